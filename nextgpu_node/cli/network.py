"""Commands that ask the daemon: peers, units, cancel."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter

from nextgpu_node.api_types import DeviceView, PeerNeed, PeerView
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.output import human_bytes, human_seconds
from nextgpu_node.cli.sizes import gigabytes
from nextgpu_node.config import load_config
from nextgpu_node.core.choice import Appraisal, PeerRecord, Preferences, choose
from nextgpu_node.errors import JobFailed, NoPeerFound
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sdk.peer_history import PeerHistory

Kind = Literal["any", "cpu", "cuda"]


async def peers(
    *,
    vram: Annotated[str, Parameter(help='Device memory at least: 16 (GB) or "16GiB".')] = "0",
    kind: Annotated[Kind, Parameter(help="Which devices.")] = "any",
    limit: Annotated[int, Parameter(help="So many peers at most.")] = 20,
    why: Annotated[
        bool, Parameter(negative="", help="What makes one peer better than another for you.")
    ] = False,
    forget: Annotated[
        bool, Parameter(negative="", help="Delete what is remembered of peers, and end.")
    ] = False,
    ctx: Ctx,
) -> int:
    """Who lends a device now.

    Every peer in the list was found in the DHT, and asked and verified just now, best first.
    """
    if forget:
        PeerHistory(ctx.paths.peer_history_file).forget()
        return 0
    need = PeerNeed(kind=kind, memory_bytes=gigabytes("--vram", vram), limit=limit)
    async with ApiClient(ctx.paths.api_socket) as api:
        reply = await api.peers(need)
    if ctx.out.json and why:
        weighed = choose(reply.peers, need, *_what_you_know(ctx))
        ctx.out.print_json(
            peers=[_plain_appraisal(one) for one in weighed], candidates=reply.candidates
        )
        return 0 if reply.peers else NoPeerFound.exit_code
    if ctx.out.json:
        ctx.out.print_json(
            peers=[msgspec.to_builtins(peer) for peer in reply.peers], candidates=reply.candidates
        )
        return 0 if reply.peers else NoPeerFound.exit_code
    if not reply.peers:
        raise NoPeerFound(
            f"No peer with such a device is lending now ({reply.candidates} found in the network). "
            "Ask for less, or try again later."
        )
    if why:
        _explain(ctx, choose(reply.peers, need, *_what_you_know(ctx)))
        return 0
    ctx.out.table(
        ("PEER", "DEVICE", "MEMORY FREE", "SLOTS", "LATENCY", "ISOLATION"),
        [_peer_row(peer) for peer in reply.peers],
    )
    return 0


def _what_you_know(ctx: Context) -> tuple[Preferences, dict[str, PeerRecord]]:
    """Whom you trust, and what is remembered of peers where you want that."""
    submit = load_config(ctx.paths, overrides={}, environ=ctx.environ).submit
    history = PeerHistory(ctx.paths.peer_history_file if submit.remember_peers else None)
    return Preferences(trusted=frozenset(submit.trusted)), history.records()


def _explain(ctx: Context, weighed: list[Appraisal]) -> None:
    for one in weighed:
        if one.excluded:
            ctx.out.say(f"{one.peer.peer_id}  not asked: {one.excluded}")
            continue
        ctx.out.say(f"{one.peer.peer_id}  cost {one.cost:.2f}")
        for factor in one.factors:
            ctx.out.say(f"    {factor.name:<12} x {factor.effect:<5.2f} {factor.why}")


def _plain_appraisal(one: Appraisal) -> dict[str, object]:
    return {
        "peer_id": one.peer.peer_id,
        "excluded": one.excluded,
        "cost": round(one.cost, 4),
        "factors": [
            {"name": factor.name, "effect": round(factor.effect, 4), "why": factor.why}
            for factor in one.factors
        ],
    }


def _peer_row(peer: PeerView) -> tuple[str, ...]:
    devices = ", ".join(device_name(device, where="there") for device in peer.devices)
    memory = ", ".join(human_bytes(device.memory_free_bytes) for device in peer.devices)
    slots = str(peer.free_slots) if peer.sharing else f"0: {peer.reason}"
    # Over a dozen names; --json has them all.
    isolation = f"{len(peer.isolation)} layers" if peer.isolation else "none"
    return (peer.peer_id, devices, memory, slots, f"{peer.latency_ms:.0f} ms", isolation)


def device_name(device: DeviceView, *, where: str) -> str:
    """A CPU is called one: nobody should take it for a GPU."""
    if device.kind == "cpu":
        return f"cpu (no GPU {where})"
    capability = f" (sm {device.compute_capability})" if device.compute_capability else ""
    return f"{device.name}{capability}"


async def units(*, ctx: Ctx) -> int:
    """Work units that are here now, lent or borrowed.  Their content is never here."""
    async with ApiClient(ctx.paths.api_socket) as api:
        reply = await api.units()
    if ctx.out.json:
        ctx.out.print_json(units=[msgspec.to_builtins(unit) for unit in reply.units])
    elif not reply.units:
        ctx.out.say("No work unit is here now.")
    else:
        rows = [
            (
                unit.unit_id,
                unit.role,
                unit.state,
                human_seconds(unit.age_s),
                human_bytes(unit.input_bytes),
                human_bytes(unit.output_bytes),
            )
            for unit in reply.units
        ]
        ctx.out.table(("UNIT", "ROLE", "STATE", "AGE", "IN", "OUT"), rows)
    return 0


async def cancel_unit(ctx: Context, unit_id: str) -> int:
    """End a work unit: its worker is killed and wiped."""
    async with ApiClient(ctx.paths.api_socket) as api:
        cancelled = await api.cancel_unit(unit_id)
    if not cancelled:
        raise JobFailed(
            "No such job or work unit is here. `nextgpu jobs` and `nextgpu units` list them."
        )
    if ctx.out.json:
        ctx.out.print_json(cancelled=True, unit_id=unit_id)
    else:
        ctx.out.say(f"Cancelled {unit_id}.")
    return 0
