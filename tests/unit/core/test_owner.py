"""The owner's rules as tables: one machine, one thing wrong with it, one reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_node.core.owner import (
    Decision,
    DeviceReading,
    ForeignUse,
    LendingState,
    Moment,
    Owner,
    Reading,
    Rules,
    Switch,
)
from nextgpu_node.hours import parse_window

GB = 1_000_000_000
NOON = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)  # a Wednesday
ON = Switch(enabled=True)
CARD = DeviceReading("cuda:0", 60.0, 150.0, 0.2, 0.0, ())
IDLE = Reading(3600.0, False, 0.0, 8 * GB, 100 * GB, frozenset(), (CARD,))
EVERY_RULE = Rules(
    hours=(parse_window("09:00-17:00"),),
    only_when_idle=True,
    idle_s=300,
    exclusive_apps=("blender", "game"),
    max_temperature_c=80,
    max_power_w=200,
    max_foreign_vram_bytes=1 * GB,
    max_foreign_gpu=0.2,
    max_foreign_cpu=0.5,
    min_free_memory_bytes=1 * GB,
    min_free_disk_bytes=1 * GB,
)


def moment(seconds: float = 0.0) -> Moment:
    local = NOON + timedelta(seconds=seconds)
    return Moment(round(local.timestamp() * 1000), seconds, local)


def decide(reading: Reading, rules: Rules = EVERY_RULE, switch: Switch = ON) -> Decision:
    """What holds once it has been so for a while."""
    owner = Owner(switch, rules)
    owner.decide(reading, moment(0))
    return owner.decide(reading, moment(10)).of_device("cuda:0")


def with_card(**changes: Any) -> Reading:
    return replace(IDLE, devices=(replace(CARD, **changes),))


BLENDER = (ForeignUse("Xorg", GB // 10), ForeignUse("blender", 62 * GB // 10))


def test_a_machine_that_is_left_alone_lends() -> None:
    assert decide(IDLE) == Decision(LendingState.LENDING)


@pytest.mark.parametrize(
    ("reading", "cause", "reason"),
    [
        (replace(IDLE, on_battery=True), "battery", "on battery"),
        (replace(IDLE, idle_s=2.0), "activity", "you are active"),
        (replace(IDLE, running=frozenset({"game"})), "application", "game is running"),
        (replace(IDLE, free_memory_bytes=GB // 2), "memory", "0.5 GB of memory free"),
        (replace(IDLE, free_disk_bytes=GB // 2), "disk", "0.5 GB of disk free"),
        (replace(IDLE, foreign_cpu=0.8), "processor", "other programs use 80% of the processor"),
        (with_card(temperature_c=81.0), "temperature", "81 C"),
        (with_card(power_w=215.0), "power", "215 W"),
        (with_card(foreign=BLENDER), "gpu_memory", "blender uses 6.2 GB"),
        (with_card(foreign_utilisation=0.45), "gpu_use", "other programs use 45% of cuda:0"),
    ],
)
def test_every_pause_has_its_reason_in_one_line(reading: Reading, cause: str, reason: str) -> None:
    decision = decide(reading)
    assert (decision.state, decision.cause, decision.reason) == (
        LendingState.PAUSED, cause, reason
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reading", "cause"),
    [
        (replace(IDLE, on_battery=None), "battery"),
        (replace(IDLE, idle_s=None), "activity"),
        (replace(IDLE, running=None), "application"),
        (replace(IDLE, free_memory_bytes=None), "memory"),
        (replace(IDLE, free_disk_bytes=None), "disk"),
        (replace(IDLE, foreign_cpu=None), "processor"),
        (with_card(temperature_c=None), "temperature"),
        (with_card(power_w=None), "power"),
        (with_card(foreign=None), "gpu_memory"),
        (with_card(foreign_utilisation=None), "gpu_use"),
    ],
)
def test_unknown_counts_against_lending(reading: Reading, cause: str) -> None:
    assert decide(reading).cause == cause


def test_nothing_is_asked_of_sensors_that_no_rule_needs() -> None:
    unknown = Reading(devices=(DeviceReading("cuda:0", foreign=None),))
    assert decide(unknown, Rules(on_battery=True)).lends


def test_outside_its_hours_it_says_when_it_opens() -> None:
    owner = Owner(ON, Rules(hours=(parse_window("22:00-07:00 mon-fri"),), on_battery=True))
    decision = owner.decide(IDLE, moment())
    assert decision.reason == "outside 22:00-07:00 mon-fri"
    assert decision.until_ms == round(NOON.replace(hour=22).timestamp() * 1000)
    assert owner.decide(IDLE, moment(10 * 3600)).lends


def test_one_hot_card_does_not_pause_the_other() -> None:
    hot, cool = replace(CARD, temperature_c=90.0), replace(CARD, label="cuda:1")
    decision = Owner(ON, EVERY_RULE).decide(replace(IDLE, devices=(hot, cool)), moment())
    assert decision.of_device("cuda:0").reason == "90 C"
    assert decision.of_device("cuda:1").lends


# --- what the owner said ------------------------------------------------------------------------


def test_off_stands_before_everything() -> None:
    decision = decide(replace(IDLE, on_battery=True), switch=Switch())
    assert (decision.state, decision.reason) == (LendingState.OFF, "sharing is off")


def test_a_pause_for_a_time_ends_by_itself_and_one_without_does_not() -> None:
    for_an_hour = Switch(True, "pause", moment(3600).wall_ms)
    owner = Owner(for_an_hour, EVERY_RULE)
    decision = owner.decide(IDLE, moment(3599))
    assert (decision.cause, decision.reason) == ("owner", "by you until 13:00")
    assert decision.until_ms == moment(3600).wall_ms
    assert owner.decide(IDLE, moment(3600)).lends
    assert owner.switch == ON

    owner = Owner(Switch(True, "pause"), EVERY_RULE)
    assert owner.decide(IDLE, moment(1_000_000)).reason == "by you"


def test_draining_takes_no_new_units_and_is_no_pause() -> None:
    decision = decide(IDLE, switch=Switch(True, "drain"))
    assert decision.state is LendingState.DRAINING
    assert not decision.lends


@pytest.mark.parametrize("state", list(LendingState))
def test_peers_are_not_told_what_the_owner_does(state: LendingState) -> None:
    told = Decision(state, "gpu_memory", "blender uses 6.2 GB").told
    assert "blender" not in told
    assert bool(told) is (state is not LendingState.LENDING)


def test_what_was_measured_before_off_is_forgotten() -> None:
    owner = Owner(ON, EVERY_RULE)
    assert not owner.decide(with_card(temperature_c=90.0), moment()).of_device("cuda:0").lends
    owner.switch = Switch()
    owner.decide(Reading(), moment(1))
    owner.switch = ON
    assert owner.decide(IDLE, moment(2)).of_device("cuda:0").lends


# --- hysteresis ---------------------------------------------------------------------------------


def run(owner: Owner, readings: list[tuple[float, Reading]]) -> Iterator[bool]:
    for seconds, reading in readings:
        yield owner.decide(reading, moment(seconds)).of_device("cuda:0").lends


def test_a_hot_card_lends_again_when_it_has_been_cooler_for_a_while() -> None:
    owner = Owner(ON, Rules(max_temperature_c=80))
    seen = [(0, 79), (1, 81), (2, 79), (60, 79), (61, 75), (90, 75), (91, 75), (92, 79)]
    readings = [(float(s), with_card(temperature_c=float(c))) for s, c in seen]
    assert list(run(owner, readings)) == [True, False, False, False, False, False, True, True]


def test_a_short_peak_of_another_program_is_no_reason() -> None:
    owner = Owner(ON, Rules(max_foreign_gpu=0.2))
    busy, quiet = with_card(foreign_utilisation=0.9), with_card(foreign_utilisation=0.0)
    readings = [(0.0, busy), (4.0, busy), (4.5, quiet), (5.0, busy), (10.0, busy), (11.0, quiet)]
    assert list(run(owner, readings)) == [True, True, True, True, False, False]


def test_the_owners_return_is_never_waited_for() -> None:
    owner = Owner(ON, replace(EVERY_RULE, hours=()))
    active = replace(IDLE, idle_s=0.0)
    assert list(run(owner, [(0, IDLE), (1, active), (2, IDLE)])) == [True, False, True]


@given(st.lists(st.floats(70, 90), min_size=2, max_size=60))
def test_however_a_sensor_jumps_a_pause_lasts_for_its_time(degrees: list[float]) -> None:
    """Once a second: between a pause and its end lie at least 30 s, all of them cool."""
    owner = Owner(ON, Rules(max_temperature_c=80, on_battery=True))
    lent = list(run(owner, [(float(s), with_card(temperature_c=c)) for s, c in enumerate(degrees)]))
    for second in range(1, len(lent)):
        if lent[second] and not lent[second - 1]:
            assert max(degrees[second - 30 : second + 1]) <= 75
        if degrees[second] > 80:
            assert not lent[second]


def test_new_rules_hold_at_once() -> None:
    owner = Owner(ON, Rules(max_temperature_c=80))
    warm = with_card(temperature_c=82.0)
    assert not owner.decide(warm, moment()).of_device("cuda:0").lends
    owner.rules = Rules(max_temperature_c=90)
    assert owner.decide(warm, moment(1)).of_device("cuda:0").lends
