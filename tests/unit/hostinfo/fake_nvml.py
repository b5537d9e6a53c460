# ruff: noqa: N802, N803 - the names are pynvml's
"""A machine with NVIDIA cards, for tests on machines without: pynvml's functions over a table.

`test_devices.py` compares every function here with the real module's, by name and arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TypeVar

_T = TypeVar("_T")


class NVMLError(Exception):
    """As pynvml's: what every function raises."""

    def __init__(self, message: str, value: int = 3) -> None:
        super().__init__(message)
        self.value = value


@dataclass
class Card:
    """A card or a MIG instance; None is an answer that the card refuses."""

    name: str = "NVIDIA RTX 4090"
    uuid: str = "GPU-0"
    total: int | None = 24 * 1024**3
    free: int = 20 * 1024**3
    capability: tuple[int, int] | None = (8, 9)
    busy_percent: int | None = 40
    degrees: int | None = 61
    milliwatts: int | None = 200_500
    mig_enabled: bool | None = False
    instances: list[Card | None] = field(default_factory=list)
    computing: list[tuple[int, int | None]] | None = field(default_factory=list)  # pid, bytes
    drawing: list[tuple[int, int | None]] | None = field(default_factory=list)
    samples: list[tuple[int, int, int]] | None = field(default_factory=list)  # µs, pid, percent


class FakeNvml:
    """Stands in for the module `pynvml`; `starts` counts nvmlInit."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0
    NVML_ERROR_NOT_FOUND = 6

    def __init__(self, cards: list[Card | None], *, loaded: bool = True) -> None:
        self._cards = cards
        self._loaded = loaded
        self.starts = 0

    def nvmlInit(self) -> None:
        self.starts += 1
        if not self._loaded:
            raise NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.86"

    def nvmlDeviceGetCount(self) -> int:
        return len(self._cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return _known(self._cards[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        cards = [card for card in self._cards if card is not None]
        everything = [*cards, *(i for card in cards for i in card.instances)]
        return _known(next((c for c in everything if c is not None and c.uuid == uuid), None))

    def nvmlDeviceGetMigMode(self, device: Card) -> list[int]:
        return [int(_known(device.mig_enabled)), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Card) -> int:
        return len(device.instances)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Card, index: int) -> Card:
        return _known(device.instances[index])

    def nvmlDeviceGetName(self, handle: Card) -> str:
        return handle.name

    def nvmlDeviceGetUUID(self, handle: Card) -> str:
        return handle.uuid

    def nvmlDeviceGetMinorNumber(self, handle: Card) -> int:
        whole = [card for card in self._cards if card is not None]
        if handle not in whole:
            raise NVMLError("Not Supported")  # an instance has no node of its own
        return whole.index(handle)

    def nvmlDeviceGetMemoryInfo(self, handle: Card, version: int | None = None) -> SimpleNamespace:
        assert version is None
        return SimpleNamespace(total=_known(handle.total), free=handle.free)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Card) -> tuple[int, int]:
        return _known(handle.capability)

    def nvmlDeviceGetUtilizationRates(self, handle: Card) -> SimpleNamespace:
        return SimpleNamespace(gpu=_known(handle.busy_percent))

    def nvmlDeviceGetTemperature(self, handle: Card, sensor: int) -> int:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return _known(handle.degrees)

    def nvmlDeviceGetPowerUsage(self, handle: Card) -> int:
        return _known(handle.milliwatts)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Card) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in _known(handle.computing)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Card) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in _known(handle.drawing)]

    def nvmlDeviceGetProcessUtilization(
        self, handle: Card, timeStamp: int
    ) -> list[SimpleNamespace]:
        found = [
            SimpleNamespace(timeStamp=at, pid=pid, smUtil=percent)
            for at, pid, percent in _known(handle.samples)
            if at > timeStamp
        ]
        if not found:
            raise NVMLError("Not Found", self.NVML_ERROR_NOT_FOUND)
        return found


def _known(value: _T | None) -> _T:
    if value is None:
        raise NVMLError("Not Supported")
    return value
