"""`nextgpu limits`: what of this machine is lent, and when.

Changes go into the settings file and hold in the running node at once; without one they hold from
its next start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from cyclopts import Parameter

from nextgpu_node.api_types import LimitsReply
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.sizes import duration_s
from nextgpu_node.config import load_config, read_changes, set_values
from nextgpu_node.errors import ConfigError, DaemonUnreachable, UsageError
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sharing_settings import limit_views

Text = str | None

# The flags of `limits set` whose names are not those of their settings.
_KEY_OF_FLAG: Final[Mapping[str, str]] = {
    "vram": "max_vram",
    "memory": "max_memory",
    "cores": "threads",
    "utilisation": "max_utilisation",
    "scratch": "max_scratch",
    "temp": "max_temperature",
    "power": "max_power",
    "upload": "max_upload",
    "download": "max_download",
    "units": "max_concurrent_units",
    "unit_time": "max_unit_seconds",
    "other_vram": "max_foreign_vram",
    "other_gpu": "max_foreign_gpu",
    "other_cpu": "max_foreign_cpu",
    "free_memory": "min_free_memory",
    "free_disk": "min_free_disk",
    "apps": "exclusive_apps",
    "idle": "only_when_idle",
    "exclude": "exclude_devices",
}


async def show(*, ctx: Ctx) -> int:
    """Every limit with its value."""
    try:
        async with ApiClient(ctx.paths.api_socket) as api:
            reply = await api.limits()
    except DaemonUnreachable:
        config = load_config(ctx.paths, overrides={}, environ=ctx.environ)
        reply = LimitsReply(limits=limit_views(config.sharing))
    _print(ctx, reply)
    return 0


async def set_(
    *,
    vram: Annotated[Text, Parameter(help='Of a card, for one unit: "60%" or "8 GiB".')] = None,
    memory: Annotated[Text, Parameter(help='Of one unit: "8 GiB".')] = None,
    cores: Annotated[Text, Parameter(help="Threads of one unit; 0: half of the cores.")] = None,
    utilisation: Annotated[Text, Parameter(help='Share of the time it computes: "50%".')] = None,
    scratch: Annotated[Text, Parameter(help="Scratch space of one unit, in memory.")] = None,
    temp: Annotated[Text, Parameter(help="Pause above so many C; 0: no limit.")] = None,
    power: Annotated[Text, Parameter(help='Pause above "200W"; 0: no limit.')] = None,
    upload: Annotated[Text, Parameter(help='Bytes a second: "5 MiB"; 0: no limit.')] = None,
    download: Annotated[Text, Parameter(help='Bytes a second: "5 MiB"; 0: no limit.')] = None,
    units: Annotated[Text, Parameter(help="Units at the same time.")] = None,
    unit_time: Annotated[Text, Parameter(help='The longest unit: "10m".')] = None,
    hours: Annotated[
        Text, Parameter(help='"22:00-07:00 mon-fri; 00:00-24:00 sat,sun", or always.')
    ] = None,
    idle: Annotated[Text, Parameter(help="Only while you are away: yes or no.")] = None,
    idle_minutes: Annotated[Text, Parameter(help="Minutes without input: you are away.")] = None,
    on_battery: Annotated[Text, Parameter(help="Lend on battery too: yes or no.")] = None,
    apps: Annotated[Text, Parameter(help='Pause while one of these runs: "blender,steam".')] = None,
    other_vram: Annotated[Text, Parameter(help="Pause while others hold more of the card.")] = None,
    other_gpu: Annotated[Text, Parameter(help='Pause while others use more: "20%".')] = None,
    other_cpu: Annotated[Text, Parameter(help='Pause while others use more: "50%".')] = None,
    free_memory: Annotated[Text, Parameter(help="Pause with less memory free.")] = None,
    free_disk: Annotated[Text, Parameter(help="Pause with less disk free.")] = None,
    device: Annotated[Text, Parameter(help='"auto", "cpu" or "cuda:N".')] = None,
    exclude: Annotated[Text, Parameter(help='Never lend these: "cuda:1".')] = None,
    peer_units: Annotated[Text, Parameter(help="Units of one peer at the same time.")] = None,
    peer_time: Annotated[Text, Parameter(help='Of one peer in 24 h: "1h"; 0: no limit.')] = None,
    ctx: Ctx,
) -> int:
    """Change limits; all of them, or, where one is wrong, none."""
    given = {name: value for name, value in locals().items() if name != "ctx" and value is not None}
    changes = {_KEY_OF_FLAG.get(flag, flag): value for flag, value in given.items()}
    if unit_time is not None:
        changes["max_unit_seconds"] = str(duration_s("--unit-time", unit_time))
    if peer_time is not None:
        del changes["peer_time"]
        no_limit = peer_time.strip() == "0"
        changes["peer_seconds_per_day"] = (
            "0" if no_limit else str(duration_s("--peer-time", peer_time))
        )
    if not changes:
        raise UsageError("Say what to change: nextgpu limits set --temp 80; --help has them all.")
    _print(ctx, await change(ctx, changes), only=set(changes))
    return 0


async def change(ctx: Context, changes: Mapping[str, str]) -> LimitsReply:
    """Settings of [sharing], in the running node and in the file."""
    dotted = {f"sharing.{key}": text for key, text in changes.items()}
    # A wrong value is the user's, and is told in the same words with and without a node.
    read_changes(dotted)
    try:
        async with ApiClient(ctx.paths.api_socket) as api:
            reply = await api.set_limits(changes)
    except DaemonUnreachable:
        set_values(ctx.paths.config_file, dotted)
        config = load_config(ctx.paths, overrides={}, environ=ctx.environ)
        return LimitsReply(limits=limit_views(config.sharing))
    return save_here(ctx, dotted, reply)


def save_here(ctx: Context, dotted: Mapping[str, str], reply: LimitsReply) -> LimitsReply:
    """A service may not write its settings file; who may call its socket perhaps can."""
    if reply.saved:
        return reply
    try:
        set_values(ctx.paths.config_file, dotted)
    except ConfigError:
        return reply
    return msgspec.structs.replace(reply, saved=True, note="")


def _print(ctx: Context, reply: LimitsReply, *, only: set[str] | None = None) -> None:
    rows = [limit for limit in reply.limits if only is None or limit.key in only]
    if ctx.out.json:
        limits = {limit.key: limit.value for limit in rows}
        ctx.out.print_json(limits=limits, saved=reply.saved, note=reply.note)
        return
    ctx.out.table(("LIMIT", "VALUE"), [(limit.key, limit.value or "(none)") for limit in rows])
    if not reply.saved:
        ctx.out.note(f"Until this node ends: {reply.note}")
