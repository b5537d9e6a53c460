"""What a submitter believes: each lie of a peer or of the daemon in between is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing

from nextgpu_node.api_types import PeerView
from nextgpu_node.errors import DaemonUnreachable, IntegrityError, NextGPUError, PeerLost, Refused
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.tensors import encode_tensors
from nextgpu_node.sdk.events import ReceiptVerified, StepResult, UnitEvent
from nextgpu_node.sdk.inbox import Inbox
from nextgpu_node.sdk.unit import Needs, open_unit
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.ids import peer_id_from_public_key
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.program import (
    TENSOR,
    Graph,
    Node,
    ProgramSpec,
    Ref,
    TensorSpec,
)
from nextgpu_protocol.records import (
    RecordKind,
    RecordWriter,
    UnitSummary,
    read_records_untrusted,
)
from tests.support.lying_peer import LyingPeer
from tests.support.messages import PROVIDER, STRANGER

X = TensorSpec("x", "float32", (2,))
Y = TensorSpec("y", "float32", (2,))
NODE = Node("aten.add.Tensor", (Ref(0), Ref(0)), (), TENSOR)
SPEC = ProgramSpec(
    min_table_version=1,
    step=Graph((NODE,), (1,)),
    xs=(X,),
    ys=(Y,),
)
PROGRAM = Program.from_parts(SPEC, {}, {})
RESULT = {"y": torch.tensor([2.0, 4.0])}
PEER = PeerView(
    peer_id=peer_id_from_public_key(bytes(PROVIDER.verify_key)),
    latency_ms=1,
    sharing=True,
    reason="",
    devices=[],
    free_slots=1,
    memory_bytes=64 * MIB,
    max_seconds=10,
    input_bytes=MIB,
    output_bytes=MIB,
    runtime="",
    table_version=1,
    isolation=[],
)


async def events_from(
    peer: LyingPeer,
    directory: Path,
    *,
    deadline_s: float = 10,
    steps: int = 1,
    program: Program | None = None,
) -> list[UnitEvent]:
    """Everything the submitter's side says of one unit with `peer`."""
    peer.result = peer.result or RESULT
    path = directory / "units.sock"
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    events: list[UnitEvent] = []
    failure: NextGPUError | None = None
    with trio.fail_after(deadline_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, peer.serve, [trio.SocketListener(sock)])
            try:
                await one_unit(path, events, steps, program or PROGRAM)
            except NextGPUError as exc:
                failure = exc
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return events


async def one_unit(path: Path, events: list[UnitEvent], steps: int, program: Program) -> None:
    async with open_unit(path, PEER, Needs(), table_version=1) as unit:
        await unit.start(program)
        for _ in range(steps):
            await unit.send_step({"x": torch.tensor([1.0, 2.0])})
        await unit.close_input()
        async for event in unit.events():
            events.append(event)


