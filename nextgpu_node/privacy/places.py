"""The places of a Linux machine where something of a work unit could be left, each searched.

    files         every byte below directories, and what changed in the shared temporary ones
    memory        /proc/PID/mem, every page that is there (proc_pid_mem(5))
    descriptors   /proc/PID/fd: files without a name, memfds, anything else that is open
    shared memory /dev/shm, System V segments (shmat(2)), POSIX message queues

Nothing of what is found is kept or shown: a Look has counts.
"""

from __future__ import annotations

import ctypes
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from nextgpu_node.privacy.marks import NONE_FOUND, OVERLAP_BYTES, Found, Marks

_CHUNK_BYTES: Final = 4 << 20
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_PRESENT_OR_SWAPPED: Final = 3 << 62  # /proc/PID/pagemap (admin-guide/mm/pagemap)
# Below this a region is read whole: cheaper than asking which of its pages are there.
_SPARSE_BYTES: Final = 64 << 20
_PROC: Final = Path("/proc")
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  searched, never written
_PSEUDO: Final = ("[vvar]", "[vsyscall]", "[vvar_vclock]")


@dataclass(frozen=True, slots=True)
class Look:
    """One place: how much of it was searched, what was found, and what could not be searched."""

    place: str
    searched_bytes: int = 0
    items: int = 0
    found: Found = NONE_FOUND
    unsearched: str = ""

    def __add__(self, other: Look) -> Look:
        return Look(
            self.place,
            self.searched_bytes + other.searched_bytes,
            self.items + other.items,
            self.found + other.found,
            "; ".join(dict.fromkeys(filter(None, (self.unsearched, other.unsearched)))),
        )


def total(place: str, looks: Iterable[Look]) -> Look:
    """All of them as one place."""
    whole = Look(place)
    for look in looks:
        whole += look
    return whole


# --- files ------------------------------------------------------------------------------------


def search_files(
    place: str,
    tops: Sequence[Path],
    marks: Marks,
    *,
    since_s: float = 0,
    without: Path | None = None,
) -> Look:
    """Names and contents below `tops`; with `since_s` only what changed after that time."""
    files = (file for top in tops for file in _files(top, since_s, without))
    return total(place, (_search_file(file, marks) for file in files))


def _files(top: Path, since_s: float, without: Path | None) -> Iterator[Path]:
    if top.is_file() and not top.is_symlink():
        yield top
    for directory, below, names in os.walk(top, onerror=None):
        below[:] = [name for name in below if Path(directory, name) != without]
        for name in names:
            path = Path(directory, name)
            try:
                info = path.lstat()
            except OSError:
                continue
            if stat.S_ISREG(info.st_mode) and max(info.st_mtime, info.st_ctime) >= since_s:
                yield path


def _search_file(path: Path, marks: Marks) -> Look:
    named = marks.search(os.fsencode(path))
    try:
        with path.open("rb", buffering=0) as file:
            return _search_stream("", file, marks) + Look("", found=named)
    except OSError:
        return Look("", found=named, unsearched="a file that this user may not read")


def _search_stream(place: str, file: BinaryIO, marks: Marks) -> Look:
    found, size_bytes, tail = Found(), 0, b""
    while data := file.read(_CHUNK_BYTES):
        size_bytes += len(data)
        # What lies in the overlap was counted with the chunk before.
        found += _minus(marks.search(tail + data), marks.search(tail))
        tail = (tail + data)[-OVERLAP_BYTES:]
    return Look(place, size_bytes, 1, found)


def _minus(whole: Found, seen: Found) -> Found:
    return Found(whole.count - seen.count, whole.units if whole.count > seen.count else frozenset())


# --- processes --------------------------------------------------------------------------------


def search_memory(place: str, pid: int, marks: Marks) -> Look:
    """Every page of the process that is there, written out to swap or not."""
    try:
        with (
            Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory,
            Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap,
        ):
            regions = [span for span in _regions(pid) for span in _present(pagemap, *span)]
            looks = (_search_region(memory, start, end, marks) for start, end in regions)
            return total(place, looks) + Look(place, items=1)
    except FileNotFoundError:
        return Look(place)  # it has ended
    except PermissionError:
        return Look(place, unsearched="this user may not read another process's memory")


