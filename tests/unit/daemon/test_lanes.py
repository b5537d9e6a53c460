"""The provider's bulk lane under strangers: a ticket opens it once, nothing else does, and whoever
disturbs it has not ended the unit.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from nextgpu_node.daemon import lanes
from nextgpu_node.daemon.lanes import LaneDesk, LaneFrames
from nextgpu_node.errors import ConnectionLost
from nextgpu_node.p2p import lanes as connections
from nextgpu_node.p2p.lanes import LaneListener, dial_lane
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.framing import FrameKind, encode_frame
from nextgpu_protocol.lane import LaneEnds, hello
from nextgpu_protocol.messages import LaneTicket, UnitResumed
from tests.support.breakable import BreakableStream, breakable_pair
from tests.support.messages import PROVIDER, SUBMITTER
from tests.unit.daemon.test_lasting import SENDER, come_back, resume, running
from tests.unit.daemon.test_lending import Lent

D = FrameKind.DATA
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
UNIT_ID = bytes(16)
ENDS = LaneEnds(UNIT_ID, bytes(SUBMITTER.verify_key), bytes(PROVIDER.verify_key))


def desk() -> LaneDesk:
    made = LaneDesk()
    made.opens(4651)
    return made


class Far:
    """The submitter's end of a lane in memory, served by `desk`."""

    def __init__(self, desk: LaneDesk, nursery: trio.Nursery) -> None:
        self.stream, ours, self.line = breakable_pair()
        self.over = trio.Event()
        nursery.start_soon(self._serve, desk, _with_exact_reads(ours))

    async def _serve(self, desk: LaneDesk, ours: Any) -> None:
        with suppress(trio.TooSlowError):
            await desk.serve(ours)
        ours.abort()
        self.over.set()

    async def enter(self, ticket: bytes, received: int, ends: LaneEnds = ENDS) -> LaneFrames:
        frames = LaneFrames(self.stream, ticket, ends, "S")
        await self.stream.send_all(hello(ticket))
        await frames.send(FrameKind.RESUMED, encode_message(UnitResumed(received)))
        return frames


def _with_exact_reads(stream: BreakableStream) -> Any:
    stream.receive_exactly = connections.LaneStream.receive_exactly.__get__(stream)  # type: ignore[attr-defined]
    return stream


def ticket_for(one: Lent, taken: Any, made: LaneDesk, attempt: int = 1) -> LaneTicket:
    one.unit.check_submitter_untrusted(resume(taken, attempt=attempt), SENDER)
    return made.issue(one.unit, attempt, ENDS)


async def ended_well(frames: Any) -> bool:
    await frames.send(FrameKind.CANCEL)
    return bool(await frames.expect_untrusted(FrameKind.RECEIPT))


