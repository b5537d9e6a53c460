"""The Linux system calls that the sandbox needs and Python does not offer.  Source: man-pages 2, 7

Each wrapper raises OSError, its text naming the call.  Numbers stand in SYSCALLS; the C library
is called through `ctypes.PyDLL`, which keeps the interpreter lock: a fork in the middle of a
released lock would leave the child's interpreter in an undefined state.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

# name: (x86_64, aarch64); None where the architecture has no such call.  Source: the kernel's
# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h
# fmt: off
SYSCALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66),
    "pread64": (17, 67), "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57),
    "close_range": (436, 436), "open": (2, None), "openat": (257, 56), "newfstatat": (262, 79),
    "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "getdents64": (217, 61), "fcntl": (72, 25), "ioctl": (16, 29), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "mkdir": (83, None),
    "mkdirat": (258, 34), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "ftruncate": (77, 46),
    "fallocate": (285, 47), "fsync": (74, 82), "fdatasync": (75, 83), "umask": (95, 166),
    "chdir": (80, 49), "statfs": (137, 43), "fstatfs": (138, 44), "brk": (12, 214),
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233), "msync": (26, 227), "membarrier": (324, 283), "clone": (56, 220),
    "clone3": (435, 435), "futex": (202, 98), "rseq": (334, 293), "set_robust_list": (273, 99),
    "set_tid_address": (218, 96), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getcpu": (309, 168), "gettid": (186, 178), "getpid": (39, 172), "getppid": (110, 173),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "tgkill": (234, 131), "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "sendto": (44, 206), "recvfrom": (45, 207),
    "shutdown": (48, 210), "getsockopt": (55, 209), "getsockname": (51, 204),
    "getpeername": (52, 205), "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179),
    "getrlimit": (97, 163), "prlimit64": (302, 261), "getrusage": (98, 165),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "prctl": (157, 167), "arch_prctl": (158, None), "exit": (60, 93), "exit_group": (231, 94),
    "restart_syscall": (219, 128), "times": (100, 153), "memfd_create": (319, 279),
    "mlock": (149, 228), "munlock": (150, 229), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "mount_setattr": (442, 442), "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
    "sethostname": (170, 161), "ioprio_set": (251, 30),
    "seccomp": (317, 277), "capset": (126, 91), "capget": (125, 90),
    "execve": (59, 221), "fork": (57, None),
}
# fmt: on

MACHINE: Final = platform.machine()
_COLUMN: Final = {"x86_64": 0, "aarch64": 1}

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
_CLONE_PIDFD: Final = 0x00001000
_CLONE_CHILD_CLEARTID: Final = 0x00200000
_CLONE_CHILD_SETTID: Final = 0x01000000
_CLONE_INTO_CGROUP: Final = 0x200000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000

PR_SET_PDEATHSIG: Final = 1
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_NAME: Final = 15
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_TID_ADDRESS: Final = 40
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_CAPABILITY_VERSION_3: Final = 0x20080522
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1
_SECCOMP_SET_MODE_FILTER: Final = 1
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_CLASS_IDLE: Final = 3
_MADV_HUGEPAGE: Final = 14
_MADV_COLLAPSE: Final = 25

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _CloneArgs(ctypes.Structure):
    """struct clone_args of clone(2), as of Linux 5.7."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    )


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def number(name: str, machine: str = MACHINE) -> int | None:
    """The number of a system call, None where `machine` has none of that name.

    Raises OSError on a machine type that the sandbox does not know.
    """
    column = _COLUMN.get(machine)
    if column is None:
        raise OSError(f"the sandbox knows x86_64 and aarch64, not {machine}")
    return SYSCALLS[name][column]


def fork_with_namespaces(flags: int, cgroup_fd: int | None = None) -> tuple[int, int]:
    """Fork into new namespaces by one clone3(2); (0, -1) in the child, (pid, pidfd) in the parent.

    Only for a process with a single thread.  The interpreter's own hooks run as in os.fork.  The
    child's thread id is written where the C library caches it: raise(3) and abort(3) use it.
    """
    if not flags and cgroup_fd is None:
        # A service manager's filter may refuse clone3, whose arguments it can not look into.
        pid = os.fork()
        return pid, os.pidfd_open(pid) if pid else -1
    pidfd = ctypes.c_int(-1)
    tid_address = _tid_address()
    args = _CloneArgs(flags=flags | _CLONE_PIDFD, pidfd=ctypes.addressof(pidfd), exit_signal=17)
    if tid_address:
        args.flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
        args.child_tid = tid_address
    if cgroup_fd is not None:
        args.flags |= _CLONE_INTO_CGROUP
        args.cgroup = cgroup_fd
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc.syscall(number("clone3"), ctypes.byref(args), ctypes.sizeof(args))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    error = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(error, f"clone3: {os.strerror(error)}")
    return pid, pidfd.value


