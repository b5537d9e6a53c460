"""A unit that outlives its connection: nothing is lost, nothing comes twice, and it is bounded."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from nextgpu_node.clock import now_ms
from nextgpu_node.daemon.lasting import LastingFrames
from nextgpu_node.errors import PeerLost
from nextgpu_node.frames import FrameStream
from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.envelope import Signed, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind, encode_frame
from nextgpu_protocol.ids import PeerId, peer_id_from_public_key
from nextgpu_protocol.limits import RESUME_GRACE_MS
from nextgpu_protocol.messages import SUITE, UnitHeader, UnitResume, UnitResumed
from tests.support.breakable import BreakableStream, Line, breakable_pair
from tests.support.messages import STRANGER, SUBMITTER, header
from tests.unit.daemon.test_lending import SENDER, Lent, lent

GRACE_S = RESUME_GRACE_MS / 1000
D = FrameKind.DATA


# --- both ends of it, over lines that break anywhere --------------------------------------------


class Ends:
    """Two LastingFrames and whoever brings them together again."""

    def __init__(self, luck: random.Random) -> None:
        self._luck = luck
        one, other, self.line = breakable_pair(luck.randrange(20_000))
        self.one, self.other = LastingFrames(one), LastingFrames(other)
        self.breaks = 0
        for end in (self.one, self.other):
            end.lasts(GRACE_S)

    async def keep_together(self) -> None:
        while True:
            await self.one.wait_broken()
            self.breaks += 1
            one, other, self.line = breakable_pair(self._luck.randrange(60_000))
            counts = self.one.detach(), self.other.detach()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.one.attach, one, counts[1])
                nursery.start_soon(self.other.attach, other, counts[0])


async def send_all(end: LastingFrames, frames: list[Frame], luck: random.Random) -> None:
    at = 0
    while at < len(frames):
        batch = luck.randrange(1, 5)
        await end.send_many(frames[at : at + batch])
        at += batch


async def receive_all(end: LastingFrames, count: int, into: list[Frame]) -> None:
    while len(into) < count:
        frames = await end.receive_ready_untrusted()
        assert frames
        into += frames


@pytest.mark.parametrize("seed", range(25))
async def test_every_frame_comes_once_and_in_order_wherever_the_line_breaks(
    autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    luck = random.Random(seed)
    ends = Ends(luck)
    there = [(D, luck.randbytes(luck.choice((0, 1, 900, 5000)))) for _ in range(150)]
    back = [(D, luck.randbytes(luck.choice((0, 1, 900, 5000)))) for _ in range(150)]
    got_there: list[Frame] = []
    got_back: list[Frame] = []
    with trio.fail_after(3000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends.keep_together)
            async with trio.open_nursery() as working:
                working.start_soon(send_all, ends.one, there, luck)
                working.start_soon(send_all, ends.other, back, luck)
                working.start_soon(receive_all, ends.other, len(there), got_there)
                working.start_soon(receive_all, ends.one, len(back), got_back)
            nursery.cancel_scope.cancel()
    assert ends.breaks > 3
    assert got_there == there
    assert got_back == back


async def test_what_arrives_while_its_link_is_replaced_is_not_taken_twice() -> None:
    """It was not counted when the peer was told a number, so it comes again."""
    arrived = trio.Event()

    class Late:
        async def receive_some(self, _max_bytes: int) -> bytes:
            await arrived.wait()
            return encode_frame(D, b"once")

        async def send_all(self, data: bytes) -> None:
            raise AssertionError

        async def aclose(self) -> None:
            pass

    frames, got = LastingFrames(Late()), list[Frame]()
    frames.lasts(GRACE_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_all, frames, 2, got)
        await trio.testing.wait_all_tasks_blocked()
        arrived.set()
        assert frames.detach() == 0
        one, other, _line = breakable_pair()
        await frames.attach(one, 0)
        await FrameStream(other).send_many([(D, b"once"), (D, b"then")])
    assert got == [(D, b"once"), (D, b"then")]


async def test_who_waits_is_told_when_nobody_comes_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one, _other, line = breakable_pair()
    frames = LastingFrames(one)
    frames.lasts(GRACE_S)
    line.break_now()
    with trio.fail_after(300), pytest.raises(PeerLost):
        await frames.receive_untrusted()
    assert trio.current_time() == pytest.approx(GRACE_S, abs=0.1)


async def test_before_it_lasts_a_broken_line_is_an_error_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one, _other, line = breakable_pair()
    line.break_now()
    with pytest.raises(PeerLost):
        await LastingFrames(one).receive_untrusted()
    assert trio.current_time() == 0


async def test_a_peer_that_counts_what_was_never_sent_gets_nothing() -> None:
    one, _other, _line = breakable_pair()
    frames = LastingFrames(one)
    frames.lasts(GRACE_S)
    frames.detach()
    again, _far, _line = breakable_pair()
    with pytest.raises(RemoteProtocolError) as caught:
        await frames.attach(again, 1)
    assert caught.value.code is ErrorCode.WRONG_OFFSET


# --- the provider's side ------------------------------------------------------------------------


@asynccontextmanager
async def running(tmp_path: Any) -> AsyncIterator[tuple[Lent, Signed[UnitHeader], Line]]:
    """A unit that runs, over a line that can break."""
    theirs, ours, line = breakable_pair()
    async with lent(tmp_path, (theirs, ours)) as one:
        times = {"issued_at_ms": now_ms(), "expires_at_ms": now_ms() + 60_000}
        taken = header(await one.ask(), **times)
        await one.frames.send(FrameKind.HEADER, taken.data)
        await one.frames.send(D, b"first")
        inside = FrameStream(one.worker.inside)
        await inside.expect_untrusted(FrameKind.ASSIGN)
        assert await inside.expect_untrusted(D) == b"first"
        yield one, taken, line


def resume(taken: Signed[UnitHeader], key: Any = SUBMITTER, **changes: Any) -> Signed[UnitResume]:
    plain = UnitResume(
        suite=SUITE,
        unit_id=taken.message.unit_id,
        header_hash=taken.hash,
        attempt=1,
        received=1,  # the offer
        issued_at_ms=now_ms(),
        expires_at_ms=now_ms() + 30_000,
    )
    return sign_message(replace(plain, **changes), key)


async def come_back(
    one: Lent, nursery: trio.Nursery, message: Signed[UnitResume]
) -> tuple[FrameStream, int]:
    """Another stream to the unit; the submitter's end of it, and what the provider has."""
    theirs, ours, _line = breakable_pair()
    nursery.start_soon(one.unit.resume_untrusted, message, ours, PeerId(SENDER))
    frames = FrameStream(theirs)
    answer = await frames.expect_untrusted(FrameKind.RESUMED)
    return frames, decode_message_untrusted(UnitResumed, answer).received


