"""One work unit, from its assignment to its last sealed word.

    MANIFEST  PROGRAM  CONSTANTS  [CARRY]  STEP STEP STEP …  END
                                    each STEP  ──►  RESULT      (and CHECKPOINT now and then)
                                    END, or the program's stop  ──►  DONE

Inputs may keep coming while results go out: one open unit serves many small calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Protocol

import torch

from nextgpu_node.graph.machine import Machine
from nextgpu_node.graph.tensors import TensorImageReader, encode_tensors
from nextgpu_node.worker.channel import Channel
from nextgpu_node.worker.outbox import Outbox
from nextgpu_node.worker.preemption import OwnerIsBack, Preemption
from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.limits import MAX_MANIFEST_BYTES
from nextgpu_protocol.local import Assignment
from nextgpu_protocol.messages import Offer, UnitHeader
from nextgpu_protocol.program import TensorSpec, decode_program_untrusted
from nextgpu_protocol.program_limits import MAX_PROGRAM_BYTES
from nextgpu_protocol.records import (
    Record,
    RecordKind,
    UnitManifest,
    UnitSummary,
    read_records_untrusted,
)
from nextgpu_protocol.sealing import KeyPair, Opener, StreamKeys, transcript_hash

# Below this a sleep costs more than it gives.
_LEAST_REST_S = 0.0005


class WorkerExitCode(IntEnum):
    """All that the daemon is told of a unit's end."""

    DONE = 0
    FAILED = 10
    OUT_OF_MEMORY = 11
    PROTOCOL_ERROR = 12
    OVER_LIMIT = 13
    ABANDONED = 14
    OWNER_RETURNED = 15


_EXIT_CODES = {
    ErrorCode.OUT_OF_MEMORY: WorkerExitCode.OUT_OF_MEMORY,
    ErrorCode.OVER_LIMIT: WorkerExitCode.OVER_LIMIT,
    ErrorCode.STEP_FAILED: WorkerExitCode.FAILED,
    ErrorCode.BAD_PROGRAM: WorkerExitCode.FAILED,
    ErrorCode.UNKNOWN_OPERATOR: WorkerExitCode.FAILED,
    ErrorCode.BAD_TENSORS: WorkerExitCode.FAILED,
    ErrorCode.INTERNAL: WorkerExitCode.FAILED,
}


@dataclass(frozen=True, slots=True)
class UnitLimits:
    """What this worker may use.  `live_bytes` bounds tensors alive at one moment."""

    device: str
    threads: int
    live_bytes: int
    utilisation: float = 1.0  # share of the time that a unit computes
    vram_bytes: int = 0  # 0: no limit

    @classmethod
    def from_mapping(cls, limits: Mapping[str, int | str]) -> UnitLimits:
        return cls(
            device=str(limits["device"]),
            threads=int(limits["max_threads"]),
            live_bytes=int(limits["memory_bytes"]),
            utilisation=int(limits.get("utilisation_percent", 100)) / 100,
            vram_bytes=int(limits.get("vram_bytes", 0)),
        )


class RecordReader(Protocol):
    """What runs a unit's records.  `stopped`: it wants no more of them."""

    stopped: bool

    def take_untrusted(self, record: Record) -> None: ...

    def flush_results(self, *, idle: bool) -> None: ...

    def finish(self) -> UnitSummary: ...

    def save(self) -> None: ...


