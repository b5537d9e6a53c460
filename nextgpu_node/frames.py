"""Frames over a trio stream: the one reader and writer for every hop.  Spec: 30-framing.md"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import trio

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameDecoder, FrameKind, encode_frames

# Two whole frames and more: they are passed on together, and the next ones are read meanwhile.
_RECEIVE_BYTES = 640 * 1024


# A unix socket takes what its sender's buffer holds (unix(7)); by default that is less than one
# large frame, and each frame then costs both processes a turn.  More is cut to net.core.wmem_max.
_SOCKET_BUFFER_BYTES = 1024 * 1024


def widen(sock: socket.socket | trio.socket.SocketType) -> None:
    """Let a few frames stand in this end of a local socket."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)


class ByteStream(Protocol):
    """What a hop needs of its transport: a trio socket stream, a pipe or a peer stream."""

    async def receive_some(self, max_bytes: int) -> bytes | bytearray: ...

    async def send_all(self, data: bytes) -> None: ...

    async def aclose(self) -> None: ...


class FrameStream:
    """Frames both ways over a stream that it does not own.

    One task may receive while several send: each frame goes out whole.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._decoder = FrameDecoder()
        self._ready: deque[Frame] = deque()
        self._send_lock = trio.StrictFIFOLock()
        self._is_cut = False

    async def receive_untrusted(self) -> Frame | None:
        """The next frame, or None where the stream ended between two frames.

        Raises RemoteProtocolError for bytes that are no frames, or an end inside one.
        """
        while not self._ready:
            data = await self._stream.receive_some(_RECEIVE_BYTES)
            if not data:
                if self._decoder.mid_frame:
                    raise RemoteProtocolError(ErrorCode.TRUNCATED, "inside a frame")
                return None
            self._decoder.feed(data)
            self._ready.extend(self._incoming_untrusted(self._decoder))
        return self._ready.popleft()

    async def receive_ready_untrusted(self) -> list[Frame] | None:
        """Every whole frame that is here, at least one; None and errors as above.

        For those who pass frames on: one write for many costs a fraction.
        """
        first = await self.receive_untrusted()
        if first is None:
            return None
        frames = [first, *self._ready]
        self._ready.clear()
        return frames

    async def expect_untrusted(self, kind: FrameKind) -> bytes:
        """The body of the next frame, which must be of `kind`."""
        frame = await self.receive_untrusted()
        if frame is None:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, f"{kind.name} is missing")
        if frame[0] is not kind:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, frame[0].name)
        return frame[1]

    async def send(self, kind: FrameKind, body: bytes = b"") -> None:
        """Send one frame."""
        await self.send_many([(kind, body)])

    async def send_many(self, frames: Sequence[Frame]) -> None:
        """Send frames, none between them.

        A cancelled or failed send leaves half a frame, which nothing can follow: later sends raise
        trio.BrokenResourceError, and the stream is to be closed.
        """
        async with self._send_lock:
            if self._is_cut:
                raise trio.BrokenResourceError("an earlier frame was cut")
            self._is_cut = True
            await self._stream.send_all(encode_frames(self._outgoing(frames)))
            self._is_cut = False

    def _outgoing(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """What goes onto this kind of stream in place of `frames`."""
        return frames

    def _incoming_untrusted(self, frames: Iterable[Frame]) -> Iterable[Frame]:
        """What stands for the frames that came off it."""
        return frames

    async def aclose(self) -> None:
        await self._stream.aclose()
