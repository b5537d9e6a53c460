"""Calls over providers that are full, go away, come back, lie or are too small."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import trio

from nextgpu_node.errors import (
    DaemonUnreachable,
    IntegrityError,
    JobFailed,
    NoPeerFound,
    PeerLost,
    Refused,
)
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.sdk.dispatch import Dispatcher, Limits
from nextgpu_node.sdk.peer_book import PeerBook
from nextgpu_node.sdk.pool import Xs, Ys
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.program import Node
from tests.support.farm import FarmPeer, open_farm

QUICK = Limits(max_units=8, idle_s=0.05, patience_s=1.0, attempts=4)


class Pick(torch.nn.Module):
    """Fails, in the worker, where the index is out of bounds."""

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(index, torch.arange(200.0).reshape(100, 2))


class Grow(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(4096, 1).sum(0)


@pytest.fixture(scope="module")
def pick() -> Program:
    return export(Pick(), (torch.tensor([0]),))


@dataclass(eq=False)
class Want:
    """A job whose outcome can be waited for."""

    steps: list[Xs]
    outcome: list[Ys] | Exception | None = None
    starts: int = 0
    over: trio.Event = field(default_factory=trio.Event)

    def start(self) -> bool:
        self.starts += 1
        return True

    def succeed(self, results: list[Ys]) -> None:
        self._settle(results)

    def fail(self, error: Exception) -> None:
        self._settle(error)

    def _settle(self, outcome: list[Ys] | Exception) -> None:
        assert self.outcome is None, "settled twice"
        self.outcome = outcome
        self.over.set()


def wants(program: Program, *indices: int) -> list[Want]:
    name = program.spec.xs[0].name
    return [Want([{name: torch.tensor([index])}]) for index in indices]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  of several objects, none of which has an event for it
        await trio.sleep(0.01)


def values(jobs: list[Want]) -> list[object]:
    return [
        float(job.outcome[0]["output"][0, 0]) / 2 if isinstance(job.outcome, list) else job.outcome
        for job in jobs
    ]


@asynccontextmanager
async def dispatching(
    directory: Path, *peers: FarmPeer, limits: Limits = QUICK
) -> AsyncIterator[Dispatcher]:
    with trio.fail_after(20):
        async with open_farm(list(peers), directory) as farm, trio.open_nursery() as nursery:
            book = PeerBook(farm.ask, Needs())
            dispatcher = Dispatcher(farm.socket_path, book, Needs(), limits)
            await nursery.start(dispatcher.run)
            yield dispatcher
            await dispatcher.close()
            nursery.cancel_scope.cancel()


async def run_all(dispatcher: Dispatcher, program: Program, jobs: list[Want]) -> None:
    for job in jobs:
        dispatcher.submit(program, job)
    for job in jobs:
        await job.over.wait()


async def test_small_calls_share_one_unit(tmp_path: Path, pick: Program) -> None:
    peer = FarmPeer()
    jobs = wants(pick, *range(100))
    async with dispatching(tmp_path, peer) as dispatcher:
        await run_all(dispatcher, pick, jobs)
    assert values(jobs) == list(range(100))
    assert peer.units == 1
    assert peer.open_units == 0


async def test_a_unit_is_closed_when_nobody_calls_and_opened_again_when_somebody_does(
    tmp_path: Path, pick: Program
) -> None:
    peer = FarmPeer()
    async with dispatching(tmp_path, peer) as dispatcher:
        for _ in range(2):
            await run_all(dispatcher, pick, wants(pick, 1))
            await until(lambda: not dispatcher.unit_count)
    assert peer.units == 2


async def test_slow_calls_go_to_all_peers_and_each_answer_comes_once(
    tmp_path: Path, pick: Program
) -> None:
    peers = [FarmPeer(delay_s=0.02) for _ in range(3)]
    jobs = wants(pick, *range(60))
    async with dispatching(tmp_path, *peers) as dispatcher:
        await run_all(dispatcher, pick, jobs)
    assert values(jobs) == list(range(60))
    assert [peer.units for peer in peers] == [1, 1, 1]


async def test_a_peer_with_several_slots_gets_several_units(tmp_path: Path, pick: Program) -> None:
    peer = FarmPeer(delay_s=0.02, slots=3)
    jobs = wants(pick, *range(60))
    async with dispatching(tmp_path, peer) as dispatcher:
        await run_all(dispatcher, pick, jobs)
    assert values(jobs) == list(range(60))
    assert peer.units >= 2


async def test_the_calls_of_a_lost_peer_are_run_elsewhere(tmp_path: Path, pick: Program) -> None:
    dying, sound = FarmPeer(dies_after_results=2, delay_s=0.01), FarmPeer(delay_s=0.01)
    jobs = wants(pick, *range(80))
    async with dispatching(tmp_path, dying, sound) as dispatcher:
        await run_all(dispatcher, pick, jobs)
    assert values(jobs) == list(range(80))
    assert not dying.up
    assert sound.units >= 1


async def test_a_peer_that_comes_back_is_used_again(tmp_path: Path, pick: Program) -> None:
    peer = FarmPeer(dies_after_results=1)
    jobs = wants(pick, *range(30))
    async with dispatching(tmp_path, peer, limits=Limits(patience_s=10)) as dispatcher:
        for job in jobs:
            dispatcher.submit(pick, job)
        await until(lambda: not peer.up)
        peer.dies_after_results, peer.up = None, True
        for job in jobs:
            await job.over.wait()
    assert values(jobs) == list(range(30))


async def test_a_call_whose_peers_are_all_lost_says_so(tmp_path: Path, pick: Program) -> None:
    peers = [FarmPeer(dies_after_results=0) for _ in range(5)]
    (job,) = wants(pick, 1)
    async with dispatching(tmp_path, *peers) as dispatcher:
        await run_all(dispatcher, pick, [job])
    assert isinstance(job.outcome, PeerLost)
    assert job.starts == QUICK.attempts


async def test_one_bad_call_costs_the_others_nothing(tmp_path: Path, pick: Program) -> None:
    jobs = wants(pick, *range(20), 1000, *range(20, 40), 2000)
    async with dispatching(tmp_path, FarmPeer()) as dispatcher:
        await run_all(dispatcher, pick, jobs)
    outcomes = values(jobs)
    for place in (41, 20):
        assert isinstance(outcomes.pop(place), JobFailed)
    assert outcomes == list(range(40))


async def test_a_program_that_does_not_load_fails_all_its_calls_at_once(
    tmp_path: Path, pick: Program
) -> None:
    """An operator that is in no table: no worker would take it."""
    graph = pick.spec.step
    nodes = tuple(_renamed(node) for node in graph.nodes)
    spec = replace(pick.spec, step=replace(graph, nodes=nodes))
    program = Program(spec, pick.constants, pick.carry)
    peer = FarmPeer()
    jobs = wants(program, *range(50))
    async with dispatching(tmp_path, peer) as dispatcher:
        await run_all(dispatcher, program, jobs)
    assert all(isinstance(job.outcome, JobFailed) for job in jobs)
    assert peer.units <= 3


def _renamed(node: Node) -> Node:
    return replace(node, op="aten.no_such_operator.default")


async def test_what_needs_too_much_memory_here_is_tried_on_a_larger_peer(tmp_path: Path) -> None:
    program = export(Grow(), (torch.ones(1, 1024),))
    small, large = FarmPeer(memory_bytes=8 * MIB), FarmPeer()
    job = Want([{program.spec.xs[0].name: torch.ones(1, 1024)}])
    async with dispatching(tmp_path, small, large) as dispatcher:
        await run_all(dispatcher, program, [job])
        assert isinstance(job.outcome, list)
        large.up = False
        await dispatcher.close()
        again = [Want(job.steps) for _ in range(3)]
        await run_all(dispatcher, program, again)
    for job in again:
        assert isinstance(job.outcome, Refused)
        assert "16781312 bytes" in str(job.outcome)


async def test_inputs_that_no_peer_takes_are_refused_before_anything_is_sent(
    tmp_path: Path, pick: Program
) -> None:
    peers = [FarmPeer(input_bytes=1024), FarmPeer(input_bytes=2048)]
    (job,) = wants(pick, 1)
    async with dispatching(tmp_path, *peers) as dispatcher:
        await run_all(dispatcher, pick, [job])
    assert isinstance(job.outcome, Refused)
    assert "2,048" in str(job.outcome)
    assert [peer.units for peer in peers] == [0, 0]


async def test_nobody_there_is_said_after_a_while(tmp_path: Path, pick: Program) -> None:
    (job,) = wants(pick, 1)
    async with dispatching(tmp_path) as dispatcher:
        await run_all(dispatcher, pick, [job])
    assert isinstance(job.outcome, NoPeerFound)


async def test_everybody_full_is_said_after_a_while(
    tmp_path: Path, pick: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    peers = [FarmPeer(refuse=ErrorCode.BUSY) for _ in range(3)]
    (job,) = wants(pick, 1)
    async with dispatching(tmp_path, *peers) as dispatcher:
        await run_all(dispatcher, pick, [job])
    assert isinstance(job.outcome, Refused)
    assert "in use" in str(job.outcome)
    assert capfd.readouterr() == ("", "")  # a library prints nothing of its own


async def test_without_a_daemon_calls_fail_at_once(tmp_path: Path, pick: Program) -> None:
    async def nobody_answers(_: object) -> object:
        raise DaemonUnreachable

    jobs = wants(pick, 1, 2)
    with trio.fail_after(0.9):  # less than their patience
        async with trio.open_nursery() as nursery:
            book = PeerBook(nobody_answers, Needs())  # type: ignore[arg-type]
            dispatcher = Dispatcher(tmp_path / "none.sock", book, Needs(), QUICK)
            await nursery.start(dispatcher.run)
            await run_all(dispatcher, pick, jobs)
            nursery.cancel_scope.cancel()
    assert all(isinstance(job.outcome, DaemonUnreachable) for job in jobs)


async def test_a_peer_whose_receipt_lies_gets_nothing_more(tmp_path: Path, pick: Program) -> None:
    liar, honest = FarmPeer(lies_in_receipt=True), FarmPeer(slots=0)
    async with dispatching(tmp_path, liar, honest) as dispatcher:
        await run_all(dispatcher, pick, wants(pick, 1))
        await until(lambda: not dispatcher.unit_count)
        honest.slots = 1
        later = wants(pick, 2)
        await run_all(dispatcher, pick, later)
    assert values(later) == [2.0]
    assert (liar.units, honest.units) == (1, 1)


async def test_a_single_call_of_a_liar_is_an_integrity_error(tmp_path: Path) -> None:
    """A program with a carry is answered by its receipt alone."""
    program = export(_Counter(), (torch.ones(2),))
    (name,) = (one.name for one in program.spec.xs)
    job = Want([{name: torch.ones(2)}])
    async with dispatching(tmp_path, FarmPeer(lies_in_receipt=True)) as dispatcher:
        await run_all(dispatcher, program, [job])
    assert isinstance(job.outcome, IntegrityError)


class _Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 1.0


async def test_every_call_of_a_program_with_a_carry_begins_anew(tmp_path: Path) -> None:
    program = export(_Counter(), (torch.ones(2),))
    (name,) = (one.name for one in program.spec.xs)
    jobs = [Want([{name: torch.ones(2)}] * 2) for _ in range(3)]
    async with dispatching(tmp_path, FarmPeer(), FarmPeer()) as dispatcher:
        await run_all(dispatcher, program, jobs)
    for job in jobs:
        assert isinstance(job.outcome, list)
        assert [ys["output"].tolist() for ys in job.outcome] == [[1.0, 1.0], [2.0, 2.0]]


async def test_two_programs_take_turns_at_one_peer(tmp_path: Path, pick: Program) -> None:
    other = export(Pick(), (torch.tensor([0]),))
    peer = FarmPeer(delay_s=0.001)
    limits = Limits(idle_s=30, patience_s=1)
    first, second = wants(pick, *range(20)), wants(other, *range(20))
    async with dispatching(tmp_path, peer, limits=limits) as dispatcher:
        for job in first:
            dispatcher.submit(pick, job)
        await run_all(dispatcher, other, second)
        for job in first:
            await job.over.wait()
    assert values(first) == values(second) == list(range(20))


async def test_a_dropped_call_frees_its_peer(tmp_path: Path, pick: Program) -> None:
    peer = FarmPeer(delay_s=30)
    (job,) = wants(pick, 1)
    async with dispatching(tmp_path, peer) as dispatcher:
        drop = dispatcher.submit(pick, job)
        await until(lambda: job.starts)
        drop()
        peer.delay_s = 0
        later = wants(pick, 2)
        await run_all(dispatcher, pick, later)
    assert job.outcome is None
    assert values(later) == [2.0]


async def test_cancelling_the_dispatcher_fails_what_waits(tmp_path: Path, pick: Program) -> None:
    jobs = wants(pick, *range(5))
    async with dispatching(tmp_path, FarmPeer(delay_s=30)) as dispatcher:
        for job in jobs:
            dispatcher.submit(pick, job)
        await until(lambda: jobs[0].starts)
        dispatcher.start_soon(_cancel_nursery_of, dispatcher)
        for job in jobs:
            await job.over.wait()
    assert all(isinstance(job.outcome, Exception) for job in jobs)


async def _cancel_nursery_of(dispatcher: Dispatcher) -> None:
    assert dispatcher._nursery is not None
    dispatcher._nursery.cancel_scope.cancel()
