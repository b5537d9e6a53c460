"""What a worker may have: WorkerPolicy, HostLayout -> Plan.  Pure: nothing here touches the host.

    policy   the owner's limits for one worker
    layout   where this host keeps the interpreter and the packages (layout.py reads it)
    plan     everything that is done to the worker before it runs, in terms of the kernel

Nothing is shared by default; each mount below says why it is there.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Final, Literal

from nextgpu_node.sandbox.calls import Vendor, seccomp_rules
from nextgpu_node.sandbox.seccomp import Check, Rule

# A: namespaces of our own.  B: those that systemd builds around a worker.  C: none.
Tier = Literal["A", "B", "C"]
TIERS: Final[tuple[Tier, ...]] = ("A", "B", "C")  # strongest first
STRONGEST: Final[Tier] = TIERS[0]

MIB: Final = 1024 * 1024
SCRATCH: Final = "/tmp"  # noqa: S108  the worker's own tmpfs, in its own mount namespace

_NVIDIA_CONTROL: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
_AMD_CONTROL: Final = "/dev/kfd"
EXTRA_THREADS: Final = "threads beyond those of this user"  # a limit that confine.py resolves
# What the owner may start meanwhile without the worker's threads failing.
SHARED_UID_SLACK: Final = 64
_RENDER_NODE: Final = "/dev/dri/renderD"

# Not the memory that a unit may use but what the kernel needs beside it: page tables, the pages
# of the launcher that the worker writes to (measured: 2 to 4 MiB) and the socket's buffers.
_MEMORY_SLACK_BYTES: Final = 32 * MIB
# Address space that is reserved and never used: a stack for each thread, and two malloc arenas
# (the zygote allows no more) of up to 128 MiB each while they are aligned.
_STACK_BYTES: Final = 8 * MIB
_ARENAS_BYTES: Final = 2 * 128 * MIB


@dataclass(frozen=True, slots=True)
class WorkerPolicy:
    """Limits of one worker.  Sizes in bytes, times in seconds."""

    memory_bytes: int = 2048 * MIB
    tmpfs_bytes: int = 64 * MIB
    tmpfs_inodes: int = 1024
    max_threads: int = 8
    max_open_files: int = 64
    wall_s: float = 600.0
    cpu_s: int = 3600
    # Of the time; a unit rests between its steps.
    utilisation_percent: int = 100
    vram_bytes: int = 0  # of the card, this process's context included; 0: no limit
    device: str = "cpu"  # or "cuda:0", "xpu:0": torch's names
    # Which of several cards: N of /dev/nvidiaN or /dev/dri/renderDN; None: whatever is there.
    device_node: int | None = None


@dataclass(frozen=True, slots=True)
class HostLayout:
    """Where things are on this host; absolute paths as the interpreter knows them."""

    stdlib: tuple[str, ...]  # the standard library, pure and compiled
    site_packages: tuple[str, ...]
    packages: tuple[str, ...]  # our own, where an editable install keeps them elsewhere
    gpu_devices: tuple[str, ...] = ()
    gpu_libraries: tuple[str, ...] = ()
    gpu_sys_trees: tuple[str, ...] = ()
    uid: int = 0
    landlock_abi: int = 0


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount below the worker's root; `source` is a path of the host, empty for a new one."""

    target: str
    source: str = ""
    kind: Literal["tree", "file", "device", "scratch", "proc", "masked", "frozen"] = "tree"
    options: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that confines one worker.  Only tests take a layer out, by dataclasses.replace."""

    tier: Tier
    namespaces: tuple[str, ...]
    mounts: tuple[Mount, ...]
    landlock: tuple[tuple[str, str], ...]  # (path, access name); empty: not applied
    landlock_abi: int
    seccomp: tuple[Rule, ...]  # empty: not applied
    rlimits: tuple[tuple[str, int], ...]  # soft and hard alike
    # Added to what the worker has inherited from the launcher at its birth.
    extra_data_bytes: int
    extra_address_space_bytes: int
    cgroup_memory_bytes: int
    cgroup_pids: int
    cgroup_cpus: int
    map_user: bool  # the host's uid stands for itself inside a new user namespace
    drop_user: bool  # leave root for a spare uid that the launcher names
    drop_capabilities: bool = True
    non_dumpable: bool = True
    close_descriptors: bool = True
    die_with_launcher: bool = True
    clear_environment: bool = True
    limits: tuple[tuple[str, int | str], ...] = ()  # what the worker module is told

    def layers(self) -> tuple[str, ...]:
        """The layers in force around a worker that came up under this plan, its tier first."""
        names = [f"tier-{self.tier}", *(f"{name}-namespace" for name in self.namespaces)]
        optional = {
            "private-root": bool(self.mounts),
            "spare-uid": self.drop_user,
            "no-capabilities": self.drop_capabilities,
            "no-new-privileges": True,
            "non-dumpable": self.non_dumpable,
            f"landlock-{self.landlock_abi}": bool(self.landlock),
            "seccomp": bool(self.seccomp),
            "rlimits": bool(self.rlimits),
        }
        return tuple(names + [name for name, present in optional.items() if present])


@lru_cache(maxsize=8)
def plan_worker(policy: WorkerPolicy, layout: HostLayout, tier: Tier = "A") -> Plan:
    """The plan of one worker under `policy` on this host.

    Tier A has namespaces and a root of its own.  Tiers B and C have neither here, and no writable
    directory: in B the service manager has put both around the process already.
    """
    root = layout.uid == 0
    gpu = gpu_vendor(policy, layout)
    layout = dataclasses.replace(layout, gpu_devices=_gpu_nodes(policy, layout, gpu))
    namespaces: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    if tier == "A":
        namespaces = ("mount", "pid", "network", "ipc", "uts", "cgroup")
        namespaces = namespaces if root else ("user", *namespaces)
        mounts = _mounts(policy, layout)
    return Plan(
        tier=tier,
        namespaces=namespaces,
        mounts=mounts,
        landlock=_landlock_rules(layout, tier, gpu=gpu),
        landlock_abi=layout.landlock_abi,
        seccomp=seccomp_rules(namespaces=tier == "A", gpu=gpu),
        # In tier B the account is this worker's alone, as root's spare ones are.
        rlimits=_rlimits(policy, alone=root or tier != "C"),
        extra_data_bytes=policy.memory_bytes,
        # CUDA reserves address space by the terabyte: its workers are held by the cgroup.
        extra_address_space_bytes=0 if gpu else _address_space_bytes(policy),
        cgroup_memory_bytes=policy.memory_bytes + policy.tmpfs_bytes + _MEMORY_SLACK_BYTES,
        cgroup_pids=policy.max_threads + 1,
        cgroup_cpus=policy.max_threads,
        map_user=tier == "A" and not root,
        drop_user=root,
        limits=_told_limits(policy),
    )


def gpu_vendor(policy: WorkerPolicy, layout: HostLayout) -> Vendor | None:
    """Whose driver this worker needs; torch calls AMD's cards "cuda" too, Intel's "xpu"."""
    kind = policy.device.partition(":")[0]
    if kind == "cpu":
        return None
    if kind == "xpu":
        return "intel"
    has_amd = any(path == _AMD_CONTROL for path in layout.gpu_devices)
    return (
        "amd" if has_amd and not any("nvidia" in path for path in layout.gpu_devices) else "nvidia"
    )


def _gpu_nodes(policy: WorkerPolicy, layout: HostLayout, gpu: Vendor | None) -> tuple[str, ...]:
    """The nodes of one vendor's driver: its control nodes, and the card's, if it is known which."""
    if gpu is None:
        return ()
    prefix = "/dev/nvidia" if gpu == "nvidia" else _RENDER_NODE
    control = () if gpu == "intel" else (_AMD_CONTROL,) if gpu == "amd" else _NVIDIA_CONTROL
    wanted = "" if policy.device_node is None else str(policy.device_node)
    return tuple(
        path for path in layout.gpu_devices if path in control or _is_card(path, prefix, wanted)
    )


def _is_card(path: str, prefix: str, wanted: str) -> bool:
    number = path.removeprefix(prefix)
    return path.startswith(prefix) and number.isdigit() and wanted in ("", number)


def _told_limits(policy: WorkerPolicy) -> tuple[tuple[str, int | str], ...]:
    """What the worker module is told.  A card that is alone in a worker's /dev is its first."""
    told = dataclasses.asdict(policy)
    if told.pop("device_node") is not None:
        told["device"] = policy.device.partition(":")[0] + ":0"
    return tuple(told.items())


