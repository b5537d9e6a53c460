"""The owner's data on this machine: what there is, a copy of it, and its end.

    survey    every kind of the registry (paths.PATH_REGISTRY) with its size, from the disk
    export    chosen kinds into one tar file of mode 0600
    delete    one kind, whole or not at all

Whatever is deleted is first moved out of its place in one rename for each entry, all of them taken
back where one fails; only then it is unlinked.  A crash in between leaves a directory whose name
begins with `.nextgpu-deleted-`, which counts to its kind and goes with the next `delete`.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nextgpu_node.errors import NextGPUError, UsageError
from nextgpu_node.paths import (
    ELSEWHERE,
    PATH_REGISTRY,
    ElsewhereKind,
    PathKind,
    Paths,
    ensure_private_dir,
)
from nextgpu_node.runtime_dir import answers, locked

_TRASH: Final = ".nextgpu-deleted-"
_MANIFEST: Final = "MANIFEST.json"
SCHEMA: Final = 1


class DataInUse(NextGPUError):
    """This can not be deleted now."""

    exit_code = 5


@dataclass(frozen=True, slots=True)
class Holding:
    """What is there of one kind now.  `places` are its top entries on the disk."""

    kind: PathKind
    place: Path
    places: tuple[Path, ...]
    files: int
    size_bytes: int


def survey(paths: Paths) -> list[Holding]:
    """Every kind of data, in the registry's order, whether there is any or not."""
    return [_holding(paths, kind) for kind in kinds(paths)]


def kinds(paths: Paths) -> list[PathKind]:
    """The registry without directories that only hold others, each place once."""
    found: dict[Path, PathKind] = {}
    for kind in PATH_REGISTRY:
        if not kind.holds_others:
            found.setdefault(getattr(paths, kind.attribute), kind)
    return list(found.values())


def find_kind(paths: Paths, name: str) -> PathKind:
    """The kind of that name.  Raises UsageError naming all of them."""
    known = {kind.name: kind for kind in kinds(paths)}
    if name not in known:
        raise UsageError(f"{name!r} is no kind of data. There are: {', '.join(known)}.")
    return known[name]


def kind_of(path: Path, paths: Paths) -> PathKind | ElsewhereKind | None:
    """Which kind of the registry `path` belongs to; None where the registry does not know it."""
    for kind in PATH_REGISTRY:
        place = getattr(paths, kind.attribute)
        if path == place or (not kind.holds_others and place in path.parents):
            return kind
        below = path.relative_to(place.parent).parts if place.parent in path.parents else ()
        if below and any(fnmatch.fnmatch(below[0], name) for name in _names_beside(place, kind)):
            return kind
    text, temporary = os.fspath(path), tempfile.gettempdir()
    for other in ELSEWHERE:
        for pattern in other.patterns:
            whole = pattern.replace("{tmp}", temporary)
            if fnmatch.fnmatch(text, whole) or fnmatch.fnmatch(text, whole + "/*"):
                return other
    return None


def _names_beside(place: Path, kind: PathKind) -> list[str]:
    named = [pattern.replace("{name}", place.name) for pattern in kind.beside]
    return [*named, f"{_TRASH}{kind.name}-*"]


# --- looking ----------------------------------------------------------------------------------


def _holding(paths: Paths, kind: PathKind) -> Holding:
    place: Path = getattr(paths, kind.attribute)
    places = tuple(_places(place, kind))
    sizes = [size for top in places for size in _sizes(top)]
    return Holding(kind, place, places, len(sizes), sum(sizes))


def _places(place: Path, kind: PathKind) -> Iterator[Path]:
    """The top entries of the kind; what a link among the jobs leads to is one too (--job-dir)."""
    if place.is_dir() and not place.is_symlink():
        yield from _places_below(place)
    elif os.path.lexists(place):
        yield place
    for pattern in _names_beside(place, kind):
        yield from sorted(place.parent.glob(pattern))


