"""The system calls that a worker may make: the allow-list that seccomp.py turns into a filter.

In plain words: threads but no processes; no new socket, and neither a descriptor nor an odd flag
over the one that is there; no change of identity, privilege, namespace or dumpability; no shared
memory, no signal and no question about any process but itself.  Found by running models with
everything else refused; nothing is here for convenience.

    seccomp_rules(namespaces, gpu)
      namespaces   the worker has a root and process ids of its own: it may write to its scratch,
                   and what it can ask by path or by process id is its own
      gpu          whose driver it talks to, if any
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final, Literal

from nextgpu_node.sandbox.seccomp import SELF_PID, Check, Rule

Vendor = Literal["nvidia", "amd", "intel"]

_PLAIN_CALLS: Final = (
    # memory
    *("brk", "munmap", "mprotect", "mremap", "membarrier"),
    # threads and signals of this process
    *("rseq", "set_robust_list", "set_tid_address", "gettid", "getpid"),
    *("sched_yield", "getcpu", "rt_sigaction", "rt_sigprocmask"),
    *("rt_sigreturn", "sigaltstack", "restart_syscall", "exit", "exit_group"),
    *("sched_get_priority_max", "sched_get_priority_min"),
    # time
    *("clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time"),
    *("times", "getrusage"),
    # files: Landlock and the root decide which
    *("close", "close_range", "read", "readv", "pread64", "write", "writev"),
    *("pwrite64", "lseek", "fstat", "newfstatat", "stat", "lstat", "statx"),
    *("getcwd", "getdents64", "dup", "dup2", "dup3"),
    # waiting, and the one socket that the worker is born with
    *("poll", "ppoll", "select", "pselect6", "shutdown", "getsockname", "getpeername"),
    # about itself
    *("getrandom", "sysinfo", "getrlimit", "getuid", "geteuid", "getgid", "getegid"),
    *("getresuid", "getresgid", "getgroups"),
)
# Only where the file system is the worker's own.
_OWN_ROOT_CALLS: Final = (
    *("access", "faccessat", "faccessat2", "readlink", "readlinkat", "chdir", "umask"),
    *("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "rename", "renameat", "renameat2"),
    *("ftruncate", "fallocate", "getppid"),
)
# Questions that take a process id: about others only where there are none.
_BY_PROCESS_CALLS: Final = ("sched_getaffinity", "sched_getparam", "sched_getscheduler")

_CLONE_THREAD: Final = 0x00010F00  # VM | FS | FILES | SIGHAND | THREAD: a thread, no process
# SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID, DETACHED: pthread_create adds some of them.
_CLONE_HARMLESS: Final = 0x007C0000
_ALL_BITS: Final = 0xFFFFFFFFFFFFFFFF
_MAP_SHARED: Final = 0x01
_MAP_ANONYMOUS: Final = 0x20
_MAP_HUGETLB: Final = 0x40000

# Reading around the page cache, writing through it, and O_PATH, which Landlock does not judge.
_ODD_OPEN_FLAGS: Final = os.O_DIRECT | os.O_SYNC | os.O_PATH | 0o20000  # O_ASYNC
# MSG_OOB on a unix socket has a history of its own (CVE-2025-38236).
_SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RECEIVE_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_WAITALL | socket.MSG_PEEK
# SO_PEERPIDFD would make a descriptor for the daemon's process, SO_PEERCRED tell its id.
_SOCKET_OPTIONS: Final = (
    *(socket.SO_TYPE, socket.SO_ERROR, socket.SO_SNDBUF, socket.SO_RCVBUF),
    *(socket.SO_DOMAIN, socket.SO_PROTOCOL),
)
_FUTEX_PRIVATE: Final = 128
_FUTEX_COMMAND: Final = 127
# pthread_join waits without the private bit, for the kernel's own wake at a thread's end.
_FUTEX_WAIT_BITSET: Final = 9
# To wake without it could reach another process.  So nobody may sleep who would be woken that way:
# refused, libstdc++'s locks around static variables look again, and std::future does.
# NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTNEED, FREE, DONTFORK, DOFORK, HUGEPAGE, NOHUGEPAGE,
# DONTDUMP, DODUMP, POPULATE_READ, POPULATE_WRITE, GUARD_INSTALL, GUARD_REMOVE.  Not MERGEABLE
# (pages shared with other processes can be timed) and not PAGEOUT (to swap).
_ADVICE: Final = (0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 22, 23, 102, 103)

_F_COMMANDS: Final = (0, 1, 2, 3, 4, 1030)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC
_O_ASYNC: Final = 0o20000
_F_SETFL: Final = 4
_IOCTLS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# TCGETS and TIOCGWINSZ ask, FIONREAD counts, FIONBIO, FIONCLEX and FIOCLEX set own flags.
_PR_SET_NAME: Final = 15
_PR_GET_NAME: Final = 16
_PR_GET_DUMPABLE: Final = 3
_ARCH_XCOMP: Final = (0x1021, 0x1022, 0x1023)  # oneDNN asks for the AMX tile registers


# By type, the second byte of a request.  A terminal's (type 'T') are nowhere among them.
_TYPE: Final = 0xFFFFFFFF_0000FF00
_DRM: Final = (Check(1, 0x6400, _TYPE),)  # 'd': render nodes
_DRIVER_IOCTLS: Final[dict[Vendor, tuple[tuple[Check, ...], ...]]] = {
    # 'F' for the control nodes; small plain numbers and one odd one for nvidia-uvm.
    "nvidia": (
        (Check(1, 0x4600, _TYPE),),
        (Check(1, 0, 0xFFFFFFFF_FFFFF800),),
        (Check(1, 0x30000000, 0xFFFFFFFF_FFFFFFF0),),
    ),
    "amd": (_DRM, (Check(1, 0x4B00, _TYPE),)),  # 'K': /dev/kfd
    "intel": (_DRM,),
}


def seccomp_rules(*, namespaces: bool = True, gpu: Vendor | None = None) -> tuple[Rule, ...]:
    """The allow-list of one kind of worker."""
    # Calls with a condition come first: the kernel remembers the verdict on all others.
    rules = [
        *(_gpu_rules(gpu) if gpu else _cpu_rules()),
        Rule("clone", ((Check(0, _CLONE_THREAD, _ALL_BITS & ~_CLONE_HARMLESS),),)),
        Rule("open", ((Check(1, 0, _ODD_OPEN_FLAGS),),)),
        Rule("openat", ((Check(2, 0, _ODD_OPEN_FLAGS),),)),
        # send(2) is sendto(2) without an address; sendmsg(2) could carry descriptors.
        Rule("sendto", ((Check(3, 0, _ALL_BITS & ~_SEND_FLAGS), Check(4, 0), Check(5, 0)),)),
        Rule("recvfrom", ((Check(3, 0, _ALL_BITS & ~_RECEIVE_FLAGS),),)),
        Rule("getsockopt", _any_of(_SOCKET_OPTIONS, 2, Check(1, socket.SOL_SOCKET))),
        Rule("madvise", _any_of(_ADVICE, 2), errno.EINVAL),
        Rule("tgkill", ((Check(0, SELF_PID),),)),
        Rule("prlimit64", ((Check(0, 0), Check(2, 0)), (Check(0, SELF_PID), Check(2, 0)))),
        Rule("fcntl", _fcntl_alternatives()),
        Rule("arch_prctl", _any_of(_ARCH_XCOMP, 0)),
    ]
    rules += [Rule(name) for name in _PLAIN_CALLS]
    if namespaces:
        rules += [Rule(name) for name in (*_OWN_ROOT_CALLS, *_BY_PROCESS_CALLS)]
    else:
        rules += [Rule(name, _about_itself()) for name in _BY_PROCESS_CALLS]
    return tuple(rules)


def _cpu_rules() -> list[Rule]:
    return [
        # Memory shared with nobody: RLIMIT_DATA counts it, and no other process can be met in it.
        Rule("mmap", ((Check(3, 0, _MAP_SHARED | _MAP_HUGETLB),),)),
        Rule("futex", _futex_alternatives()),
        Rule("ioctl", _any_of(_IOCTLS, 1), errno.ENOTTY),
        Rule("prctl", _any_of((_PR_GET_NAME, _PR_GET_DUMPABLE), 0)),
    ]


def _gpu_rules(vendor: Vendor) -> list[Rule]:
    """The driver's interface is ioctl and shared mappings of its own device nodes; it needs
    memfd_create, locks memory, names its threads and may ask for the kernel's release.  Not
    verified on a card of any vendor."""
    return [
        Rule("mmap", ((Check(3, 0, _MAP_SHARED),), (Check(3, 0, _MAP_ANONYMOUS),))),
        Rule("ioctl", (*_DRIVER_IOCTLS[vendor], *_any_of(_IOCTLS, 1))),
        Rule("prctl", _any_of((_PR_SET_NAME, _PR_GET_NAME, _PR_GET_DUMPABLE), 0)),
        *(Rule(name) for name in ("futex", "memfd_create", "mlock", "munlock", "pipe2", "uname")),
    ]


def _any_of(
    values: tuple[int, ...], argument: int, *others: Check
) -> tuple[tuple[Check, ...], ...]:
    return tuple((Check(argument, value), *others) for value in values)


def _about_itself() -> tuple[tuple[Check, ...], ...]:
    return ((Check(0, 0),), (Check(0, SELF_PID),))


def _futex_alternatives() -> tuple[tuple[Check, ...], ...]:
    return (
        (Check(1, _FUTEX_PRIVATE, _FUTEX_PRIVATE),),
        (Check(1, _FUTEX_WAIT_BITSET, _FUTEX_COMMAND),),
    )


def _fcntl_alternatives() -> tuple[tuple[Check, ...], ...]:
    plain = tuple((Check(1, command),) for command in _F_COMMANDS if command != _F_SETFL)
    # O_ASYNC would have the kernel send signals.
    return (*plain, (Check(1, _F_SETFL), Check(2, 0, _O_ASYNC)))