def _mounts(policy: WorkerPolicy, layout: HostLayout) -> tuple[Mount, ...]:
    scratch = f"size={policy.tmpfs_bytes},nr_inodes={policy.tmpfs_inodes},mode=700"
    mounts = [
        # First: a project that lives below /tmp is mounted into it, not hidden by it.
        Mount(SCRATCH, kind="scratch", options=scratch),
        *_trees(layout),
        # torch, numpy and the interpreter ask the kernel for entropy; some code opens the device.
        Mount("/dev/urandom", "/dev/urandom", "device"),
        Mount("/dev/null", "/dev/null", "device"),
        Mount("/dev/zero", "/dev/zero", "device"),
    ]
    if policy.device != "cpu":
        mounts += _gpu_mounts(layout)
    return tuple(mounts)


# What a CUDA worker has no use for in its /proc: files read as empty, directories are empty.
# The driver reads /proc/driver, /proc/devices, /proc/cpuinfo and settings of virtual memory.
_MASKED_PROC_FILES: Final = (
    *("kcore", "kmsg", "keys", "key-users", "kallsyms", "kpagecount", "kpageflags", "kpagecgroup"),
    *("sysrq-trigger", "timer_list", "sched_debug", "latency_stats", "vmallocinfo", "slabinfo"),
    *("interrupts", "softirqs", "diskstats", "partitions", "swaps", "mdstat", "locks", "cmdline"),
    *("config.gz", "loadavg", "uptime", "schedstat", "buddyinfo", "pagetypeinfo", "zoneinfo"),
)
_MASKED_PROC_DIRECTORIES: Final = (
    *("acpi", "asound", "bus", "dynamic_debug", "fs", "irq", "pressure", "scsi", "sysvipc", "tty"),
)


