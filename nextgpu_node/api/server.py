"""The local API: JSON over HTTP on a unix socket that only the owner can open.

    GET  /v1/status                                    StatusReply
    GET  /v1/peers?kind=&memory_bytes=&limit=          PeersReply
    GET  /v1/units                                     UnitsReply
    POST /v1/units/{unit_id}/cancel                    CancelReply
    PUT  /v1/sharing          ShareRequest             SharingReply
    POST /v1/sharing/pause    PauseRequest             SharingReply
    POST /v1/sharing/resume                            SharingReply
    POST /v1/sharing/drain                             SharingReply
    GET  /v1/gpus                                      GpusReply
    GET  /v1/limits                                    LimitsReply
    PUT  /v1/limits           LimitsRequest            LimitsReply
    GET  /v1/serving                                   ServingReply
    PUT  /v1/serving/{peer}   ServeRequest             ServingReply
    GET  /v1/history?limit=                            HistoryReply
    PUT  /v1/history          HistoryRequest           HistoryReply
    DELETE /v1/history                                 HistoryReply

Everything that goes wrong ends in an ErrorReply: its sentence is for the user, its exit code for
the command line.  A fault of our own is told apart from a refusal and never shows its message,
which could hold anything.  There is no access log.
"""

from __future__ import annotations

import math
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeVar, cast

import anycorn
import msgspec
import structlog
import trio
from anycorn.typing import Framework
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, HTTPExceptionHandler, Message, Receive, Scope, Send

from nextgpu_node.api.desk import EVENTS_PATH, DeskEndpoints
from nextgpu_node.api.serving import OpenSocket
from nextgpu_node.api.serving import reply as _reply
from nextgpu_node.api.sockets import listen_private, remove_listening
from nextgpu_node.api_types import (
    Backend,
    CancelReply,
    ErrorReply,
    HistoryRequest,
    InviteRequest,
    LimitsRequest,
    PauseRequest,
    PeerNeed,
    ServeRequest,
    ShareRequest,
    SharingReply,
    SharingView,
)
from nextgpu_node.desk_types import Desk
from nextgpu_node.errors import JobTimeout, NextGPUError, UsageError
from nextgpu_protocol.limits import MAX_MEMORY_BYTES
from nextgpu_protocol.messages import DEVICE_KINDS

log = structlog.get_logger()

HOST: Final = "nextgpu"
MAX_BODY_BYTES: Final = 64 * 1024
MAX_PEERS: Final = 200
MAX_UNIT_ID_CHARS: Final = 64
MAX_PAUSE_S: Final = 366 * 86_400
RULES: Final = ("allow", "deny", "none")
DEFAULT_HISTORY: Final = 100
MAX_HISTORY: Final = 10_000
MAX_INVITE_S: Final = 10 * 366 * 86_400
# A search of the DHT visits a handful of slow peers; after this the caller should try again.
REQUEST_DEADLINE_S: Final = 60
# One person's command line and dashboard; a runaway script waits instead of starting searches.
MAX_REQUESTS_AT_ONCE: Final = 16
MAX_STREAMS_AT_ONCE: Final = 8

# What an error of ours is in HTTP's terms, by its exit code.
_STATUS_OF_EXIT_CODE: Final = {
    1: HTTPStatus.INTERNAL_SERVER_ERROR,
    2: HTTPStatus.BAD_REQUEST,
    3: HTTPStatus.SERVICE_UNAVAILABLE,
    4: HTTPStatus.NOT_FOUND,
    5: HTTPStatus.FORBIDDEN,
    6: HTTPStatus.GATEWAY_TIMEOUT,
    7: HTTPStatus.BAD_GATEWAY,
    130: HTTPStatus.CONFLICT,
}

_SENTENCES: Final[dict[int, str]] = {
    HTTPStatus.NOT_FOUND: "The API has no such path.",
    HTTPStatus.METHOD_NOT_ALLOWED: "This path of the API takes another method.",
}

_Body = TypeVar("_Body")


