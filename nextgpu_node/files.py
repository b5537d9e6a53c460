"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from nextgpu_node.errors import NextGPUError, UsageError

Piece = bytes | bytearray | memoryview


def check_writable(path: Path, *, force: bool) -> None:
    """Raise UsageError where `path` could not be written later: asked before work begins."""
    if path.is_dir():
        raise UsageError(f"{path}: is a directory. Name a file.")
    if path.exists() and not force:
        raise UsageError(f"{path}: exists already. Choose another name, or say --force.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{path}: there is no directory {parent}. Make it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the directory {parent} can not be written to.")


def write_whole(path: Path, pieces: Iterable[Piece], *, force: bool) -> None:
    """`path` holds all pieces afterwards, or is as it was.

    The bytes go to a file of another name in the same directory (0600), reach the disk, and only
    then get the name; without `force` only if nobody took it meanwhile.
    """
    try:
        _write_and_rename(path, pieces, force=force)
    except FileExistsError as exc:
        raise UsageError(f"{path}: exists by now. Choose another name, or say --force.") from exc
    except OSError as exc:
        raise NextGPUError(f"{path}: can not be written: {exc.strerror}. Nothing is left.") from exc


def _write_and_rename(path: Path, pieces: Iterable[Piece], *, force: bool) -> None:
    parent = path.absolute().parent
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=parent)
    part = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if force:
            part.replace(path)
        else:
            # link(2) fails where the name is taken; rename(2) would replace what is there.
            os.link(part, path)
        _sync_directory(parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
