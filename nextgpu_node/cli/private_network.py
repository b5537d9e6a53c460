"""Private networks: `nextgpu network create|invite|join|show|leave`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.files import check_writable, write_whole
from nextgpu_node.config import load_config, set_value
from nextgpu_node.errors import DaemonUnreachable, UsageError
from nextgpu_node.private_network import (
    NetworkInvite,
    fingerprint,
    forget_network,
    format_invite,
    new_network_key,
    parse_invite,
    read_network_key,
    write_network_key,
)
from nextgpu_node.sdk.api_client import ApiClient

_RESTART = "A running node takes it up when it restarts."
OutputFile = Annotated[
    Path | None, Parameter(name="--output", help="Write the invite here (0600), not to stdout.")
]


def create(*, ctx: Ctx) -> int:
    """Make a network of your own: from its next start on, this node meets only its members.

    Then start the node and run `nextgpu network invite` for what the others need.
    """
    key = new_network_key()
    write_network_key(ctx.paths.network_key_file, key)
    set_value(ctx.paths.config_file, "network.bootstrap", "")
    ctx.paths.known_peers_file.unlink(missing_ok=True)
    return _told(ctx, key, f"This node is the first of network {fingerprint(key)}. {_RESTART}")


async def invite(*, output: OutputFile = None, ctx: Ctx) -> int:
    """An invite to this node's network, with the addresses of this node in it.

    It holds the network's key: whoever has it can join, and hand it on. Send it as you would send
    a password.
    """
    key = _own_key(ctx)
    text = format_invite(NetworkInvite(key, tuple(await _own_addresses(ctx))))
    if output is not None:
        check_writable(output, force=False)
        write_whole(output, [text.encode() + b"\n"], force=False)
    if ctx.out.json:
        ctx.out.print_json(network=fingerprint(key), **({} if output else {"invite": text}))
    elif output is None:
        ctx.out.say(text)
    return 0


def join(
    invite: Annotated[str, Parameter(help='The invite, or "-" to read it from stdin.')],
    /,
    *,
    ctx: Ctx,
) -> int:
    """Join the network of an invite: from its next start on, this node meets only its members."""
    found = parse_invite(sys.stdin.read(16 * 1024) if invite == "-" else invite)
    write_network_key(ctx.paths.network_key_file, found.key)
    try:
        set_value(ctx.paths.config_file, "network.bootstrap", ",".join(found.bootstrap))
    except BaseException:
        ctx.paths.network_key_file.unlink()
        raise
    ctx.paths.known_peers_file.unlink(missing_ok=True)
    name = fingerprint(found.key)
    return _told(ctx, found.key, f"This node belongs to network {name}. {_RESTART}")


def show(*, ctx: Ctx) -> int:
    """Which network this node belongs to."""
    key = read_network_key(ctx.paths.network_key_file)
    if ctx.out.json:
        ctx.out.print_json(private=key is not None, network=fingerprint(key) if key else "")
    elif key is None:
        ctx.out.say("The open network.")
    else:
        ctx.out.say(f"Private network {fingerprint(key)}.")
    return 0


def leave(*, ctx: Ctx) -> int:
    """Forget the network's key and nodes; the node goes back to the open network."""
    paths = (ctx.paths.network_key_file, ctx.paths.known_peers_file)
    if not forget_network(paths):
        raise UsageError("This node belongs to no private network.")
    set_value(ctx.paths.config_file, "network.bootstrap", "")
    if ctx.out.json:
        ctx.out.print_json(private=False, network="")
    else:
        ctx.out.say(f"The network's key is deleted. {_RESTART}")
    return 0


def _own_key(ctx: Context) -> bytes:
    key = read_network_key(ctx.paths.network_key_file)
    if key is None:
        raise UsageError("This node belongs to no private network. `nextgpu network create` one.")
    return key


async def _own_addresses(ctx: Context) -> list[str]:
    """Where others knock: the running node's own addresses, and those through which it came."""
    bootstrap = load_config(ctx.paths, overrides={}, environ=ctx.environ).network.bootstrap
    try:
        async with ApiClient(ctx.paths.api_socket) as api:
            own = (await api.status()).addresses
    except DaemonUnreachable:
        if not bootstrap:
            raise
        own = []
    return list(dict.fromkeys([*own, *bootstrap]))[:16]


def _told(ctx: Context, key: bytes, text: str) -> int:
    if ctx.out.json:
        ctx.out.print_json(private=True, network=fingerprint(key))
    else:
        ctx.out.say(text)
    return 0