class Unit:
    """Reads the sealed input, drives the machine, seals what comes out."""

    def __init__(
        self,
        channel: Channel,
        key_pair: KeyPair,
        limits: UnitLimits,
        make_reader: Callable[[Outbox, UnitLimits], RecordReader] | None = None,
        preemption: Preemption | None = None,
    ) -> None:
        """`make_reader`: what to do with the records; without it, a program's Scan."""
        self._channel = channel
        self._key_pair = key_pair
        self._limits = limits
        self._make_reader = make_reader or Scan
        self._preemption = preemption or Preemption()

    def run(self) -> int:
        """The exit code for the daemon.  Raises ChannelClosed when nobody listens any more."""
        keys = self._take_assignment()
        outbox = Outbox(self._channel, keys.outbound)
        scan = self._make_reader(outbox, self._limits)
        try:
            self._read_input(Opener(keys.inbound), scan)
            outbox.finish(scan.finish())
        except OwnerIsBack:
            scan.save()
            outbox.fail(RemoteProtocolError(ErrorCode.OWNER_RETURNED))
            return WorkerExitCode.OWNER_RETURNED
        except RemoteProtocolError as exc:
            outbox.fail(exc)
            return _EXIT_CODES.get(exc.code, WorkerExitCode.PROTOCOL_ERROR)
        except MemoryError:
            outbox.fail(RemoteProtocolError(ErrorCode.OUT_OF_MEMORY))
            return WorkerExitCode.OUT_OF_MEMORY
        return WorkerExitCode.DONE

    def _take_assignment(self) -> StreamKeys:
        body = self._channel.expect_untrusted(FrameKind.ASSIGN)
        assignment = decode_message_untrusted(Assignment, body)
        offer = open_envelope_untrusted(Offer, assignment.offer)
        header = open_envelope_untrusted(UnitHeader, assignment.header)
        self._check_binding(offer, header)
        transcript = transcript_hash(offer.data, header.data)
        return self._key_pair.worker_keys_untrusted(header.message.ephemeral_key, transcript)

    def _check_binding(self, offer: Signed[Offer], header: Signed[UnitHeader]) -> None:
        if offer.message.one_time_key != self._key_pair.public:
            raise RemoteProtocolError(ErrorCode.WRONG_OFFER, "another worker's key")
        if header.message.offer_hash != offer.hash:
            raise RemoteProtocolError(ErrorCode.WRONG_OFFER, "offer_hash")

    def _rest(self, worked_s: float, scan: RecordReader) -> None:
        """Leave the device alone for the share of the time that the owner keeps."""
        rest_s = worked_s * (1 / self._limits.utilisation - 1)
        if rest_s > _LEAST_REST_S:
            scan.flush_results(idle=True)
            self._preemption.wait(partial(time.sleep, rest_s))

    def _read_input(self, opener: Opener, scan: RecordReader) -> None:
        while not scan.stopped:
            kind, body = self._preemption.wait(self._channel.receive_untrusted)
            if kind is FrameKind.END:
                opener.check_end_untrusted()
                return
            if kind is not FrameKind.DATA:
                raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, kind.name)
            for record in read_records_untrusted(opener.open_untrusted(body)):
                began_s = time.monotonic()
                scan.take_untrusted(record)
                self._rest(time.monotonic() - began_s, scan)
                if scan.stopped:
                    return
                self._preemption.check()
            scan.flush_results(idle=not self._channel.has_ready)


