"""What a worker may have: WorkerPolicy, HostLayout -> Plan.  Pure: nothing here touches the host.

    policy   the owner's limits for one worker
    layout   where this host keeps the interpreter and the packages (layout.py reads it)
    plan     everything that is done to the worker before it runs, in terms of the kernel

Nothing is shared by default; each mount below says why it is there.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Final, Literal

from nextgpu_node.sandbox.seccomp import SELF_PID, Check, Rule

Tier = Literal["A", "C"]

MIB: Final = 1024 * 1024
SCRATCH: Final = "/tmp"  # noqa: S108  the worker's own tmpfs, in its own mount namespace

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
    device: str = "cpu"  # or "cuda:0"


@dataclass(frozen=True, slots=True)
class HostLayout:
    """Where things are on this host; absolute paths as the interpreter knows them."""

    stdlib: tuple[str, ...]  # the standard library, pure and compiled
    site_packages: tuple[str, ...]
    packages: tuple[str, ...]  # our own, where an editable install keeps them elsewhere
    gpu_devices: tuple[str, ...] = ()
    gpu_libraries: tuple[str, ...] = ()
    uid: int = 0
    landlock_abi: int = 0


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount below the worker's root; `source` is a path of the host, empty for a new one."""

    target: str
    source: str = ""
    kind: Literal["tree", "file", "device", "scratch", "proc"] = "tree"
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
    map_user: bool  # the host's uid stands for itself inside a new user namespace
    drop_user: bool  # leave root for a spare uid that the launcher names
    drop_capabilities: bool = True
    non_dumpable: bool = True
    close_descriptors: bool = True
    die_with_launcher: bool = True
    clear_environment: bool = True
    limits: tuple[tuple[str, int | str], ...] = ()  # what the worker module is told

    def layers(self) -> tuple[str, ...]:
        """The layers in force around a worker that came up under this plan."""
        names = [f"{name}-namespace" for name in self.namespaces]
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

    Tier A has namespaces and a root of its own.  Tier C has neither, and no writable directory.
    """
    root = layout.uid == 0
    with_gpu = policy.device != "cpu"
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
        landlock=_landlock_rules(layout, tier, with_gpu=with_gpu),
        landlock_abi=layout.landlock_abi,
        seccomp=seccomp_rules(with_gpu=with_gpu),
        rlimits=_rlimits(policy, count_threads=root or tier == "A"),
        extra_data_bytes=policy.memory_bytes,
        # CUDA reserves address space by the terabyte: its workers are held by the cgroup.
        extra_address_space_bytes=0 if with_gpu else _address_space_bytes(policy),
        cgroup_memory_bytes=policy.memory_bytes + policy.tmpfs_bytes + _MEMORY_SLACK_BYTES,
        cgroup_pids=policy.max_threads + 1,
        map_user=tier == "A" and not root,
        drop_user=root,
        limits=tuple(dataclasses.asdict(policy).items()),
    )


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
        # The driver writes thread names below /proc/self and reads /proc/driver.
        mounts.append(Mount("/proc", kind="proc"))
        mounts += [Mount(path, path, "device") for path in layout.gpu_devices]
        mounts += [Mount(path, path, "file") for path in layout.gpu_libraries]
    return tuple(mounts)


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
    layout: HostLayout, tier: Tier, *, with_gpu: bool
) -> tuple[tuple[str, str], ...]:
    rules = [(mount.target, "read") for mount in _trees(layout)]
    rules += [("/dev/null", "device"), ("/dev/zero", "device"), ("/dev/urandom", "read")]
    if tier == "A":
        rules.append((SCRATCH, "write"))
    if with_gpu:
        rules += [(path, "device") for path in layout.gpu_devices]
        rules += [(path, "read") for path in layout.gpu_libraries]
        rules.append(("/proc", "write" if tier == "A" else "read"))
    return tuple(rules)


def _address_space_bytes(policy: WorkerPolicy) -> int:
    reserved = policy.max_threads * _STACK_BYTES + _ARENAS_BYTES
    return policy.memory_bytes + policy.tmpfs_bytes + reserved + _MEMORY_SLACK_BYTES


def _rlimits(policy: WorkerPolicy, *, count_threads: bool) -> tuple[tuple[str, int], ...]:
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
    if count_threads:
        # Counted per uid and user namespace: it would count the owner's own processes in tier C.
        limits.append(("RLIMIT_NPROC", policy.max_threads))
    return tuple(limits)


# What CPython, torch's CPU kernels, OpenMP and the C library call once they run.  Found by
# running models with everything else refused; nothing is here for convenience.
_PLAIN_CALLS: Final = (
    # memory
    *("brk", "munmap", "mprotect", "mremap", "madvise", "msync", "membarrier"),
    # threads and signals of this process
    *("futex", "rseq", "set_robust_list", "set_tid_address", "gettid", "getpid", "getppid"),
    *("sched_yield", "sched_getaffinity", "getcpu", "rt_sigaction", "rt_sigprocmask"),
    *("rt_sigreturn", "sigaltstack", "restart_syscall", "exit", "exit_group"),
    *("sched_get_priority_max", "sched_get_priority_min", "sched_getparam"),
    "sched_getscheduler",
    # time
    *("clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time"),
    *("times", "getrusage"),
    # files: Landlock and the root decide which
    *("open", "openat", "close", "close_range", "read", "readv", "pread64", "write", "writev"),
    *("pwrite64", "lseek", "fstat", "newfstatat", "stat", "lstat", "statx", "access"),
    *("faccessat", "faccessat2", "readlink", "readlinkat", "getcwd", "chdir", "getdents64"),
    *("statfs", "fstatfs", "dup", "dup2", "dup3", "mkdir", "mkdirat", "unlink", "unlinkat"),
    *("rmdir", "rename", "renameat", "renameat2", "ftruncate", "fallocate", "fsync"),
    *("fdatasync", "umask"),
    # waiting, and the one socket that the worker is born with
    *("poll", "ppoll", "select", "pselect6", "recvfrom", "shutdown", "getsockopt"),
    *("getsockname", "getpeername"),
    # about itself
    *("getrandom", "uname", "sysinfo", "getrlimit", "getuid", "geteuid", "getgid", "getegid"),
    *("getresuid", "getresgid", "getgroups"),
)

_CLONE_THREAD: Final = 0x00010F00  # VM | FS | FILES | SIGHAND | THREAD: a thread, no process
# SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID, DETACHED: pthread_create adds some of them.
_CLONE_HARMLESS: Final = 0x007C0000
_ALL_BITS: Final = 0xFFFFFFFFFFFFFFFF
_MAP_SHARED: Final = 0x01
_MAP_ANONYMOUS: Final = 0x20

_F_COMMANDS: Final = (0, 1, 2, 3, 4, 1030)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC
_O_ASYNC: Final = 0o20000
_F_SETFL: Final = 4
_IOCTLS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# TCGETS and TIOCGWINSZ ask, FIONREAD counts, FIONBIO, FIONCLEX and FIOCLEX set own flags.
_PR_SET_NAME: Final = 15
_PR_GET_NAME: Final = 16
_PR_GET_DUMPABLE: Final = 3
_PR_SET_VMA: Final = 0x53564D41
_ARCH_XCOMP: Final = (0x1021, 0x1022, 0x1023)  # oneDNN asks for the AMX tile registers


def seccomp_rules(*, with_gpu: bool = False) -> tuple[Rule, ...]:
    """The allow-list.  In plain words: threads but no processes; no new socket and no descriptor
    over the one that is there; no change of identity, privilege, namespace or dumpability."""
    rules = [Rule(name) for name in _PLAIN_CALLS]
    rules += [
        Rule("clone", ((Check(0, _CLONE_THREAD, _ALL_BITS & ~_CLONE_HARMLESS),),)),
        # Shared anonymous memory is not counted by RLIMIT_DATA.
        Rule("mmap", ((Check(3, 0, _MAP_SHARED),), (Check(3, 0, _MAP_ANONYMOUS),))),
        # send(2) is sendto(2) without an address; sendmsg(2) could carry descriptors.
        Rule("sendto", ((Check(4, 0), Check(5, 0)),)),
        Rule("tgkill", ((Check(0, SELF_PID),),)),
        Rule("prlimit64", ((Check(0, 0), Check(2, 0)), (Check(0, SELF_PID), Check(2, 0)))),
        Rule("fcntl", _fcntl_alternatives()),
        Rule("prctl", tuple((Check(0, option),) for option in _PRCTLS)),
        Rule("arch_prctl", tuple((Check(0, code),) for code in _ARCH_XCOMP), errno.EINVAL),
    ]
    if with_gpu:
        # The driver's interface is ioctl on its own device nodes, and it needs memfd_create.
        rules += [Rule("ioctl", _nvidia_ioctls()), Rule("memfd_create")]
        rules += [Rule("mlock"), Rule("munlock"), Rule("pipe2")]
    else:
        rules.append(
            Rule("ioctl", tuple((Check(1, command),) for command in _IOCTLS), errno.ENOTTY)
        )
    return tuple(rules)


_PRCTLS: Final = (_PR_SET_NAME, _PR_GET_NAME, _PR_GET_DUMPABLE, _PR_SET_VMA)


def _fcntl_alternatives() -> tuple[tuple[Check, ...], ...]:
    plain = tuple((Check(1, command),) for command in _F_COMMANDS if command != _F_SETFL)
    # O_ASYNC would have the kernel send signals.
    return (*plain, (Check(1, _F_SETFL), Check(2, 0, _O_ASYNC)))


def _nvidia_ioctls() -> tuple[tuple[Check, ...], ...]:
    """Requests of type 'F' for the control nodes; small plain numbers and one odd one for uvm.

    Not verified on a card yet.  A terminal's requests (type 'T') are not among them.
    """
    return (
        (Check(1, 0x4600, 0xFFFFFFFF_0000FF00),),
        (Check(1, 0, 0xFFFFFFFF_FFFFF800),),
        (Check(1, 0x30000000, 0xFFFFFFFF_FFFFFFF0),),
        *((Check(1, command),) for command in _IOCTLS),
    )


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
