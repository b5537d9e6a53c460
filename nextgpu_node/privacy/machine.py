"""What of this machine is beside the node: journal, core dumps, swap, the memory of its cards.

Each answers with a Look, which says why where it could not be searched.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nextgpu_node.privacy.marks import Found, Marks
from nextgpu_node.privacy.places import Look, search_files, swapped_bytes

_JOURNAL_S: Final = 30
_GPU_S: Final = 300
# Where the usual collectors put a core: systemd-coredump(8), apport, the working directory.
_CORE_DIRECTORIES: Final = ("/var/lib/systemd/coredump", "/var/crash", "/cores")


def search_journal(place: str, marks: Marks, *, since_s: float) -> Look:
    """Everything that systemd's journal took since then, of any program."""
    if shutil.which("journalctl") is None:
        return Look(place, unsearched="there is no journalctl here")
    command = ["journalctl", "--since", f"@{int(since_s)}", "--no-pager", "--quiet", "-o", "json"]
    try:
        done = subprocess.run(
            [*command, "--all"], capture_output=True, timeout=_JOURNAL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return Look(place, unsearched="journalctl did not answer")
    if done.returncode:
        return Look(place, unsearched="there is no journal here, or not for this user")
    if not done.stdout:
        return Look(place, unsearched="no entry since then, or no journal, or not for this user")
    return Look(place, len(done.stdout), done.stdout.count(b"\n"), marks.search(done.stdout))


def search_core_dumps(place: str, marks: Marks, tops: Sequence[Path], *, since_s: float) -> Look:
    """Where the kernel's own setting puts them; what a collector packed is not unpacked."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    directories = [Path(name) for name in _CORE_DIRECTORIES if Path(name).is_dir()]
    if pattern.startswith("/"):
        directories.append(Path(pattern).parent)
    look = search_files(place, [*directories, *tops], marks, since_s=since_s)
    packed = [f for top in directories for f in top.glob("*") if _is_new(f, since_s)]
    if pattern.startswith("|") and packed:
        return look + Look(place, unsearched="what a collector has compressed")
    return look


def _is_new(path: Path, since_s: float) -> bool:
    try:
        return path.stat().st_mtime >= since_s
    except OSError:
        return False


def look_at_swap(place: str, pids: Sequence[int]) -> Look:
    """Nothing can be in swap where there is none, or where no page of the processes went there."""
    try:
        devices = len(Path("/proc/swaps").read_text().splitlines()) - 1
    except OSError:
        return Look(place, unsearched="the kernel does not say whether there is swap")
    if devices <= 0:
        return Look(place)
    swapped = sum(swapped_bytes(pid) for pid in pids)
    if not swapped:
        return Look(place, items=devices)
    return Look(
        place,
        items=devices,
        unsearched=f"{swapped} bytes of these processes are in swap, on a disk",
    )


def search_gpu_memory(place: str, marks: Marks, *, cards: int) -> Look:
    """All memory of the cards that is free now, taken by a process of its own and searched there.

    Drivers clear memory before they give it to another process; this shows whether this one did.
    """
    if not cards:
        return Look(place, unsearched="there is no GPU here")
    command = [sys.executable, "-m", "nextgpu_node.privacy.gpu_memory"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps([text.decode() for text in marks.plain_prefixes]),
            capture_output=True,
            text=True,
            timeout=_GPU_S,
            check=True,
        )
        told = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return Look(place, unsearched="the search on the card failed")
    found = Found(told["found"], frozenset({"?"} if told["found"] else ()))
    return Look(place, told["searched_bytes"], told["cards"], found)