async def test_the_submitter_comes_back_and_goes_on(
    autojump_clock: trio.testing.MockClock, tmp_path: Any
) -> None:
    async with running(tmp_path) as (one, taken, line), trio.open_nursery() as nursery:
        await one.worker.inside.send_all(encode_frame(D, b"result"))
        line.break_now()
        await trio.sleep(GRACE_S - 1)
        frames, received = await come_back(one, nursery, resume(taken))
        assert received == 3  # request, header, data
        assert await frames.expect_untrusted(D) == b"result"
        await frames.send(D, b"second")
        await frames.send(FrameKind.CANCEL)
        assert await frames.expect_untrusted(FrameKind.RECEIPT)


async def test_a_stream_that_still_stands_is_left_for_the_new_one(
    autojump_clock: trio.testing.MockClock, tmp_path: Any
) -> None:
    """The submitter's address changed: the provider has not noticed anything yet."""
    async with running(tmp_path) as (one, taken, line), trio.open_nursery() as nursery:
        await trio.sleep(1)
        frames, _received = await come_back(one, nursery, resume(taken))
        assert line.is_broken
        await frames.send(FrameKind.CANCEL)
        assert await frames.expect_untrusted(FrameKind.RECEIPT)


async def test_a_submitter_that_does_not_come_back_ends_its_unit_when_the_grace_is_over(
    autojump_clock: trio.testing.MockClock, tmp_path: Any
) -> None:
    async with running(tmp_path) as (one, _taken, line):
        one.worker.restart_clock(3600)
        began_s = trio.current_time()
        line.break_now()
        assert GRACE_S <= await one.over() - began_s <= GRACE_S + 12
        assert one.worker.finished


