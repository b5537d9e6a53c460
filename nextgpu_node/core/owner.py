"""Whether this machine lends now.  Pure: settings, a reading of the sensors and a clock come in,
a state with a one-line reason goes out.

    Switch    what the owner said: on, off, pause (for a time), drain  ─┐
    Rules     the owner's settings                                      ├─► Owner.decide ─► Decision
    Reading   what the sensors say; None is unknown                     │
    Moment    now                                                      ─┘

The first cause in the order of `_MACHINE` and `_DEVICE` that holds is the reason.  What is unknown
counts against lending, where a rule asks for it: unknown is active, on battery, too hot.

A cause that holds goes on holding until its opposite has been true for a while, and some have a
lower threshold to leave than to enter: else a device would heat up, pause, cool and begin again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Final, Literal, TypeAlias

from nextgpu_node.hours import Window, is_open, next_change

_GIGA: Final = 1_000_000_000
_COOLING_C: Final = 5
_POWER_RELIEF: Final = 0.9
_MEMORY_RELIEF: Final = 1.25

Order: TypeAlias = Literal["lend", "pause", "drain"]


class LendingState(Enum):
    """What the node does with its device."""

    OFF = "off"
    PAUSED = "paused"
    DRAINING = "draining"
    LENDING = "lending"


@dataclass(frozen=True, slots=True)
class Switch:
    """What the owner said last.  `until_ms` ends a pause by itself; 0: not before `resume`."""

    enabled: bool = False
    order: Order = "lend"
    until_ms: int = 0


@dataclass(frozen=True, slots=True)
class Rules:
    """The owner's settings.  Shares are from 0 to 1; 0, None or empty: no such rule."""

    hours: tuple[Window, ...] = ()
    on_battery: bool = False
    only_when_idle: bool = False
    idle_s: float = 300.0
    exclusive_apps: tuple[str, ...] = ()
    max_temperature_c: int = 0
    max_power_w: int = 0
    max_foreign_vram_bytes: int = 0
    max_foreign_gpu: float = 0.0
    max_foreign_cpu: float = 0.0
    min_free_memory_bytes: int = 0
    min_free_disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ForeignUse:
    """A program that is not ours on a device, with the device memory that it holds."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One device at this moment.  None: it does not say."""

    label: str
    temperature_c: float | None = None
    power_w: float | None = None
    utilisation: float | None = None  # everybody's, ours too
    foreign_utilisation: float | None = None
    foreign: tuple[ForeignUse, ...] | None = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """The machine at this moment.  None: unknown."""

    idle_s: float | None = None  # since the owner's last input
    on_battery: bool | None = None
    foreign_cpu: float | None = None  # share of all cores that other programs keep busy
    free_memory_bytes: int | None = None
    free_disk_bytes: int | None = None
    running: frozenset[str] | None = frozenset()  # those of the exclusive applications that run
    devices: tuple[DeviceReading, ...] = ()


@dataclass(frozen=True, slots=True)
class Moment:
    """Now, by three clocks: the wall's, one that never jumps, and the local one with its zone."""

    wall_ms: int
    steady_s: float
    local: datetime


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why something is not lent: a word for programs, a line for people."""

    cause: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """`cause` and `reason` are empty while lending; `until_ms` is 0 where nobody knows.

    `devices` are the verdicts on single devices, by label.
    """

    state: LendingState
    cause: str = ""
    reason: str = ""
    until_ms: int = 0
    devices: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def lends(self) -> bool:
        return self.state is LendingState.LENDING

    @property
    def runs(self) -> bool:
        """Whether units that run may go on."""
        return self.state in (LendingState.LENDING, LendingState.DRAINING)

    @property
    def told(self) -> str:
        """What peers are told: that the owner decided, never what the owner does meanwhile."""
        match self.state:
            case LendingState.LENDING:
                return ""
            case LendingState.OFF:
                return "sharing is off"
            case LendingState.DRAINING:
                return "takes no new units"
            case _:
                return "paused by its owner"

    def of_device(self, label: str) -> Decision:
        """The decision for one device: the machine's, or its own reason to pause."""
        verdict = self.devices.get(label)
        if verdict is None or not self.runs:
            return self
        return Decision(LendingState.PAUSED, verdict.cause, verdict.reason)


# --- causes -----------------------------------------------------------------------------------

# Each takes `held`: whether it holds already, and then asks for more before it lets go.
_MachineCheck: TypeAlias = Callable[[Rules, Reading, datetime, bool], str]
_DeviceCheck: TypeAlias = Callable[[Rules, DeviceReading, bool], str]


