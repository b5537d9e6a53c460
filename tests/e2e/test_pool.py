"""Open units that take calls, on a real provider."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
import trio
import trio.testing

from nextgpu_node.api_types import PeerView
from nextgpu_node.errors import JobFailed, NextGPUError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.pool import CallLost, OpenUnit, open_calls
from nextgpu_node.sdk.unit import Needs
from tests.support.nodes import Trio


class Pick(torch.nn.Module):
    """Fails at a step, in the worker, where the index is out of bounds."""

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(index, torch.arange(12.0).reshape(6, 2))


class Accumulator(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 1.0


@pytest.fixture(scope="module")
def pick() -> Program:
    return export(Pick(), (torch.tensor([0]),))


def step(program: Program, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {program.spec.xs[0].name: tensor}


async def the_peer(nodes: Trio) -> PeerView:
    async with open_client(nodes.submitter.paths) as client:
        (peer,) = await client.find_peers(Needs())
    return peer


@asynccontextmanager
async def opened(nodes: Trio, program: Program) -> AsyncIterator[OpenUnit]:
    await nodes.wait_idle()
    peer = await the_peer(nodes)
    with trio.fail_after(30):
        async with open_calls(nodes.submitter.paths.units_socket, peer, program) as unit:
            yield unit


async def test_calls_share_a_unit_and_each_gets_its_own_results(nodes: Trio, pick: Program) -> None:
    answers: dict[int, list[float]] = {}

    async def one(index: int) -> None:
        steps = [step(pick, torch.tensor([index % 6])), step(pick, torch.tensor([5]))]
        first, second = await unit.call(steps)
        answers[index] = first["output"][0].tolist()
        assert second["output"].tolist() == [[10.0, 11.0]]

    async with opened(nodes, pick) as unit, trio.open_nursery() as nursery:
        for index in range(60):
            nursery.start_soon(one, index)
    assert answers == {i: [2.0 * (i % 6), 2.0 * (i % 6) + 1] for i in range(60)}
    assert unit.error is None
    assert unit.receipt is not None
    assert unit.receipt.status == "done"


async def test_a_call_that_fails_takes_the_blame_and_the_others_are_lost_not_failed(
    nodes: Trio, pick: Program
) -> None:
    outcomes: dict[int, NextGPUError | float] = {}

    async def one(position: int, index: int) -> None:
        try:
            (ys,) = await unit.call([step(pick, torch.tensor([index]))])
            outcomes[position] = float(ys["output"][0, 0])
        except NextGPUError as exc:
            outcomes[position] = exc

    async with opened(nodes, pick) as unit, trio.open_nursery() as nursery:
        for position, index in enumerate((1, 99, 2, 3)):
            nursery.start_soon(one, position, index)
            await trio.testing.wait_all_tasks_blocked()
    assert outcomes[0] == 2.0
    assert isinstance(outcomes[1], JobFailed)
    assert "embedding" in str(outcomes[1])
    for position in (2, 3):
        lost = outcomes[position]
        assert isinstance(lost, CallLost)
        assert not lost.suspect


async def test_a_program_with_a_carry_gets_one_call_from_its_first_state(nodes: Trio) -> None:
    program = export(Accumulator(), (torch.ones(2),))
    async with opened(nodes, program) as unit:
        one = step(program, torch.ones(2))
        results = await unit.call([one, one])
        assert [ys["output"].tolist() for ys in results] == [[1.0, 1.0], [2.0, 2.0]]
        assert not unit.is_open


async def test_leaving_by_an_exception_ends_the_unit_at_once(nodes: Trio, pick: Program) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(KeyError)):
        async with opened(nodes, pick) as unit:
            raise KeyError("mine")
    assert unit.ended.is_set()
    await nodes.wait_idle()
