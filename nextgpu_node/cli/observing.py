"""Commands that look at a running node: log-level, events, metrics, web."""

from __future__ import annotations

import html
import sys
import webbrowser
from contextlib import aclosing
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter

from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.errors import NextGPUError
from nextgpu_node.files import write_whole
from nextgpu_node.sdk.api_client import ApiClient

Level = Literal["debug", "info", "warning", "error"]


async def log_level(level: Level | None = None, /, *, ctx: Ctx) -> int:
    """How much the running node logs; with LEVEL, from now until it ends.

    `nextgpu config set log.level` changes it for every later start.
    """
    async with ApiClient(ctx.paths.api_socket) as api:
        reply = await (api.log() if level is None else api.set_log_level(level))
    if ctx.out.json:
        ctx.out.print_json(**{**msgspec.to_builtins(reply), "schema": 1})
    else:
        ctx.out.say(reply.level)
    return 0


async def events(*, ctx: Ctx) -> int:
    """What changes in the node, as lines of JSON, until it ends or you do."""
    async with ApiClient(ctx.paths.api_socket) as api, aclosing(api.events()) as lines:
        async for line in lines:
            sys.stdout.write(line.decode() + "\n")
            sys.stdout.flush()
    return 0


async def metrics(*, ctx: Ctx) -> int:
    """The node's figures in Prometheus' text format."""
    async with ApiClient(ctx.paths.api_socket) as api:
        sys.stdout.write(await api.metrics())
    return 0


async def web(
    *,
    print_url: Annotated[
        bool, Parameter(negative="", help="Print the address instead of opening a browser.")
    ] = False,
    close: Annotated[bool, Parameter(negative="", help="Close the dashboard.")] = False,
    ctx: Ctx,
) -> int:
    """Open the dashboard of this node in a browser: on loopback, with a key of its own."""
    async with ApiClient(ctx.paths.api_socket) as api:
        reply = await api.set_web(not close)
    if ctx.out.json:
        ctx.out.print_json(**{**msgspec.to_builtins(reply), "schema": 1})
    elif close:
        ctx.out.say("The dashboard is closed.")
    elif print_url or not _open_browser(ctx, reply.url):
        ctx.out.say(reply.url)
        ctx.out.note("Whoever has this address can steer this node, from this machine.")
    return 0


def _open_browser(ctx: Context, url: str) -> bool:
    """False where there is no browser.

    The address goes through a page in the private runtime directory: on a browser's command line
    every user of the machine could read the key.
    """
    place = html.escape(url, quote=True)
    page = (
        f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url={place}">'
        f'<title>NextGPU</title><a href="{place}">The dashboard</a>'
    )
    try:
        browser = webbrowser.get()
        write_whole(ctx.paths.web_page_file, [page.encode()], force=True)
    except (webbrowser.Error, NextGPUError):
        return False
    return browser.open(ctx.paths.web_page_file.as_uri())