def _hours(rules: Rules, _reading: Reading, local: datetime, _held: bool) -> str:
    if is_open(rules.hours, local):
        return ""
    return "outside " + "; ".join(map(str, rules.hours))


def _battery(rules: Rules, reading: Reading, _local: datetime, _held: bool) -> str:
    if rules.on_battery or reading.on_battery is False:
        return ""
    return "on battery" if reading.on_battery else "on battery, for all that is known"


def _activity(rules: Rules, reading: Reading, _local: datetime, _held: bool) -> str:
    if not rules.only_when_idle:
        return ""
    if reading.idle_s is None:
        return "you may be active: nothing here tells (see `nextgpu doctor`)"
    return "you are active" if reading.idle_s < rules.idle_s else ""


def _application(rules: Rules, reading: Reading, _local: datetime, _held: bool) -> str:
    if not rules.exclusive_apps:
        return ""
    if reading.running is None:
        return "which programs run can not be seen from here"
    found = sorted(set(rules.exclusive_apps) & reading.running)
    return f"{found[0]} is running" if found else ""


def _memory(rules: Rules, reading: Reading, _local: datetime, held: bool) -> str:
    return _shortage("memory", reading.free_memory_bytes, rules.min_free_memory_bytes, held=held)


def _disk(rules: Rules, reading: Reading, _local: datetime, held: bool) -> str:
    return _shortage("disk", reading.free_disk_bytes, rules.min_free_disk_bytes, held=held)


def _shortage(what: str, free: int | None, least: int, *, held: bool) -> str:
    if not least:
        return ""
    if free is None:
        return f"how much {what} is free is unknown"
    return f"{_gigabytes(free)} of {what} free" if free < least * _relief(held) else ""


def _relief(held: bool) -> float:
    return _MEMORY_RELIEF if held else 1.0


def _processor(rules: Rules, reading: Reading, _local: datetime, _held: bool) -> str:
    return _busy("the processor", reading.foreign_cpu, rules.max_foreign_cpu)


def _busy(what: str, share: float | None, limit: float) -> str:
    if not limit:
        return ""
    if share is None:
        return f"how busy {what} is with other programs is unknown"
    return f"other programs use {share:.0%} of {what}" if share > limit else ""


def _temperature(rules: Rules, device: DeviceReading, held: bool) -> str:
    limit = rules.max_temperature_c
    if not limit:
        return ""
    if device.temperature_c is None:
        return f"the temperature of {device.label} is unknown"
    if device.temperature_c > limit - (_COOLING_C if held else 0):
        return f"{device.temperature_c:.0f} C"
    return ""


def _power(rules: Rules, device: DeviceReading, held: bool) -> str:
    limit = rules.max_power_w * (_POWER_RELIEF if held else 1.0)
    if not limit:
        return ""
    if device.power_w is None:
        return f"the power of {device.label} is unknown"
    return f"{device.power_w:.0f} W" if device.power_w > limit else ""


def _foreign_vram(rules: Rules, device: DeviceReading, _held: bool) -> str:
    """One program with much counts, and many with little together."""
    if not rules.max_foreign_vram_bytes:
        return ""
    if device.foreign is None:
        return f"who else uses {device.label} is unknown"
    total = sum(use.memory_bytes for use in device.foreign)
    if total <= rules.max_foreign_vram_bytes:
        return ""
    largest = max(device.foreign, key=lambda use: use.memory_bytes)
    return f"{largest.name} uses {_gigabytes(largest.memory_bytes)}"


def _foreign_gpu(rules: Rules, device: DeviceReading, _held: bool) -> str:
    return _busy(device.label, device.foreign_utilisation, rules.max_foreign_gpu)


@dataclass(frozen=True, slots=True)
class _Timing:
    """Seconds that a cause must be seen before it holds, and be gone before it lets go."""

    enter_s: float = 0.0
    leave_s: float = 0.0


_MACHINE: Final[tuple[tuple[str, _MachineCheck, _Timing], ...]] = (
    ("hours", _hours, _Timing()),
    ("battery", _battery, _Timing(leave_s=10)),
    # No delay to leave: `idle_s` is one.
    ("activity", _activity, _Timing()),
    ("application", _application, _Timing(leave_s=10)),
    ("memory", _memory, _Timing(leave_s=30)),
    ("disk", _disk, _Timing(leave_s=30)),
    ("processor", _processor, _Timing(enter_s=5, leave_s=30)),
)
_DEVICE: Final[tuple[tuple[str, _DeviceCheck, _Timing], ...]] = (
    ("temperature", _temperature, _Timing(leave_s=30)),
    # A device draws little as soon as it is left alone: without a minute it would flap.
    ("power", _power, _Timing(enter_s=2, leave_s=60)),
    ("gpu_memory", _foreign_vram, _Timing(leave_s=10)),
    ("gpu_use", _foreign_gpu, _Timing(enter_s=5, leave_s=30)),
)


