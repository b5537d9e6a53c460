"""`nextgpu data`: what this software has on this machine, a copy of it, and its end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nextgpu_node import data
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.output import human_bytes
from nextgpu_node.data import Holding
from nextgpu_node.errors import UsageError
from nextgpu_node.paths import ELSEWHERE, PathKind

Kind = Annotated[str, Parameter(help="Kinds of data, as `nextgpu data show` has them.")]
All = Annotated[bool, Parameter(name="--all", negative="", help="Every kind.")]


def show(*, ctx: Ctx) -> int:
    """Every kind of data that the software writes here: where, how much, why, how long."""
    holdings = data.survey(ctx.paths)
    if ctx.out.json:
        elsewhere = [
            {"kind": k.name, "what": k.what, "why": k.why, "kept": k.kept} for k in ELSEWHERE
        ]
        ctx.out.print_json(kinds=[plain(one) for one in holdings], elsewhere=elsewhere)
        return 0
    rows = [
        (
            one.kind.name,
            human_bytes(one.size_bytes) if one.files else "-",
            str(one.files or "-"),
            one.kind.what,
            one.kind.kept,
        )
        for one in holdings
    ]
    ctx.out.table(("KIND", "SIZE", "FILES", "WHAT", "KEPT"), rows)
    ctx.out.say("")
    for one in holdings:
        ctx.out.say(f"{one.kind.name}: {one.place}", f"    {one.kind.why}")
    ctx.out.say("", "Elsewhere:")
    for other in ELSEWHERE:
        ctx.out.say(f"{other.name}: {other.what}", f"    {other.why}; {other.kept}")
    ctx.out.say("", "And the files that you name on a command line: those are yours.")
    return 0


def plain(holding: Holding) -> dict[str, object]:
    """The JSON object of one kind."""
    kind = holding.kind
    return {
        "kind": kind.name,
        "what": kind.what,
        "why": kind.why,
        "kept": kind.kept,
        "place": os.fspath(holding.place),
        "files": holding.files,
        "size_bytes": holding.size_bytes,
        "personal": kind.personal,
        "deleting": kind.deleting,
    }


def export(
    *kind: Kind,
    all_: All = False,
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help="The archive to write (tar).")
    ] = None,
    force: Annotated[bool, Parameter(negative="", help="Replace an existing file.")] = False,
    ctx: Ctx,
) -> int:
    """Copy data into one archive that only you can read (tar, mode 0600)."""
    chosen = _chosen(ctx, kind, every=all_)
    destination = output or Path("nextgpu-data.tar")
    held = data.export(ctx.paths, chosen, destination, force=force)
    size_bytes = destination.stat().st_size
    if ctx.out.json:
        ctx.out.print_json(
            file=str(destination), size_bytes=size_bytes, kinds=[plain(one) for one in held]
        )
        return 0
    ctx.out.say(f"{destination}: {human_bytes(size_bytes)}, {len(held)} kinds.")
    if any(one.kind.name == "identity" and one.files for one in held):
        ctx.out.note("It holds this node's key: whoever has the file can be this node.")
    return 0


def delete(
    *kind: Kind,
    all_: All = False,
    yes: Annotated[bool, Parameter(negative="", help="Delete without being asked.")] = False,
    ctx: Ctx,
) -> int:
    """Delete data of these kinds, each of them whole or not at all."""
    chosen = _chosen(ctx, kind, every=all_)
    if all_:
        chosen = [one for one in chosen if one.deleting != "never"]
    names = {one.name for one in chosen}
    held = [one for one in data.survey(ctx.paths) if one.kind.name in names]
    if not yes:
        _ask(ctx, held)
    deleted = data.delete(ctx.paths, chosen)
    if all_:
        data.remove_empty_directories(ctx.paths)
    if ctx.out.json:
        ctx.out.print_json(deleted=[plain(one) for one in deleted])
        return 0
    for one in deleted:
        what = f"{one.files} files, {human_bytes(one.size_bytes)}" if one.files else "nothing there"
        ctx.out.say(f"{one.kind.name}: {what}{' deleted' if one.files else ''}.")
    return 0


def _chosen(ctx: Context, names: tuple[str, ...], *, every: bool) -> list[PathKind]:
    if every and names:
        raise UsageError("Name kinds of data, or say --all: not both.")
    if every:
        return data.kinds(ctx.paths)
    if not names:
        raise UsageError("Which kinds of data? `nextgpu data show` lists them; --all is all.")
    return [data.find_kind(ctx.paths, name) for name in dict.fromkeys(names)]


def _ask(ctx: Context, held: list[Holding]) -> None:
    """Raises UsageError where the answer is no, or where nobody can answer."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("Nobody to ask here. Say --yes to delete without being asked.")
    for one in held:
        ctx.out.note(
            f"{one.kind.name}: {one.kind.what}, {one.files} files, {human_bytes(one.size_bytes)}",
            f"    {one.place}",
        )
    sys.stderr.write("Delete all of this? It can not be brought back. [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("Nothing was deleted.")
