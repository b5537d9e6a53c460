"""What a service manager has put around a process: a zygote of tier B tells, the daemon judges.

The daemon can not look: the worker has another user, and perhaps no place in its /proc.  What is
told here is told before any unit is near, by our own code.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NAMESPACES: Final = {"mount": "mnt", "network": "net", "ipc": "ipc", "uts": "uts", "user": "user"}
CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
_NO_LIMIT_V1: Final = 1 << 60  # the kernel writes a number near 2**63 for "none"
# Without these it is not the service of nextgpu-worker@.service, or one that was weakened.
_REQUIRED: Final = ("network-namespace", "mount-namespace", "ipc-namespace", "own-uid")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """`namespaces` by name: the number that the kernel gives it; `memory_limit_bytes` 0: none."""

    uid: int
    namespaces: dict[str, int]
    cgroup: str  # path below its hierarchy's root
    memory_limit_bytes: int

    def layers(self, own: Surroundings) -> tuple[str, ...]:
        """What is between this process and one that lives in `own`."""
        found = [
            f"{name}-namespace"
            for name, number in self.namespaces.items()
            if number != own.namespaces.get(name)
        ]
        if self.uid not in (0, own.uid):
            found.append("own-uid")
        if self.memory_limit_bytes:
            found.append("service-memory-limit")
        return tuple(found)

    def missing(self, own: Surroundings) -> tuple[str, ...]:
        """Which of the walls that make tier B are not there."""
        layers = self.layers(own)
        return tuple(name for name in _REQUIRED if name not in layers)


def read_surroundings() -> Surroundings:
    """Those of this process."""
    directory = _own_directory()
    return Surroundings(
        uid=os.getuid(),
        namespaces={
            name: Path("/proc/self/ns", link).stat().st_ino for name, link in _NAMESPACES.items()
        },
        cgroup="" if directory is None else str(directory),
        memory_limit_bytes=_own_memory_limit_bytes(),
    )


def _own_directory() -> Path | None:
    """The directory of this process's group in the hierarchy that the service manager keeps."""
    own = read_own_groups()
    candidates = [CGROUP_ROOT / own[""].lstrip("/")] if "" in own else []
    if "name=systemd" in own:
        candidates.insert(0, CGROUP_ROOT / "systemd" / own["name=systemd"].lstrip("/"))
    return next((path for path in candidates if str(path) != str(CGROUP_ROOT)), None)


def _own_memory_limit_bytes() -> int:
    """The limit of this process's own group; 0 where there is none or it can not be read."""
    own = read_own_groups()
    files = [CGROUP_ROOT / own[""].lstrip("/") / "memory.max"] if "" in own else []
    if "memory" in own:
        files.append(CGROUP_ROOT / "memory" / own["memory"].lstrip("/") / "memory.limit_in_bytes")
    for file in files:
        with contextlib.suppress(OSError):
            text = file.read_text().strip()
            if text.isdigit() and int(text) < _NO_LIMIT_V1:
                return int(text)
    return 0


def read_own_groups() -> dict[str, str]:
    """/proc/self/cgroup: controller ("" for v2) to path; empty where it can not be read."""
    try:
        return _own_groups(Path("/proc/self/cgroup").read_text())
    except OSError:
        return {}


def _own_groups(text: str) -> dict[str, str]:
    """/proc/self/cgroup -> controller ("" for v2) to path."""
    groups: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    return groups
