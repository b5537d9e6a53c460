"""Watches the machine for its owner: sensors, clock and the owner's word -> core.owner's decision.

    OwnerWatch.run     a reading every second or so, in a thread, while sharing is switched on
    say, set_config    the owner's word and settings, at once
    decision           what holds now; `on_change` is called for another one

The owner's word outlives the daemon: a pause that was to last an hour does, whatever restarts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import structlog
import trio

from nextgpu_node.clock import now_ms
from nextgpu_node.config import SharingConfig
from nextgpu_node.core.owner import Decision, Moment, Order, Owner, Reading, Rules, Switch
from nextgpu_node.errors import NextGPUError
from nextgpu_node.files import write_whole
from nextgpu_node.hostinfo.devices import Device
from nextgpu_node.hostinfo.sensors import Sensors
from nextgpu_node.hours import parse_window

log = structlog.get_logger()

# The owner who comes back is noticed within one of these.
QUICK_S: Final = 1.0
# Where nothing that moves quickly is watched.
CALM_S: Final = 5.0
_MAX_FILE_BYTES: Final = 4096


def rules_of(config: SharingConfig) -> Rules:
    """The owner's settings, as core takes them."""
    return Rules(
        hours=tuple(map(parse_window, config.hours)),
        on_battery=config.on_battery,
        only_when_idle=config.only_when_idle,
        idle_s=config.idle_minutes * 60.0,
        exclusive_apps=config.exclusive_apps,
        max_temperature_c=config.max_temperature,
        max_power_w=config.max_power,
        max_foreign_vram_bytes=config.max_foreign_vram_bytes,
        max_foreign_gpu=config.max_foreign_gpu / 100,
        max_foreign_cpu=config.max_foreign_cpu / 100,
        min_free_memory_bytes=config.min_free_memory_bytes,
        min_free_disk_bytes=config.min_free_disk_bytes,
    )


class _Saved(msgspec.Struct, frozen=True):
    """The file: what the owner said last, where it is not simply on or off."""

    order: Order
    until_ms: int = 0


@dataclass(frozen=True, slots=True)
class Watched:
    """What to read now: devices that may be lent, and which processes are ours."""

    devices: Sequence[Device]
    own_pids: frozenset[int]


class OwnerWatch:
    """`run` it once.  `watched` says, for each reading, what to look at."""

    def __init__(
        self,
        config: SharingConfig,
        sensors: Sensors,
        file: Path,
        watched: Callable[[], Watched],
        on_change: Callable[[], None],
    ) -> None:
        self._sensors = sensors
        self._file = file
        self._watched = watched
        self._on_change = on_change
        self._owner = Owner(_restored(file, config.enabled), rules_of(config))
        self._reading: Reading | None = None
        self._wake = trio.Event()
        self.decision = self._decide()

    @property
    def switch(self) -> Switch:
        return self._owner.switch

    async def run(self) -> None:
        """Read and decide, until cancelled.  While sharing is off nothing is read."""
        while True:
            self._wake = trio.Event()
            if self._owner.switch.enabled:
                await self._read()
            else:
                self._reading = None
            self._publish()
            with trio.move_on_after(self.period_s):
                await self._wake.wait()

    def say(self, *, enabled: bool, order: Order = "lend", until_ms: int = 0) -> None:
        """The owner's word.  It holds when this returns."""
        self._owner.switch = Switch(enabled, order, until_ms)
        self._save()
        self._publish()
        self._wake.set()

    def set_config(self, config: SharingConfig) -> None:
        """New settings, and a fresh reading for them."""
        self._owner.rules = rules_of(config)
        self._wake.set()

    @property
    def period_s(self) -> float:
        """How long until the machine is looked at again."""
        if not self._owner.switch.enabled:
            return float("inf")
        rules = self._owner.rules
        quick = rules.only_when_idle or rules.exclusive_apps or rules.max_foreign_cpu
        has_card = any(device.kind != "cpu" for device in self._watched().devices)
        return QUICK_S if quick or has_card or rules.max_temperature_c else CALM_S

    async def _read(self) -> None:
        watched = self._watched()
        self._reading = await trio.to_thread.run_sync(
            self._sensors.read,
            self._owner.rules,
            watched.devices,
            watched.own_pids,
            abandon_on_cancel=True,
        )

    def _decide(self) -> Decision:
        before = self._owner.switch
        decision = self._owner.decide(self._reading, _moment())
        if self._owner.switch != before:
            self._save()
        return decision

    def _publish(self) -> None:
        decision = self._decide()
        if decision == self.decision:
            return
        if decision.state is not self.decision.state or decision.cause != self.decision.cause:
            log.info("sharing.state_changed", state=decision.state.value, cause=decision.cause)
        self.decision = decision
        self._on_change()

    def _save(self) -> None:
        switch = self._owner.switch
        try:
            if not switch.enabled or switch.order == "lend":
                self._file.unlink(missing_ok=True)
            else:
                saved = msgspec.json.encode(_Saved(switch.order, switch.until_ms))
                write_whole(self._file, [saved], force=True)
        except (OSError, NextGPUError) as exc:
            # It holds for this run all the same.
            log.warning("sharing.state_not_saved", error=type(exc).__name__)


def _restored(file: Path, enabled: bool) -> Switch:
    """What the owner said before the last restart; a file that is not ours says nothing."""
    try:
        with file.open("rb") as stream:
            saved = msgspec.json.decode(stream.read(_MAX_FILE_BYTES), type=_Saved)
    except FileNotFoundError:
        return Switch(enabled)
    except (OSError, msgspec.DecodeError):
        # The safer guess: the owner wanted something else than to lend.
        log.warning("sharing.state_not_read")
        return Switch(enabled, "pause")
    return Switch(enabled, saved.order, saved.until_ms)


def _moment() -> Moment:
    return Moment(now_ms(), time.monotonic(), datetime.now(_zone()))


def _zone() -> tzinfo | None:
    """The zone of this machine with its rules.  Asked for each time: its owner may travel."""
    name = os.environ.get("TZ", "")
    try:
        if name:
            return ZoneInfo(name.removeprefix(":"))
        return _zone_of_file(Path("/etc/localtime").resolve())
    except (OSError, ValueError, ZoneInfoNotFoundError):
        return datetime.now(UTC).astimezone().tzinfo


@lru_cache(maxsize=4)
def _zone_of_file(path: Path) -> ZoneInfo:
    with path.open("rb") as file:
        return ZoneInfo.from_file(file)