def _places_below(directory: Path) -> Iterator[Path]:
    for entry in sorted(_entries(directory)):
        if entry.is_symlink() and entry.is_dir():
            yield entry.resolve()
        yield entry


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _sizes(top: Path) -> Iterator[int]:
    """Bytes on the disk's own account of each file below; links are not followed."""
    try:
        info = top.lstat()
    except OSError:
        return
    if stat.S_ISDIR(info.st_mode):
        for entry in _entries(top):
            yield from _sizes(entry)
    else:
        yield info.st_size if stat.S_ISREG(info.st_mode) else 0


# --- a copy -----------------------------------------------------------------------------------


def export(
    paths: Paths, chosen: Sequence[PathKind], destination: Path, *, force: bool
) -> list[Holding]:
    """`destination` is afterwards a tar file (0600) with the chosen kinds, a folder for each.

    MANIFEST.json in it says what each kind is, and the SHA-256 of every file.  Raises UsageError
    where the name is taken, NextGPUError where something can not be read; nothing is left then.
    """
    holdings = [_holding(paths, kind) for kind in chosen]
    parent = destination.absolute().parent
    try:
        descriptor, name = tempfile.mkstemp(
            prefix=f".{destination.name}.", suffix=".part", dir=parent
        )
    except OSError as exc:
        raise NextGPUError(f"{destination}: can not be written: {exc.strerror}.") from exc
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                _fill(archive, holdings)
            file.flush()
            os.fsync(file.fileno())
        if force:
            part.replace(destination)
        else:
            os.link(part, destination)
    except FileExistsError as exc:
        taken = f"{destination}: exists already. Choose another name, or say --force."
        raise UsageError(taken) from exc
    except OSError as exc:
        raise NextGPUError(f"The data can not be copied: {exc}. Nothing is left.") from exc
    finally:
        part.unlink(missing_ok=True)
    return holdings


def _fill(archive: tarfile.TarFile, holdings: Sequence[Holding]) -> None:
    described = []
    for holding in holdings:
        hashes: dict[str, str] = {}
        with _held_still(holding):
            for top in holding.places:
                for file in _regular_files(top):
                    name = f"{holding.kind.name}/{top.name}"
                    if file != top:
                        name += f"/{file.relative_to(top)}"
                    hashes[name] = _add(archive, file, name)
        described.append(
            {
                "kind": holding.kind.name,
                "what": holding.kind.what,
                "why": holding.kind.why,
                "kept": holding.kind.kept,
                "place": os.fspath(holding.place),
                "sha256": hashes,
            }
        )
    text = json.dumps({"schema": SCHEMA, "kinds": described}, indent=1).encode()
    _add_bytes(archive, _MANIFEST, text, mode=0o600, mtime=0)


@contextmanager
def _held_still(holding: Holding) -> Iterator[None]:
    """A database is copied between two of its transactions: the caller's copies are good where
    nothing changed meanwhile, which is what this raises for."""
    before = _state_of(holding)
    yield
    if holding.kind.attribute.endswith("_file") and _state_of(holding) != before:
        raise NextGPUError(
            f"{holding.kind.what}: changed while it was copied. Try again, or stop nextgpud first."
        )


def _state_of(holding: Holding) -> list[tuple[str, int, int]]:
    files = (file for top in holding.places for file in _regular_files(top))
    infos = ((file, file.stat()) for file in files)
    return [(os.fspath(file), info.st_size, info.st_mtime_ns) for file, info in infos]


def _regular_files(top: Path) -> Iterator[Path]:
    if top.is_symlink():
        return
    if top.is_file():
        yield top
    elif top.is_dir():
        for entry in sorted(_entries(top)):
            yield from _regular_files(entry)


def _add(archive: tarfile.TarFile, file: Path, name: str) -> str:
    """Add the file as it is now; the SHA-256 of what went in."""
    digest = hashlib.sha256()
    with file.open("rb") as source:
        info = os.fstat(source.fileno())
        entry = _entry(name, info.st_size, info.st_mtime)
        archive.addfile(entry, _Hashed(source, digest))
    return digest.hexdigest()


def _add_bytes(
    archive: tarfile.TarFile, name: str, data: bytes, *, mode: int, mtime: float
) -> None:
    entry = _entry(name, len(data), mtime)
    entry.mode = mode
    archive.addfile(entry, io.BytesIO(data))


