"""Announcements keep to what remote nodes accept."""

from __future__ import annotations

import trio
import trio.testing

from nextgpu_node.p2p.dht import Pacer


async def test_a_burst_passes_and_the_rest_waits(autojump_clock: trio.testing.MockClock) -> None:
    pacer = Pacer(10, 11.0)
    times: list[float] = []
    started = trio.current_time()
    for _ in range(25):
        await pacer.wait_turn()
        times.append(trio.current_time() - started)
    assert times == [0.0] * 10 + [11.0] * 10 + [22.0] * 5


async def test_no_window_ever_holds_more_than_a_burst(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pacer = Pacer(10, 11.0)
    times: list[float] = []

    async def caller(every_s: float) -> None:
        for _ in range(20):
            await pacer.wait_turn()
            times.append(trio.current_time())
            await trio.sleep(every_s)

    async with trio.open_nursery() as nursery:
        for every_s in (0.1, 0.7, 3.0):
            nursery.start_soon(caller, every_s)
    for first, eleventh in zip(times, times[10:], strict=False):
        assert eleventh - first >= 11.0


async def test_a_caller_that_gives_up_frees_its_turn(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pacer = Pacer(1, 10.0)
    started = trio.current_time()
    await pacer.wait_turn()
    with trio.move_on_after(1):
        await pacer.wait_turn()
    await pacer.wait_turn()
    assert trio.current_time() - started == 10.0
