"""The devices of this machine, without torch: NVML for NVIDIA cards, /proc and psutil for the CPU.

    list_devices() -> [Device(kind="cuda", index=0, …), Device(kind="cpu", index=0, …)]

NVML (docs.nvidia.com/deploy/nvml-api) is loaded at the first call and kept.  No driver means no
cuda device and is no error.  Calls may block while a driver hangs: a daemon uses a thread.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

# Free memory moves by the second, and each NVML query costs up to a millisecond.
MAX_AGE_S = 1.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Device:
    """One thing that can run a work unit.

    `index` counts within `kind`, in PCI bus order, as CUDA does under
    CUDA_DEVICE_ORDER=PCI_BUS_ID; MIG instances count as devices of their own.
    `compute_capability` is "8.9", or "" for a CPU; `driver` is "" for a CPU.
    `uuid` selects the device for CUDA_VISIBLE_DEVICES.  It identifies the card, so it stays on
    this machine and is not printed.
    """

    kind: Literal["cpu", "cuda"]
    index: int
    name: str
    total_memory_bytes: int
    free_memory_bytes: int
    compute_capability: str = ""
    driver: str = ""
    minor: int | None = None  # N of /dev/nvidiaN; None for a CPU, or where the driver does not say
    uuid: str = field(default="", repr=False)

    @property
    def label(self) -> str:
        """torch's name for it: "cpu", "cuda:0"."""
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a device is doing now.  None: the machine does not say."""

    utilisation: float | None  # 0.0 to 1.0, all programs together
    temperature_c: float | None
    power_w: float | None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A process on a card.  `memory_bytes` is None where the driver does not say."""

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class NvmlState:
    """What NVML answered: a driver version, or the reason why there is none."""

    driver: str
    problem: str


class _NoDriver(Exception):
    """NVML is not there or does not answer; the text is its own reason."""


_nvml_lock = threading.Lock()
_nvml_started = False


@contextmanager
def _nvml() -> Iterator[Any]:
    """The started pynvml module, one caller at a time; its errors become _NoDriver."""
    # Imported here: it costs 10 ms that a submitter or relay never needs.
    import pynvml

    global _nvml_started
    with _nvml_lock:
        try:
            if not _nvml_started:
                pynvml.nvmlInit()
                _nvml_started = True
            yield pynvml
        except (pynvml.NVMLError, OSError) as exc:
            raise _NoDriver(str(exc)) from exc


_cached: tuple[float, tuple[Device, ...]] | None = None


def list_devices(*, max_age_s: float = MAX_AGE_S) -> list[Device]:
    """Every device, NVIDIA cards first; the CPU is always last.

    The answer may be `max_age_s` old; 0 asks anew.
    """
    global _cached
    now = time.monotonic()
    if _cached is None or now - _cached[0] >= max_age_s:
        _cached = (now, (*_cuda_devices(), _cpu_device()))
    return list(_cached[1])


def choose_device(devices: Sequence[Device], wanted: str) -> Device | None:
    """The device that `sharing.device` names; "auto" takes the card with the most memory, else
    the CPU.  None where it is not there."""
    if wanted != "auto":
        return next((device for device in devices if device.label == wanted), None)
    return max(devices, key=lambda d: (d.kind == "cuda", d.total_memory_bytes), default=None)


def usage(device: Device) -> Usage:
    """How busy, hot and hungry the device is at this moment."""
    if device.kind == "cpu":
        return Usage(_cpu_utilisation(), _cpu_temperature(), power_w=None)
    return _cuda_usage(device)


def tenants(device: Device) -> list[Tenant] | None:
    """Every process that holds memory of a card, for computing or for pictures.

    None where the driver does not say; a CPU has none.
    """
    if device.kind == "cpu":
        return []
    try:
        with _nvml() as nvml:
            handle = nvml.nvmlDeviceGetHandleByUUID(device.uuid)
            computing = _ask(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
            drawing = _ask(nvml, lambda: nvml.nvmlDeviceGetGraphicsRunningProcesses(handle))
    except _NoDriver:
        return None
    if computing is None:
        return None
    # A process that does both is in both lists, each time with all of its memory.
    found = {info.pid: info.usedGpuMemory for info in (*(drawing or ()), *computing)}
    return [Tenant(pid, size if size is None else int(size)) for pid, size in found.items()]


def busy_shares(device: Device, since_us: int) -> dict[int, float] | None:
    """Process id -> share of the card's time in the samples after `since_us` (of the epoch).

    Processes that did nothing are left out.  None where the driver does not say: on MIG instances
    and on cards before Maxwell.
    """
    try:
        with _nvml() as nvml:
            handle = nvml.nvmlDeviceGetHandleByUUID(device.uuid)
            try:
                samples = nvml.nvmlDeviceGetProcessUtilization(handle, since_us)
            except nvml.NVMLError as exc:
                # No sample is no process that computed.
                return {} if exc.value == nvml.NVML_ERROR_NOT_FOUND else None
    except _NoDriver:
        return None
    latest = sorted(samples, key=lambda sample: sample.timeStamp)
    return {sample.pid: sample.smUtil / 100 for sample in latest if sample.timeStamp > since_us}


def nvml_state() -> NvmlState:
    """Whether the NVIDIA driver answers, for `nextgpu doctor`."""
    try:
        with _nvml() as nvml:
            return NvmlState(str(nvml.nvmlSystemGetDriverVersion()), "")
    except _NoDriver as exc:
        return NvmlState("", str(exc))


# --- NVIDIA -----------------------------------------------------------------------------------


def _cuda_devices() -> list[Device]:
    try:
        with _nvml() as nvml:
            driver = str(nvml.nvmlSystemGetDriverVersion())
            handles = enumerate(_handles(nvml))
            found = [_cuda_device(nvml, handle, index, driver) for index, handle in handles]
    except _NoDriver:
        return []
    return [device for device in found if device is not None]


def _handles(nvml: Any) -> Iterator[Any]:
    """Cards in PCI order, a card in MIG mode replaced by its instances: CUDA can not run on such
    a card as a whole."""
    for number in range(nvml.nvmlDeviceGetCount()):
        card = _ask(nvml, lambda n=number: nvml.nvmlDeviceGetHandleByIndex(n))  # type: ignore[misc]
        if card is None:
            continue  # fallen off the bus, or not ours to open
        mode = _ask(nvml, lambda c=card: nvml.nvmlDeviceGetMigMode(c))  # type: ignore[misc]
        if mode is None or mode[0] == 0:
            yield card
            continue
        for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
            instance = _ask(nvml, lambda c=card, s=slot: _mig_instance(nvml, c, s))  # type: ignore[misc]
            if instance is not None:
                yield instance


def _mig_instance(nvml: Any, card: Any, slot: int) -> Any:
    return nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, slot)


