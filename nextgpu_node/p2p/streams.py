"""One stream to one peer, as trio's HalfCloseableStream."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from nextgpu_node.errors import ConnectionLost, PeerLost

_CLOSE_S = 2.0
_RECEIVE_BYTES = 64 * 1024


class PeerStream(trio.abc.HalfCloseableStream):
    """Bytes both ways, ordered, encrypted, with back-pressure; the peer's identity is proven.

    `receive_some` returns b"" only after the peer has finished sending on purpose.  A reset raises
    PeerLost; a lost connection and a silent peer raise ConnectionLost, which is one.  One task
    sends and one receives at a time.
    """

    def __init__(self, net_stream: Any, peer_id: str) -> None:
        self.peer_id = peer_id
        self._net_stream = net_stream
        # libp2p's wrapper takes two locks and a state machine per call; the muxer's own stream
        # has the same operations.  The wrapper is still what has to be told of the end.
        self._muxed = net_stream.muxed_stream
        self._is_sending = False
        self._is_receiving = False
        self._is_closed = False

    @property
    def remote_ip(self) -> str:
        """The address that the connection comes from or goes to; empty where there is none."""
        remote = self._net_stream.muxed_conn.get_remote_address()
        return remote[0] if remote else ""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, for as long as the peer takes to read; deadlines are the caller's.

        After a cancelled `send_all` it is unknown how much was sent: reset the stream.
        """
        self._enter("_is_sending")
        try:
            await self._muxed.write(data)
        except BaseLibp2pError as exc:
            raise self._lost("The peer closed the stream while data was being sent.") from exc
        finally:
            self._is_sending = False

    async def wait_send_all_might_not_block(self) -> None:
        self._enter("_is_sending")
        try:
            await self._muxed.wait_writable()
        finally:
            self._is_sending = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte and at most `max_bytes`, or b"" at the end of what the peer sent."""
        self._enter("_is_receiving")
        try:
            data: bytes = await self._muxed.read(max_bytes or _RECEIVE_BYTES)
        except MuxedStreamEOF:
            return b""
        except BaseLibp2pError as exc:
            raise self._lost("The peer broke the stream off.") from exc
        finally:
            self._is_receiving = False
        return data

    async def send_eof(self) -> None:
        self._enter("_is_sending")
        try:
            await self._muxed.close_write()
        finally:
            self._is_sending = False

    async def aclose(self) -> None:
        """Finish sending and stop receiving.  If cancelled, the stream is reset."""
        if self._is_closed:
            await trio.lowlevel.checkpoint()
            return
        self._is_closed = True
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self._muxed.reset_nowait()
            raise
        finally:
            await self._release(self._net_stream.close)

    async def reset(self) -> None:
        """Tell the peer that this stream failed, and drop everything unsent and unread."""
        self._is_closed = True
        self._muxed.reset_nowait()
        await self._release(self._net_stream.reset)

    def abort(self) -> None:
        """As `reset`, without waiting: whoever reads or writes now is told of the end."""
        self._muxed.reset_nowait()

    def _lost(self, what: str) -> PeerLost:
        """A connection that broke may come back; a stream that the peer reset was meant to end."""
        if self._muxed.conn.is_closed:
            return ConnectionLost("The connection to the peer was lost.")
        return PeerLost(what)

    async def _release(self, finish: Any) -> None:
        with trio.move_on_after(_CLOSE_S, shield=True), suppress(BaseLibp2pError):
            await finish()

    def _enter(self, side: str) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("this stream was closed here")
        if getattr(self, side):
            raise trio.BusyResourceError("another task is already using this side of the stream")
        setattr(self, side, True)
