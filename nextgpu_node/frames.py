"""Frames over a trio stream: the one reader and writer for every hop.  Spec: 30-framing.md"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import trio

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameDecoder, FrameKind, encode_frame

# Two whole frames: the next one is being read while one is passed on.
_RECEIVE_BYTES = 512 * 1024


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
            self._ready.extend(self._decoder)
        return self._ready.popleft()

    async def expect_untrusted(self, kind: FrameKind) -> bytes:
        """The body of the next frame, which must be of `kind`."""
        frame = await self.receive_untrusted()
        if frame is None:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, f"{kind.name} is missing")
        if frame[0] is not kind:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, frame[0].name)
        return frame[1]

    async def send(self, kind: FrameKind, body: bytes = b"") -> None:
        """Send one frame.

        A cancelled or failed send leaves half a frame, which nothing can follow: later sends raise
        trio.BrokenResourceError, and the stream is to be closed.
        """
        async with self._send_lock:
            if self._is_cut:
                raise trio.BrokenResourceError("an earlier frame was cut")
            self._is_cut = True
            await self._stream.send_all(encode_frame(kind, body))
            self._is_cut = False

    async def aclose(self) -> None:
        await self._stream.aclose()
