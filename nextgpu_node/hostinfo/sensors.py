"""The machine as the owner's rules see it: one reading, of what the rules ask for and no more.

    HostSensors    this machine: psutil, /sys/class/power_supply, NVML, hostinfo/activity.py
    Sensors        what both it and a simulated machine are to the daemon

Everything here may block for as long as a driver or a bus likes: a daemon uses a thread.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import psutil

from nextgpu_node.core.owner import DeviceReading, ForeignUse, Reading, Rules
from nextgpu_node.hostinfo.activity import ActivityWatch
from nextgpu_node.hostinfo.devices import Device, Usage, busy_shares, tenants, usage

# A D-Bus round trip for each session: not every second.
_IDLE_MAX_AGE_S: Final = 2.0
_COMM_CHARS: Final = 15  # what the kernel keeps of a program's name (proc_pid_comm(5))
_HIDDEN: Final = "another program"


class Sensors(Protocol):
    """Reads a machine."""

    def read(self, rules: Rules, devices: Sequence[Device], own_pids: frozenset[int]) -> Reading:
        """What `rules` need to know; `own_pids` are the daemon's and its workers'."""


class HostSensors:
    """This machine.  `disk` is where the node keeps its state."""

    def __init__(self, disk: Path, root: Path = Path("/")) -> None:
        self._disk = disk
        self._root = root
        self._activity = ActivityWatch()
        self._idle: tuple[float, float | None] | None = None
        self._cpu = CpuShare()
        self._gpu_since_us: dict[str, int] = {}

    def read(self, rules: Rules, devices: Sequence[Device], own_pids: frozenset[int]) -> Reading:
        return Reading(
            idle_s=self._idle_s() if rules.only_when_idle else None,
            on_battery=None if rules.on_battery else on_battery(self._root),
            foreign_cpu=self._cpu.foreign(own_pids) if rules.max_foreign_cpu else None,
            free_memory_bytes=psutil.virtual_memory().available,
            free_disk_bytes=_free_disk(self._disk) if rules.min_free_disk_bytes else None,
            running=running_apps(rules.exclusive_apps, self._root / "proc"),
            devices=tuple(self._device(rules, device, own_pids) for device in devices),
        )

    def _idle_s(self) -> float | None:
        now_s = time.monotonic()
        if self._idle is None or now_s - self._idle[0] >= _IDLE_MAX_AGE_S:
            self._idle = (now_s, self._activity.idle_s())
        return self._idle[1]

    def _device(self, rules: Rules, device: Device, own_pids: frozenset[int]) -> DeviceReading:
        watched = rules.max_temperature_c or rules.max_power_w
        now = usage(device) if watched else Usage(None, None, None)
        shares = self._shares(device) if rules.max_foreign_gpu else None
        return DeviceReading(
            label=device.label,
            temperature_c=now.temperature_c,
            power_w=now.power_w,
            utilisation=now.utilisation,
            foreign_utilisation=_foreign_share(device, shares, own_pids),
            foreign=foreign_use(device, own_pids) if rules.max_foreign_vram_bytes else None,
        )

    def _shares(self, device: Device) -> dict[int, float] | None:
        if device.kind == "cpu":
            return {}
        since_us = self._gpu_since_us.get(device.label, 0)
        self._gpu_since_us[device.label] = time.time_ns() // 1000
        return busy_shares(device, since_us)


def _foreign_share(
    device: Device, shares: dict[int, float] | None, own_pids: frozenset[int]
) -> float | None:
    if shares is None:
        return None
    return min(1.0, sum(share for pid, share in shares.items() if pid not in own_pids))


def foreign_use(device: Device, own_pids: frozenset[int]) -> tuple[ForeignUse, ...] | None:
    """None where it is not known of every other program how much it holds."""
    found = tenants(device)
    if found is None:
        return None
    uses: list[ForeignUse] = []
    for tenant in found:
        if tenant.pid in own_pids:
            continue
        if tenant.memory_bytes is None:
            return None
        uses.append(ForeignUse(_program_name(tenant.pid), tenant.memory_bytes))
    return tuple(uses)


def _program_name(pid: int) -> str:
    """As its owner knows it; a process of another user may be hidden from a service."""
    try:
        return psutil.Process(pid).name() or _HIDDEN
    except psutil.Error:
        return _HIDDEN


def on_battery(root: Path) -> bool | None:
    """Whether this machine runs from a battery (Linux ABI/testing/sysfs-class-power).

    False where a mains supply is online, or where there is no battery of the machine's own; a
    mouse's battery (scope "Device") does not count.
    """
    supplies = root / "sys/class/power_supply"
    if not (root / "sys/class").is_dir():
        return None  # no sysfs at all: nothing is known
    discharging, unknown = False, False
    for supply in sorted(supplies.glob("*")):
        kind = _read(supply / "type")
        if kind in ("Mains", "USB") and _read(supply / "online") == "1":
            return False
        if kind == "Battery" and _read(supply / "scope") != "Device":
            status = _read(supply / "status")
            discharging |= status == "Discharging"
            unknown |= status in ("", "Unknown")
    if discharging:
        return True
    return None if unknown else False


def running_apps(wanted: Sequence[str], proc: Path) -> frozenset[str] | None:
    """Those of `wanted` that run.  None where other users' processes are hidden (ProtectProc=)."""
    if not wanted:
        return frozenset()
    # Process 1 is always there; where it can not be seen, others can not either.
    if not (proc / "1").is_dir():
        return None
    short = {name[:_COMM_CHARS]: name for name in wanted}
    names = set(_program_names(proc))
    return frozenset(name for cut, name in short.items() if cut in names)


def _program_names(proc: Path) -> Iterator[str]:
    """Of every process, once a second: without pathlib and file objects, ten times as cheap."""
    for name in os.listdir(proc):  # noqa: PTH208
        if not name.isdigit():
            continue
        with suppress(OSError):  # it may have ended meanwhile
            fd = os.open(f"{proc}/{name}/comm", os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.read(fd, 2 * _COMM_CHARS)
            finally:
                os.close(fd)
            yield found.decode(errors="replace").rstrip("\n")


def _free_disk(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


class CpuShare:
    """How busy other programs keep all cores, between two calls."""

    def __init__(self) -> None:
        self._before: tuple[float, float, float] | None = None

    def foreign(self, own_pids: Iterable[int]) -> float | None:
        """0.0 to 1.0; None at the first call and for calls in the same tick."""
        times = psutil.cpu_times()
        # guest and guest_nice are already part of user and nice (proc_stat(5)).
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0)
        own = sum(map(_cpu_seconds, own_pids))
        before, self._before = self._before, (total, idle, own)
        if before is None or total <= before[0]:
            return None
        passed = total - before[0]
        # A worker that ended takes its time with it: it must not look like anybody's else.
        ours = max(0.0, own - before[2])
        return min(1.0, max(0.0, (passed - (idle - before[1]) - ours) / passed))


def _cpu_seconds(pid: int) -> float:
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0
