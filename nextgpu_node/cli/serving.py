"""`nextgpu allow`, `deny`, `serving`: whom this machine lends to, and how much."""

from __future__ import annotations

from typing import Annotated

import msgspec
from cyclopts import Parameter

from nextgpu_node.api_types import ServedPeerView, ServingReply
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.output import human_seconds
from nextgpu_node.cli.sizes import duration_s
from nextgpu_node.config import load_config, set_values
from nextgpu_node.errors import ConfigError, DaemonUnreachable
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sharing_settings import serving_changes

Peer = Annotated[str, Parameter(name="PEER")]


async def allow(
    peer: Peer,
    /,
    *,
    units: Annotated[int | None, Parameter(help="Its units at the same time.")] = None,
    time: Annotated[str | None, Parameter(help='Its device time in 24 hours: "2h".')] = None,
    requests: Annotated[int | None, Parameter(help="Its requests in a minute.")] = None,
    kinds: Annotated[
        str | None, Parameter(help='What it may run: "program", or "program,python".')
    ] = None,
    ctx: Ctx,
) -> int:
    """Serve a peer, with limits of its own where any are named."""
    terms = {
        "units": units,
        "seconds_per_day": duration_s("--time", time) if time else None,
        "requests_per_minute": requests,
        "kinds": kinds,
    }
    named = {name: str(value) for name, value in terms.items() if value is not None}
    return await _rule(ctx, peer, "allow", named)


async def deny(peer: Peer, /, *, ctx: Ctx) -> int:
    """Never serve a peer; its running units end."""
    return await _rule(ctx, peer, "deny", {})


async def serving(
    *,
    forget: Annotated[str | None, Parameter(help="Drop every rule about this PEER.")] = None,
    ctx: Ctx,
) -> int:
    """Whom this machine serves, and what each named peer used in the last 24 hours."""
    if forget is not None:
        return await _rule(ctx, forget, "none", {})
    async with ApiClient(ctx.paths.api_socket) as api:
        _print(ctx, await api.serving())
    return 0


async def _rule(ctx: Context, peer: str, rule: str, terms: dict[str, str]) -> int:
    config = load_config(ctx.paths, overrides={}, environ=ctx.environ).sharing
    changes = serving_changes(config, peer, rule, terms)
    try:
        async with ApiClient(ctx.paths.api_socket) as api:
            reply = await api.set_serving(peer, rule, terms)
    except DaemonUnreachable:
        set_values(ctx.paths.config_file, changes)
        ctx.out.note("No node runs here: this holds from its next start.")
        return 0
    if not reply.saved:
        reply = _save_here(ctx, changes, reply)
    _print(ctx, reply)
    return 0


def _save_here(ctx: Context, changes: dict[str, str], reply: ServingReply) -> ServingReply:
    try:
        set_values(ctx.paths.config_file, changes)
    except ConfigError:
        return reply
    return msgspec.structs.replace(reply, saved=True, note="")


def _print(ctx: Context, reply: ServingReply) -> None:
    if ctx.out.json:
        ctx.out.print_json(**{**msgspec.to_builtins(reply), "schema": 1})
        return
    ctx.out.say(f"Served: {_in_words(reply)}.")
    if reply.peers:
        ctx.out.table(
            ("PEER", "RULE", "LIMITS OF ITS OWN", "USED IN 24 H"),
            [_row(peer) for peer in reply.peers],
        )
    if not reply.saved:
        ctx.out.note(f"Until this node ends: {reply.note}")


def _in_words(reply: ServingReply) -> str:
    allowed = sum(peer.rule == "allow" for peer in reply.peers)
    match reply.serve:
        case "everyone":
            return "everyone who is not denied"
        case "tokens":
            return f"{allowed} allowed peers, and whoever brings a token of this node"
        case _ if allowed:
            return f"the {allowed} allowed peers and nobody else"
        case _:
            return "everyone who is not denied, since no peer is allowed by name"


def _row(peer: ServedPeerView) -> tuple[str, ...]:
    own = ", ".join(f"{name} {value}" for name, value in peer.terms.items())
    return peer.peer_id, peer.rule, own or "-", human_seconds(peer.used_s)
