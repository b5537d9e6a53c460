"""Devices in the words of the local API."""

from __future__ import annotations

from nextgpu_node.api_types import ForeignUseView, GpuView
from nextgpu_node.core.owner import ForeignUse
from nextgpu_node.hostinfo.devices import Device, Usage


def as_gpu(
    device: Device,
    now: Usage,
    foreign: tuple[ForeignUse, ...] | None,
    lent: bool = False,
    state: str = "off",
    reason: str = "",
) -> GpuView:
    """A device for its owner: nothing of it leaves this machine."""
    uses = foreign and [ForeignUseView(name=f.name, memory_bytes=f.memory_bytes) for f in foreign]
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
        foreign=None if foreign is None else list(uses or []),
        lent=lent,
        state=state,
        reason=reason,
    )
