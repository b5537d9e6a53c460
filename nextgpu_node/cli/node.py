"""Commands about this machine: status, gpus."""

from __future__ import annotations

import dataclasses

import msgspec

from nextgpu_node.api_types import SharingView, StatusReply
from nextgpu_node.cli.context import Ctx
from nextgpu_node.cli.network import device_name
from nextgpu_node.cli.output import human_bytes, human_seconds
from nextgpu_node.hostinfo.devices import list_devices
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
        "sharing": _sharing_fact(reply.sharing),
        "devices": "; ".join(devices) or "none",
        "runtime": reply.runtime or "none",
        "isolation": f"tier {reply.isolation_tier}: {', '.join(reply.isolation) or 'none'}",
        "memory": human_bytes(reply.rss_bytes),
    }


def _sharing_fact(sharing: SharingView) -> str:
    if sharing.active:
        return f"on, {sharing.free_slots} of {sharing.slots} slots free"
    return f"off: {sharing.reason}" if sharing.reason else "off"


def gpus(*, ctx: Ctx) -> int:
    """The devices of this machine.  Needs no running node."""
    devices = list_devices(max_age_s=0)
    if ctx.out.json:
        # The uuid names this one card anywhere; it is nobody's business.
        plain = [dataclasses.asdict(device) for device in devices]
        ctx.out.print_json(devices=[{k: v for k, v in d.items() if k != "uuid"} for d in plain])
        return 0
    has_gpu = any(device.kind == "cuda" for device in devices)
    rows = [
        (
            device.label if has_gpu or device.kind != "cpu" else "cpu (no GPU here)",
            device.name,
            human_bytes(device.total_memory_bytes),
            human_bytes(device.free_memory_bytes),
            device.compute_capability or "-",
        )
        for device in devices
    ]
    ctx.out.table(("DEVICE", "NAME", "MEMORY", "FREE", "COMPUTE"), rows)
    return 0