class Scan:
    """carry, y_k = step(constants, carry, x_k), record by record."""

    def __init__(self, outbox: Outbox, limits: UnitLimits) -> None:
        self._outbox = outbox
        self._limits = limits
        self._body = bytearray()
        self._image: TensorImageReader | None = None
        self._continued: RecordKind | None = None
        self._manifest: UnitManifest | None = None
        self._machine: Machine | None = None
        self._awaited: tuple[RecordKind, ...] = (RecordKind.MANIFEST,)
        self._steps = 0
        self._checkpointed = 0
        self._unflushed = False
        self._run_s = 0.0
        self._began_s = time.monotonic()
        self._loaded_s = self._began_s
        self._checkpoint_s = self._began_s
        self.stopped = False

    def take_untrusted(self, record: Record) -> None:
        """One record, or one fragment of it."""
        if self._continued not in (None, record.kind) or record.kind not in self._awaited:
            raise RemoteProtocolError(
                ErrorCode.UNEXPECTED_MESSAGE, f"{record.kind.name}, not {self._awaited[0].name}"
            )
        self._continued = record.kind if record.more else None
        match record.kind:
            case RecordKind.MANIFEST:
                self._collect(record, MAX_MANIFEST_BYTES)
            case RecordKind.PROGRAM:
                self._collect(record, MAX_PROGRAM_BYTES)
            case _:
                self._reader(record.kind).feed_untrusted(record.body)
        if not record.more:
            self._complete(record.kind)

    def flush_results(self, *, idle: bool) -> None:
        """Send results that wait for company: when nothing else is here, or after a while."""
        if self._unflushed and (idle or self._outbox.flush_is_due):
            self._outbox.flush()
            self._unflushed = False

    def finish(self) -> UnitSummary:
        """The input is complete: what was done in all."""
        if self._continued is not None or RecordKind.STEP not in self._awaited:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, f"{self._awaited[0].name} is missing")
        assert self._manifest is not None
        if self._the_machine.spec.finish is not None:
            self._outbox.write(RecordKind.FINAL, encode_tensors(self._the_machine.finish()))
        if self._manifest.return_carry:
            self._send_checkpoint()
        return UnitSummary(
            steps=self._steps,
            load_ms=round((self._loaded_s - self._began_s) * 1000),
            run_ms=round(self._run_s * 1000),
            stopped_early=self.stopped,
        )

    def save(self) -> None:
        """The owner is back: the state after the last step, for another machine to go on from."""
        if (
            self._machine is not None
            and RecordKind.STEP in self._awaited
            and self._machine.spec.carry
        ):
            self._send_checkpoint()
        self._outbox.flush()

    def _collect(self, record: Record, limit: int) -> None:
        if len(self._body) + len(record.body) > limit:
            raise RemoteProtocolError(ErrorCode.TOO_LARGE, record.kind.name)
        self._body += record.body

    def _reader(self, kind: RecordKind) -> TensorImageReader:
        if self._image is None:
            expected = self._expected(kind)
            self._image = TensorImageReader(expected, max_bytes=self._limits.live_bytes)
        return self._image

    def _expected(self, kind: RecordKind) -> tuple[TensorSpec, ...]:
        spec = self._the_machine.spec
        match kind:
            case RecordKind.CONSTANTS:
                return spec.constants
            case RecordKind.CARRY:
                return spec.carry
            case _:
                return spec.xs

    def _complete(self, kind: RecordKind) -> None:
        match kind:
            case RecordKind.MANIFEST:
                self._manifest = decode_message_untrusted(UnitManifest, self._take_body())
                self._awaited = (RecordKind.PROGRAM,)
            case RecordKind.PROGRAM:
                self._load_program()
                self._awaited = (RecordKind.CONSTANTS,)
            case RecordKind.CONSTANTS:
                self._the_machine.load_constants(self._take_tensors())
                self._await_carry_or_start()
            case RecordKind.CARRY:
                self._the_machine.load_carry(self._take_tensors())
                self._start()
            case _:
                self._step()

    def _load_program(self) -> None:
        spec = decode_program_untrusted(self._take_body())
        self._machine = Machine(
            spec, device=self._limits.device, max_live_bytes=self._limits.live_bytes
        )

    def _await_carry_or_start(self) -> None:
        spec = self._the_machine.spec
        if spec.carry and spec.init is None:
            self._awaited = (RecordKind.CARRY,)
            return
        if spec.init is not None:
            self._the_machine.init_carry()
        self._start()
        if spec.init is not None:
            # Going on from a checkpoint: the sent state takes the place of the computed one.
            self._awaited = (RecordKind.STEP, RecordKind.CARRY)

    def _start(self) -> None:
        self._awaited = (RecordKind.STEP,)
        self._loaded_s = self._checkpoint_s = time.monotonic()
        self._outbox.write(RecordKind.STARTED)
        self._outbox.flush()

    def _step(self) -> None:
        self._awaited = (RecordKind.STEP,)
        began_s = time.monotonic()
        outcome = self._the_machine.step_and_release(self._take_tensors())
        # The copy to host memory below waits for the device, so it belongs to the step.
        self._outbox.write(RecordKind.RESULT, encode_tensors(outcome.ys))
        self._run_s += time.monotonic() - began_s
        self._steps += 1
        self._unflushed = True
        self.stopped = outcome.stop
        self._checkpoint_if_due()
        self.flush_results(idle=False)

    def _checkpoint_if_due(self) -> None:
        assert self._manifest is not None
        interval_ms, interval = self._manifest.checkpoint_ms, self._manifest.checkpoint_steps
        waited_ms = (time.monotonic() - self._checkpoint_s) * 1000
        if (interval_ms and waited_ms >= interval_ms) or (
            interval and self._steps - self._checkpointed >= interval
        ):
            self._send_checkpoint()

    def _send_checkpoint(self) -> None:
        steps = self._steps.to_bytes(8)
        self._outbox.write(
            RecordKind.CHECKPOINT, [steps, *encode_tensors(self._the_machine.carry())]
        )
        self._outbox.flush()
        self._checkpoint_s, self._checkpointed = time.monotonic(), self._steps

    @property
    def _the_machine(self) -> Machine:
        assert self._machine is not None
        return self._machine

    def _take_body(self) -> bytes:
        body = bytes(self._body)
        self._body.clear()
        return body

    def _take_tensors(self) -> dict[str, torch.Tensor]:
        assert self._image is not None
        tensors = self._image.finish_untrusted()
        self._image = None
        return tensors
