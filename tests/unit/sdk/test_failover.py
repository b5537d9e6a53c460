"""One piece of work over peers that refuse, vanish, lie and come back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
import trio
import trio.testing

from nextgpu_node.api_types import PeerView
from nextgpu_node.errors import (
    IntegrityError,
    JobFailed,
    JobTimeout,
    NextGPUError,
    NoPeerFound,
    OutOfMemory,
    PeerLost,
    Refused,
)
from nextgpu_node.sdk.failover import run_reliably
from nextgpu_node.sdk.outcome import error_for
from nextgpu_node.sdk.peer_book import PeerBook
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.errors import ErrorCode
from tests.support.peers import PeerSource, peer

Attempt = Callable[[PeerView], Awaitable[str]]


def failing(*errors: NextGPUError, asked: list[str]) -> Attempt:
    """Raises one error after the other, then gives the peer's name."""
    left = list(errors)

    async def attempt(chosen: PeerView) -> str:
        asked.append(chosen.peer_id)
        await trio.lowlevel.checkpoint()
        if left:
            raise left.pop(0)
        return chosen.peer_id

    return attempt


@pytest.mark.parametrize(
    "error", [PeerLost(), OutOfMemory(), JobTimeout(), IntegrityError(), Refused()], ids=repr
)
async def test_the_work_goes_on_at_the_next_best_peer(
    error: NextGPUError, autojump_clock: trio.testing.MockClock
) -> None:
    asked: list[str] = []
    book = PeerBook(PeerSource(peer("far", latency_ms=90), peer("near")), Needs())
    assert await run_reliably(book, failing(error, asked=asked)) == "far"
    assert asked == ["near", "far"]


async def test_a_lone_peer_is_asked_again_after_a_pause_that_grows(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[str] = []
    times: list[float] = []
    fail = failing(*[PeerLost()] * 5, asked=asked)

    async def attempt(chosen: PeerView) -> str:
        times.append(trio.current_time())
        return await fail(chosen)

    book = PeerBook(PeerSource(peer("a")), Needs())
    assert await run_reliably(book, attempt) == "a"
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert pauses[-1] > 2 * pauses[0] > 0


async def test_a_peer_that_gave_a_broken_seal_is_never_asked_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[str] = []
    book = PeerBook(PeerSource(peer("a")), Needs())
    with pytest.raises(Refused, match="did not verify"):
        await run_reliably(book, failing(IntegrityError(), asked=asked), patience_s=100)
    assert asked == ["a"]


async def test_what_would_fail_anywhere_is_not_tried_twice(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[str] = []
    book = PeerBook(PeerSource(peer("a"), peer("b")), Needs())
    bad = error_for(ErrorCode.BAD_TENSORS, "")
    with pytest.raises(JobFailed):
        await run_reliably(book, failing(bad, asked=asked))
    assert len(asked) == 1


async def test_work_that_kills_every_peer_is_given_up_with_its_last_error(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[str] = []
    book = PeerBook(PeerSource(peer("a"), peer("b")), Needs())
    crash = error_for(ErrorCode.WORKER_CRASHED, "")
    with pytest.raises(JobFailed, match="worker process ended"):
        await run_reliably(book, failing(*[crash] * 99, asked=asked), attempts=4)
    assert len(asked) == 4


async def test_a_thousand_peers_that_refuse_cost_bounded_time_and_one_sentence(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[str] = []
    book = PeerBook(PeerSource(*[peer(f"p{k}") for k in range(1000)]), Needs())
    refusals = [error_for(ErrorCode.NOT_ALLOWED, "")] * 1000
    began_s = trio.current_time()
    with pytest.raises(Refused, match=r"1000 known.*1000 x The owner of this node"):
        await run_reliably(book, failing(*refusals, asked=asked), patience_s=20)
    assert len(asked) == 1000
    assert trio.current_time() - began_s < 25


async def test_nobody_there_is_said_after_the_patience(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[str] = []
    began_s = trio.current_time()
    with pytest.raises(NoPeerFound):
        await run_reliably(PeerBook(PeerSource(), Needs()), failing(asked=asked), patience_s=20)
    assert 20 <= trio.current_time() - began_s < 23


async def test_a_peer_that_comes_while_waiting_gets_the_work(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    source = PeerSource()
    asked: list[str] = []

    async def arrive() -> None:
        await trio.sleep(10)
        source.peers.append(peer("late"))

    nursery.start_soon(arrive)
    assert await run_reliably(PeerBook(source, Needs()), failing(asked=asked)) == "late"


async def test_the_daemon_is_not_asked_more_often_than_every_two_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = PeerSource()
    with pytest.raises(NoPeerFound):
        await run_reliably(PeerBook(source, Needs()), failing(asked=[]), patience_s=20)
    assert source.asked <= 12