def flip_last_bit(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


async def test_an_honest_peer_is_believed(tmp_path: Path) -> None:
    events = await events_from(LyingPeer(), tmp_path)
    (result,) = [event for event in events if isinstance(event, StepResult)]
    assert torch.equal(result.tensors["y"], RESULT["y"])
    assert isinstance(events[-1], ReceiptVerified)


@pytest.mark.parametrize(
    "lie",
    [
        {"offer_key": STRANGER},
        {"receipt_key": STRANGER},
        {"change_offer": lambda offer: replace(offer, request_hash=bytes(32))},
        {"change_offer": lambda offer: replace(offer, submitter_key=bytes(32))},
        {"change_offer": lambda offer: replace(offer, suite=2)},
        {"change_offer": lambda offer: replace(offer, one_time_key=bytes(32))},
        {"change_draft": lambda draft: replace(draft, expires_at_ms=draft.expires_at_ms - 1)},
        {"change_receipt": lambda receipt: replace(receipt, unit_id=bytes(16))},
        {"change_receipt": lambda receipt: replace(receipt, transcript_hash=bytes(32))},
        {"change_receipt": lambda receipt: replace(receipt, output_hash=bytes(32))},
        {"change_receipt": lambda receipt: replace(receipt, input_hash=bytes(32))},
        {"change_chunk": flip_last_bit},
        {"say_done": False},
        {"say_more": True},
    ],
    ids=lambda lie: next(iter(lie)),
)
async def test_a_lie_is_an_integrity_error(lie: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        await events_from(LyingPeer(**lie), tmp_path)


@pytest.mark.parametrize(
    "cut",
    [
        {"send_receipt": False},
        {"seal_final": False},
        {"seal_final": False, "send_end": False},
    ],
)
async def test_a_stream_that_is_cut_short_is_a_lost_peer(
    cut: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(PeerLost):
        await events_from(LyingPeer(**cut), tmp_path)


@pytest.mark.parametrize(
    ("stage", "seconds"),
    [
        ("connect", 40),
        ("request", 40),
        ("header", 10 + 60),
        ("input", 10 + 60),
        ("results", 10 + 60),
        ("end", 30),
    ],
)
async def test_a_peer_that_goes_silent_is_given_up(
    stage: str, seconds: float, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """10 s are what the unit was granted."""
    with pytest.raises(PeerLost):
        await events_from(LyingPeer(silent_after=stage), tmp_path, deadline_s=100)
    assert trio.current_time() == pytest.approx(seconds, abs=0.5)


async def test_a_peer_that_reads_nothing_is_given_up(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    steps = 400  # more than the socket holds
    with pytest.raises(PeerLost):
        await events_from(LyingPeer(silent_after="header"), tmp_path, deadline_s=100, steps=steps)
    assert trio.current_time() == pytest.approx(10 + 60, abs=0.5)


async def test_two_inputs_of_one_size_class_are_told_apart_by_nothing_on_the_wire(
    tmp_path: Path,
) -> None:
    """Programs with constants of 30, 200 and 700 numbers: both below the floor of a size class."""
    sizes = []
    for number in (30, 200, 700):
        constants = {"w": torch.ones(number)}
        spec = replace(SPEC, constants=(TensorSpec("w", "float32", (number,)),))
        spec = replace(spec, step=Graph((replace(NODE, args=(Ref(1), Ref(1))),), (2,)))
        peer = LyingPeer()
        await events_from(peer, tmp_path, program=Program.from_parts(spec, constants, {}))
        sizes.append(peer.input_sizes)
        (tmp_path / "units.sock").unlink()
    assert sizes[0] == sizes[1] == sizes[2]


async def test_results_of_another_shape_are_not_taken(tmp_path: Path) -> None:
    with pytest.raises(NextGPUError, match="do not match"):
        await events_from(LyingPeer(result={"y": torch.ones(3)}), tmp_path)


@pytest.mark.parametrize("name", ["memory_bytes", "max_seconds", "input_bytes", "output_bytes"])
async def test_an_offer_of_less_than_asked_is_not_taken_up(name: str, tmp_path: Path) -> None:
    peer = LyingPeer(change_offer=lambda offer: replace(offer, **{name: 1}))
    with pytest.raises(Refused, match=name):
        await events_from(peer, tmp_path)


async def test_the_last_word_may_be_cut_by_the_end_of_a_chunk(tmp_path: Path) -> None:
    """A result of just this size leaves two bytes of the chunk to DONE."""
    for size in range(65_490, 65_530):
        spec = replace(SPEC, ys=(replace(Y, shape=(size,)),))
        inbox = Inbox(spec, max_bytes=MIB)
        writer = RecordWriter()
        chunks = list(writer.write(RecordKind.RESULT, encode_tensors({"y": torch.ones(size)})))
        chunks += writer.write(RecordKind.DONE, [encode_message(UnitSummary(1, 2, 3, False))])
        for chunk in (*chunks, *writer.flush()):
            for record in read_records_untrusted(chunk):
                list(inbox.take_untrusted(record))
        assert inbox.summary == UnitSummary(1, 2, 3, False)


async def test_a_refusal_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="slots are in use"):
        await events_from(LyingPeer(refuse=ErrorCode.BUSY), tmp_path)


async def test_without_a_daemon_the_error_says_what_to_start(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="nextgpu up"):
        await one_unit(tmp_path / "nobody.sock", [], 1, PROGRAM)
