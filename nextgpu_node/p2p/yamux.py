"""The stream muxer: yamux over Noise, with every bound enforced.

Spec: github.com/hashicorp/yamux spec.md; libp2p protocol id /yamux/1.0.0

    u8 version = 0 ‖ u8 type ‖ u16 flags ‖ u32 stream id ‖ u32 length ‖ DATA only: payload
    type   0 DATA   1 WINDOW_UPDATE   2 PING   3 GO_AWAY
    flags  1 SYN    2 ACK             4 FIN    8 RST

This takes the place of libp2p 0.8.1's own muxer, whose receive window is logged and not
enforced, whose writer gives up after a pause of five seconds, and where a reset, a crash and a
clean end of stream look alike (docs/libp2p-defects.md, 4, 5 and 8).  What differs here:

- A frame beyond the window ends the connection; streams and unread bytes have hard caps.
- One task per connection writes whole frames.  A cancelled `write` can leave a stream half
  written, never a frame, so the other streams of the connection are unharmed.
- The end of a stream is `MuxedStreamEOF` only where the peer sent FIN; all else is
  `MuxedStreamReset`.
- A silent peer is asked every `keepalive_s`, and dropped if nothing at all arrives in answer.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import structlog
import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from nextgpu_node.p2p.noise_pipe import NoisePipe, PipeClosed

log = structlog.get_logger()

DATA: Final = 0
WINDOW_UPDATE: Final = 1
PING: Final = 2
GO_AWAY: Final = 3

SYN: Final = 1
ACK: Final = 2
FIN: Final = 4
RST: Final = 8

NORMAL_END: Final = 0
PROTOCOL_ERROR: Final = 1

_HEADER = struct.Struct("!BBHII")
HEADER_BYTES: Final = _HEADER.size
# The window every yamux stream starts with; both ends assume it.
INITIAL_WINDOW_BYTES: Final = 256 * 1024
# A frame is cut into Noise messages below; few large ones cost less than many small ones, and
# other streams wait no longer than for this.
MAX_WRITE_BYTES: Final = 272 * 1024
# What the writer task may hold per connection; beyond it, writers wait for the socket.
_QUEUE_BYTES: Final = 2 * (MAX_WRITE_BYTES + HEADER_BYTES)
# Unread pieces up to this size are joined as they come.
_SMALL_BYTES: Final = 4096
# Answers (ACK, RST, PONG, window updates) a peer may make us owe it before we hang up.
_MAX_OWED_FRAMES: Final = 4096
# A reader that empties half its window within this time is given a larger one.
_FAST_READER_S: Final = 0.2
_FLUSH_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class MuxLimits:
    """Bounds of one connection.  Sizes in bytes, times in seconds."""

    max_inbound_streams: int = 64
    max_outbound_streams: int = 64
    max_window_bytes: int = 4 * 1024 * 1024
    keepalive_s: float = 30.0
    keepalive_timeout_s: float = 30.0


class ReceiveBudget:
    """Bytes received and not yet read, over all connections of a node."""

    def __init__(self, limit_bytes: int = 256 * 1024 * 1024) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    @property
    def is_spent(self) -> bool:
        return self.held_bytes > self.limit_bytes

    @property
    def is_ample(self) -> bool:
        """Whether windows may still grow."""
        return self.held_bytes < self.limit_bytes // 2


class YamuxStream(IMuxedStream):  # type: ignore[misc]
    """One stream.  A single task reads and a single task writes at a time."""

    def __init__(self, conn: Yamux, stream_id: int, *, is_initiator: bool) -> None:
        self.conn = conn
        self.muxed_conn = conn
        self.stream_id = stream_id
        self.is_initiator = is_initiator
        self._pieces: deque[bytes] = deque()
        self._held_bytes = 0
        self._readable = trio.lowlevel.ParkingLot()
        self._peer_ended = False
        self._is_reset = False
        self._write_ended = False
        self._forgotten = False
        self._send_window = INITIAL_WINDOW_BYTES
        self._window_opened = trio.lowlevel.ParkingLot()
        self._receive_window = INITIAL_WINDOW_BYTES
        self._window_target = INITIAL_WINDOW_BYTES
        self._last_update = trio.current_time()

    @property
    def is_closed(self) -> bool:
        return self._is_reset or (self._write_ended and self._peer_ended)

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, as soon as there are any.

        Raises MuxedStreamEOF after the peer's FIN and MuxedStreamReset after anything else.
        """
        if n == 0:
            return b""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._pieces:
            if self._peer_ended:
                raise MuxedStreamEOF("the peer has finished sending")
            if self._is_reset:
                raise MuxedStreamReset("the stream was reset or its connection was lost")
            await self._readable.park()
        data = self._take(n if n is not None and n > 0 else self._held_bytes)
        self._grant_window()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return data

    def _take(self, n: int) -> bytes:
        """As many whole pieces as fit into `n`, or a part of one."""
        taken: list[bytes] = []
        size = 0
        while self._pieces and size < n:
            piece = self._pieces[0]
            if len(piece) <= n - size:
                taken.append(self._pieces.popleft())
                size += len(piece)
            elif taken:
                break
            else:
                self._pieces[0] = piece[n:]
                taken.append(piece[:n])
                size = n
        self._held_bytes -= size
        self.conn.budget.held_bytes -= size
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def _grant_window(self) -> None:
        """Let the peer send again, once half of the window has been read."""
        if self._peer_ended or self._is_reset:
            return
        owed = self._window_target - self._receive_window - self._held_bytes
        if owed < self._window_target // 2:
            return
        now = trio.current_time()
        if now - self._last_update < _FAST_READER_S and self.conn.budget.is_ample:
            larger = min(self._window_target * 2, self.conn.limits.max_window_bytes)
            owed += larger - self._window_target
            self._window_target = larger
        self._last_update = now
        self._receive_window += owed
        self.conn.post(WINDOW_UPDATE, 0, self.stream_id, owed)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of `data`, waiting as long as the peer's window and the socket need."""
        # What can change while it is queued is copied; bytes can not.
        view = memoryview(data if type(data) is bytes else bytes(data))
        await trio.lowlevel.checkpoint_if_cancelled()
        while len(view):
            if self._is_reset:
                raise MuxedStreamReset("the stream was reset or its connection was lost")
            if self._write_ended:
                raise MuxedStreamClosed("this end has finished sending")
            if not self._send_window:
                await self._window_opened.park()
            elif self.conn.queue_is_full:
                await self.conn.wait_queue_has_room()
            else:
                size = min(len(view), self._send_window, MAX_WRITE_BYTES)
                self._send_window -= size
                self.conn.post_data(self.stream_id, view[:size])
                view = view[size:]
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_writable(self) -> None:
        """Return once `write` would find room for at least one byte, or fail."""
        await trio.lowlevel.checkpoint()
        while not (self._is_reset or self._write_ended):
            if not self._send_window:
                await self._window_opened.park()
            elif self.conn.queue_is_full:
                await self.conn.wait_queue_has_room()
            else:
                return

    async def close_write(self) -> None:
        """Tell the peer that nothing more follows; reading goes on."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.end_write()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def end_write(self) -> None:
        if self._write_ended or self._is_reset:
            return
        self._write_ended = True
        self.conn.post_in_order(WINDOW_UPDATE, FIN, self.stream_id, 0)
        self._window_opened.unpark_all()
        if self._peer_ended:
            self._forget()

    async def close(self) -> None:
        """Finish sending and stop listening.  The peer is reset if it sends any more."""
        self.end_write()
        self._drop_unread()
        self._forget()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def reset(self) -> None:
        self.reset_nowait()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def reset_nowait(self) -> None:
        if not self._forgotten:
            self.conn.post_in_order(WINDOW_UPDATE, RST, self.stream_id, 0)
        self.fail()

    def fail(self) -> None:
        """Take the stream out of use without a word to the peer."""
        self._is_reset = True
        self._drop_unread()
        self._readable.unpark_all()
        self._window_opened.unpark_all()
        self._forget()

    def _drop_unread(self) -> None:
        self.conn.budget.held_bytes -= self._held_bytes
        self._held_bytes = 0
        self._pieces.clear()

    def _forget(self) -> None:
        if not self._forgotten:
            self._forgotten = True
            self.conn.forget_stream(self)

    # What the connection tells its streams.

    def on_data_untrusted(self, size: int) -> None:
        """A DATA frame of `size` bytes was announced."""
        if size > self._receive_window:
            raise _ProtocolViolation("a frame beyond the receive window")
        if size and self._peer_ended:
            raise _ProtocolViolation("data after the end of a stream")
        self._receive_window -= size

    def on_piece(self, piece: bytes) -> None:
        if self._is_reset or self._forgotten:
            return
        if self._pieces and len(self._pieces[-1]) + len(piece) <= _SMALL_BYTES:
            # An object for each byte would cost forty times what the budget counts.
            self._pieces[-1] += piece
        else:
            self._pieces.append(piece)
        self._held_bytes += len(piece)
        self.conn.budget.held_bytes += len(piece)
        if self.conn.budget.is_spent:
            self.reset_nowait()
        else:
            self._readable.unpark_all()

    def on_window_update(self, increment: int) -> None:
        self._send_window += increment
        self._window_opened.unpark_all()

    def on_fin(self) -> None:
        self._peer_ended = True
        self._readable.unpark_all()
        if self._write_ended:
            self._forget()

    def on_reset(self) -> None:
        if self._peer_ended and not self._write_ended:
            # All the peer had to say has arrived and stays readable; only our half is void.
            self._is_reset = True
            self._window_opened.unpark_all()
            self._readable.unpark_all()
            self._forget()
        else:
            self.fail()

    # The rest of libp2p's interface.

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("deadlines belong to the caller: use trio.fail_after")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.conn.get_remote_address()

    async def __aenter__(self) -> YamuxStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()


class _ProtocolViolation(Exception):
    """The peer broke a rule of yamux; its connection ends."""


class Yamux(IMuxedConn):  # type: ignore[misc]
    """One connection and its streams.  `start` runs it until either side ends it."""

    def __init__(
        self,
        secured_conn: ISecureConn,
        peer_id: ID,
        *,
        is_initiator: bool,
        limits: MuxLimits,
        budget: ReceiveBudget,
    ) -> None:
        self.secured_conn = secured_conn
        self.peer_id = peer_id
        self.limits = limits
        self.budget = budget
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        # libp2p's SwarmConn sets this; it learns of the end from accept_stream as well.
        self.on_close: Callable[[], Awaitable[object]] | None = None
        self._is_initiator = is_initiator
        self._pipe = NoisePipe(secured_conn)
        self._streams: dict[int, YamuxStream] = {}
        self._next_id = 1 if is_initiator else 2
        self._inbound_count = 0
        self._outbound_slots = trio.Semaphore(limits.max_outbound_streams)
        self._accepted, self._accept = trio.open_memory_channel[YamuxStream](
            limits.max_inbound_streams
        )
        self._in_order: deque[bytes | memoryview] = deque()
        self._ahead: deque[bytes] = deque()
        self._queued_bytes = 0
        self._owed_frames = 0
        self._work = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._ending = False
        self._flushed = trio.Event()
        self._scope = trio.CancelScope()
        self._pings: dict[int, trio.Event] = {}
        self._next_ping = 0
        self._last_heard = trio.current_time()
        self._used_at = trio.current_time()

    def idle_since(self) -> float | None:
        """trio's time at which the last stream of either side began; None while one is open."""
        return None if self._streams else self._used_at

    # Life.

    async def start(self) -> None:
        """Carry frames until the connection ends.  Never raises an Exception."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_frames)
                    nursery.start_soon(self._keep_alive)
                    self.event_started.set()
                    await self._read_frames()
                    nursery.cancel_scope.cancel()
        except* (PipeClosed, _ProtocolViolation) as group:
            log.debug("connection.ended", reasons=[type(e).__name__ for e in group.exceptions])
        finally:
            self.event_started.set()
            self._tear_down()

    async def close(self) -> None:
        """Say goodbye, give what is queued half a second to leave, and close the socket."""
        if not self._ending and not self.event_closed.is_set():
            self._enqueue_in_order(_HEADER.pack(0, GO_AWAY, 0, 0, NORMAL_END))
            self._ending = True
            if self.event_started.is_set():
                with trio.move_on_after(_FLUSH_S, shield=True):
                    await self._flushed.wait()
        self._scope.cancel()
        self._tear_down()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _tear_down(self) -> None:
        self._ending = True
        self._pipe.close()
        self._accepted.close()
        for stream in list(self._streams.values()):
            stream.on_reset()
        self._in_order.clear()
        self._ahead.clear()
        self._queued_bytes = 0
        self._room.unpark_all()
        self._flushed.set()
        for pong in self._pings.values():
            pong.set()
        self.event_closed.set()

    @property
    def is_initiator(self) -> bool:
        return self._is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self._ending

    @property
    def is_closed(self) -> bool:
        return self.event_closed.is_set()

    # Streams.

    async def open_stream(self) -> YamuxStream:
        """A new stream to the peer.  Waits while `max_outbound_streams` are open."""
        await self._outbound_slots.acquire()
        if self._ending:
            self._outbound_slots.release()
            raise MuxedStreamError("the connection has ended")
        stream = YamuxStream(self, self._next_id, is_initiator=True)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self._used_at = trio.current_time()
        self.post_in_order(WINDOW_UPDATE, SYN, stream.stream_id, 0)
        return stream

    async def accept_stream(self) -> YamuxStream:
        """The peer's next stream.  Raises MuxedConnUnavailable when the connection has ended."""
        try:
            return await self._accept.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection has ended") from None

    def forget_stream(self, stream: YamuxStream) -> None:
        self._streams.pop(stream.stream_id, None)
        if stream.is_initiator:
            self._outbound_slots.release()
        else:
            self._inbound_count -= 1

    async def ping(self) -> float:
        """Round-trip time in seconds.  Raises MuxedStreamError if the connection ends first."""
        if self._ending:
            raise MuxedStreamError("the connection has ended")
        number = self._next_ping
        self._next_ping = (number + 1) & 0xFFFFFFFF
        pong = self._pings[number] = trio.Event()
        started = trio.current_time()
        try:
            self.post(PING, SYN, 0, number)
            await pong.wait()
        finally:
            del self._pings[number]
        if self._ending:
            raise MuxedStreamError("the connection has ended")
        return trio.current_time() - started

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(self.limits.keepalive_s)
            asked = trio.current_time()
            self.post(PING, SYN, 0, 0xFFFFFFFF)
            await trio.sleep(self.limits.keepalive_timeout_s)
            # Any byte counts: a pong may stand behind megabytes on a slow line.
            if self._last_heard < asked:
                raise PipeClosed("the peer has gone silent")

    # Sending.

    @property
    def queue_is_full(self) -> bool:
        return self._queued_bytes >= _QUEUE_BYTES

    async def wait_queue_has_room(self) -> None:
        await self._room.park()

    def post(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame without payload ahead of queued data."""
        if not self._ending:
            self._ahead.append(_HEADER.pack(0, kind, flags, stream_id, length))
            self._work.unpark()

    def post_in_order(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame without payload behind the data of its stream."""
        self._enqueue_in_order(_HEADER.pack(0, kind, flags, stream_id, length))

    def post_data(self, stream_id: int, payload: memoryview) -> None:
        self._enqueue_in_order(_HEADER.pack(0, DATA, 0, stream_id, len(payload)))
        self._enqueue_in_order(payload)

    def _enqueue_in_order(self, frame: bytes | memoryview) -> None:
        if not self._ending:
            self._in_order.append(frame)
            self._queued_bytes += len(frame)
            self._work.unpark()

    def _answer(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame that the peer made us owe it, and refuse to owe too many."""
        self.post(kind, flags, stream_id, length)
        if len(self._ahead) > _MAX_OWED_FRAMES:
            raise _ProtocolViolation("more questions than it reads answers to")

    async def _write_frames(self) -> None:
        while True:
            if self._ahead:
                batch: list[bytes | memoryview] = list(self._ahead)
                self._ahead.clear()
            elif self._in_order:
                batch = list(self._in_order)
                self._in_order.clear()
                self._queued_bytes = 0
                self._room.unpark_all()
            elif self._ending:
                self._flushed.set()
                return
            else:
                await self._work.park()
                continue
            await self._pipe.send(batch)

    # Receiving.

    async def _read_frames(self) -> None:
        """Cut the plaintext into frames; payload goes to its stream as it arrives."""
        rest = b""
        body_left = 0
        stream: YamuxStream | None = None
        flags = 0
        while True:
            data = await self._pipe.receive()
            self._last_heard = trio.current_time()
            if rest:
                data = rest + data
                rest = b""
            at = 0
            while True:
                if body_left:
                    piece = data[at : at + body_left] if at or len(data) > body_left else data
                    at += len(piece)
                    body_left -= len(piece)
                    if stream is not None and piece:
                        stream.on_piece(piece)
                    if body_left:
                        break
                    self._apply_end(stream, flags)
                if len(data) - at < HEADER_BYTES:
                    rest = data[at:]
                    break
                version, kind, flags, stream_id, length = _HEADER.unpack_from(data, at)
                at += HEADER_BYTES
                if version != 0:
                    raise _ProtocolViolation("not yamux version 0")
                if kind == DATA:
                    stream = self._stream_for_untrusted(stream_id, flags, length)
                    if stream is not None:
                        stream.on_data_untrusted(length)
                    body_left = length
                    if not body_left:
                        self._apply_end(stream, flags)
                else:
                    self._on_control_untrusted(kind, flags, stream_id, length)

    def _on_control_untrusted(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if kind == WINDOW_UPDATE:
            stream = self._stream_for_untrusted(stream_id, flags, 0)
            if stream is not None:
                stream.on_window_update(length)
                self._apply_end(stream, flags)
        elif kind == PING:
            if flags & SYN:
                self._answer(PING, ACK, 0, length)
            elif length in self._pings:
                self._pings[length].set()
        elif kind == GO_AWAY:
            raise PipeClosed("the peer said goodbye")
        else:
            raise _ProtocolViolation("an unknown frame type")

    def _apply_end(self, stream: YamuxStream | None, flags: int) -> None:
        if stream is None:
            return
        if flags & RST:
            stream.on_reset()
        elif flags & FIN:
            stream.on_fin()

    def _stream_for_untrusted(self, stream_id: int, flags: int, length: int) -> YamuxStream | None:
        """The stream a frame belongs to, opened if it asks for that; None to ignore its payload."""
        stream = self._streams.get(stream_id)
        if flags & SYN:
            if stream is not None:
                raise _ProtocolViolation("a stream opened twice")
            return self._accept_untrusted(stream_id)
        if stream is None:
            if length > INITIAL_WINDOW_BYTES and length > self.limits.max_window_bytes:
                raise _ProtocolViolation("a frame beyond any window")
            if length and not flags & (RST | FIN):
                self._answer(WINDOW_UPDATE, RST, stream_id, 0)
        return stream

    def _accept_untrusted(self, stream_id: int) -> YamuxStream | None:
        theirs_are_odd = not self._is_initiator
        if not stream_id or bool(stream_id & 1) != theirs_are_odd:
            raise _ProtocolViolation("a stream id of the wrong side")
        if self._inbound_count >= self.limits.max_inbound_streams:
            self._answer(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        stream = YamuxStream(self, stream_id, is_initiator=False)
        try:
            self._accepted.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self._answer(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        self._streams[stream_id] = stream
        self._used_at = trio.current_time()
        self._inbound_count += 1
        self._answer(WINDOW_UPDATE, ACK, stream_id, 0)
        return stream

    # The rest of libp2p's interface.

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._pipe.remote_address

    def get_transport_addresses(self) -> list[Multiaddr]:
        address = self._pipe.remote_address
        if address is None:
            return []
        host, port = address
        return [Multiaddr(f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}")]

    def get_connection_type(self) -> object:
        return self._pipe.connection_type
