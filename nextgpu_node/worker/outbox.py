"""What the worker says, sealed: records -> chunks -> DATA frames."""

from __future__ import annotations

import time
from collections.abc import Iterable

from nextgpu_node.worker.channel import Channel
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.messages import Refusal
from nextgpu_protocol.records import Piece, RecordKind, RecordWriter, UnitSummary
from nextgpu_protocol.sealing import Sealer, StreamKey

# Results that are ready together share a chunk, but none waits longer than this for company.
_LONGEST_WAIT_S = 0.02


class Outbox:
    """Seals records in order.  Nothing is on the wire before `flush`, or a chunk is full."""

    def __init__(self, channel: Channel, key: StreamKey) -> None:
        self._channel = channel
        self._sealer = Sealer(key)
        self._writer = RecordWriter()
        self._last_flush_s = 0.0
        channel.send(FrameKind.DATA, self._sealer.preamble)

    def write(self, kind: RecordKind, pieces: Iterable[Piece] = (b"",)) -> None:
        for chunk in self._writer.write(kind, pieces):
            self._send(chunk)

    def flush(self) -> None:
        for chunk in self._writer.flush():
            self._send(chunk)
        self._last_flush_s = time.monotonic()

    @property
    def flush_is_due(self) -> bool:
        return time.monotonic() - self._last_flush_s > _LONGEST_WAIT_S

    def finish(self, summary: UnitSummary) -> None:
        """The last word of a unit that ran."""
        self.write(RecordKind.DONE, [encode_message(summary)])
        self._end()

    def fail(self, error: RemoteProtocolError) -> None:
        """The last word of a unit that did not."""
        refusal = Refusal(int(error.code), printable(error.detail))
        self.write(RecordKind.FAILED, [encode_message(refusal)])
        self._end()

    def _end(self) -> None:
        for chunk, is_last in self._writer.flush_marked():
            self._channel.send(FrameKind.DATA, self._sealer.seal(chunk, final=is_last))
        self._channel.send(FrameKind.END)

    def _send(self, chunk: bytes) -> None:
        self._channel.send(FrameKind.DATA, self._sealer.seal(chunk))


def printable(text: str) -> str:
    """`text` as a message field can carry it: one short line."""
    return "".join(c if c.isprintable() and c.isascii() else " " for c in text)[:240]