async def test_a_unit_moves_to_its_lane_with_what_was_on_its_way(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with running(tmp_path) as (one, taken, line), trio.open_nursery() as nursery:
        made = desk()
        ticket = ticket_for(one, taken, made)
        assert ticket.port == 4651
        await one.worker.inside.send_all(encode_frame(D, b"on its way"))
        await trio.sleep(1)
        far = Far(made, nursery)
        frames = await far.enter(ticket.ticket, received=1)
        answer = await frames.expect_untrusted(FrameKind.RESUMED)
        assert decode_message_untrusted(UnitResumed, answer).received == 3
        assert line.is_broken
        assert await frames.expect_untrusted(D) == b"on its way"
        assert await ended_well(frames)


@pytest.mark.parametrize("fault", ["ticket", "unit", "peer", "used", "expired", "stale", "offset"])
async def test_what_opens_no_lane_leaves_the_unit_where_it_is(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, fault: str
) -> None:
    async with running(tmp_path) as (one, taken, line), trio.open_nursery() as nursery:
        made = desk()
        secret, ends, received = ticket_for(one, taken, made).ticket, ENDS, 1
        match fault:
            case "ticket":
                secret = bytes(32)
            case "unit":
                ends = LaneEnds(b"x" * 16, ENDS.submitter_peer, ENDS.provider_peer)
            case "peer":
                ends = LaneEnds(UNIT_ID, b"x" * 32, ENDS.provider_peer)
            case "used":
                await Far(made, nursery).stream.send_all(hello(secret))
                await trio.sleep(6)
            case "expired":
                await trio.sleep(16)
            case "stale":
                one.unit.check_submitter_untrusted(resume(taken, attempt=2), SENDER)
            case "offset":
                received = 2
        far = Far(made, nursery)
        with suppress(ConnectionLost):
            await far.enter(secret, received, ends)
        await far.over.wait()
        assert not line.is_broken
        assert await ended_well(one.frames)


async def test_a_new_ticket_takes_the_place_of_the_one_before(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with running(tmp_path) as (one, taken, _line):
        made = desk()
        for attempt in range(1, 50):
            ticket_for(one, taken, made, attempt)
        assert len(made._issued) == 1
        assert await ended_well(one.frames)


async def test_a_lane_that_is_disturbed_costs_the_lane_and_not_the_unit(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """Anybody on the way can write there: a forged CANCEL ends nothing."""
    async with running(tmp_path) as (one, taken, _line), trio.open_nursery() as nursery:
        made = desk()
        far = Far(made, nursery)
        frames = await far.enter(ticket_for(one, taken, made).ticket, received=1)
        await frames.expect_untrusted(FrameKind.RESUMED)
        await far.stream.send_all(encode_frame(FrameKind.CANCEL, bytes(16)))
        await far.over.wait()
        assert not one.worker.finished
        again, received = await come_back(one, nursery, resume(taken, attempt=2))
        assert received == 3
        assert await ended_well(again)


async def test_an_end_of_file_on_a_lane_is_a_loss_and_not_the_end(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """As is a reset: both can be made by whoever stands on the way."""
    async with running(tmp_path) as (one, taken, _line), trio.open_nursery() as nursery:
        made = desk()
        far = Far(made, nursery)
        await far.enter(ticket_for(one, taken, made).ticket, received=1)
        await trio.sleep(1)
        await far.stream.aclose()
        await far.over.wait()
        assert not one.worker.finished
        again, _received = await come_back(one, nursery, resume(taken, attempt=2))
        assert await ended_well(again)


async def test_a_submitter_that_leaves_its_lane_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with running(tmp_path) as (one, taken, _line), trio.open_nursery() as nursery:
        made = desk()
        far = Far(made, nursery)
        frames = await far.enter(ticket_for(one, taken, made).ticket, received=1)
        await trio.sleep(1)
        began_s = trio.current_time()
        await frames.aclose()
        assert await one.over() - began_s < 12


# --- the listener, over real connections --------------------------------------------------------


async def test_strangers_on_the_port_are_dropped_after_their_time_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes, "_HELLO_S", 0.5)
    async with trio.open_nursery() as nursery:
        listener = LaneListener(LOOPBACK, 0)
        port = await nursery.start(listener.run, LaneDesk().serve)
        silent = [await dial_lane("127.0.0.1", port) for _ in range(16)]
        one_more = await dial_lane("127.0.0.1", port)
        with trio.fail_after(0.4):
            assert await closed(one_more)
        with trio.fail_after(5):
            assert all([await closed(stream) for stream in silent])
            # The places are free again.
            while listener._live.total():  # noqa: ASYNC110
                await trio.sleep(0.01)
        garbage = await dial_lane("127.0.0.1", port)
        await garbage.send_all(bytes(100))
        with trio.fail_after(0.4):
            assert await closed(garbage)
        nursery.cancel_scope.cancel()


async def test_a_handler_that_fails_ends_one_connection_and_not_the_listener() -> None:
    async def fail(_stream: Any) -> None:
        raise RuntimeError("a bug")

    async with trio.open_nursery() as nursery:
        port = await nursery.start(LaneListener(LOOPBACK, 0).run, fail)
        with trio.fail_after(5):
            for _ in range(2):
                assert await closed(await dial_lane("127.0.0.1", port))
        nursery.cancel_scope.cancel()


async def closed(stream: connections.LaneStream) -> bool:
    try:
        return await stream.receive_some(1) == b""
    except ConnectionLost:
        return True
    finally:
        stream.abort()
