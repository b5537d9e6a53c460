"""Commands about this machine: up, status, gpus."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated

import msgspec
from cyclopts import Parameter

from nextgpu_node.api_types import SharingView, StatusReply
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.network import device_name
from nextgpu_node.cli.output import human_bytes, human_seconds
from nextgpu_node.config import Config, format_size, load_config, set_value
from nextgpu_node.errors import UsageError
from nextgpu_node.hostinfo.devices import Device, choose_device, list_devices
from nextgpu_node.sandbox.probe import SandboxReport, probe
from nextgpu_node.sdk.api_client import ApiClient

_WHAT_HOLDS = (
    "What a borrower can rely on: a work unit is sealed to the worker process that runs it; our "
    "software keeps nothing of it; the owner of that machine could run a modified node.",
    "What you can rely on: a work unit is data for a fixed table of operators, not code. Its "
    "worker has no network, sees none of your files and is killed when the unit ends.",
)


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


def up(
    *,
    yes: Annotated[bool, Parameter(negative="", help="Lend without being asked.")] = False,
    share: Annotated[bool | None, Parameter(help="Lend, or do not, until this node stops.")] = None,
    ctx: Ctx,
) -> int:
    """Start the node here, in the foreground.

    The first time it explains what lending means and asks once; the answer goes into the
    settings file.  --yes is that answer; --share and --no-share hold for this run only.
    """
    if yes and share is False:
        raise UsageError("--yes and --no-share contradict each other.")
    config = load_config(ctx.paths, overrides={}, environ=ctx.environ)
    device = choose_device(list_devices(max_age_s=0), config.sharing.device)
    report = probe()
    ctx.out.note(*_explain(device, report, config))
    wanted = share if share is not None else _consent(ctx, config, report, yes=yes)
    overrides = {} if wanted is None else {"sharing.enabled": str(wanted).lower()}
    sys.stderr.flush()
    sys.stdout.flush()
    os.execv(sys.executable, _daemon_command(ctx, overrides))


def _explain(device: Device | None, report: SandboxReport, config: Config) -> list[str]:
    """What would be lent, under which isolation, and what that does and does not promise."""
    if device is None:
        return [f"Nothing to lend: there is no device {config.sharing.device!r} here."]
    kind = "cpu (no GPU here)" if device.kind == "cpu" else device.label
    limits = config.sharing
    can = [
        f"Device: {kind}, {device.name}, {human_bytes(device.total_memory_bytes)} in all, "
        f"{human_bytes(device.free_memory_bytes)} free.",
        f"Limits for each work unit: {format_size(limits.max_memory_bytes)} of memory, "
        f"{limits.max_unit_seconds} seconds, {limits.max_concurrent_units} at a time.",
    ]
    if report.tier == "none":
        return [*can, "Isolation: not possible here, so this machine can borrow but not lend."] + [
            f"  {layer} is missing. {remedy}" for layer, remedy in report.missing
        ]
    isolation = f"Isolation: tier {report.tier} ({', '.join(report.layers)})."
    return [*can, isolation, *_WHAT_HOLDS]


def _consent(ctx: Context, config: Config, report: SandboxReport, *, yes: bool) -> bool | None:
    """The owner's decision; None leaves the settings as they are."""
    decided = config.origins["sharing.enabled"] != "default"
    if report.tier == "none" or (decided and not yes):
        return None
    if not yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            ctx.out.note(
                "Nobody to ask here: sharing stays off. Say --yes, or run "
                "`nextgpu config set sharing.enabled true`."
            )
            return None
        sys.stderr.write("Lend this device to other people? [y/N] ")
        sys.stderr.flush()
        yes = sys.stdin.readline().strip().lower() in ("y", "yes")
    set_value(ctx.paths.config_file, "sharing.enabled", str(yes).lower())
    ctx.out.note(f"Sharing is {'on' if yes else 'off'}; `nextgpu share on|off` changes it.")
    return yes


def _daemon_command(ctx: Context, overrides: dict[str, str]) -> list[str]:
    command = [sys.executable, "-m", "nextgpu_node.daemon.main"]
    if ctx.home is not None:
        command += ["--home", str(ctx.home)]
    if ctx.config_file is not None:
        command += ["--config", str(ctx.config_file)]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    return command
