"""The owner and a running unit: real daemons, real workers, a simulated machine."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch
import trio
from torch import nn

from nextgpu_node.api_types import PeerNeed, SharingView
from nextgpu_node.cli.processes import DaemonProcess, run_cli
from nextgpu_node.errors import NextGPUError, NoPeerFound, OwnerReturned, Refused
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.optimizers import SGD
from nextgpu_node.graph.training import train_step
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import Checkpoint, ReceiptVerified, StepResult
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.errors import SENTENCES, ErrorCode
from tests.support.nodes import Swarm, swarm
from tests.support.simulated_daemon import say

Tensors = Mapping[str, torch.Tensor]
BATCH = {"input": torch.ones(4, 8), "target": torch.tensor([0, 1, 2, 0])}


@pytest.fixture(scope="module")
def pair() -> Iterator[Swarm]:
    """A submitter and a provider on a simulated machine."""
    with swarm(1, modules={0: "tests.support.simulated_daemon"}) as two:
        yield two


@pytest.fixture(scope="module")
def training() -> Program:
    torch.manual_seed(0)
    return train_step(
        nn.Linear(8, 3), nn.CrossEntropyLoss(), BATCH["input"], BATCH["target"],
        optimizer=SGD(lr=0.1),
    )  # fmt: skip


@pytest.fixture
async def owner(pair: Swarm) -> AsyncIterator[ApiClient]:
    """The owner at the provider; afterwards it lends to everybody again."""
    provider = pair.providers[0]
    async with ApiClient(provider.paths.api_socket) as api:
        await lending(pair, api)
        yield api
        say(provider.home)
        await api.set_sharing(True)
        await api.resume()
        await api.set_limits({"max_concurrent_units": "1", "hours": "always"})
        await api.set_serving(pair.submitter.ready.peer_id, "none")
        await wait_for(api, lambda sharing: sharing.free_slots > 0)


async def wait_for(api: ApiClient, condition: Callable[[SharingView], bool]) -> SharingView:
    with trio.fail_after(90):
        # Another process's state: there is no event of ours to wait for.
        while not condition(sharing := (await api.status()).sharing):  # noqa: ASYNC110
            await trio.sleep(0.05)
        return sharing


async def lending(pair: Swarm, api: ApiClient) -> None:
    """Until the provider lends, and its announcement has reached the submitter."""
    await wait_for(api, lambda sharing: sharing.free_slots > 0)
    async with ApiClient(pair.submitter.paths.api_socket) as submitter:
        with trio.fail_after(90):
            while not (await submitter.peers(PeerNeed())).peers:  # noqa: ASYNC110  as above
                await trio.sleep(0.1)


@dataclass
class Job:
    """A unit that is fed by hand."""

    send: trio.MemorySendChannel[Tensors]
    results: list[Tensors] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    status: str = ""
    error: NextGPUError | None = None
    news: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)

    async def step(self) -> None:
        """Send one batch and wait for its result."""
        wanted = len(self.results) + 1
        await self.send.send(BATCH)
        while len(self.results) < wanted:
            assert not self.over.is_set(), self.error
            await self.news.wait()

    def take(self, event: object) -> None:
        match event:
            case StepResult(tensors=tensors):
                self.results.append(tensors)
            case Checkpoint():
                self.checkpoint = event
            case ReceiptVerified(receipt=receipt):
                self.status = receipt.status
        self.wake()

    def wake(self) -> None:
        self.news.set()
        self.news = trio.Event()


@asynccontextmanager
async def running(pair: Swarm, program: Program, **options: Any) -> AsyncIterator[Job]:
    """A unit of the submitter on the provider, open until the block or the unit ends."""
    send, receive = trio.open_memory_channel[Tensors](math.inf)
    job = Job(send)

    async def run() -> None:
        try:
            async with (
                open_client(pair.submitter.paths) as client,
                client.run(program, receive, **options) as events,
            ):
                async for event in events:
                    job.take(event)
        except NextGPUError as exc:
            job.error = exc
        job.over.set()
        job.wake()

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield job
            send.close()
            await job.over.wait()


def worker_pids(provider: DaemonProcess) -> set[int]:
    """Below the launchers, which are children of the daemon."""
    launchers = psutil.Process(provider.pid).children()
    return {child.pid for one in launchers for child in one.children(recursive=True)}


async def seconds_until_gone(pids: set[int]) -> float:
    began_s = time.monotonic()
    with trio.fail_after(30):
        while any(psutil.pid_exists(pid) for pid in pids):  # noqa: ASYNC110  as above
            await trio.sleep(0.01)
    return time.monotonic() - began_s


Word = Callable[[ApiClient], Awaitable[object]]


async def test_share_off_in_the_middle_of_a_unit_loses_nothing(
    pair: Swarm, owner: ApiClient, training: Program
) -> None:
    """The state is saved without having been asked for, and another run goes on from it."""
    provider = pair.providers[0]
    async with running(pair, training) as job:
        for _ in range(3):
            await job.step()
        pids = worker_pids(provider)
        assert pids
        await owner.set_sharing(False)
        # Two seconds on a quiet machine (scripts/bench lending); this one may be busy.
        assert await seconds_until_gone(pids) < 10
        await job.over.wait()
    assert isinstance(job.error, OwnerReturned)
    assert "took" in str(job.error)
    assert job.status == "owner_stopped"
    assert job.checkpoint is not None
    assert job.checkpoint.steps == 3

    sharing = (await owner.status()).sharing
    assert (sharing.active, sharing.state) == (False, "off")
    await owner.set_sharing(True)
    await lending(pair, owner)
    async with running(pair, training, carry=job.checkpoint.carry) as rest:
        await rest.step()
    async with running(pair, training) as whole:
        for _ in range(4):
            await whole.step()
    assert torch.equal(rest.results[0]["loss"], whole.results[3]["loss"])
    assert rest.status == whole.status == "done"


async def test_a_pause_for_a_time_ends_units_at_once_and_itself_later(
    pair: Swarm, owner: ApiClient, training: Program
) -> None:
    async with running(pair, training) as job:
        await job.step()
        sharing = await owner.pause(2)
        await job.over.wait()
    assert isinstance(job.error, OwnerReturned)
    assert (sharing.state, sharing.cause) == ("paused", "owner")
    assert sharing.reason.startswith("by you until ")
    assert abs(sharing.until_ms - time.time() * 1000) < 5000
    assert (await wait_for(owner, lambda sharing: sharing.active)).state == "lending"


async def test_drain_lets_the_unit_end_and_takes_no_other(
    pair: Swarm, owner: ApiClient, training: Program
) -> None:
    async with running(pair, training) as job:
        await job.step()
        assert (await owner.drain()).state == "draining"
        async with running(pair, training, needs=needs(pair)) as second:
            await second.over.wait()
        assert isinstance(second.error, NoPeerFound)
        await job.step()
    assert (job.status, job.error) == ("done", None)
    await seconds_until_gone(worker_pids(pair.providers[0]))
    assert (await owner.status()).sharing.state == "draining"


def needs(pair: Swarm) -> Needs:
    """The provider by name, so that a refusal is an answer and not a search."""
    return Needs(peer_id=pair.providers[0].ready.peer_id)


async def test_units_at_once_are_limited_from_now_on(
    pair: Swarm, owner: ApiClient, training: Program
) -> None:
    async with running(pair, training) as first:
        await first.step()
        async with running(pair, training, needs=needs(pair)) as second:
            await second.over.wait()
        assert isinstance(second.error, Refused)
        assert SENTENCES[ErrorCode.BUSY] in str(second.error)
        reply = await owner.set_limits({"max_concurrent_units": "2"})
        assert reply.saved
        async with running(pair, training, needs=needs(pair)) as third:
            await third.step()
    assert (first.status, third.status) == ("done", "done")


async def test_a_peer_that_is_denied_is_stopped_and_refused(
    pair: Swarm, owner: ApiClient, training: Program
) -> None:
    submitter = pair.submitter.ready.peer_id
    async with running(pair, training) as job:
        await job.step()
        await owner.set_serving(submitter, "deny")
        await job.over.wait()
    assert isinstance(job.error, OwnerReturned)
    async with running(pair, training, needs=needs(pair)) as again:
        await again.over.wait()
    assert isinstance(again.error, Refused)
    assert SENTENCES[ErrorCode.NOT_ALLOWED] in str(again.error)
    assert submitter in pair.providers[0].paths.config_file.read_text()


async def test_the_machine_pauses_for_its_owner_and_peers_are_not_told_why(
    pair: Swarm, owner: ApiClient
) -> None:
    provider = pair.providers[0]
    await owner.set_limits({"exclusive_apps": "blender", "max_temperature": "80"})
    say(provider.home, running=["blender"])
    sharing = await wait_for(owner, lambda sharing: not sharing.active)
    assert (sharing.state, sharing.cause, sharing.reason) == (
        "paused", "application", "blender is running"
    )  # fmt: skip
    shown = run_cli(provider.home, "status")
    assert isinstance(shown["sharing"], dict)
    assert shown["sharing"]["reason"] == "blender is running"
    async with ApiClient(pair.submitter.paths.api_socket) as api:
        with trio.fail_after(30):
            found = (await api.peers(PeerNeed())).peers
    assert "blender" not in repr(found)
    say(provider.home, device={"temperature_c": 81.0})
    await wait_for(owner, lambda sharing: sharing.reason == "81 C")
    await owner.set_limits({"exclusive_apps": "", "max_temperature": "0"})
    await wait_for(owner, lambda sharing: sharing.active)