def _regions(pid: int) -> Iterator[tuple[int, int]]:
    """What may differ from a file on the disk, which is searched as one.  A region that the process
    itself may not read is read all the same, as ptrace(2) does."""
    span, name, sizes = (0, 0), "", {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if head.endswith(":"):
            sizes[head] = rest.split()[0] if rest.split() else ""
            # Memory of a device (io, pf) is not read: doing so may have an effect there.
            if head == "VmFlags:" and not {"io", "pf"} & {*rest.split()} and _is_own(name, sizes):
                yield span
            continue
        start, _, end = head.partition("-")
        span = (int(start, 16), int(end, 16))
        fields = line.split(maxsplit=5)
        name, sizes = (fields[5] if len(fields) > 5 else ""), {}


def _is_own(name: str, sizes: dict[str, str]) -> bool:
    if name in _PSEUDO:
        return False
    if name.startswith("/") and not name.endswith("(deleted)") and "/dev/" not in name:
        # A private mapping's changed pages are anonymous; the others are the file's.
        return any(int(sizes.get(key, "0")) for key in ("Anonymous:", "Swap:", "Shared_Dirty:"))
    return any(int(sizes.get(key, "1")) for key in ("Rss:", "Swap:"))


def _present(pagemap: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The runs of pages of a large region that are there: reading the others would make them."""
    if end - start < _SPARSE_BYTES:
        yield start, end
        return
    run_start = -1
    for first in range(start, end, _CHUNK_BYTES * _PAGE_BYTES // 8):
        last = min(end, first + _CHUNK_BYTES * _PAGE_BYTES // 8)
        pagemap.seek(first // _PAGE_BYTES * 8)
        entries = array("Q", pagemap.read((last - first) // _PAGE_BYTES * 8))
        for number, entry in enumerate(entries):
            at = first + number * _PAGE_BYTES
            if entry & _PRESENT_OR_SWAPPED:
                run_start = at if run_start < 0 else run_start
            elif run_start >= 0:
                yield run_start, at
                run_start = -1
    if run_start >= 0:
        yield run_start, end


def _search_region(memory: BinaryIO, start: int, end: int, marks: Marks) -> Look:
    look, tail = Look(""), b""
    for at in range(start, end, _CHUNK_BYTES):
        try:
            memory.seek(at)
            data = memory.read(min(_CHUNK_BYTES, end - at))
        except (OSError, OverflowError):
            return look  # unmapped meanwhile, or memory of a device
        found = _minus(marks.search(tail + data), marks.search(tail))
        look += Look("", len(data), 0, found)
        tail = (tail + data)[-OVERLAP_BYTES:]
    return look


def search_descriptors(place: str, pid: int, marks: Marks) -> Look:
    """Regular files that the process holds open, with or without a name; memfds among them."""
    try:
        numbers = [entry.name for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except FileNotFoundError:
        return Look(place)
    except PermissionError:
        return Look(place, unsearched="this user may not see another process's descriptors")
    return total(place, (_search_descriptor(pid, number, marks) for number in numbers))


def _search_descriptor(pid: int, number: str, marks: Marks) -> Look:
    path = f"/proc/{pid}/fd/{number}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  a link to no name
            return Look("")
        # A file description of its own: reading does not move the process's.
        with Path(path).open("rb", buffering=0) as file:
            return _search_stream("", file, marks)
    except FileNotFoundError:
        return Look("")
    except OSError:
        return Look("", unsearched="a descriptor that can not be opened again")


def swapped_bytes(pid: int) -> int:
    """How much of the process is in swap now (VmSwap of /proc/PID/status)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in lines if line.startswith("VmSwap:")]
    return int(sizes[0]) * 1024 if sizes else 0


# --- shared memory ----------------------------------------------------------------------------


def search_shared_memory(place: str, marks: Marks, *, since_s: float) -> Look:
    """Named memory, message queues, and the System V segments made or used since then."""
    look = search_files(place, [_SHARED_MEMORY], marks, since_s=since_s)
    look += search_files(place, [Path("/dev/mqueue")], marks)
    try:
        lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    except OSError:
        return look + Look(place, unsearched="System V segments: the kernel lists none here")
    for line in lines:
        fields = line.split()
        # key shmid perms size cpid lpid nattch uid gid cuid cgid atime dtime ctime (proc(5))
        if max(int(text) for text in fields[11:14]) >= int(since_s):
            look += _search_segment(place, int(fields[1]), int(fields[3]), marks)
    return look


def _search_segment(place: str, segment: int, size_bytes: int, marks: Marks) -> Look:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    read_only = 0o10000  # SHM_RDONLY, <sys/shm.h>
    address = libc.shmat(segment, None, read_only)
    if address in (None, ctypes.c_void_p(-1).value):
        return Look(place, unsearched="a System V segment of another user")
    try:
        data = ctypes.string_at(address, size_bytes)
    finally:
        libc.shmdt(ctypes.c_void_p(address))
    return Look(place, len(data), 1, marks.search(data))


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, itself not among them."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            children.setdefault(_parent_of(entry), []).append(int(entry.name))
    found, pending = [], [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def _parent_of(entry: Path) -> int:
    try:
        stat_line = (entry / "stat").read_text()
    except OSError:
        return 0
    return int(stat_line.rpartition(")")[2].split()[1])
