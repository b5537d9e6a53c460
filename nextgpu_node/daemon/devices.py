"""What this host's devices are at this moment, without ever waiting for a driver."""

from __future__ import annotations

import trio

from nextgpu_node.api_types import DeviceView, GpusReply, GpuView
from nextgpu_node.hostinfo.devices import Device, Usage, choose_device, list_devices, usage
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

    def chosen(self, wanted: str) -> Device | None:
        """The device that `sharing.device` names."""
        return choose_device(self._devices, wanted)

    async def gpus(self) -> GpusReply:
        """Every device with what it does now."""
        found = await trio.to_thread.run_sync(_look, abandon_on_cancel=True)
        return GpusReply(gpus=found)

    def views(self) -> list[DeviceView]:
        """Every device, for its owner."""
        return [as_view(as_message(device)) for device in self._devices]


def _look() -> list[GpuView]:
    return [_with_usage(device, usage(device)) for device in list_devices()]


def _with_usage(device: Device, now: Usage) -> GpuView:
    return GpuView(
        label=device.label,
        kind=device.kind,
        name=device.name,
        memory_total_bytes=device.total_memory_bytes,
        memory_free_bytes=device.free_memory_bytes,
        compute_capability=device.compute_capability,
        utilisation=now.utilisation,
        temperature_c=now.temperature_c,
        power_w=now.power_w,
    )


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