async def run(
    backend: Backend,
    socket_path: Path,
    desk: Desk | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `backend` on `socket_path` until cancelled; then the socket file is gone.

    Raises AlreadyRunning where another daemon answers there.
    """
    listener = listen_private(socket_path)
    try:
        # From here on the kernel takes connections; they wait the moment until anycorn does.
        task_status.started()
        await anycorn.serve(cast(Framework, build_app(backend, desk)), OpenSocket(listener))
    finally:
        remove_listening(socket_path, listener)


def build_app(backend: Backend, desk: Desk | None, host: str = HOST) -> ASGIApp:
    """The API for requests to `host`; `desk` adds what is around the node (api/desk.py)."""
    endpoints = _Endpoints(backend)
    routes = [
        Route("/v1/status", endpoints.status, methods=["GET"]),
        Route("/v1/peers", endpoints.peers, methods=["GET"]),
        Route("/v1/units", endpoints.units, methods=["GET"]),
        Route("/v1/units/{unit_id}/cancel", endpoints.cancel_unit, methods=["POST"]),
        Route("/v1/invites", endpoints.invites, methods=["GET"]),
        Route("/v1/invites", endpoints.invite, methods=["POST"]),
        Route("/v1/invites/{token_id}/revoke", endpoints.revoke, methods=["POST"]),
        Route("/v1/sharing", endpoints.set_sharing, methods=["PUT"]),
        Route("/v1/sharing/pause", endpoints.pause, methods=["POST"]),
        Route("/v1/sharing/resume", endpoints.resume, methods=["POST"]),
        Route("/v1/sharing/drain", endpoints.drain, methods=["POST"]),
        Route("/v1/gpus", endpoints.gpus, methods=["GET"]),
        Route("/v1/limits", endpoints.limits, methods=["GET"]),
        Route("/v1/limits", endpoints.set_limits, methods=["PUT"]),
        Route("/v1/serving", endpoints.serving, methods=["GET"]),
        Route("/v1/serving/{peer_id}", endpoints.set_serving, methods=["PUT"]),
        Route("/v1/history", endpoints.history, methods=["GET"]),
        Route("/v1/history", endpoints.set_history, methods=["PUT"]),
        Route("/v1/history", endpoints.clear_history, methods=["DELETE"]),
    ]
    if desk is not None:
        routes += DeskEndpoints(desk, _body_untrusted).routes()
    handlers: dict[type[Exception], HTTPExceptionHandler] = {
        HTTPException: _http_error,
        NextGPUError: _our_error,
        Exception: _fault,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return _Guard(app, host)


class _Endpoints:
    """One method for each line of the table above."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def status(self, request: Request) -> Response:
        return _reply(self._backend.status())

    async def peers(self, request: Request) -> Response:
        return _reply(await self._backend.peers(_peer_need_untrusted(request)))

    async def units(self, request: Request) -> Response:
        return _reply(self._backend.units())

    async def cancel_unit(self, request: Request) -> Response:
        unit_id = request.path_params["unit_id"]
        if len(unit_id) > MAX_UNIT_ID_CHARS or not unit_id.isalnum():
            raise UsageError("That is not the id of a unit; `nextgpu units` lists them.")
        return _reply(CancelReply(cancelled=await self._backend.cancel_unit(unit_id)))

    async def invites(self, request: Request) -> Response:
        return _reply(self._backend.issued_tokens())

    async def invite(self, request: Request) -> Response:
        wanted = await _body_untrusted(request, InviteRequest)
        # JSON has negative numbers, the protocol has none; the rest of the bounds are its own.
        if min(wanted.gpu_seconds, wanted.expires_s, wanted.memory_bytes) < 1:
            raise UsageError("gpu_seconds, expires_s and memory_bytes are whole numbers from 1 on.")
        if wanted.expires_s > MAX_INVITE_S:
            raise UsageError(f"expires_s is at most {MAX_INVITE_S}: ten years.")
        return _reply(await self._backend.issue_token(wanted))

    async def revoke(self, request: Request) -> Response:
        token_id = request.path_params["token_id"]
        if len(token_id) > MAX_UNIT_ID_CHARS or not token_id.isalnum():
            raise UsageError("That is not the id of a token; `nextgpu invites` lists them.")
        return _reply(await self._backend.revoke_token(token_id))

    async def set_sharing(self, request: Request) -> Response:
        wanted = await _body_untrusted(request, ShareRequest)
        return _sharing_reply(self._backend.set_sharing(wanted.enabled))

    async def pause(self, request: Request) -> Response:
        wanted = await _body_untrusted(request, PauseRequest)
        if not 0 <= wanted.seconds <= MAX_PAUSE_S:
            raise UsageError(f"seconds is a whole number from 0 to {MAX_PAUSE_S}.")
        return _sharing_reply(self._backend.pause(wanted.seconds))

    async def resume(self, request: Request) -> Response:
        await _no_body_untrusted(request)
        return _sharing_reply(self._backend.resume())

    async def drain(self, request: Request) -> Response:
        await _no_body_untrusted(request)
        return _sharing_reply(self._backend.drain())

    async def gpus(self, request: Request) -> Response:
        return _reply(await self._backend.gpus())

    async def limits(self, request: Request) -> Response:
        return _reply(self._backend.limits())

    async def set_limits(self, request: Request) -> Response:
        wanted = await _body_untrusted(request, LimitsRequest)
        return _reply(await self._backend.set_limits(wanted.changes))

    async def serving(self, request: Request) -> Response:
        return _reply(self._backend.serving())

    async def set_serving(self, request: Request) -> Response:
        wanted = await _body_untrusted(request, ServeRequest)
        if wanted.rule not in RULES:
            raise UsageError(f"rule is one of {', '.join(RULES)}.")
        peer_id = request.path_params["peer_id"]
        return _reply(await self._backend.set_serving(peer_id, wanted.rule, wanted.terms))

    async def history(self, request: Request) -> Response:
        query = dict(request.query_params)
        if set(query) - {"limit"}:
            raise UsageError("The query takes limit, once.")
        limit = _whole("limit", query, DEFAULT_HISTORY, 1, MAX_HISTORY)
        return _reply(await self._backend.history(limit))

    async def set_history(self, request: Request) -> Response:
        wanted = await _body_untrusted(request, HistoryRequest)
        return _reply(await self._backend.set_history(wanted.enabled))

    async def clear_history(self, request: Request) -> Response:
        return _reply(await self._backend.clear_history())


class _Guard:
    """What every request passes first: the host's name, a place in the queue, a deadline."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._host = host
        self._places = trio.CapacityLimiter(MAX_REQUESTS_AT_ONCE)
        self._streams = trio.CapacityLimiter(MAX_STREAMS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif Headers(scope=scope).getlist("host") != [self._host]:
            # A page in a browser can be made to reach a local port under its own name (DNS
            # rebinding), never under ours.
            reply = _error("This is not the API's host name.", HTTPStatus.MISDIRECTED_REQUEST, 2)
            await reply(scope, receive, send)
        else:
            await self._handle(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        # A stream of events ends when its reader leaves.
        endless = scope["path"] == EVENTS_PATH
        places = self._streams if endless else self._places
        try:
            with trio.fail_after(math.inf if endless else REQUEST_DEADLINE_S):
                async with places:
                    await self._app(scope, receive, send_noting)
        except trio.TooSlowError:
            log.warning("api.request_timed_out", endpoint=_endpoint_name(scope))
            if not started:
                timeout = JobTimeout("The daemon took too long to answer. Try again in a moment.")
                await _error_of(timeout)(scope, receive, send)
        except Exception as exc:
            # Starlette has answered by `_fault` and hands the exception on for the log.  Its
            # type says where to look; its message could hold what nobody may read.
            failed = _endpoint_name(scope)
            log.error("api.request_failed", endpoint=failed, error=type(exc).__name__)


def _endpoint_name(scope: Scope) -> str:
    return getattr(scope.get("endpoint"), "__name__", "none")


async def _live(receive: Receive, send: Send) -> None:
    """The server's start and stop.  Starlette's own calls a cancelled server a failed one."""
    for stage in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{stage}.complete"})


def _peer_need_untrusted(request: Request) -> PeerNeed:
    """The query of GET /v1/peers.  Raises UsageError naming the parameter."""
    query: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in query or name not in PeerNeed.__struct_fields__:
            raise UsageError(f"The query takes {', '.join(PeerNeed.__struct_fields__)}, each once.")
        query[name] = value
    default = PeerNeed()
    kind = query.get("kind", default.kind)
    if kind not in DEVICE_KINDS:
        raise UsageError(f"kind is one of {', '.join(DEVICE_KINDS)}.")
    return PeerNeed(
        kind=kind,
        memory_bytes=_whole("memory_bytes", query, default.memory_bytes, 0, MAX_MEMORY_BYTES),
        limit=_whole("limit", query, default.limit, 1, MAX_PEERS),
    )


def _whole(name: str, query: dict[str, str], default: int, low: int, high: int) -> int:
    text = query.get(name, str(default))
    # Only ASCII digits, and few of them: int() also takes signs, spaces and long texts.
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and low <= int(text) <= high):
        raise UsageError(f"{name} is a whole number from {low} to {high}.")
    return int(text)


async def _body_untrusted(request: Request, kind: type[_Body]) -> _Body:
    """The JSON body as `kind`.  Raises HTTPException or UsageError, which names the field."""
    # A form or a plain text can be sent across sites without asking; this type can not.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be application/json.")
    body = bytearray()
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                too_large = f"The body is larger than {MAX_BODY_BYTES} bytes."
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"The body is not what this path takes: {exc}.") from exc


async def _no_body_untrusted(request: Request) -> None:
    """An action of a page elsewhere is refused like a form: only our own clients say JSON."""
    await _body_untrusted(request, _Empty)


class _Empty(msgspec.Struct, forbid_unknown_fields=True):
    """{}"""


def _sharing_reply(sharing: SharingView) -> Response:
    return _reply(SharingReply(**msgspec.structs.asdict(sharing)))


def _error(sentence: str, status: int, exit_code: int) -> Response:
    body = msgspec.json.encode(ErrorReply(error=sentence, exit_code=exit_code))
    return Response(body, status_code=status, media_type="application/json")


def _error_of(exc: NextGPUError) -> Response:
    return _error(str(exc), _STATUS_OF_EXIT_CODE[exc.exit_code], exc.exit_code)


async def _our_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, NextGPUError)
    return _error_of(exc)


async def _http_error(request: Request, exc: Exception) -> Response:
    """Unknown paths, wrong methods, bodies that are too large or not JSON."""
    assert isinstance(exc, HTTPException)
    sentence = _SENTENCES.get(exc.status_code, exc.detail)
    return _error(sentence, exc.status_code, UsageError.exit_code)


async def _fault(request: Request, exc: Exception) -> Response:
    sentence = "The daemon met an error of its own; its log names the kind."
    return _error(sentence, HTTPStatus.INTERNAL_SERVER_ERROR, NextGPUError.exit_code)
