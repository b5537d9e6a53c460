"""A connection that breaks in the middle of a unit costs what was on its way, not the unit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import trio

from nextgpu_node.errors import PeerLost
from nextgpu_node.graph.export import export
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import ReceiptVerified, StepResult
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.messages import Receipt
from tests.support.cut_proxy import HOST, CutProxy, cut_proxy, free_port
from tests.support.nodes import Trio, network_of_three

DEAD_END = '["/ip4/127.0.0.1/tcp/9"]'


@dataclass
class CutNetwork:
    """The provider stands behind a router: it is reached through `line`, its bulk lane through
    `lane`, and it reaches the submitter not at all."""

    nodes: Trio
    line: CutProxy
    lane: CutProxy

    def times_on_lane(self) -> int:
        return self.nodes.log.read_text("utf-8", "replace").count("unit.on_lane")


@pytest.fixture(scope="module")
def network() -> Iterator[CutNetwork]:
    lane_port = free_port()
    with cut_proxy() as line, cut_proxy(lane_port) as lane:
        line.target_port, lane.target_port = free_port(), lane_port
        lending = {
            "network.listen": json.dumps([f"/ip4/127.0.0.1/tcp/{line.target_port}"]),
            "network.announce": json.dumps([f"/ip4/{HOST}/tcp/{line.port}"]),
            "network.lane_port": str(lane_port),
            "sharing.max_memory": "6 GiB",
            "sharing.max_input": "4 GiB",
            "sharing.max_output": "4 GiB",
            "sharing.max_unit_seconds": "600",
        }
        borrowing = {"network.announce": DEAD_END}
        with network_of_three(lending, borrowing) as nodes:
            yield CutNetwork(nodes, line, lane)


@pytest.fixture
def cut_network(network: CutNetwork) -> Iterator[CutNetwork]:
    """Without the lane: its port can not be reached, as behind most routers."""
    network.lane.refuse(True)
    before = network.times_on_lane()
    yield network
    network.lane.refuse(False)
    assert network.times_on_lane() == before


class Ends(torch.nn.Module):
    """Much in, little out."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:4096] + 0, x[-4096:] + 0


class Grow(torch.nn.Module):
    """Little in, much out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.repeats = size // 4096

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(self.repeats)


async def run(
    nodes: Trio, module: torch.nn.Module, x: torch.Tensor
) -> tuple[list[torch.Tensor], Receipt]:
    program = export(module, (x,))
    results, receipt = None, None
    async with open_client(nodes.submitter.paths) as client:
        step = {program.spec.xs[0].name: x}
        async with client.run(program, [step]) as events:
            async for event in events:
                if isinstance(event, StepResult):
                    results = list(event.tensors.values())
                if isinstance(event, ReceiptVerified):
                    receipt = event.receipt
    assert results is not None
    assert receipt is not None
    return results, receipt


def numbers(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


@pytest.mark.parametrize(
    ("mib", "cuts"),
    [(68, 2), pytest.param(1024, 5, marks=pytest.mark.slow)],
    ids=["68-mib", "1-gib"],
)
async def test_an_upload_goes_on_where_its_connection_broke(
    cut_network: CutNetwork, mib: int, cuts: int
) -> None:
    size = mib * MIB
    x = numbers(size)
    line = cut_network.line
    before, cuts_before = line.forwarded_bytes, line.cuts
    line.cut_at(*(before + size * (i + 1) // (cuts + 1) for i in range(cuts)))
    with trio.fail_after(50 + mib):
        (head, tail), receipt = await run(cut_network.nodes, Ends(), x)
    assert line.cuts - cuts_before == cuts
    assert torch.equal(head, x[:4096])
    assert torch.equal(tail, x[-4096:])
    # The submitter has checked that the receipt covers what it sent, every frame once.
    assert receipt.status == "done"
    assert size <= receipt.metering.input_bytes <= size * 1.07
    # What was sent a second time is what was on its way, and not the upload.
    assert line.forwarded_bytes - before < size * 1.07 + cuts * 10 * MIB


async def test_results_go_on_where_their_connection_broke(cut_network: CutNetwork) -> None:
    size, line = 64 * MIB, cut_network.line
    cuts_before = line.cuts

    async def cut_soon() -> None:
        await trio.sleep(0.6)
        line.cut()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut_soon)
            (result,), receipt = await run(cut_network.nodes, Grow(size), numbers(4096))
    assert line.cuts == cuts_before + 1
    assert torch.equal(result, numbers(4096).repeat(size // 4096))
    assert receipt.status == "done"


async def test_a_large_unit_moves_to_the_lane_and_back_where_that_breaks(
    network: CutNetwork,
) -> None:
    size, line, lane = 64 * MIB, network.line, network.lane
    x, times = numbers(size), network.times_on_lane()
    before, cuts = line.forwarded_bytes, lane.cuts
    lane.cut_at(lane.forwarded_bytes + size // 2)
    with trio.fail_after(60):
        (head, tail), receipt = await run(network.nodes, Ends(), x)
    assert network.times_on_lane() == times + 1
    assert lane.cuts == cuts + 1
    assert line.forwarded_bytes - before > size // 4
    assert torch.equal(head, x[:4096])
    assert torch.equal(tail, x[-4096:])
    assert receipt.status == "done"


@pytest.mark.slow
async def test_a_peer_that_can_not_be_reached_again_is_given_up(cut_network: CutNetwork) -> None:
    """And its provider, which waits for the submitter, frees the slot."""
    line = cut_network.line
    x = numbers(32 * MIB)
    line.cut_at(line.forwarded_bytes + 16 * MIB, for_good=True)
    try:
        with trio.fail_after(60), pytest.raises(PeerLost):
            await run(cut_network.nodes, Ends(), x)
    finally:
        line.refuse(False)
    with trio.fail_after(45):
        await cut_network.nodes.wait_idle()
