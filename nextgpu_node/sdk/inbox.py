"""The worker's records, put together into events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nextgpu_node.errors import IntegrityError
from nextgpu_node.sdk.events import (
    Checkpoint,
    FinalResult,
    Finished,
    Started,
    StepResult,
    UnitEvent,
)
from nextgpu_node.sdk.outcome import error_for, status_error
from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.limits import MAX_MESSAGE_BYTES
from nextgpu_protocol.messages import Receipt, Refusal
from nextgpu_protocol.program import ProgramSpec, TensorSpec
from nextgpu_protocol.records import Record, RecordKind, UnitSummary

if TYPE_CHECKING:
    from nextgpu_node.graph.tensors import TensorImageReader

_STEPS_BYTES = 8  # a checkpoint begins with the number of steps done


class Inbox:
    """Takes records of the outbound stream; gives an event for each that is complete.

    `max_bytes` bounds one image: what a lying worker could make this side allocate.
    """

    def __init__(self, spec: ProgramSpec, *, max_bytes: int) -> None:
        self._spec = spec
        self._max_bytes = max_bytes
        self._image: TensorImageReader | None = None
        self._prefix = bytearray()
        self._words = bytearray()
        self._continued: RecordKind | None = None
        self._results = 0
        self.failure: Refusal | None = None
        self.summary: UnitSummary | None = None

    def take_untrusted(self, record: Record) -> Iterable[UnitEvent]:
        """The events that `record` completes: none or one."""
        self._continue_untrusted(record)
        match record.kind:
            case RecordKind.RESULT:
                return self._result(record)
            case RecordKind.CHECKPOINT:
                return self._checkpoint(record)
            case RecordKind.FINAL:
                return self._final(record)
            case RecordKind.STARTED:
                return [Started()]
            case RecordKind.DONE | RecordKind.FAILED:
                return self._last_word(record)
            case _:
                raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, record.kind.name)

    def _continue_untrusted(self, record: Record) -> None:
        """Fragments of one body follow each other, and nothing follows the last word."""
        if self._continued not in (None, record.kind) or self._has_ended:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, record.kind.name)
        self._continued = record.kind if record.more else None

    def raise_if_failed(self, receipt: Receipt) -> None:
        """The unit's end as an exception; nothing where it is done."""
        if self.failure is not None:
            raise error_for(self.failure.error_code(), self.failure.detail)
        if receipt.status != "done":
            raise status_error(receipt.status)
        if self.summary is None:
            raise IntegrityError("The peer's receipt says done, but the worker never did.")

    def _result(self, record: Record) -> list[UnitEvent]:
        reader = self._reader(self._spec.ys)
        reader.feed_untrusted(record.body)
        if record.more:
            return []
        self._image = None
        self._results += 1
        return [StepResult(index=self._results - 1, tensors=reader.finish_untrusted())]

    def _final(self, record: Record) -> list[UnitEvent]:
        reader = self._reader(self._spec.finish_ys)
        reader.feed_untrusted(record.body)
        if record.more:
            return []
        self._image = None
        return [FinalResult(tensors=reader.finish_untrusted())]

    def _checkpoint(self, record: Record) -> list[UnitEvent]:
        missing = _STEPS_BYTES - len(self._prefix)
        self._prefix += record.body[:missing]
        reader = self._reader(self._spec.carry)
        if len(record.body) > missing:
            reader.feed_untrusted(record.body[missing:])
        if record.more:
            return []
        steps = int.from_bytes(self._prefix)
        self._image = None
        self._prefix.clear()
        return [Checkpoint(steps=steps, carry=reader.finish_untrusted())]

    @property
    def _has_ended(self) -> bool:
        return self.summary is not None or self.failure is not None

    def _last_word(self, record: Record) -> list[UnitEvent]:
        """DONE or FAILED; even these few bytes may be cut by the end of a chunk."""
        self._words += record.body
        if len(self._words) > MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(ErrorCode.TOO_LARGE, record.kind.name)
        if record.more:
            return []
        words = bytes(self._words)
        if record.kind is RecordKind.FAILED:
            self.failure = decode_message_untrusted(Refusal, words)
            return []
        self.summary = decode_message_untrusted(UnitSummary, words)
        return [Finished(summary=self.summary)]

    def _reader(self, expected: Sequence[TensorSpec]) -> TensorImageReader:
        from nextgpu_node.graph.tensors import TensorImageReader

        if self._image is None:
            self._image = TensorImageReader(expected, max_bytes=self._max_bytes)
        return self._image
