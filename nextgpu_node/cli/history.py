"""`nextgpu history`: what ran on this machine for others.  Never what it was."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter

from nextgpu_node.api_types import HistoryReply, PastUnitView
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.output import human_bytes
from nextgpu_node.errors import UsageError
from nextgpu_node.sdk.api_client import ApiClient

_PEER_CHARS = 16


async def history(
    switch: Annotated[
        Literal["on", "off"] | None, Parameter(help="Record from now on; off also deletes.")
    ] = None,
    /,
    *,
    limit: Annotated[int, Parameter(help="So many units at most, the newest first.")] = 50,
    clear: Annotated[bool, Parameter(negative="", help="Delete all of it.")] = False,
    ctx: Ctx,
) -> int:
    """Units that ran here: when, how large, how long, how they ended."""
    if switch is not None and clear:
        raise UsageError("Say either on or off, or --clear.")
    async with ApiClient(ctx.paths.api_socket) as api:
        if clear:
            reply = await api.clear_history()
        elif switch is not None:
            reply = await api.set_history(switch == "on")
        else:
            reply = await api.history(limit)
    if ctx.out.json:
        ctx.out.print_json(**{**msgspec.to_builtins(reply), "schema": 1})
    else:
        _print(ctx, reply, switch, cleared=clear)
    return 0


def _print(ctx: Context, reply: HistoryReply, switch: str | None, *, cleared: bool) -> None:
    if not reply.enabled:
        ctx.out.say("Nothing is recorded: `nextgpu history on` begins.")
    elif cleared:
        ctx.out.say("The history is empty.")
    elif switch is not None:
        ctx.out.say(f"Units are recorded, and forgotten after {reply.keep_days} days.")
    elif not reply.units:
        ctx.out.say(f"No unit has run here in the last {reply.keep_days} days.")
    else:
        columns = ("WHEN", "UNIT", "PEER", "KIND", "OUTCOME", "DEVICE TIME", "IN", "OUT")
        ctx.out.table(columns, [_row(unit) for unit in reply.units])


def _row(unit: PastUnitView) -> tuple[str, ...]:
    peer = f"#{unit.peer[:8]}" if unit.peer_is_hash else f"…{unit.peer[-_PEER_CHARS:]}"
    return (
        f"{datetime.fromtimestamp(unit.started_at_ms / 1000).astimezone():%Y-%m-%d %H:%M}",
        unit.unit_id[:8],
        peer,
        unit.kind,
        unit.status if unit.wiped else f"{unit.status}, wipe incomplete",
        f"{unit.wall_ms / 1000:.1f} s",
        human_bytes(unit.input_bytes),
        human_bytes(unit.output_bytes),
    )
