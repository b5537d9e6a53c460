"""`nextgpu share`: the owner's word on whether this machine lends now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Annotated

import msgspec
from cyclopts import Parameter

from nextgpu_node.api_types import SharingView
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.sizes import duration_s
from nextgpu_node.config import set_value
from nextgpu_node.errors import ConfigError
from nextgpu_node.sdk.api_client import ApiClient


async def on(*, ctx: Ctx) -> int:
    """Lend from now on, also after a restart."""
    return await _switch(ctx, enabled=True)


async def off(*, ctx: Ctx) -> int:
    """Lend no more, also after a restart; running units save their state and end."""
    return await _switch(ctx, enabled=False)


async def pause(
    time: Annotated[str, Parameter(help='For how long: "1h", "30m"; else until `resume`.')] = "",
    /,
    *,
    ctx: Ctx,
) -> int:
    """Give the device back at once, for a time or until `resume`; also over a restart."""
    seconds = duration_s("pause", time) if time else 0
    return await _say(ctx, lambda api: api.pause(seconds))


async def resume(*, ctx: Ctx) -> int:
    """End a pause, or a drain."""
    return await _say(ctx, lambda api: api.resume())


async def drain(*, ctx: Ctx) -> int:
    """Take no new units; those that run go on to their end."""
    return await _say(ctx, lambda api: api.drain())


async def _switch(ctx: Context, *, enabled: bool) -> int:
    async with ApiClient(ctx.paths.api_socket) as api:
        sharing = await api.set_sharing(enabled)
    if sharing.note:
        # A service may not write its settings file; who may call its socket perhaps can.
        with suppress(ConfigError):
            set_value(ctx.paths.config_file, "sharing.enabled", str(enabled).lower())
            sharing = msgspec.structs.replace(sharing, note="")
    return _print(ctx, sharing)


async def _say(ctx: Context, word: Callable[[ApiClient], Awaitable[SharingView]]) -> int:
    async with ApiClient(ctx.paths.api_socket) as api:
        return _print(ctx, await word(api))


def _print(ctx: Context, sharing: SharingView) -> int:
    if ctx.out.json:
        ctx.out.print_json(sharing=msgspec.to_builtins(sharing))
    else:
        ctx.out.say(f"Sharing is {describe(sharing)}.")
        if sharing.note:
            ctx.out.note(f"Until this node ends: {sharing.note}")
    return 0


def describe(sharing: SharingView) -> str:
    """The state in one line, with its reason."""
    match sharing.state:
        case "lending":
            return f"on, {sharing.free_slots} of {sharing.slots} slots free"
        case "starting":
            return "on: starting"
        case "off":
            return "off"
        case state:
            return f"{state}: {sharing.reason}{_until(sharing)}"


def _until(sharing: SharingView) -> str:
    """A pause of the owner's says it itself."""
    if not sharing.until_ms or sharing.cause == "owner":
        return ""
    return f", opens {datetime.fromtimestamp(sharing.until_ms / 1000).astimezone():%a %H:%M}"
