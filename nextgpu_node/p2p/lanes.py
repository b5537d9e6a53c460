"""Plain TCP connections for sealed payloads: listening for them, and dialling them.

Who may use one is decided by the ticket that it begins with (protocol/spec/48-lane.md); here are
the bounds on what a stranger can cost before that.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import structlog
import trio

from nextgpu_node.errors import ConnectionLost, NetworkError, PeerLost
from nextgpu_node.p2p.hardening import neighbourhood
from nextgpu_node.p2p.host import host_and_port, parse_listen
from nextgpu_node.p2p.noise_pipe import remote_address
from nextgpu_protocol.errors import RemoteProtocolError

log = structlog.get_logger()

_DIAL_S = 3.0
_CLOSE_S = 1.0
_DRAIN_BYTES = 64 * 1024
_MAX_CONNECTIONS = 256
_MAX_PER_IP = 16
# What is on its way is kept by its sender for a connection that breaks (47-resuming.md): these two
# bound it below that.
_WINDOW_BYTES = 4 * 1024 * 1024
_UNSENT_BYTES = 1024 * 1024
# A peer that is gone without a word is noticed in about a minute, as on libp2p's connections.
_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, _WINDOW_BYTES),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES),
)
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER without time: close() resets (socket(7))


class LaneStream:
    """Bytes both ways.  A reset, a timeout and a lost route raise ConnectionLost."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        for level, option, value in _OPTIONS:
            stream.socket.setsockopt(level, option, value)

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        """At least one byte, or b"" where the peer has closed."""
        try:
            return await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError as exc:
            raise ConnectionLost from exc

    async def receive_exactly(self, size: int) -> bytes:
        """`size` bytes; fewer where the peer has closed."""
        data = b""
        while len(data) < size and (more := await self.receive_some(size - len(data))):
            data += more
        return data

    async def send_all(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as exc:
            raise ConnectionLost from exc

    def abort(self) -> None:
        """Reset the connection: to its peer it is lost."""
        with suppress(OSError):
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self._stream.socket.close()

    async def aclose(self) -> None:
        """Finish sending, and let the peer close: bytes that nobody read would make it a reset."""
        gone = (trio.BrokenResourceError, trio.ClosedResourceError)
        with trio.move_on_after(_CLOSE_S), suppress(*gone):
            await self._stream.send_eof()
            while await self._stream.receive_some(_DRAIN_BYTES):
                pass
        await self._stream.aclose()


async def dial_lane(ip: str, port: int) -> LaneStream:
    """Raises PeerLost where nobody answers."""
    try:
        with trio.fail_after(_DIAL_S):
            return LaneStream(await trio.open_tcp_stream(ip, port))
    except (OSError, trio.TooSlowError) as exc:
        raise PeerLost("The peer's bulk lane can not be reached.") from exc


class LaneListener:
    """Listens where the node listens for peers, on a port of its own."""

    def __init__(self, listen_addrs: Sequence[str], port: int) -> None:
        """`port` 0 asks the system for a free one."""
        addresses = [parse_listen(text) for text in listen_addrs]
        self._ips = list(dict.fromkeys(host_and_port(address)[0] for address in addresses))
        self._port = port
        self._live: Counter[str] = Counter()

    async def run(
        self,
        handler: Callable[[LaneStream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled.  Starts with the port.  Raises NetworkError where it is taken."""
        self._handler = handler
        listeners: list[trio.SocketListener] = []
        for ip in self._ips:
            try:
                listeners += await trio.open_tcp_listeners(self._port, host=ip)
            except OSError as exc:
                raise NetworkError(
                    f"TCP port {self._port} for the bulk lane is not free: choose another"
                    " network.lane_port, or 0 for any."
                ) from exc
            self._port = listeners[0].socket.getsockname()[1]
        task_status.started(self._port)
        await trio.serve_listeners(self._serve, listeners)

    async def _serve(self, stream: trio.SocketStream) -> None:
        remote = remote_address(stream)
        ip = neighbourhood(remote[0]) if remote else ""
        if self._live[ip] >= _MAX_PER_IP or self._live.total() >= _MAX_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        self._live[ip] += 1
        try:
            await self._handler(LaneStream(stream))
        except Exception as exc:  # one stranger's connection, never the node
            everyday = isinstance(exc, PeerLost | RemoteProtocolError | trio.TooSlowError | OSError)
            say = log.debug if everyday else log.warning
            say("lane.ended", reason=type(exc).__name__)
        finally:
            self._live[ip] -= 1
            if not self._live[ip]:
                del self._live[ip]
            await trio.aclose_forcefully(stream)
