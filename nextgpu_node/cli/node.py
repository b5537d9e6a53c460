"""Commands about this machine: status, gpus."""

from __future__ import annotations

import msgspec

from nextgpu_node.api_types import GpuView, StatusReply
from nextgpu_node.cli.context import Ctx
from nextgpu_node.cli.network import device_name
from nextgpu_node.cli.output import human_bytes, human_seconds
from nextgpu_node.cli.sharing import describe
from nextgpu_node.errors import DaemonUnreachable
from nextgpu_node.hostinfo.devices import list_devices, usage
from nextgpu_node.hostinfo.sensors import foreign_use
from nextgpu_node.hostinfo.views import as_gpu
from nextgpu_node.sdk.api_client import ApiClient


async def status(*, ctx: Ctx) -> int:
    """What the node is doing now."""
    async with ApiClient(ctx.paths.api_socket) as api:
        reply = await api.status()
    if ctx.out.json:
        ctx.out.print_json(**{**msgspec.to_builtins(reply), "schema": 1})
    else:
        ctx.out.facts(_status_facts(reply))
    return 0


def _status_facts(reply: StatusReply) -> dict[str, str]:
    devices = [
        f"{device_name(device, where='here')}, {human_bytes(device.memory_free_bytes)} free"
        for device in reply.devices
    ]
    return {
        "peer id": reply.peer_id,
        "version": reply.version,
        "up": human_seconds(reply.uptime_s),
        "addresses": ", ".join(reply.addresses) or "none",
        "connected to": f"{reply.connected_peers} peers",
        "sharing": describe(reply.sharing),
        "devices": "; ".join(devices) or "none",
        "runtime": reply.runtime or "none",
        "isolation": f"tier {reply.isolation_tier}: {', '.join(reply.isolation) or 'none'}",
        "memory": human_bytes(reply.rss_bytes),
    }


async def gpus(*, ctx: Ctx) -> int:
    """The devices of this machine, and what each does now.  Needs no running node."""
    try:
        async with ApiClient(ctx.paths.api_socket) as api:
            found = (await api.gpus()).gpus
    except DaemonUnreachable:
        nobody: frozenset[int] = frozenset()
        devices = list_devices(max_age_s=0)
        found = [as_gpu(d, usage(d), foreign_use(d, nobody)) for d in devices]
    if ctx.out.json:
        ctx.out.print_json(devices=[msgspec.to_builtins(gpu) for gpu in found])
        return 0
    has_gpu = any(gpu.kind != "cpu" for gpu in found)
    columns = ("DEVICE", "NAME", "MEMORY", "FREE", "COMPUTE", "BUSY", "TEMP", "POWER", "STATE")
    ctx.out.table(columns, [_gpu_row(gpu, has_gpu=has_gpu) for gpu in found])
    return 0


def _gpu_row(gpu: GpuView, *, has_gpu: bool) -> tuple[str, ...]:
    return (
        gpu.label if has_gpu or gpu.kind != "cpu" else "cpu (no GPU here)",
        gpu.name,
        human_bytes(gpu.memory_total_bytes),
        human_bytes(gpu.memory_free_bytes),
        gpu.compute_capability or "-",
        _known(gpu.utilisation, "{:.0%}"),
        _known(gpu.temperature_c, "{:.0f} C"),
        _known(gpu.power_w, "{:.0f} W"),
        f"{gpu.state}: {gpu.reason}" if gpu.reason else gpu.state,
    )


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
