"""The dashboard on loopback TCP: off until the owner opens it, and closed with the daemon.

    GET /, /app.js, /vendor/…        fixed files of the package; nothing of this node is in them
    everything else                  the local API, behind a bearer token

Every page that a browser has open can send requests here.  So each one is refused unless all of
this holds: the Host is exactly ours (else a name that resolves to 127.0.0.1 would do: DNS
rebinding), an Origin is ours, Sec-Fetch-Site does not name another site, and the API's requests,
reading ones too, carry the token, which is in the fragment of the URL and never in a request of
the browser's own.  There is no cookie that a browser could add by itself.
Sources: Fetch standard (Sec-Fetch-*: W3C Fetch Metadata), CSP Level 3, RFC 6750.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, cast

import anycorn
import structlog
import trio
from anycorn.typing import Framework
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nextgpu_node.api.serving import OpenSocket
from nextgpu_node.desk_types import WebReply
from nextgpu_node.errors import NextGPUError
from nextgpu_node.files import write_whole
from nextgpu_node.paths import ensure_private_dir

log = structlog.get_logger()

ADDRESS: Final = "127.0.0.1"
_TOKEN_BYTES: Final = 32
_BACKLOG: Final = 64

_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing but our own files, no inline code, no frame around it, no form, no other origin.
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), usb=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes no further."""

    status: HTTPStatus
    sentence: str


def refusal(method: str, path: str, headers: Headers, *, host: str, token: str) -> Refusal | None:
    """Whether this request may not pass, and why.  `host` is "127.0.0.1:PORT"."""
    if headers.getlist("host") != [host]:
        return Refusal(HTTPStatus.MISDIRECTED_REQUEST, "This is not the dashboard's host name.")
    if any(origin != f"http://{host}" for origin in headers.getlist("origin")):
        return Refusal(HTTPStatus.FORBIDDEN, "Another site may not ask this.")
    site = headers.get("sec-fetch-site", "")
    if path in static_files():
        if method not in ("GET", "HEAD"):
            return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "This is a file.")
        # Following a link here is fine, from anywhere: the page alone says nothing.
        opened = path == "/" and headers.get("sec-fetch-mode") == "navigate"
        own = site in ("", "same-origin", "none") or (
            opened and headers.get("sec-fetch-dest") == "document"
        )
        return None if own else Refusal(HTTPStatus.FORBIDDEN, "Another site may not load this.")
    if site not in ("", "same-origin"):
        return Refusal(HTTPStatus.FORBIDDEN, "Another site may not ask this.")
    if site and method not in ("GET", "HEAD") and not headers.get("origin"):
        return Refusal(HTTPStatus.FORBIDDEN, "A browser says where such a request comes from.")
    if not _has_token(headers, token):
        return Refusal(HTTPStatus.UNAUTHORIZED, "Open the dashboard with: nextgpu web")
    return None


def _has_token(headers: Headers, token: str) -> bool:
    given = headers.getlist("authorization")
    if len(given) != 1:
        return False
    return hmac.compare_digest(given[0].encode(), f"Bearer {token}".encode())


@cache
def static_files() -> Mapping[str, tuple[bytes, str]]:
    """Every file of the dashboard by its path, with its type."""
    found: dict[str, tuple[bytes, str]] = {}

    def add(directory: Traversable, prefix: str) -> None:
        for entry in directory.iterdir():
            if entry.is_dir():
                add(entry, f"{prefix}{entry.name}/")
            elif (kind := _TYPES.get(os.path.splitext(entry.name)[1])) is not None:  # noqa: PTH122
                found[prefix + entry.name] = (entry.read_bytes(), kind)

    add(resources.files("nextgpu_node.api").joinpath("dashboard"), "/")
    found["/"] = found.pop("/index.html")
    return found


class WebGuard:
    """The API's application with the dashboard's files beside it, behind `refusal`."""

    def __init__(self, app: ASGIApp, host: str, token: str) -> None:
        self._app = app
        self._host = host
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                pairs = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *pairs]
            await send(message)

        method, path = scope["method"], scope["path"]
        headers = Headers(scope=scope)
        refused = refusal(method, path, headers, host=self._host, token=self._token)
        if refused is not None:
            log.info("web.request_refused", status=int(refused.status))
            reply = Response(refused.sentence + "\n", refused.status, media_type="text/plain")
            if refused.status is HTTPStatus.UNAUTHORIZED:
                reply.headers["www-authenticate"] = "Bearer"
            await reply(scope, receive, send_with_headers)
        elif path in static_files():
            content, kind = static_files()[path]
            reply = Response(content, headers={"content-type": kind})
            await reply(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)


class Web:
    """Serves the dashboard while it is open.  `run` it once; `open` and `close` as often as wanted.

    The token holds for the life of the daemon.  It is also in a file (0600), for a scraper of
    /metrics, while the dashboard is open.
    """

    def __init__(self, make_app: Callable[[str], ASGIApp], port: int, token_file: Path) -> None:
        """`make_app` is given the host name that requests have."""
        self._make_app = make_app
        self._port = port
        self._token_file = token_file
        self._token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._scope: trio.CancelScope | None = None
        self._host = ""
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        self._token_file.unlink(missing_ok=True)
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._token_file.unlink(missing_ok=True)

    def view(self) -> WebReply:
        url = f"http://{self._host}/#token={self._token}" if self._scope else ""
        return WebReply(enabled=self._scope is not None, url=url)

    def open(self) -> WebReply:
        """Listen on loopback, on the port of the settings or, where that is taken, another.

        Raises NextGPUError where the machine refuses.
        """
        if self._scope is None:
            assert self._nursery is not None
            listener = self._listen()
            self._host = f"{ADDRESS}:{listener.getsockname()[1]}"
            ensure_private_dir(self._token_file.parent)
            write_whole(self._token_file, [self._token.encode()], force=True)
            self._scope = trio.CancelScope()
            self._nursery.start_soon(self._serve, listener, self._scope)
            log.info("web.opened")
        return self.view()

    def close(self) -> WebReply:
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None
            self._token_file.unlink(missing_ok=True)
            log.info("web.closed")
        return self.view()

    def _listen(self) -> socket.socket:
        try:
            return _listening(self._port)
        except OSError:
            try:
                return _listening(0)
            except OSError as exc:
                raise NextGPUError(f"Can not listen on loopback: {exc.strerror}.") from exc

    async def _serve(self, listener: socket.socket, scope: trio.CancelScope) -> None:
        app = WebGuard(self._make_app(self._host), self._host, self._token)
        with listener, scope:
            await anycorn.serve(cast(Framework, app), OpenSocket(listener))


def _listening(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESS, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
