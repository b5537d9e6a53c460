"""Capability tokens: issuing and revoking them as a provider, narrowing them as a holder.

`invite`, `invites` and `revoke` ask this machine's node, which holds the key that signs.  `token
show` and `token attenuate` need nobody: a token carries all that is needed to read and narrow it.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from nextgpu_node.api_types import InviteRequest, InviteView
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.files import check_writable, write_whole
from nextgpu_node.cli.output import human_bytes, human_seconds
from nextgpu_node.cli.sizes import duration_s, size
from nextgpu_node.clock import now_ms
from nextgpu_node.config import load_config
from nextgpu_node.errors import UsageError
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_protocol.errors import LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.ids import peer_id_from_public_key, public_key_from_peer_id
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.messages import HeldToken, TokenBlock
from nextgpu_protocol.tokens import (
    TEXT_PREFIX,
    TokenChain,
    attenuate_token,
    format_token,
    parse_token_untrusted,
)

_MAX_FILE_BYTES = 16 * 1024
_LEAST_MEMORY_BYTES = 256 * MIB

Kinds = Annotated[
    list[str] | None, Parameter(name="--kind", negative="", help="Kind of work: program.")
]
For = Annotated[str | None, Parameter(name="--for", help="Only this peer may use it.")]
OutputFile = Annotated[
    Path | None, Parameter(name="--output", help="Write the token here (0600), not to stdout.")
]


async def invite(
    *,
    gpu_seconds: Annotated[int, Parameter(help="Time on this device, in all.")],
    expires: Annotated[str, Parameter(help='How long it may be used: "7d", "12h".')] = "7d",
    memory: Annotated[
        str | None, Parameter(help='Of each worker: "8GB". Without: sharing.max_memory.')
    ] = None,
    kind: Kinds = None,
    for_: For = None,
    output: OutputFile = None,
    ctx: Ctx,
) -> int:
    """Issue a capability token for this node's device.

    Whoever has the token's text can spend it, unless --for names a peer.  It is printed once and
    kept nowhere; this node remembers its id and what was spent.
    """
    config = load_config(ctx.paths, overrides={}, environ=ctx.environ)
    if output is not None:
        check_writable(output, force=False)
    wanted = InviteRequest(
        gpu_seconds=_positive("--gpu-seconds", gpu_seconds),
        expires_s=duration_s("--expires", expires),
        memory_bytes=_memory(memory) or config.sharing.max_memory_bytes,
        kinds=kind or ["program"],
        audience=for_ or "",
    )
    async with ApiClient(ctx.paths.api_socket) as api:
        reply = await api.invite(wanted)
    ctx.out.note(f"Token {reply.invite.id[:16]}: {_allowance(reply.invite)}.")
    if not reply.invite.audience:
        ctx.out.note("Whoever has it can spend it. `nextgpu revoke ID` ends it.")
    if config.sharing.serve == "allow" and config.sharing.allow:
        ctx.out.note(
            "This node serves only the peers in sharing.allow. To serve those with a token too: "
            "nextgpu config set sharing.serve tokens"
        )
    _give(ctx, reply.token, output, invite=msgspec.to_builtins(reply.invite))
    return 0


async def invites(*, ctx: Ctx) -> int:
    """Every token that this node has issued, with what was spent of it."""
    async with ApiClient(ctx.paths.api_socket) as api:
        reply = await api.invites()
    if ctx.out.json:
        ctx.out.print_json(invites=[msgspec.to_builtins(one) for one in reply.invites])
    elif not reply.invites:
        ctx.out.say("This node has issued no tokens.")
    else:
        columns = ("ID", "GPU SECONDS", "SPENT", "IN USE", "MEMORY", "FOR", "STATE")
        ctx.out.table(columns, [_row(one) for one in reply.invites])
    return 0


async def revoke(token_id: Annotated[str, Parameter(name="ID")], /, *, ctx: Ctx) -> int:
    """Revoke a token that this node issued; units that run under it end.

    Parameters
    ----------
    token_id
        As `nextgpu invites` shows it, or its beginning.
    """
    async with ApiClient(ctx.paths.api_socket) as api:
        revoked = await api.revoke(token_id)
    if ctx.out.json:
        ctx.out.print_json(invite=msgspec.to_builtins(revoked))
    else:
        ctx.out.say(f"Revoked {revoked.id[:16]}; {revoked.spent_s:g} s had been spent.")
    return 0


def show(token: Annotated[str, Parameter(name="TOKEN")], /, *, ctx: Ctx) -> int:
    """What a token allows.

    Parameters
    ----------
    token
        Its text, a file that holds it, or - for stdin.
    """
    _, chain = load_token(token)
    allows = chain.allows
    left_s = max(0, allows.expires_at_ms - now_ms()) // 1000
    facts = {
        "id": chain.token_id.hex(),
        "issuer": peer_id_from_public_key(chain.issuer),
        "gpu_seconds": allows.gpu_seconds,
        "memory_bytes": allows.memory_bytes,
        "kinds": list(allows.kinds),
        "audience": _audience(allows),
        "expires_at_ms": allows.expires_at_ms,
        "expired": not left_s,
        "blocks": len(chain.blocks),
    }
    if ctx.out.json:
        ctx.out.print_json(**facts)
        return 0
    ctx.out.facts(
        {
            "id": chain.token_id.hex(),
            "issuer": str(facts["issuer"]),
            "GPU seconds": f"{allows.gpu_seconds} in all; its issuer knows what is left",
            "memory": human_bytes(allows.memory_bytes),
            "kinds": ", ".join(allows.kinds),
            "for": _audience(allows) or "whoever has it",
            "expires": f"{_date(allows.expires_at_ms)} ({_in(left_s)})",
            "narrowed": f"{len(chain.blocks) - 1} times",
        }
    )
    return 0


def attenuate(
    token: Annotated[str, Parameter(name="TOKEN")],
    /,
    *,
    gpu_seconds: Annotated[int | None, Parameter(help="Fewer seconds in all.")] = None,
    expires: Annotated[str | None, Parameter(help='Sooner: "1d" from now.')] = None,
    memory: Annotated[str | None, Parameter(help='Less memory: "2GB".')] = None,
    kind: Kinds = None,
    for_: For = None,
    output: OutputFile = None,
    ctx: Ctx,
) -> int:
    """Make a narrower token out of one, offline.

    What it spends counts against the token that it was made from, too.  It can not be widened
    again; the token that was given stays as it was.

    Parameters
    ----------
    token
        Its text, a file that holds it, or - for stdin.
    """
    if output is not None:
        check_writable(output, force=False)
    held, chain = load_token(token)
    allows = chain.allows
    expires_at_ms = allows.expires_at_ms
    if expires is not None:
        expires_at_ms = now_ms() + duration_s("--expires", expires) * 1000
    narrower = replace(
        allows,
        gpu_seconds=_positive("--gpu-seconds", gpu_seconds or allows.gpu_seconds),
        memory_bytes=_memory(memory) or allows.memory_bytes,
        kinds=tuple(sorted(set(kind))) if kind else allows.kinds,
        audience=_key("--for", for_) if for_ else allows.audience,
        expires_at_ms=expires_at_ms,
    )
    try:
        narrowed = attenuate_token(held, narrower, os.urandom(32))
    except LocalProtocolError as exc:
        raise UsageError(f"A token can only be narrowed: {exc}. `nextgpu token show` says what "
                         "it allows.") from exc  # fmt: skip
    _give(ctx, format_token(narrowed), output)
    return 0


def load_token(given: str) -> tuple[HeldToken, TokenChain]:
    """The token in a text, a file, or stdin ("-").  Raises UsageError."""
    text = given if given.startswith(TEXT_PREFIX) else _read(given)
    try:
        return parse_token_untrusted(text.strip())
    except RemoteProtocolError as exc:
        raise UsageError(f"That is not a token that can be used: {exc}") from exc


def _read(name: str) -> str:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_MAX_FILE_BYTES + 1)
        else:
            # A FIFO in the file's place must not hold the command up.
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1) or b""
    except OSError as exc:
        raise UsageError(
            f"{name}: is neither a token ({TEXT_PREFIX}…) nor a file that can be read: "
            f"{exc.strerror}."
        ) from exc
    if len(data) > _MAX_FILE_BYTES or not data.isascii():
        raise UsageError(f"{name}: is not a token's file.")
    return data.decode("ascii")


def _give(ctx: Context, token: str, output: Path | None, **facts: object) -> None:
    if output is not None:
        write_whole(output, [f"{token}\n".encode()], force=False)
    if ctx.out.json:
        ctx.out.print_json(**({"output": str(output)} if output else {"token": token}), **facts)
    elif output is None:
        ctx.out.say(token)


def _allowance(view: InviteView) -> str:
    who = view.audience or "whoever has it"
    return (
        f"{view.gpu_seconds} GPU seconds, {human_bytes(view.memory_bytes)} for each unit, "
        f"until {_date(view.expires_at_ms)}, for {who}"
    )


def _row(view: InviteView) -> tuple[str, ...]:
    left_s = (view.expires_at_ms - now_ms()) // 1000
    state = "revoked" if view.revoked else _in(left_s)
    return (
        view.id[:16],
        str(view.gpu_seconds),
        f"{view.spent_s:.1f}",
        f"{view.reserved_s:.0f}",
        human_bytes(view.memory_bytes),
        view.audience or "anyone",
        state,
    )


def _in(left_s: int) -> str:
    return f"{human_seconds(left_s)} left" if left_s > 0 else "expired"


def _date(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at_ms / 1000))


def _audience(allows: TokenBlock) -> str:
    return peer_id_from_public_key(allows.audience) if allows.audience else ""


def _key(option: str, peer_id: str) -> bytes:
    try:
        return public_key_from_peer_id(peer_id)
    except ValueError as exc:
        raise UsageError(f"{option} takes a peer ID: {exc}.") from exc


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"{option} takes a whole number from 1 on.")
    return value


def _memory(text: str | None) -> int | None:
    if text is None:
        return None
    size_bytes = size("--memory", text)
    if size_bytes < _LEAST_MEMORY_BYTES:
        raise UsageError(f"--memory: a worker needs {human_bytes(_LEAST_MEMORY_BYTES)} at least.")
    return size_bytes
