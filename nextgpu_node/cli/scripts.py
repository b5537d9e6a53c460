"""`nextgpu run script.py -- ARGS`: a script of yours on a peer whose owner named you.

What it prints is printed here while it runs.  The files that it leaves in its working directory are
here, all of them, once the peer's signed receipt is verified; before that there is nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nextgpu_node.cli.context import Context
from nextgpu_node.errors import (
    IntegrityError,
    JobFailed,
    NextGPUError,
    PeerLost,
    Refused,
    UsageError,
)
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import CallResult, FileReceived, LogText, ReceiptVerified, UnitEvent
from nextgpu_node.sdk.executor import show_log
from nextgpu_node.sdk.python_unit import PythonUnit, encode_script, result_of
from nextgpu_node.sdk.unit import Needs, open_unit

_MOST_SOURCE_BYTES = 16 * 1024 * 1024


async def run_script(
    ctx: Context, script: Path, output: Path, needs: Needs, arguments: Sequence[str]
) -> int:
    """0 where the script ended with 0, else 1."""
    source = _read_source(script)
    check_directory(output)
    call = encode_script(script.name, source, arguments)
    taken = _ScriptRun()
    await _drive(ctx, call, needs, taken)
    write_directory(output, taken.files)
    _report(ctx, taken, output)
    return 0 if taken.exit_code == 0 else JobFailed.exit_code


def _read_source(script: Path) -> str:
    try:
        if script.stat().st_size > _MOST_SOURCE_BYTES:
            raise UsageError(f"{script}: is too large for a script.")
        return script.read_text(encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"{script}: can not be read: {exc.strerror}.") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"{script}: is not UTF-8 text.") from exc


def check_directory(output: Path) -> None:
    """Raise UsageError unless `output` is new, or an empty directory: asked before work begins."""
    if output.is_dir() and not output.is_symlink():
        if any(output.iterdir()):
            raise UsageError(f"{output}: is not empty. Name a new directory for the files.")
    elif output.exists() or output.is_symlink():
        raise UsageError(f"{output}: is not a directory. Name a new one for the files.")


@dataclass(slots=True)
class _ScriptRun:
    files: list[FileReceived] = field(default_factory=list)
    exit_code: int | None = None
    peer_id: str = ""
    verified: bool = False

    def take(self, event: UnitEvent) -> None:
        match event:
            case LogText(stream=stream, text=text):
                show_log(stream, text)
            case FileReceived():
                self.files.append(event)
            case CallResult():
                code = result_of(event)
                if type(code) is not int:
                    raise IntegrityError("The peer's exit code of the script is none.")
                self.exit_code = code
            case ReceiptVerified(peer_id=peer_id):
                self.peer_id, self.verified = peer_id, True
            case _:
                pass


async def _drive(ctx: Context, call: bytes, needs: Needs, taken: _ScriptRun) -> None:
    """On the first peer that takes it, to its verified end."""
    async with open_client(ctx.paths) as client:
        refusal: NextGPUError | None = None
        for peer in await client.find_peers(needs):
            opening = open_unit(
                ctx.paths.units_socket, peer, needs, table_version=1, unit_class=PythonUnit
            )
            try:
                async with opening as unit:
                    assert isinstance(unit, PythonUnit)
                    await unit.start_calls()
                    await unit.send_calls([call])
                    await unit.close_input()
                    async for event in unit.events():
                        taken.take(event)
            except (Refused, PeerLost) as exc:
                if unit_has_begun(taken):
                    raise
                refusal = exc
                continue
            if taken.exit_code is None or not taken.verified:
                raise JobFailed("The unit ended without the script's result.")
            return
    raise Refused(
        f"No peer runs scripts of yours; an owner must name your peer ID in sharing.python_allow. "
        f"The last answer: {refusal}"
    )


def unit_has_begun(taken: _ScriptRun) -> bool:
    """Whether something of the script was seen: a script may not be run twice without asking."""
    return taken.exit_code is not None or bool(taken.files)


def write_directory(output: Path, files: Sequence[FileReceived]) -> None:
    """All files below `output`, or nothing.

    Names were checked when they came (python_unit.check_name_untrusted).  Here every directory is
    new and every file is created, never opened, so that no link can lead out.
    """
    stage = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
    try:
        stage.mkdir(parents=True)
        for file in files:
            _create(stage, file)
        if output.is_dir():
            output.rmdir()
        stage.rename(output)
    except FileExistsError as exc:
        raise IntegrityError("The peer sent one name twice, or a file as a directory.") from exc
    except NotADirectoryError as exc:
        raise IntegrityError("The peer sent one name twice, or a file as a directory.") from exc
    except OSError as exc:
        raise NextGPUError(f"{output}: can not be written: {exc.strerror}.") from exc
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _create(stage: Path, file: FileReceived) -> None:
    path = stage.joinpath(*file.name.split("/"))
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o644), "wb") as target:
        target.write(file.content)


def _report(ctx: Context, taken: _ScriptRun, output: Path) -> None:
    if ctx.out.json:
        ctx.out.print_json(
            peer_id=taken.peer_id,
            exit_code=taken.exit_code,
            files=[file.name for file in taken.files],
            receipt_verified=taken.verified,
            output=str(output),
        )
        return
    ctx.out.note(f"Ran on {taken.peer_id}; receipt verified. {len(taken.files)} files in {output}.")
    if taken.exit_code:
        print(f"The script ended with code {taken.exit_code}.", file=sys.stderr)
