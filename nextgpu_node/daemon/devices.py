"""What this host's devices are at this moment, without ever waiting for a driver."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from nextgpu_node.api_types import DeviceView, GpusReply
from nextgpu_node.core.owner import ForeignUse
from nextgpu_node.hostinfo.devices import Device, Usage, list_devices, usage
from nextgpu_node.hostinfo.sensors import foreign_use
from nextgpu_node.hostinfo.views import as_gpu
from nextgpu_protocol.messages import DeviceInfo

_REFRESH_S = 15
_MAX_NAME_CHARS = 120


class HostDevices:
    """The devices, asked for anew every few seconds in a thread: a driver call may hang."""

    def __init__(self) -> None:
        self._devices = list_devices()

    async def run(self) -> None:
        while True:
            await trio.sleep(_REFRESH_S)
            self._devices = await trio.to_thread.run_sync(list_devices, abandon_on_cancel=True)

    def all(self) -> list[Device]:
        return list(self._devices)

    def ranked(self, wanted: str) -> list[Device]:
        """What `sharing.device` names, the best first: cards, or the CPU where there is none."""
        if wanted != "auto":
            return [device for device in self._devices if device.label == wanted]
        cards = [device for device in self._devices if device.kind != "cpu"]
        found = cards or self._devices
        return sorted(found, key=lambda device: -device.total_memory_bytes)

    async def gpus(
        self, states: Mapping[str, tuple[bool, str, str]], own_pids: frozenset[int]
    ) -> GpusReply:
        """Every device with what it does now; `states` is the provider's word on each."""
        found = await trio.to_thread.run_sync(_look, own_pids, abandon_on_cancel=True)
        missing = (False, "off", "")
        return GpusReply(gpus=[as_gpu(*one, *states.get(one[0].label, missing)) for one in found])

    def views(self) -> list[DeviceView]:
        """Every device, for its owner."""
        return [as_view(as_message(device)) for device in self._devices]


_Found = tuple[Device, Usage, tuple[ForeignUse, ...] | None]


def _look(own_pids: frozenset[int]) -> list[_Found]:
    return [(d, usage(d), foreign_use(d, own_pids)) for d in list_devices()]


def as_message(device: Device) -> DeviceInfo:
    """The device as peers are told of it: nothing that tells this machine from another alike."""
    return DeviceInfo(
        kind=device.kind,
        name=device.name[:_MAX_NAME_CHARS],
        memory_total_bytes=device.total_memory_bytes,
        memory_free_bytes=device.free_memory_bytes,
        compute_capability=device.compute_capability,
    )


def as_view(device: DeviceInfo) -> DeviceView:
    """A device in the words of the local API."""
    return DeviceView(
        kind=device.kind,
        name=device.name,
        memory_total_bytes=device.memory_total_bytes,
        memory_free_bytes=device.memory_free_bytes,
        compute_capability=device.compute_capability,
    )