def _ask(nvml: Any, question: Callable[[], _T]) -> _T | None:
    """The answer, or None where this card, driver or user gets none."""
    try:
        return question()
    except nvml.NVMLError:
        return None


def _cuda_device(nvml: Any, handle: Any, index: int, driver: str) -> Device | None:
    memory = _ask(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    if memory is None:
        return None  # nothing can be lent of a card that does not tell its memory
    capability = _ask(nvml, lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Device(
        kind="cuda",
        index=index,
        name=str(_ask(nvml, lambda: nvml.nvmlDeviceGetName(handle)) or "NVIDIA GPU"),
        total_memory_bytes=int(memory.total),
        free_memory_bytes=int(memory.free),
        compute_capability="" if capability is None else f"{capability[0]}.{capability[1]}",
        driver=driver,
        minor=_ask(nvml, lambda: int(nvml.nvmlDeviceGetMinorNumber(handle))),
        uuid=str(_ask(nvml, lambda: nvml.nvmlDeviceGetUUID(handle)) or ""),
    )


def _cuda_usage(device: Device) -> Usage:
    """A MIG instance knows no utilisation, and some cards no power: each is None then."""
    try:
        with _nvml() as nvml:
            handle = nvml.nvmlDeviceGetHandleByUUID(device.uuid)
            rates = _ask(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
            sensor = nvml.NVML_TEMPERATURE_GPU
            degrees = _ask(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, sensor))
            milliwatts = _ask(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    except _NoDriver:
        return Usage(None, None, None)
    return Usage(
        utilisation=None if rates is None else rates.gpu / 100,
        temperature_c=None if degrees is None else float(degrees),
        power_w=None if milliwatts is None else milliwatts / 1000,
    )


# --- CPU --------------------------------------------------------------------------------------


def _cpu_device() -> Device:
    memory = psutil.virtual_memory()
    limit = memory_limit_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    total = min(memory.total, limit) if limit is not None else memory.total
    return Device(
        kind="cpu",
        index=0,
        name=cpu_name(Path("/proc/cpuinfo")),
        total_memory_bytes=total,
        free_memory_bytes=min(memory.available, total),
    )


def cpu_name(cpuinfo: Path) -> str:
    """The model name, or the architecture where the kernel names none (most ARM machines)."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.machine()


def memory_limit_bytes(self_cgroup: Path, root: Path) -> int | None:
    """The tightest memory.max above this process (cgroup v2), or None without one.

    A container's limit is what can be lent, whatever the machine has.
    """
    try:
        entries = self_cgroup.read_text().splitlines()
    except OSError:
        return None
    own = next((line.removeprefix("0::/") for line in entries if line.startswith("0::/")), None)
    if own is None:
        return None  # cgroup v1: the limit of this hierarchy is not looked for
    groups = [root / own, *(root / own).parents]
    limits = [_read_limit(group / "memory.max") for group in groups if group.is_relative_to(root)]
    return min((limit for limit in limits if limit is not None), default=None)


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


_cpu_before: tuple[float, float] | None = None


def _cpu_utilisation() -> float | None:
    """Busy share since the last call; None at the first, and for calls in the same tick."""
    global _cpu_before
    times = psutil.cpu_times()
    total = sum(times)
    # guest and guest_nice are already part of user and nice (proc_stat(5)).
    total -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    idle = times.idle + getattr(times, "iowait", 0.0)
    before, _cpu_before = _cpu_before, (total, idle)
    if before is None or total <= before[0]:
        return None
    share = float(1 - (idle - before[1]) / (total - before[0]))
    return min(1.0, max(0.0, share))


def _cpu_temperature() -> float | None:
    """The hottest reading of the processor's own sensor."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    readings: list[float] = [
        reading.current
        for chip in ("coretemp", "k10temp", "zenpower", "cpu_thermal")
        for reading in sensors.get(chip, [])
    ]
    return max(readings, default=None)


def default_threads() -> int:
    """What `sharing.threads = 0` means: half of the cores that this process may use, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // 2)
