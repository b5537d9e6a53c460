"""A pair of streams in memory whose connection a test can break, as a bad line would."""

from __future__ import annotations

import trio
import trio.testing

from nextgpu_node.errors import ConnectionLost


class BreakableStream:
    """One end.  After `break_after` bytes of its own, or `line.broken`, every call is an error."""

    def __init__(self, stream: trio.abc.Stream, line: Line) -> None:
        self._stream = stream
        self._line = line
        line.ends.append(self)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        left = self._line.bytes_left
        try:
            await self._stream.send_all(bytes(data)[:left])
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ConnectionLost from exc
        self._line.bytes_left -= min(left, len(data))
        if left < len(data):
            self._line.break_now()
            raise ConnectionLost

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ConnectionLost from exc
        if not data and self._line.is_broken:
            raise ConnectionLost
        return bytes(data)

    def abort(self) -> None:
        self._line.break_now()

    async def aclose(self) -> None:
        await self._stream.aclose()


class Line:
    """Both ends' fate: it breaks after so many bytes, both ways together."""

    def __init__(self, bytes_left: int = 1 << 60) -> None:
        self.bytes_left = bytes_left
        self.is_broken = False
        self.ends: list[BreakableStream] = []

    def break_now(self) -> None:
        self.is_broken = True
        for end in self.ends:
            stream = end._stream
            assert isinstance(stream, trio.StapledStream)
            stream.send_stream.close()  # type: ignore[attr-defined]
            stream.receive_stream.close()  # type: ignore[attr-defined]


def breakable_pair(bytes_left: int = 1 << 60) -> tuple[BreakableStream, BreakableStream, Line]:
    """Two connected ends and the line between them."""
    line = Line(bytes_left)
    one, other = trio.testing.memory_stream_pair()
    return BreakableStream(one, line), BreakableStream(other, line), line
