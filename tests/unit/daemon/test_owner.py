"""The owner's word and the machine's sensors, as the daemon follows them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
import trio.testing

from nextgpu_node.clock import now_ms
from nextgpu_node.config import SharingConfig
from nextgpu_node.core.owner import DeviceReading, LendingState, Reading, Rules
from nextgpu_node.daemon.owner import CALM_S, QUICK_S, OwnerWatch, Watched
from nextgpu_node.hostinfo.devices import Device

CPU = Device("cpu", 0, "Test CPU", 1 << 30, 1 << 30)
ALONE = Reading(3600.0, False, 0.0, 10**12, 10**12, frozenset(), (DeviceReading("cpu"),))
ON = SharingConfig(enabled=True)
Clock = trio.testing.MockClock


@dataclass
class Machine:
    """Sensors that say what they are told to, and count."""

    reading: Reading = ALONE
    reads: int = 0
    asked: list[Rules] = field(default_factory=list)

    def read(self, rules: Rules, devices: Sequence[Device], own_pids: frozenset[int]) -> Reading:
        self.reads += 1
        self.asked.append(rules)
        return self.reading


@dataclass
class Watching:
    watch: OwnerWatch
    machine: Machine
    changes: list[str]

    @property
    def state(self) -> LendingState:
        return self.watch.decision.state


@asynccontextmanager
async def watching(tmp_path: Path, config: SharingConfig = ON) -> AsyncIterator[Watching]:
    machine, changes = Machine(), list[str]()
    watch = OwnerWatch(
        config,
        machine,
        tmp_path / "owner.json",
        lambda: Watched([CPU], frozenset()),
        lambda: changes.append(watch.decision.state.value),
    )
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            yield Watching(watch, machine, changes)
            nursery.cancel_scope.cancel()


async def until(one: Watching, state: LendingState) -> float:
    began_s = trio.current_time()
    while one.state is not state:  # noqa: ASYNC110  the clock jumps
        await trio.sleep(0.1)
    return trio.current_time() - began_s


async def test_nothing_is_lent_before_the_machine_was_looked_at(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with watching(tmp_path) as one:
        assert (one.state, one.watch.decision.cause) == (LendingState.PAUSED, "starting")
        await until(one, LendingState.LENDING)
        assert one.machine.reads == 1


async def test_while_sharing_is_off_no_sensor_is_read(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with watching(tmp_path, SharingConfig()) as one:
        await trio.sleep(1000)
        assert (one.state, one.machine.reads) == (LendingState.OFF, 0)
        one.watch.say(enabled=True)
        await until(one, LendingState.LENDING)


async def test_the_machine_is_looked_at_as_often_as_its_rules_need(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with watching(tmp_path) as one:
        await until(one, LendingState.LENDING)
        assert one.watch.period_s == CALM_S
        before = one.machine.reads
        one.watch.set_config(replace(ON, only_when_idle=True))
        while one.machine.reads == before:  # noqa: ASYNC110  the clock jumps
            await trio.sleep(0.01)
        assert one.machine.asked[-1].only_when_idle
        assert one.watch.period_s == QUICK_S


async def test_an_owner_who_comes_back_is_noticed_by_the_next_reading(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with watching(tmp_path, replace(ON, only_when_idle=True)) as one:
        await until(one, LendingState.LENDING)
        before = one.machine.reads
        one.machine.reading = replace(ALONE, idle_s=0.0)
        await until(one, LendingState.PAUSED)
        # One reading may have been on its way; the next one says it, a second later.
        assert one.machine.reads - before <= 2
        assert one.watch.period_s == QUICK_S
        assert one.watch.decision.reason == "you are active"
        assert one.changes == ["lending", "paused"]


async def test_a_word_holds_when_it_is_said(autojump_clock: Clock, tmp_path: Path) -> None:
    async with watching(tmp_path) as one:
        await until(one, LendingState.LENDING)
        one.watch.say(enabled=True, order="pause")
        assert one.state is LendingState.PAUSED
        one.watch.say(enabled=True)
        assert one.state is LendingState.LENDING
        one.watch.say(enabled=True, order="drain")
        assert one.state is LendingState.DRAINING
        one.watch.say(enabled=False)
        assert one.state is LendingState.OFF


async def test_a_pause_outlives_the_daemon_and_so_does_its_end(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    later = now_ms() + 3_600_000
    async with watching(tmp_path) as one:
        one.watch.say(enabled=True, order="pause", until_ms=later)
    async with watching(tmp_path) as again:
        await trio.sleep(10)
        assert again.watch.decision.until_ms == later
        again.watch.say(enabled=True)
    assert not (tmp_path / "owner.json").exists()
    async with watching(tmp_path) as third:
        third.watch.say(enabled=True, order="pause", until_ms=now_ms() - 1)
        await until(third, LendingState.LENDING)
    assert not (tmp_path / "owner.json").exists()


@pytest.mark.parametrize("text", ["", "{", '{"order": "sell"}', "[]", "\xff"])
async def test_a_file_that_is_not_understood_is_a_pause(
    autojump_clock: Clock, tmp_path: Path, text: str
) -> None:
    (tmp_path / "owner.json").write_text(text, encoding="latin-1")
    async with watching(tmp_path) as one:
        await trio.sleep(10)
        assert (one.state, one.watch.decision.cause) == (LendingState.PAUSED, "owner")
        one.watch.say(enabled=True)
        await until(one, LendingState.LENDING)
