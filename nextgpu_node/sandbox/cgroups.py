"""Memory and process limits by cgroup, where this process may make cgroups.  Source: cgroups(7)

v2   a delegated subtree (systemd's Delegate=): the daemon moves to a leaf of it, workers get others
v1   the memory hierarchy, root only; joining each hierarchy costs 3 ms, and RLIMIT_NPROC on a
     uid of its own counts a root daemon's worker threads just as well as the pids hierarchy

A group holds one worker: what it counts beyond rlimits is memory that no single process maps,
such as tmpfs, and what the kernel keeps for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from nextgpu_node.sandbox.surroundings import CGROUP_ROOT, read_own_groups

_PREFIX: Final = "nextgpu-"
_DAEMON_LEAF: Final = f"{_PREFIX}daemon"
_RETRY_S: Final = 0.002
_PERIOD_US: Final = 100_000  # of cpu.max


@dataclass(frozen=True, slots=True)
class Group:
    """The cgroup of one worker."""

    version: int
    directory: Path

    @property
    def layer(self) -> str:
        return f"cgroup-v{self.version}"

    def open_for_birth(self) -> list[int]:
        """v2: the directory's descriptor, for clone3 to start the worker in; v1: nothing.

        The caller closes it.
        """
        if self.version == 1:
            return []
        return [os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]

    async def adopt(self, pid: int) -> None:
        """v1: move a newborn worker in.  Waits for an RCU grace period in the kernel.

        Raises OSError.
        """
        if self.version == 1:
            await trio.to_thread.run_sync(_set, self.directory / "cgroup.procs", pid)

    def out_of_memory(self) -> bool:
        """True where the kernel has killed something in this group for its memory limit."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        with contextlib.suppress(OSError):
            for line in (self.directory / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value) > 0
        return False

    def swap_forbidden(self) -> bool:
        with contextlib.suppress(OSError):
            if self.version == 2:
                return (self.directory / "memory.swap.max").read_text().strip() == "0"
        return False

    async def remove(self) -> bool:
        """Remove the group; False where it can not be.  The caller sets a deadline."""
        while self.directory.exists():
            try:
                self.directory.rmdir()
            except OSError:
                # A dead process leaves its group a moment after it was reaped.
                await trio.sleep(_RETRY_S)
        return not self.directory.exists()


class Hierarchy:
    """The place below which this daemon makes its workers' groups."""

    def __init__(self, version: int, parent: Path) -> None:
        self.version = version
        self._parent = parent

    @property
    def layer(self) -> str:
        return f"cgroup-v{self.version}"

    def claim(self) -> None:
        """v2: make room for workers' groups.  Raises OSError.

        No process may stay in a group that hands controllers to its children, so this daemon,
        and whatever its unit has started beside it, moves to a leaf.
        """
        if self.version == 1:
            return
        leaf = self._parent / _DAEMON_LEAF
        leaf.mkdir(exist_ok=True)
        for pid in _members(self._parent):
            _set(leaf / "cgroup.procs", int(pid))
        # Not everybody delegates cpu: max_threads bounds the processor time as well.
        cpu = " +cpu" if "cpu" in _controllers(self._parent) else ""
        (self._parent / "cgroup.subtree_control").write_text(f"+memory +pids{cpu}")

    def create(self, name: str, *, memory_bytes: int, pids: int, cpus: int) -> Group:
        """A new group with its limits set.  Raises OSError."""
        directory = self._parent / f"{_PREFIX}{name}"
        directory.mkdir()
        if self.version == 2:
            _set(directory / "memory.max", memory_bytes)
            _set_if_present(directory / "memory.swap.max", 0)
            _set_if_present(directory / "memory.oom.group", 1)
            _set(directory / "pids.max", pids)
            with contextlib.suppress(FileNotFoundError, PermissionError):
                (directory / "cpu.max").write_text(f"{cpus * _PERIOD_US} {_PERIOD_US}")
        else:
            _set(directory / "memory.limit_in_bytes", memory_bytes)
            _set_if_present(directory / "memory.memsw.limit_in_bytes", memory_bytes)
        return Group(self.version, directory)

    def leftovers(self) -> Iterator[Group]:
        """Groups whose daemon no longer lives: it was killed, in this run directory or another."""
        for path in sorted(self._parent.glob(f"{_PREFIX}*-*")):
            owner = path.name.removeprefix(_PREFIX).partition("-")[0]
            pid, _, started = owner.partition(".")
            if pid.isdigit() and start_ticks(int(pid)) != int(started or 0):
                yield Group(self.version, path)


def owner_name() -> str:
    """How this process marks its groups, as `leftovers` reads it: id and start time."""
    return f"{os.getpid()}.{start_ticks(os.getpid())}"


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with its id, its identity (proc(5)).

    None where there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def find_hierarchy() -> Hierarchy | None:
    """Where this process may make cgroups; None where it may not, or limits are missing."""
    own = read_own_groups()
    return _find_v2(own, CGROUP_ROOT) or _find_v1(own, CGROUP_ROOT)


def _find_v2(own: dict[str, str], mount: Path) -> Hierarchy | None:
    if "" not in own:
        return None
    group = mount / own[""].lstrip("/")
    if group.name == _DAEMON_LEAF:  # a launcher of this process was here before
        group = group.parent
    if not {"memory", "pids"} <= _controllers(group) or not _is_delegated(group):
        return None
    return Hierarchy(2, group)


def _controllers(group: Path) -> set[str]:
    try:
        return set((group / "cgroup.controllers").read_text().split())
    except OSError:
        return set()


def _is_delegated(group: Path) -> bool:
    """systemd marks what it delegates.  To be able to write is no permission: a user may write to
    the scope of a terminal, and everything else that runs there would have to move."""
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return os.access(group / "cgroup.procs", os.W_OK)
    return False


def _find_v1(own: dict[str, str], mount: Path) -> Hierarchy | None:
    if os.geteuid() != 0 or "memory" not in own:
        return None
    parent = mount / "memory" / own["memory"].lstrip("/")
    if not os.access(parent / "cgroup.procs", os.W_OK):
        return None
    return Hierarchy(1, parent)


def _members(group: Path) -> list[str]:
    try:
        return (group / "cgroup.procs").read_text().split()
    except OSError:
        return []


def _set(file: Path, value: int) -> None:
    file.write_text(str(value))


def _set_if_present(file: Path, value: int) -> None:
    # Kernels without swap accounting lack the file.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        file.write_text(str(value))
