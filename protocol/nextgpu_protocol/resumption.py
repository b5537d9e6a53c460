"""What one side keeps so that a unit outlives its connection.  Spec: 47-resuming.md

Frames are numbered from the first of a unit on, each direction by itself, and need no number on the
wire: both ends count.  Nothing here does I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame
from nextgpu_protocol.limits import RESUME_BYTES

# What a held frame costs besides its body, about: many small ones weigh more than they hold.
_FRAME_COST_BYTES = 128


class SentFrames:
    """The frames that this side sent last: at least `limit_bytes` of them, or all."""

    def __init__(self, limit_bytes: int = RESUME_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._kept: deque[Frame] = deque()
        self._kept_bytes = 0
        self.count = 0

    @property
    def kept_from(self) -> int:
        """How many frames the other side must have for it to go on."""
        return self.count - len(self._kept)

    def add(self, frames: Sequence[Frame]) -> None:
        """Note frames that go out now."""
        for frame in frames:
            self._kept.append(frame)
            self._kept_bytes += _size(frame)
        self.count += len(frames)
        while self._kept and self._kept_bytes - _size(self._kept[0]) >= self._limit_bytes:
            self._kept_bytes -= _size(self._kept.popleft())

    def after_untrusted(self, received: int) -> list[Frame]:
        """What the other side, which has `received` frames, lacks."""
        if not self.kept_from <= received <= self.count:
            raise RemoteProtocolError(ErrorCode.WRONG_OFFSET, "received")
        return list(islice(self._kept, received - self.kept_from, None))


def _size(frame: Frame) -> int:
    return _FRAME_COST_BYTES + len(frame[1])
