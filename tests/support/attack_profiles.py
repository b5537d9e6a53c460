"""What stays open in which profile, and why: the written half of docs/sandbox.md.

A profile is a tier, for a CPU worker unless it says otherwise.  An attack that is not named here
must be blocked; one that is named must still be open, or the entry goes.
"""

from __future__ import annotations

from typing import Any, Final

_EVERYWHERE: Final = {
    "memory_of_host": "the C library sizes its sort buffers by it; a coarse number",
    "names_of_installed_packages": "lazy imports list the directory; names, read-only",
    "path_of_installation": "modules know where they were loaded from, since before the fork",
    "precise_timer": "a clock is a vDSO call, which no filter sees",
}
_GPU: Final = {
    "call_memfd_create": "CUDA needs it; what it holds is charged to the worker's cgroup",
    "read_own_proc": "the driver reads and writes below /proc/self; only its own are there",
    "read_kernel_settings": "the driver reads settings of virtual memory; nothing can be written",
    "read_mount_table": "part of /proc/self: shows where packages are mounted from",
    "release_of_kernel": "the driver may ask uname(2); the host's name is hidden",
    "rename_own_process": "the driver names its threads",
    "map_file_shared": "device nodes are mapped shared, and the filter can not tell them apart",
    "map_device_zero_shared": "as above; charged to the worker's cgroup",
    "wake_over_a_shared_page": "not verified on a card whether the driver needs shared futexes",
    "memory_bomb_by_protection": "CUDA reserves terabytes of addresses: only the cgroup holds it",
}
_BY_PATH: Final = {
    "stat_host_file": "Landlock does not judge stat(2): sizes and times of files by known names",
}

# profile -> attack -> reason
KNOWN_OPEN: Final[dict[str, dict[str, str]]] = {
    "A": _EVERYWHERE,
    "A-gpu": {**_EVERYWHERE, **_GPU},
    "B": {**_EVERYWHERE, **_BY_PATH},
    # Where a root daemon's worker has a spare user, files of others are out of its reach.
    "C": _EVERYWHERE,
    "C-user": {
        **_EVERYWHERE,
        **_BY_PATH,
        "have_privileges": "only root can leave its supplementary groups; Landlock opens nothing",
    },
}

# How an attack ends that its worker does not outlive.
ENDINGS: Final = {
    "int80": "killed by the filter (SIGSYS)",
    "far_return_32": "killed by the filter (SIGSYS)",
    "x32": "killed by the filter (SIGSYS)",
    "segfault": "reported as a crash; the next worker runs",
    "illegal_instruction": "reported as a crash; the next worker runs",
    "stack_overflow": "reported as a crash at RLIMIT_STACK",
    "abort": "reported as a crash; the next worker runs",
    "exit_in_the_middle": "reported; what was not delivered does not count as done",
    "cpu_loop": "killed at the limit of processor time",
    "sleep": "killed at the limit of wall time",
    "stop_itself": "ignored by the first process of a PID namespace; killed at the limit of time",
    "ignore_signals": "killed (SIGKILL can not be ignored)",
    "output_flood": "waits for its reader; counted and ended at the limit of output",
    "fill_disk": "ends at the limit of the scratch; reported as over_limit",
    "touch_memory": "MemoryError inside; killed where the cgroup is reached",
}


def unexpected_verdicts(profile: str, verdicts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Those that are not what docs/attacks.md says of this profile; a worker's death is none."""
    known = KNOWN_OPEN[profile]
    return {
        name: verdict
        for name, verdict in verdicts.items()
        if verdict["open"] != (name in known) or "died" in verdict
    }