def _gpu_mounts(layout: HostLayout) -> list[Mount]:
    """Nodes, libraries, the parts of /sys that name the cards, and a /proc without its dangers:
    the driver writes thread names below /proc/self and reads /proc/driver."""
    masked = [Mount(f"/proc/{name}", "/dev/null", "masked") for name in _MASKED_PROC_FILES]
    masked += [Mount(f"/proc/{name}", kind="masked") for name in _MASKED_PROC_DIRECTORIES]
    return [
        Mount("/proc", kind="proc"),
        *masked,
        Mount("/proc/sys", kind="frozen"),
        *(Mount(path, path) for path in layout.gpu_sys_trees),
        *(Mount(path, path, "device") for path in layout.gpu_devices),
        *(Mount(path, path, "file") for path in layout.gpu_libraries),
    ]


def _trees(layout: HostLayout) -> list[Mount]:
    """Lazy imports read these.  Nested trees come once, with the outer one.

    The C library and its like are not among them: they are mapped since before the fork.
    """
    paths = [*layout.stdlib, *layout.site_packages, *layout.packages]
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(PurePosixPath(path).is_relative_to(outer) for outer in kept):
            kept.append(path)
    return [Mount(path, path) for path in kept]


def _landlock_rules(
    layout: HostLayout, tier: Tier, *, gpu: Vendor | None
) -> tuple[tuple[str, str], ...]:
    rules = [(mount.target, "read") for mount in _trees(layout)]
    rules += [("/dev/null", "device"), ("/dev/zero", "device"), ("/dev/urandom", "read")]
    if tier == "A":
        rules.append((SCRATCH, "write"))
    if gpu:
        rules += [(path, "device") for path in layout.gpu_devices]
        rules += [(path, "read") for path in (*layout.gpu_libraries, *layout.gpu_sys_trees)]
        rules.append(("/proc", "names" if tier == "A" else "read"))
    return tuple(rules)


def _address_space_bytes(policy: WorkerPolicy) -> int:
    reserved = policy.max_threads * _STACK_BYTES + _ARENAS_BYTES
    return policy.memory_bytes + policy.tmpfs_bytes + reserved + _MEMORY_SLACK_BYTES


def _rlimits(policy: WorkerPolicy, *, alone: bool) -> tuple[tuple[str, int], ...]:
    limits = [
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", policy.cpu_s),
        ("RLIMIT_FSIZE", policy.tmpfs_bytes),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
        ("RLIMIT_NOFILE", policy.max_open_files),
        ("RLIMIT_SIGPENDING", 64),
        ("RLIMIT_STACK", _STACK_BYTES),
    ]
    # Counted per uid and user namespace.  Where the worker shares both with its owner, confine.py
    # counts the owner's own threads too.
    limits.append(
        ("RLIMIT_NPROC", policy.max_threads)
        if alone
        else (EXTRA_THREADS, policy.max_threads + SHARED_UID_SLACK)
    )
    return tuple(limits)


def decode_layout(fields: dict[str, Any]) -> HostLayout:
    """The layout as the zygote sent it, through dataclasses.asdict and JSON."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return HostLayout(**values)


@lru_cache(maxsize=8)
def encode_plan(plan: Plan) -> bytes:
    """The plan as JSON, for the zygote."""
    return json.dumps(dataclasses.asdict(plan), separators=(",", ":")).encode()


def decode_plan(data: bytes) -> Plan:
    """The plan that `encode_plan` wrote.  From the daemon only: trusted."""
    fields: dict[str, Any] = json.loads(data)
    fields["mounts"] = tuple(Mount(**mount) for mount in fields["mounts"])
    fields["seccomp"] = tuple(_rule(rule) for rule in fields["seccomp"])
    fields["namespaces"] = tuple(fields["namespaces"])
    for name in ("landlock", "rlimits", "limits"):
        fields[name] = tuple(tuple(pair) for pair in fields[name])
    return Plan(**fields)


def _rule(fields: dict[str, Any]) -> Rule:
    alternatives = tuple(
        tuple(Check(**check) for check in checks) for checks in fields["alternatives"]
    )
    return Rule(fields["syscall"], alternatives, fields["otherwise"])