async def test_a_submitter_that_closes_its_stream_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, tmp_path: Any
) -> None:
    async with running(tmp_path) as (one, _taken, _line):
        began_s = trio.current_time()
        await one.stream.aclose()
        await one.over()
        assert trio.current_time() - began_s < 12


async def test_a_line_that_breaks_again_and_again_does_not_outlive_the_units_time(
    autojump_clock: trio.testing.MockClock, tmp_path: Any
) -> None:
    async with running(tmp_path) as (one, taken, line), trio.open_nursery() as nursery:
        line.break_now()
        await trio.sleep(0.5)  # never at the moment at which its time is over
        for attempt in range(1, 100):
            await trio.sleep(1)
            if one.unit.finished.is_set() or one.worker.finished:
                break
            await come_back(one, nursery, resume(taken, attempt=attempt))
        assert attempt < 45  # its 30 s, and the end of it
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("changes", "key", "sender", "code"),
    [
        ({}, SUBMITTER, bytes(STRANGER.verify_key), ErrorCode.WRONG_PEER),
        ({}, STRANGER, None, ErrorCode.WRONG_PEER),
        ({"unit_id": b"another unit 16 "}, SUBMITTER, None, ErrorCode.UNKNOWN_UNIT),
        ({"header_hash": bytes(32)}, SUBMITTER, None, ErrorCode.WRONG_OFFER),
        ({"attempt": 0}, SUBMITTER, None, ErrorCode.REPLAYED),
        ({"received": 2}, SUBMITTER, None, ErrorCode.WRONG_OFFSET),
        ({"suite": 2}, SUBMITTER, None, ErrorCode.UNKNOWN_SUITE),
        ({"issued_at_ms": 0, "expires_at_ms": 1}, SUBMITTER, None, ErrorCode.EXPIRED),
    ],
    ids=["connection", "signer", "unit", "header", "replay", "offset", "suite", "old"],
)
async def test_whoever_is_not_that_submitter_changes_nothing(
    autojump_clock: trio.testing.MockClock,
    tmp_path: Any,
    changes: dict[str, Any],
    key: Any,
    sender: bytes | None,
    code: ErrorCode,
) -> None:
    async with running(tmp_path) as (one, taken, line):
        peer = PeerId(peer_id_from_public_key(sender) if sender else SENDER)
        _theirs, ours, _ = breakable_pair()
        with pytest.raises(RemoteProtocolError) as caught:
            await one.unit.resume_untrusted(resume(taken, key, **changes), ours, peer)
        assert caught.value.code is code
        assert not line.is_broken
        await one.frames.send(FrameKind.CANCEL)
        assert (await one.receipt()).status == "cancelled"


async def test_one_attempt_serves_once(
    autojump_clock: trio.testing.MockClock, tmp_path: Any
) -> None:
    async with running(tmp_path) as (one, taken, line), trio.open_nursery() as nursery:
        line.break_now()
        frames, _received = await come_back(one, nursery, resume(taken))
        stream: BreakableStream = breakable_pair()[1]
        with pytest.raises(RemoteProtocolError) as caught:
            await one.unit.resume_untrusted(resume(taken), stream, PeerId(SENDER))
        assert caught.value.code is ErrorCode.REPLAYED
        await frames.send(FrameKind.CANCEL)
        assert await frames.expect_untrusted(FrameKind.RECEIPT)