def _entry(name: str, size_bytes: int, mtime: float) -> tarfile.TarInfo:
    """Without the account's name: who opens the archive later knows whose it is."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size_bytes, int(mtime), 0o600
    return entry


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, source: io.BufferedReader, digest: hashlib._Hash) -> None:
        self._source = source
        self._digest = digest

    def read(self, size_bytes: int = -1) -> bytes:
        data = self._source.read(size_bytes)
        self._digest.update(data)
        return data


# --- the end ----------------------------------------------------------------------------------


def delete(paths: Paths, chosen: Sequence[PathKind]) -> list[Holding]:
    """Delete everything of the chosen kinds, one kind after the other; what there was.

    Raises DataInUse, before anything is changed, where that would pull the ground from under a
    process; NextGPUError where the disk refuses, with that kind and all later ones as they were.
    """
    ensure_private_dir(paths.runtime_dir)
    # A daemon that starts now waits here, and finds all of it or nothing.
    with locked(paths.runtime_dir), ExitStack() as stack:
        holdings = [_holding(paths, kind) for kind in chosen]
        for holding in holdings:
            _check_unused(holding, paths)
            for lock in _job_locks(holding):
                _take(stack, lock)
        for holding in holdings:
            for trash in _move_away(holding):
                _remove(trash)
    return holdings


def remove_empty_directories(paths: Paths) -> None:
    """After everything was deleted: the node's own directories, where nothing is in them."""
    places = (getattr(paths, kind.attribute) for kind in PATH_REGISTRY)
    for place in sorted(places, key=lambda path: len(path.parts), reverse=True):
        if place.is_dir():
            with contextlib.suppress(OSError):
                place.rmdir()


def _check_unused(holding: Holding, paths: Paths) -> None:
    kind = holding.kind
    if kind.deleting == "never":
        raise DataInUse(f"{kind.what}: belong to the administrator, not to this node.")
    if kind.deleting == "refused" and answers(paths.units_socket):
        raise DataInUse(
            f"{kind.what}: the node that runs here is using it. Stop nextgpud first, then try "
            f"again: nextgpu data delete {kind.name}"
        )


def _job_locks(holding: Holding) -> list[Path]:
    """Held by a process that works at a job (sdk/jobs.py)."""
    if holding.kind.attribute != "jobs_dir":
        return []
    # A link among the jobs is there beside what it leads to.
    tops = [top for top in holding.places if not top.is_symlink()]
    return [top / "lock" for top in tops if (top / "lock").is_file()]


def _take(stack: ExitStack, lock: Path) -> None:
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        job = lock.parent.name
        raise DataInUse(
            f"jobs: {job} is being worked at. End it first: nextgpu cancel {job}"
        ) from exc


def _move_away(holding: Holding) -> list[Path]:
    """Every entry renamed into a directory beside it, or all of them back in their places."""
    moved: list[tuple[Path, Path]] = []
    trashes: dict[Path, Path] = {}
    mark = f"{_TRASH}{holding.kind.name}-{secrets.token_hex(4)}"
    try:
        for number, place in enumerate(holding.places):
            if place.name.startswith(_TRASH):
                trashes[place] = place
                continue
            trash = _trash_for(place.parent, holding.place, mark)
            if trash not in trashes:
                trash.mkdir(mode=0o700)
                trashes[trash] = trash
            target = trash / f"{number}-{place.name}"
            place.rename(target)
            moved.append((place, target))
    except OSError as exc:
        for place, target in reversed(moved):
            target.rename(place)
        for trash in trashes:
            if trash.name == mark:
                trash.rmdir()
        raise NextGPUError(
            f"{holding.kind.what}: can not be deleted: {exc.strerror}. Nothing was changed."
        ) from exc
    return list(trashes)


def _trash_for(parent: Path, place: Path, mark: str) -> Path:
    """Beside the kind's own directory, so that nobody lists it as one of its entries."""
    return (place.parent if parent == place else parent) / mark


def _remove(trash: Path) -> None:
    try:
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash)
        else:
            trash.unlink(missing_ok=True)
    except OSError as exc:
        raise NextGPUError(
            f"{trash}: was taken out of its place, but can not be removed: {exc.strerror}."
        ) from exc