def _tid_address() -> int:
    """Where the C library keeps this thread's id; 0 where the kernel can not tell."""
    address = ctypes.c_uint64(0)
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(address), 0, 0, 0) != 0:
        return 0
    return address.value


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _check(
        "mount",
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode(),
            ctypes.c_ulong(flags),
            options.encode() or None,
        ),
    )


def set_mount_attributes(target: str, attributes: int) -> None:
    """mount_setattr(2) on `target` and every mount below it."""
    attr = _MountAttr(attr_set=attributes)
    _syscall(
        "mount_setattr",
        _AT_FDCWD,
        os.fsencode(target),
        _AT_RECURSIVE,
        ctypes.byref(attr),
        ctypes.sizeof(attr),
    )


def detach_mount(target: str) -> None:
    _check("umount2", _libc.umount2(os.fsencode(target), MNT_DETACH))


def pivot_root(new_root: str, put_old: str) -> None:
    _syscall("pivot_root", os.fsencode(new_root), os.fsencode(put_old))


def prctl(option: int, value: int = 0) -> int:
    zero = ctypes.c_ulong(0)
    result: int = _libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero)
    return _check("prctl", result)


def drop_bounding_set() -> None:
    """Take every capability out of the bounding set.  The kernel answers EINVAL past the last."""
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            return


def clear_capabilities() -> None:
    """Empty the effective, permitted, inheritable and ambient sets (capabilities(7)).

    Does nothing where they are: a service manager has then emptied them, and may refuse capset.
    """
    if not _has_capabilities():
        return
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    _syscall("capset", ctypes.byref(header), ctypes.byref(data))


def _has_capabilities() -> bool:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    _syscall("capget", ctypes.byref(header), ctypes.byref(data))
    return any(data)


def landlock_abi() -> int:
    """The kernel's Landlock ABI version; 0 where Landlock is missing or switched off."""
    version = _libc.syscall(
        number("landlock_create_ruleset"), None, 0, _LANDLOCK_CREATE_RULESET_VERSION
    )
    return max(int(version), 0)


def landlock_create_ruleset(files: int, network: int, scoped: int) -> int:
    """A new ruleset's descriptor.  Older kernels refuse a longer struct unless its tail is 0."""
    attr = _RulesetAttr(files, network, scoped)
    return _syscall("landlock_create_ruleset", ctypes.byref(attr), ctypes.sizeof(attr), 0)


def landlock_allow_path(ruleset_fd: int, path_fd: int, access: int) -> None:
    attr = _PathBeneathAttr(access, path_fd)
    _syscall("landlock_add_rule", ruleset_fd, _LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(attr), 0)


def landlock_restrict_self(ruleset_fd: int) -> None:
    _syscall("landlock_restrict_self", ruleset_fd, 0)


def set_host_name(name: str) -> None:
    """The name of this process's UTS namespace, which must be its own."""
    encoded = name.encode()
    _syscall("sethostname", encoded, len(encoded))


def set_idle_io_priority() -> None:
    """This thread's disk requests go when nobody else has any (ioprio_set(2))."""
    _syscall("ioprio_set", _IOPRIO_WHO_PROCESS, 0, _IOPRIO_CLASS_IDLE << 13)


def install_seccomp_filter(program: bytes) -> None:
    """Install a classic BPF program (8 bytes an instruction) for this thread, for good."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = _SockFprog(len(program) // 8, ctypes.addressof(buffer))
    _syscall("seccomp", _SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(fprog))


def collapse_pages(address: int, size: int) -> bool:
    """Move `size` bytes of this process's memory onto huge pages; False where the kernel won't."""
    start, length = ctypes.c_void_p(address), ctypes.c_size_t(size)
    _libc.madvise(start, length, _MADV_HUGEPAGE)
    return bool(_libc.madvise(start, length, _MADV_COLLAPSE) == 0)


def _syscall(name: str, *args: object) -> int:
    # Plain ints would be passed as 32-bit values; the kernel reads whole registers.
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result: int = _libc.syscall(number(name), *words)
    return _check(name, result)


def _check(name: str, result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result
