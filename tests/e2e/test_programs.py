"""Programs through real processes: malice is refused inside its seal, and bytes do not vary."""

from __future__ import annotations

import pytest
import torch

from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.tensors import encode_tensors
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import StepResult
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.records import RecordKind, UnitManifest
from tests.support import malice
from tests.support.nodes import Trio
from tests.support.raw_peer import RawPeer

MANIFEST = (RecordKind.MANIFEST, encode_message(UnitManifest(0, 0, return_carry=False)))


def image(**tensors: torch.Tensor) -> bytes:
    return b"".join(bytes(piece) for piece in encode_tensors(tensors))


@pytest.mark.parametrize(
    "name",
    [
        "two nodes that read each other",
        "a hundred thousand arrays in each other",
        "an operator that reads files",
        "a reduction that does not exist",
        "100 GB of zeros",
        "a scale that leads out of the image",
        "more values than keys",
    ],
)
async def test_a_malicious_program_is_refused_by_the_worker(peer: RawPeer, name: str) -> None:
    bad = malice.ALL[name]
    unit = await peer.open()
    await unit.take_up()
    step = (RecordKind.STEP, image(**bad.inputs))
    records = ((RecordKind.PROGRAM, bad.data), (RecordKind.CONSTANTS, image()), step)
    await unit.write(MANIFEST, *records, final=True)
    code, receipt = await unit.failure()
    assert code is bad.code
    # It ended itself: it was not killed, and did not crash.
    assert receipt.status in ("failed", "over_limit", "protocol_error")


async def test_a_step_before_its_constants_is_refused(peer: RawPeer, linear: Program) -> None:
    unit = await peer.open()
    await unit.take_up()
    program = (RecordKind.PROGRAM, malice.program(malice.RELU))
    step = (RecordKind.STEP, image(x=torch.ones(4, 6)))
    await unit.write(MANIFEST, program, step, final=True)
    code, _ = await unit.failure()
    assert code is ErrorCode.UNEXPECTED_MESSAGE


async def test_two_workers_give_the_same_bytes(nodes: Trio, linear: Program) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 4)
    name = linear.spec.xs[0].name
    results = []
    async with open_client(nodes.submitter.paths) as client:
        for _ in range(2):
            async with client.run(linear, [{name: x}]) as events:
                results += [
                    event.tensors async for event in events if isinstance(event, StepResult)
                ]
    first, second = results
    assert first.keys() == second.keys()
    for key in first:
        assert image(y=first[key]) == image(y=second[key])