@dataclass(slots=True)
class _Held:
    """The memory of one cause: since when it is seen, or gone; and what it last said."""

    holds: bool = False
    since_s: float | None = None  # of the change that is waiting
    reason: str = ""

    def see(self, reason: str, timing: _Timing, now_s: float) -> str:
        """`reason` while the cause holds, else ""."""
        if bool(reason) is self.holds:
            self.since_s = None
            self.reason = reason
            return reason
        if self.since_s is None:
            self.since_s = now_s
        if now_s - self.since_s >= (timing.enter_s if reason else timing.leave_s):
            self.holds, self.since_s, self.reason = bool(reason), None, reason
        return self.reason if self.holds else ""


class Owner:
    """The owner's side of the node.  `decide` as often as there is a new reading."""

    def __init__(self, switch: Switch, rules: Rules) -> None:
        self.switch = switch
        self._rules = rules
        self._held: dict[tuple[str, str], _Held] = {}

    @property
    def rules(self) -> Rules:
        return self._rules

    @rules.setter
    def rules(self, rules: Rules) -> None:
        """New rules hold at once: what waited for the old ones is forgotten."""
        if rules != self._rules:
            self._rules = rules
            self._held.clear()

    def decide(self, reading: Reading | None, now: Moment) -> Decision:
        """What holds now.  Without a reading nothing is known, and unknown is no permission."""
        self._end_pause(now)
        if not self.switch.enabled:
            # The sensors are not even read then: what they said before is no longer true.
            self._held.clear()
            return Decision(LendingState.OFF, "off", "sharing is off")
        pause = self._paused(now)
        if reading is None:
            return pause or Decision(LendingState.PAUSED, "starting", "starting")
        devices = {
            device.label: verdict
            for device in reading.devices
            if (verdict := self._judge_device(device, now.steady_s)) is not None
        }
        machine = self._judge_machine(reading, now)
        if pause is not None:
            return pause
        if machine is not None:
            until_ms = self._opens_at_ms(now) if machine.cause == "hours" else 0
            return Decision(LendingState.PAUSED, machine.cause, machine.reason, until_ms, devices)
        if self.switch.order == "drain":
            return Decision(LendingState.DRAINING, "drain", "takes no new units", 0, devices)
        return Decision(LendingState.LENDING, devices=devices)

    def _end_pause(self, now: Moment) -> None:
        switch = self.switch
        if switch.order == "pause" and switch.until_ms and now.wall_ms >= switch.until_ms:
            self.switch = Switch(enabled=switch.enabled)

    def _paused(self, now: Moment) -> Decision | None:
        """What the owner said stands before anything that a sensor says."""
        switch = self.switch
        if switch.order != "pause":
            return None
        until = f" until {_local_time(switch.until_ms, now)}" if switch.until_ms else ""
        return Decision(LendingState.PAUSED, "owner", f"by you{until}", switch.until_ms)

    def _judge_machine(self, reading: Reading, now: Moment) -> Verdict | None:
        """Every cause is looked at, so that none misses its time; the first one is told."""
        found = []
        for cause, check, timing in _MACHINE:
            held = self._held.setdefault(("", cause), _Held())
            said = check(self._rules, reading, now.local, held.holds)
            found.append(Verdict(cause, held.see(said, timing, now.steady_s)))
        return _first(found)

    def _judge_device(self, device: DeviceReading, now_s: float) -> Verdict | None:
        found = []
        for cause, check, timing in _DEVICE:
            held = self._held.setdefault((device.label, cause), _Held())
            said = check(self._rules, device, held.holds)
            found.append(Verdict(cause, held.see(said, timing, now_s)))
        return _first(found)

    def _opens_at_ms(self, now: Moment) -> int:
        change = next_change(self._rules.hours, now.local)
        return round(change.timestamp() * 1000) if change else 0


def _first(verdicts: Iterable[Verdict]) -> Verdict | None:
    return next((verdict for verdict in verdicts if verdict.reason), None)


def _local_time(wall_ms: int, now: Moment) -> str:
    moment = datetime.fromtimestamp(wall_ms / 1000, now.local.tzinfo)
    return f"{moment:%H:%M}" if wall_ms - now.wall_ms < 86_400_000 else f"{moment:%Y-%m-%d %H:%M}"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / _GIGA:.1f} GB"
