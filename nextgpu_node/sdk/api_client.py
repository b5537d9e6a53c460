"""The local API from its other end: requests to this machine's nextgpud.

httpx over the daemon's unix socket (`Paths.api_socket`).  Deadlines belong to the caller; the
daemon itself gives up on a request after a minute.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

import h11
import httpx
import msgspec
import trio

from nextgpu_node.api_types import (
    CancelReply,
    ErrorReply,
    GpusReply,
    HistoryReply,
    HistoryRequest,
    InviteReply,
    InviteRequest,
    InvitesReply,
    InviteView,
    LimitsReply,
    LimitsRequest,
    PauseRequest,
    PeerNeed,
    PeersReply,
    RevokeReply,
    ServeRequest,
    ServingReply,
    ShareRequest,
    SharingView,
    StatusReply,
    UnitsReply,
)
from nextgpu_node.desk_types import LogReply, LogRequest, WebReply, WebRequest
from nextgpu_node.errors import (
    DaemonUnreachable,
    IntegrityError,
    JobCancelled,
    JobTimeout,
    NextGPUError,
    NoPeerFound,
    Refused,
    UsageError,
)

# The name that the daemon answers to; nothing resolves it.
_BASE_URL: Final = "http://nextgpu"

_ERROR_OF_EXIT_CODE: Final[dict[int, type[NextGPUError]]] = {
    UsageError.exit_code: UsageError,
    DaemonUnreachable.exit_code: DaemonUnreachable,
    NoPeerFound.exit_code: NoPeerFound,
    Refused.exit_code: Refused,
    JobTimeout.exit_code: JobTimeout,
    IntegrityError.exit_code: IntegrityError,
    JobCancelled.exit_code: JobCancelled,
}

_Reply = TypeVar("_Reply")


class ApiClient:
    """One connection pool to the daemon at `socket_path`; close it, or use `async with`.

    Every method raises DaemonUnreachable where nobody answers, and the daemon's own error, as
    the class that its exit code names, where it refuses.
    """

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket_path)),
            base_url=_BASE_URL,
            timeout=None,  # noqa: S113  the caller's deadline, see above
            trust_env=False,
        )

    async def __aenter__(self) -> ApiClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def status(self) -> StatusReply:
        return await self._call("GET", "/v1/status", StatusReply)

    async def peers(self, need: PeerNeed) -> PeersReply:
        """Peers that fit, best first, each asked just now; an empty list is no error."""
        return await self._call("GET", "/v1/peers", PeersReply, query=msgspec.structs.asdict(need))

    async def units(self) -> UnitsReply:
        return await self._call("GET", "/v1/units", UnitsReply)

    async def cancel_unit(self, unit_id: str) -> bool:
        """Whether there was such a unit to cancel."""
        if not unit_id.isalnum():
            raise UsageError("That is not the id of a unit; `nextgpu units` lists them.")
        reply = await self._call("POST", f"/v1/units/{unit_id}/cancel", CancelReply)
        return reply.cancelled

    async def set_sharing(self, enabled: bool) -> SharingView:
        body = msgspec.json.encode(ShareRequest(enabled=enabled))
        return await self._call("PUT", "/v1/sharing", SharingView, body=body)

    async def pause(self, seconds: int = 0) -> SharingView:
        """Give the device back for so long; 0: until `resume`."""
        body = msgspec.json.encode(PauseRequest(seconds=seconds))
        return await self._call("POST", "/v1/sharing/pause", SharingView, body=body)

    async def resume(self) -> SharingView:
        return await self._call("POST", "/v1/sharing/resume", SharingView, body=b"{}")

    async def drain(self) -> SharingView:
        return await self._call("POST", "/v1/sharing/drain", SharingView, body=b"{}")

    async def gpus(self) -> GpusReply:
        return await self._call("GET", "/v1/gpus", GpusReply)

    async def limits(self) -> LimitsReply:
        return await self._call("GET", "/v1/limits", LimitsReply)

    async def set_limits(self, changes: Mapping[str, str]) -> LimitsReply:
        """Settings of [sharing], as text: all of them, or, where one is wrong, none."""
        body = msgspec.json.encode(LimitsRequest(changes=dict(changes)))
        return await self._call("PUT", "/v1/limits", LimitsReply, body=body)

    async def serving(self) -> ServingReply:
        return await self._call("GET", "/v1/serving", ServingReply)

    async def set_serving(
        self, peer_id: str, rule: str, terms: Mapping[str, str] | None = None
    ) -> ServingReply:
        """`rule` is "allow", "deny" or "none"."""
        if not peer_id.isalnum():
            raise UsageError(
                "That is not a peer ID; `nextgpu peers` and `nextgpu history` show them."
            )
        body = msgspec.json.encode(ServeRequest(rule=rule, terms=dict(terms or {})))
        return await self._call("PUT", f"/v1/serving/{peer_id}", ServingReply, body=body)

    async def history(self, limit: int = 100) -> HistoryReply:
        return await self._call("GET", "/v1/history", HistoryReply, query={"limit": limit})

    async def clear_history(self) -> HistoryReply:
        return await self._call("DELETE", "/v1/history", HistoryReply)

    async def set_history(self, enabled: bool) -> HistoryReply:
        body = msgspec.json.encode(HistoryRequest(enabled=enabled))
        return await self._call("PUT", "/v1/history", HistoryReply, body=body)

    async def invite(self, wanted: InviteRequest) -> InviteReply:
        """A new capability token of this node."""
        body = msgspec.json.encode(wanted)
        return await self._call("POST", "/v1/invites", InviteReply, body=body)

    async def invites(self) -> InvitesReply:
        return await self._call("GET", "/v1/invites", InvitesReply)

    async def revoke(self, token_id: str) -> InviteView:
        """The token with that id, or whose id begins with it, revoked."""
        if not token_id.isalnum():
            raise UsageError("That is not the id of a token; `nextgpu invites` lists them.")
        return (await self._call("POST", f"/v1/invites/{token_id}/revoke", RevokeReply)).invite

    async def log(self) -> LogReply:
        return await self._call("GET", "/v1/log", LogReply)

    async def set_log_level(self, level: str) -> LogReply:
        body = msgspec.json.encode(LogRequest(level=level))
        return await self._call("PUT", "/v1/log", LogReply, body=body)

    async def set_web(self, enabled: bool) -> WebReply:
        """Open or close the dashboard."""
        body = msgspec.json.encode(WebRequest(enabled=enabled))
        return await self._call("PUT", "/v1/web", WebReply, body=body)

    async def metrics(self) -> str:
        """Prometheus' text format."""
        with _daemon_errors():
            reply = await self._http.get("/metrics")
        if reply.status_code >= 400:
            raise _error_of(reply)
        return reply.text

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Lines of JSON, until the caller leaves (use `aclosing`)."""
        # By hand: a response of httpx that is left before its end leaves generators behind that
        # trio calls an error.
        with _daemon_errors():
            async with await _open(self._socket_path) as stream, aclosing(_lines(stream)) as lines:
                async for line in lines:
                    yield line

    async def _call(
        self,
        method: str,
        path: str,
        kind: type[_Reply],
        *,
        query: dict[str, str | int] | None = None,
        body: bytes | None = None,
    ) -> _Reply:
        headers = {"content-type": "application/json"} if body is not None else {}
        with _daemon_errors():
            reply = await self._http.request(
                method, path, params=query, content=body, headers=headers
            )
        if reply.status_code >= 400:
            raise _error_of(reply)
        return _decoded(reply.content, kind)


async def _open(socket_path: Path) -> trio.SocketStream:
    try:
        return await trio.open_unix_socket(socket_path)
    except OSError as exc:
        raise DaemonUnreachable from exc


async def _lines(stream: trio.SocketStream) -> AsyncGenerator[bytes, None]:
    """The lines of the body of the events' reply."""
    http = h11.Connection(h11.CLIENT)
    host = _BASE_URL.removeprefix("http://")
    request = h11.Request(method="GET", target="/v1/events", headers=[("host", host)])
    await stream.send_all(http.send(request) + http.send(h11.EndOfMessage()))
    rest = b""
    while True:
        match http.next_event():
            case h11.NEED_DATA:
                http.receive_data(await stream.receive_some())
            case h11.Data(data=data):
                *lines, rest = (rest + bytes(data)).split(b"\n")
                for line in lines:
                    yield line
            case h11.Response(status_code=status) if status >= 400:
                raise UsageError("The nextgpud here has no events. Restart it with this version.")
            case h11.EndOfMessage() | h11.ConnectionClosed():
                return
            case _:
                pass


@contextmanager
def _daemon_errors() -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError as exc:
        raise DaemonUnreachable from exc
    except (httpx.TransportError, h11.ProtocolError, trio.BrokenResourceError) as exc:
        raise DaemonUnreachable(
            "The nextgpud here ended in the middle of the request. Its log says why."
        ) from exc


def _error_of(reply: httpx.Response) -> NextGPUError:
    error = _decoded(reply.content, ErrorReply)
    return _ERROR_OF_EXIT_CODE.get(error.exit_code, NextGPUError)(error.error)


def _decoded(data: bytes, kind: type[_Reply]) -> _Reply:
    """A field that a newer daemon added is passed over; a field that is missing is an error."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as exc:
        raise NextGPUError(
            "The nextgpud here speaks another version of the API. "
            "Restart it, so that both sides are the same version."
        ) from exc
