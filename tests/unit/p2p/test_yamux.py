"""The muxer keeps its promises to a well-behaved peer and its bounds towards any other."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from libp2p.stream_muxer.yamux.yamux import Yamux as StockYamux

from nextgpu_node.p2p import yamux as y
from nextgpu_node.p2p.noise_pipe import PipeClosed
from nextgpu_node.p2p.yamux import MuxLimits, Yamux
from tests.unit.p2p.muxed import attacked, muxed_pair, noise_pair, peer, yamux

MIB = 1 << 20


async def read_all(stream: Any) -> bytes:
    got = bytearray()
    while True:
        try:
            got += await stream.read(65536)
        except MuxedStreamEOF:
            return bytes(got)


async def exchange(here: Any, there: Any, size: int) -> None:
    """`size` bytes each way at the same time, each side finishing on its own."""
    payload = os.urandom(size)

    async def talk(stream: Any, data: bytes) -> None:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                for at in range(0, len(data), MIB):
                    await stream.write(data[at : at + MIB])
                await getattr(stream, "close_write", stream.close)()

            assert await read_all(stream) == payload

    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk, here, payload)
        nursery.start_soon(talk, there, payload)


async def test_bytes_arrive_both_ways_and_each_side_ends_alone() -> None:
    async with muxed_pair() as (left, right):
        here = await left.open_stream()
        there = await right.accept_stream()
        await exchange(here, there, 3 * MIB + 17)
        assert not left._streams
        assert not right._streams
        assert left.budget.held_bytes == right.budget.held_bytes == 0


@pytest.mark.parametrize("we_dial", [True, False])
async def test_it_interoperates_with_libp2ps_own_muxer(we_dial: bool) -> None:
    dialler, answerer = await noise_pair()
    if we_dial:
        ours = yamux(dialler, is_initiator=True)
        stock = StockYamux(answerer, peer("aaaa"), is_initiator=False)
    else:
        ours = yamux(answerer, is_initiator=False)
        stock = StockYamux(dialler, peer("bbbb"), is_initiator=True)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.start)
            nursery.start_soon(stock.start)
            await stock.event_started.wait()
            for opener, accepter in ((ours, stock), (stock, ours)):
                here = await opener.open_stream()
                there = await accepter.accept_stream()
                await exchange(here, there, 2 * MIB)
            await ours.ping()
            nursery.cancel_scope.cancel()


async def test_a_reader_may_pause_for_minutes(autojump_clock: trio.testing.MockClock) -> None:
    payload = os.urandom(MIB)
    async with muxed_pair() as (left, right), trio.open_nursery() as nursery:
        here = await left.open_stream()
        there = await right.accept_stream()

        @nursery.start_soon
        async def send() -> None:
            await here.write(payload)
            await here.close_write()

        got = b""
        for _ in range(3):
            await trio.sleep(60)
            got += await there.read(100_000)
        assert there._held_bytes <= y.INITIAL_WINDOW_BYTES
        assert got + await read_all(there) == payload


async def test_a_fast_reader_gets_a_larger_window_up_to_the_limit() -> None:
    limits = MuxLimits(max_window_bytes=MIB)
    async with muxed_pair(limits) as (left, right), trio.open_nursery() as nursery:
        here = await left.open_stream()
        there = await right.accept_stream()
        nursery.start_soon(here.write, bytes(4 * MIB))
        received = 0
        while received < 4 * MIB:
            received += len(await there.read(65536))
        assert there._window_target == MIB


async def test_a_cancelled_write_harms_no_other_stream() -> None:
    async with muxed_pair() as (left, right):
        doomed, other = await left.open_stream(), await left.open_stream()
        with trio.move_on_after(0.05) as scope:
            await doomed.write(bytes(8 * MIB))
        assert scope.cancelled_caught
        await doomed.reset()
        doomed_there, other_there = await right.accept_stream(), await right.accept_stream()
        await exchange(other, other_there, MIB)
        with pytest.raises(MuxedStreamReset):
            await read_all(doomed_there)


async def test_the_end_is_told_from_a_reset_and_from_a_lost_connection() -> None:
    async with muxed_pair() as (left, right):
        ended, cut, orphan = [await left.open_stream() for _ in range(3)]
        there = [await right.accept_stream() for _ in range(3)]
        for stream in (ended, cut, orphan):
            await stream.write(b"some")
        for stream in there:
            assert await stream.read(10) == b"some"
        await ended.close_write()
        await cut.reset()
        with pytest.raises(MuxedStreamEOF):
            await there[0].read(1)
        with pytest.raises(MuxedStreamReset):
            await there[1].read(1)
        left._pipe.close()
        with pytest.raises(MuxedStreamReset):
            await there[2].read(1)
        with pytest.raises(MuxedStreamReset):
            await there[2].write(b"x")


async def test_bytes_before_the_end_survive_the_connection() -> None:
    async with muxed_pair() as (left, right):
        here = await left.open_stream()
        there = await right.accept_stream()
        await here.write(b"all of it")
        await here.close_write()
        await trio.testing.wait_all_tasks_blocked()
        await left.close()
        await right.event_closed.wait()
        assert await read_all(there) == b"all of it"


async def test_a_closed_stream_refuses_more_and_resets_a_talking_peer() -> None:
    async with muxed_pair() as (left, right):
        here = await left.open_stream()
        there = await right.accept_stream()
        await here.close()
        with pytest.raises(MuxedStreamClosed):
            await here.write(b"x")
        with pytest.raises(MuxedStreamEOF):
            await there.read(1)
        with pytest.raises(MuxedStreamReset):  # noqa: PT012
            while True:
                await there.write(bytes(1000))
        assert not right._streams


async def test_open_streams_wait_for_a_slot_and_give_it_back() -> None:
    async with muxed_pair(MuxLimits(max_outbound_streams=2)) as (left, right):
        first, _ = await left.open_stream(), await left.open_stream()
        with trio.move_on_after(0.05) as scope:
            await left.open_stream()
        assert scope.cancelled_caught
        await first.close()
        await left.open_stream()
        assert (await right.accept_stream()).stream_id == 1


async def test_pings_are_answered_and_end_with_the_connection() -> None:
    async with muxed_pair() as (left, right):
        assert 0 <= await left.ping() < 1
        right._pipe.close()
        await left.event_closed.wait()
        with pytest.raises(MuxedStreamError):
            await left.ping()
        with pytest.raises(MuxedConnUnavailable):
            await left.accept_stream()
        with pytest.raises(MuxedStreamError):
            await left.open_stream()


async def test_a_silent_peer_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    async with attacked(MuxLimits(keepalive_s=30, keepalive_timeout_s=10)) as (_, victim):
        started = trio.current_time()
        with trio.fail_after(600):
            await victim.event_closed.wait()
        assert trio.current_time() - started == pytest.approx(40)


async def test_a_peer_that_answers_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    async with muxed_pair() as (left, right):
        await trio.sleep(600)
        assert left.is_established
        assert right.is_established


# What a hostile peer may try.


async def never_done(_: bytes) -> None:
    await trio.sleep_forever()


async def is_dropped(victim: Yamux) -> bool:
    with trio.move_on_after(2):
        await victim.event_closed.wait()
    return victim.is_closed


async def test_data_beyond_the_window_ends_the_connection() -> None:
    async with attacked() as (raw, victim):
        await raw.send(y.WINDOW_UPDATE, y.SYN, 1, 0)
        for _ in range(8):
            await raw.send(y.DATA, 0, 1, 32768, bytes(32768))
        await trio.testing.wait_all_tasks_blocked()
        assert not victim.is_closed
        await raw.send(y.DATA, 0, 1, 1, b"!")
        assert await is_dropped(victim)


async def test_data_after_the_end_ends_the_connection() -> None:
    async with attacked() as (raw, victim):
        await raw.send(y.WINDOW_UPDATE, y.SYN | y.FIN, 1, 0)
        await raw.send(y.DATA, 0, 1, 1, b"!")
        assert await is_dropped(victim)


@pytest.mark.parametrize(
    ("kind", "flags", "stream_id", "length"),
    [
        (y.WINDOW_UPDATE, y.SYN, 2, 0),
        (y.WINDOW_UPDATE, y.SYN, 0, 0),
        (9, 0, 1, 0),
        (y.DATA, 0, 7, 0xFFFFFFFF),
        (y.DATA, y.SYN, 1, 0xFFFFFFFF),
    ],
    ids=["even id", "id zero", "unknown type", "4 GiB to nobody", "4 GiB with SYN"],
)
async def test_a_frame_that_breaks_the_rules_ends_the_connection(
    kind: int, flags: int, stream_id: int, length: int
) -> None:
    async with attacked() as (raw, victim):
        await raw.send(kind, flags, stream_id, length)
        assert await is_dropped(victim)


async def test_a_stream_opened_twice_ends_the_connection() -> None:
    async with attacked() as (raw, victim):
        await raw.send(y.WINDOW_UPDATE, y.SYN, 1, 0)
        await raw.send(y.WINDOW_UPDATE, y.SYN, 1, 0)
        assert await is_dropped(victim)


async def test_garbage_instead_of_frames_ends_the_connection() -> None:
    async with attacked() as (raw, victim):
        await raw.pipe.send([os.urandom(4096)])
        assert await is_dropped(victim)


async def test_garbage_instead_of_noise_ends_the_connection() -> None:
    async with attacked() as (raw, victim):
        await raw.pipe._socket.send_all(b"\x01\x00" + os.urandom(256))
        assert await is_dropped(victim)


async def test_streams_beyond_the_cap_are_refused_one_by_one() -> None:
    async with attacked(MuxLimits(max_inbound_streams=4)) as (raw, victim):
        answers = []
        for stream_id in range(1, 21, 2):
            await raw.send(y.WINDOW_UPDATE, y.SYN, stream_id, 0)
            answers.append((await raw.next_frame())[1])
            if answers[-1] == y.ACK:
                await victim.accept_stream()
        assert answers == [y.ACK] * 4 + [y.RST] * 6
        assert len(victim._streams) == 4


async def test_a_peer_that_reads_no_answers_is_dropped() -> None:
    async with attacked() as (raw, victim):
        # A socket in memory is never full; this is what one does that nobody reads from.
        victim._pipe._socket.send_all = never_done  # type: ignore[method-assign]
        ping = y._HEADER.pack(0, y.PING, y.SYN, 0, 1)
        with trio.move_on_after(2):
            with suppress(PipeClosed):
                while not victim.is_closed:
                    await raw.pipe.send([ping * 1000])
        assert victim.is_closed


async def test_unread_bytes_of_all_streams_together_are_bounded() -> None:
    async with attacked(unread_bytes=300_000) as (raw, victim):
        for stream_id in (1, 3, 5):
            await raw.send(y.WINDOW_UPDATE, y.SYN, stream_id, 0)
            for _ in range(2):
                await raw.send(y.DATA, 0, stream_id, 60_000, bytes(60_000))
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert victim.budget.held_bytes <= 300_000
        assert len(victim._streams) == 2
        assert not victim.is_closed


async def test_data_for_a_forgotten_stream_is_answered_with_a_reset() -> None:
    async with attacked() as (raw, victim):
        await raw.send(y.DATA, 0, 11, 3, b"abc")
        assert await raw.next_frame() == (y.WINDOW_UPDATE, y.RST, 11, 0)
        assert not victim.is_closed
