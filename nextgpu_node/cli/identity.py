"""`nextgpu identity`: the key that this node is known by.  Works on its files, without a daemon.

A passphrase is typed at the terminal, or read from a descriptor: arguments and the environment
can be read by other processes.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nextgpu_node import identity
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.files import check_writable, write_whole
from nextgpu_node.clock import now_ms
from nextgpu_node.errors import IdentityError, UsageError
from nextgpu_node.passphrases import Passphrase, from_descriptor, from_terminal

_MAX_EXPORT_BYTES = 64 * 1024

PassphraseFd = Annotated[
    int | None, Parameter(help="Read the passphrase of the key from this descriptor.")
]
NewPassphraseFd = Annotated[
    int | None, Parameter(help="Read the new passphrase from this descriptor.")
]
ExportPassphraseFd = Annotated[
    int | None, Parameter(help="Read the passphrase of the exported file from this descriptor.")
]


def show(*, ctx: Ctx) -> int:
    """Who this node is.  Asks for no passphrase."""
    facts = identity.inspect(ctx.paths)
    if facts is None:
        raise IdentityError("There is no identity key here yet; the node's first start makes it.")
    if ctx.out.json:
        ctx.out.print_json(
            peer_id=facts.peer_id,
            sealed=facts.sealed,
            former_peer_ids=list(facts.former_ids),
            file=str(ctx.paths.identity_file),
        )
        return 0
    ctx.out.facts(
        {
            "peer ID": facts.peer_id,
            "at rest": "under a passphrase" if facts.sealed else "plain, mode 0600",
            "before": ", ".join(facts.former_ids) or "(always this key)",
            "file": str(ctx.paths.identity_file),
        }
    )
    return 0


def rotate(*, passphrase_fd: PassphraseFd = None, ctx: Ctx) -> int:
    """A new key, named by the old one as its successor.

    Peers that list the old peer ID, and tokens made out to it, follow to the new one.  Not for a
    key that somebody else may have: they could name a successor as well.
    """
    _check_stopped(ctx)
    before = identity.inspect(ctx.paths)
    after = identity.rotate(ctx.paths, _passphrase(passphrase_fd), now_ms=now_ms())
    assert before is not None
    if ctx.out.json:
        ctx.out.print_json(peer_id=after.peer_id, former_peer_id=before.peer_id)
    else:
        ctx.out.say(f"This node is {after.peer_id} now; it was {before.peer_id}.")
    return 0


def export(
    file: Path,
    /,
    *,
    passphrase_fd: PassphraseFd = None,
    export_passphrase_fd: ExportPassphraseFd = None,
    ctx: Ctx,
) -> int:
    """Write key and successions to a file, under a passphrase of its own.

    Whoever has the file and that passphrase is this node.

    Parameters
    ----------
    file
        Where to; it must not exist.
    """
    check_writable(file, force=False)
    sealed = identity.export(
        ctx.paths,
        _passphrase(passphrase_fd),
        _new_passphrase(export_passphrase_fd, "Passphrase for the exported file: "),
    )
    write_whole(file, [sealed], force=False)
    if ctx.out.json:
        ctx.out.print_json(output=str(file))
    else:
        ctx.out.say(f"Wrote {file}.")
    return 0


def import_(
    file: Path,
    /,
    *,
    export_passphrase_fd: ExportPassphraseFd = None,
    new_passphrase_fd: NewPassphraseFd = None,
    force: Annotated[bool, Parameter(negative="", help="Replace the key that is here.")] = False,
    ctx: Ctx,
) -> int:
    """Be the node of an exported identity.

    Two machines that are one node at the same time confuse their peers: stop the other one.

    Parameters
    ----------
    file
        As `nextgpu identity export` wrote it.
    """
    _check_stopped(ctx)
    data = _read(file)
    opening = (
        _passphrase(export_passphrase_fd)
        if export_passphrase_fd is not None
        else lambda: from_terminal("Passphrase of the exported file: ")
    )
    new = from_descriptor(new_passphrase_fd) if new_passphrase_fd is not None else None
    try:
        imported = identity.import_(ctx.paths, data, opening, new=new, replace=force)
    except IdentityError as exc:
        # What is wrong with the bytes of a file begins in lower case, for its name to stand before.
        if str(exc)[:1].islower():
            raise IdentityError(f"{file}: {exc}") from exc
        raise
    if ctx.out.json:
        ctx.out.print_json(peer_id=imported.peer_id, sealed=new is not None)
    else:
        ctx.out.say(f"This node is {imported.peer_id} now.")
        if new is None:
            ctx.out.note("The key is plain at rest; `nextgpu identity passphrase` seals it.")
    return 0


def passphrase(
    *,
    remove: Annotated[bool, Parameter(negative="", help="Keep the key plain from now on.")] = False,
    passphrase_fd: PassphraseFd = None,
    new_passphrase_fd: NewPassphraseFd = None,
    ctx: Ctx,
) -> int:
    """Set, change or remove the passphrase of the key at rest.  The key stays the same."""
    if remove and new_passphrase_fd is not None:
        raise UsageError("--remove and --new-passphrase-fd contradict each other.")

    facts = identity.inspect(ctx.paths)
    if facts is None:
        raise IdentityError("There is no identity key here yet; the node's first start makes it.")
    old = _passphrase(passphrase_fd)
    if facts.sealed:
        # Asked first and kept: nobody should choose a new one before the old one is right.
        opened = old()
        identity.check_passphrase(ctx.paths, opened)
        old = lambda: opened  # noqa: E731
    new = None if remove else _new_passphrase(new_passphrase_fd, "New passphrase: ")()
    identity.set_passphrase(ctx.paths, old, new)
    if ctx.out.json:
        ctx.out.print_json(peer_id=facts.peer_id, sealed=not remove)
    else:
        ctx.out.say("The key is plain at rest now." if remove else "The key is sealed at rest now.")
    if not remove:
        ctx.out.note(
            "nextgpud asks for it at its start: at the terminal, from --passphrase-fd, or as the "
            "systemd credential nextgpu.passphrase."
        )
    return 0


def _passphrase(fd: int | None) -> Passphrase:
    if fd is not None:
        return lambda: from_descriptor(fd)
    return lambda: from_terminal("Passphrase of the identity key: ")


def _new_passphrase(fd: int | None, prompt: str) -> Passphrase:
    if fd is not None:
        return lambda: from_descriptor(fd)
    return lambda: from_terminal(prompt, twice=True)


def _check_stopped(ctx: Context) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(ctx.paths.api_socket))
        except OSError:
            return
    raise UsageError("nextgpud runs here with the key that is to be replaced. Stop it first.")


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_EXPORT_BYTES)
    except OSError as exc:
        raise UsageError(f"{file}: can not be read: {exc.strerror}.") from exc
