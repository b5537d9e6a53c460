"""The owner's signal, heard where it can be acted on."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from nextgpu_node.graph.tensors import encode_tensors
from nextgpu_node.worker.preemption import GIVE_BACK, OwnerIsBack, Preemption
from nextgpu_node.worker.unit import Scan, Unit, UnitLimits
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.program import (
    TENSOR,
    Graph,
    Node,
    ProgramSpec,
    Ref,
    TensorSpec,
    encode_program,
)
from nextgpu_protocol.records import Record, RecordKind, UnitManifest


@pytest.fixture
def preemption() -> Iterator[Preemption]:
    before = signal.getsignal(GIVE_BACK)
    made = Preemption()
    made.install()
    yield made
    signal.signal(GIVE_BACK, before)


def test_a_worker_that_waits_hears_at_once(preemption: Preemption) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        timer = threading.Timer(0.1, os.kill, (os.getpid(), GIVE_BACK))
        timer.start()
        began_s = time.monotonic()
        with pytest.raises(OwnerIsBack):
            preemption.wait(lambda: ours.recv(1))
        assert time.monotonic() - began_s < 10
        timer.join()


def test_a_worker_that_computes_hears_afterwards(preemption: Preemption) -> None:
    os.kill(os.getpid(), GIVE_BACK)
    assert preemption.requested
    with pytest.raises(OwnerIsBack):
        preemption.check()
    with pytest.raises(OwnerIsBack):
        preemption.wait(lambda: pytest.fail("it must not wait any more"))


def test_one_that_is_not_asked_is_left_alone(preemption: Preemption) -> None:
    preemption.check()
    assert preemption.wait(lambda: 7) == 7


class Written:
    """An outbox that keeps what it is told."""

    def __init__(self) -> None:
        self.kinds: list[RecordKind] = []
        self.bodies: list[bytes] = []
        self.flushed = 0
        self.flush_is_due = True

    def write(self, kind: RecordKind, pieces: object = (b"",)) -> None:
        self.kinds.append(kind)
        self.bodies.append(b"".join(bytes(piece) for piece in pieces))  # type: ignore[attr-defined]

    def flush(self) -> None:
        self.flushed = len(self.kinds)


def scan_after(steps: int, *, carry: bool) -> Written:
    """What a scan has written when the owner returns after so many steps."""
    x = TensorSpec("x", "float32", (2,))
    state = (TensorSpec("sum", "float32", (2,)),) if carry else ()
    add = Node("aten.add.Tensor", (Ref(0), Ref(1 if carry else 0)), (), TENSOR)
    inputs = 2 if carry else 1
    outputs = (inputs, inputs) if carry else (inputs,)
    ys = TensorSpec("y", "float32", (2,))
    spec = ProgramSpec(
        min_table_version=1, step=Graph((add,), outputs), xs=(x,), ys=(ys,), carry=state
    )
    outbox = Written()
    scan = Scan(outbox, UnitLimits("cpu", 1, 64 * MIB))  # type: ignore[arg-type]

    def take(kind: RecordKind, body: bytes) -> None:
        scan.take_untrusted(Record(kind, memoryview(body), more=False))

    def image(**tensors: torch.Tensor) -> bytes:
        return b"".join(bytes(piece) for piece in encode_tensors(tensors))

    take(RecordKind.MANIFEST, encode_message(UnitManifest(0, 0, return_carry=False)))
    take(RecordKind.PROGRAM, encode_program(spec))
    if steps >= 0:
        take(RecordKind.CONSTANTS, image())
        if carry:
            take(RecordKind.CARRY, image(sum=torch.zeros(2)))
        for _ in range(steps):
            take(RecordKind.STEP, image(x=torch.ones(2)))
    scan.save()
    assert outbox.flushed == len(outbox.kinds)
    return outbox


def test_the_state_after_the_last_step_is_saved_unasked() -> None:
    written = scan_after(3, carry=True)
    assert written.kinds[-1] is RecordKind.CHECKPOINT
    assert written.bodies[-1][:8] == (3).to_bytes(8)
    assert torch.full((2,), 3.0).numpy().tobytes() in written.bodies[-1]


def test_results_without_a_state_are_sent_and_that_is_all() -> None:
    assert scan_after(2, carry=False).kinds == [RecordKind.STARTED, *[RecordKind.RESULT] * 2]


def test_before_the_program_is_loaded_there_is_nothing_to_save() -> None:
    assert scan_after(-1, carry=True).kinds == []


def test_a_unit_rests_for_its_owners_share_of_the_time() -> None:
    class Busy:
        stopped = False
        flushed = False

        def flush_results(self, *, idle: bool) -> None:
            self.flushed = idle

    limits = UnitLimits("cpu", 1, 64 * MIB, utilisation=0.5)
    unit, scan = Unit(None, None, limits), Busy()  # type: ignore[arg-type]
    began_s = time.monotonic()
    unit._rest(0.2, scan)  # type: ignore[arg-type]
    assert time.monotonic() - began_s >= 0.2
    assert scan.flushed
