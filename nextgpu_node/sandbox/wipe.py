"""The wipe: what is verified, from outside, after a worker was killed.

Each step is looked up again in the kernel's own tables; nothing is reported because it was asked
for.  A worker writes to its own tmpfs alone, which the kernel frees with the mount namespace.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from nextgpu_protocol.messages import OWNER_WIPE_STEPS

_PROC: Final = Path("/proc")
_MOUNT_NAMES: Final = ("nextgpu-root", "nextgpu-scratch")

Answer = Literal["yes", "no", "unknown"]
Steps = tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class WipeReport:
    """What was checked after the end of one worker, and whether it held."""

    tree_killed: bool
    reaped: bool
    scratch_gone: bool
    no_swap: Answer
    steps: Steps

    @property
    def failed(self) -> list[str]:
        """The steps that should have held and did not."""
        return [name for name, held in self.steps if not held and name not in OWNER_WIPE_STEPS]

    @property
    def complete(self) -> bool:
        return not self.failed


def look(pid: int, reaped: bool, remains: Steps, no_swap: Answer) -> WipeReport:
    """The report on the worker that was `pid`.  Blocks for a look through /proc."""
    steps: list[tuple[str, bool]] = [("worker-reaped", reaped)]
    tree_killed = reaped
    if sees_all_processes():
        alone = not pid or not session_members(pid)
        steps.append(("no-process-left", alone))
        tree_killed = tree_killed and alone
    no_mounts = mounts_left() == 0
    steps += [("no-mount-on-host", no_mounts), *remains]
    steps.append(("no-swap", no_swap == "yes"))
    return WipeReport(tree_killed, reaped, tree_killed and no_mounts, no_swap, tuple(steps))


def is_gone(pidfd: int) -> bool:
    """True where the process behind `pidfd` has ended and was reaped.  Safe against id reuse."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def reap_if_ours(pidfd: int) -> None:
    """As the first process of a container, this one inherits the workers of a zygote that died."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def sees_all_processes() -> bool:
    """Whether /proc shows other users' processes (not under hidepid=, ProtectProc=)."""
    return Path(_PROC, "1").exists()


def session_members(session: int) -> list[int]:
    """Ids of the processes in `session`: a worker opens its own and can not leave it."""
    found = []
    for name in os.listdir(_PROC):  # noqa: PTH208  names alone, many times a second
        if name.isdigit():
            # It ended meanwhile; or a security module keeps it from us, which it does with none
            # of our own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(name)) == session:
                    found.append(int(name))
    return found


def mounts_left() -> int:
    """How many of a worker's mounts are visible from the host: none unless one has leaked."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sum(line.split(" - ")[1].split()[1] in _MOUNT_NAMES for line in lines)


def swap_is_off() -> Answer:
    """Whether this host has no swap, to which a worker's memory could be written."""
    try:
        devices = Path("/proc/swaps").read_text().splitlines()[1:]
    except OSError:
        return "unknown"
    return "no" if devices else "yes"
