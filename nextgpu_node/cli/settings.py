"""`nextgpu config`: the settings, where each comes from, and changing one."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from nextgpu_node import config
from nextgpu_node.cli.context import Ctx


def show(
    *,
    origin: Annotated[
        bool, Parameter(negative="", help="Also where each value comes from.")
    ] = False,
    ctx: Ctx,
) -> int:
    """Every setting with its value."""
    loaded = config.load_config(ctx.paths, overrides={}, environ=ctx.environ)
    if ctx.out.json:
        origins = {"origins": dict(loaded.origins)} if origin else {}
        ctx.out.print_json(settings=dict(loaded.items()), **origins)
        return 0
    rows = [(key, _shown(key, value), loaded.origins[key]) for key, value in loaded.items()]
    if origin:
        ctx.out.table(("KEY", "VALUE", "ORIGIN"), rows)
    else:
        ctx.out.table(("KEY", "VALUE"), [row[:2] for row in rows])
    return 0


def set_(key: str, value: str, /, *, ctx: Ctx) -> int:
    """Change one setting in the settings file; a running node takes it up when it restarts.

    Parameters
    ----------
    key
        As `nextgpu config show` writes it: sharing.max_memory.
    value
        A list is written with commas: a,b.
    """
    taken = config.set_value(ctx.paths.config_file, key, value)
    if ctx.out.json:
        ctx.out.print_json(key=key, value=taken, file=str(ctx.paths.config_file))
    else:
        ctx.out.say(f"{key} = {_shown(key, taken)}  ({ctx.paths.config_file})")
    return 0


def path(*, ctx: Ctx) -> int:
    """Where the settings file is; it need not exist."""
    if ctx.out.json:
        ctx.out.print_json(path=str(ctx.paths.config_file))
    else:
        ctx.out.say(str(ctx.paths.config_file))
    return 0


def _shown(key: str, value: object) -> str:
    return config.shown(key, value) or "(none)"
