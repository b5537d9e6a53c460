"""A worker that attacks: each ASSIGN frame names one attack, each DATA frame is its verdict.

    ASSIGN  {"attack": name, "facts": {…}}      facts: what a knowing attacker would have
    DATA    {"open": bool, "detail": text}      open: the attack went through

An attack is a function that returns a short text where it went through and raises where it did
not.  For a raw system call, EPERM, EACCES and ENOSYS mean blocked: any other error comes from
inside the kernel's implementation, which was then reached.
"""

# ruff: noqa: PTH208  os.listdir is the system call that is meant here

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextgpu_protocol.framing import FrameDecoder, FrameKind, encode_frame

Facts = dict[str, Any]
Attack = Callable[[Facts], str]
ATTACKS: dict[str, Attack] = {}
LETHAL: dict[str, Attack] = {}  # end the worker, or are ended from outside
KINDS: dict[str, str] = {}  # attack -> the section of docs/sandbox.md that shows it

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_channel: socket.socket
_MIB = 1024 * 1024
_REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)

# x86_64 numbers of calls with a surface worth attacking: (number, arguments), by section.
_RAW_CALLS: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {
    "namespaces and mounts": {
        "unshare_user": (272, (0x10000000,)),
        "unshare_network": (272, (0x40000000,)),
        "unshare_time": (272, (0x80,)),
        "unshare_mount": (272, (0x20000,)),
        "unshare_files": (272, (0x400,)),
        "setns": (308, (0, 0)),
        "chroot": (161, (0,)),
        "pivot_root": (155, (0, 0)),
        "mount": (165, (0, 0, 0, 0, 0)),
        "umount": (166, (0, 0)),
        "open_tree": (428, (-100, 0, 0)),
        "move_mount": (429, (-100, 0, -100, 0, 4)),
        "fsopen": (430, (0, 0)),
        "fsconfig": (431, (3, 0, 0, 0, 0)),
        "fsmount": (432, (3, 0, 0)),
        "fspick": (433, (-100, 0, 0)),
        "mount_setattr": (442, (-100, 0, 0, 0, 0)),
        "statmount": (457, (0, 0, 0, 0)),
        "listmount": (458, (0, 0, 0, 0)),
        "open_tree_attr": (467, (-100, 0, 0, 0, 0)),
        "clone_new_user": (56, (0x10000000 | 17, 0, 0, 0, 0)),
        "clone3": (435, (0, 0)),
        "fchdir": (81, (0,)),
    },
    "kernel surfaces": {
        "bpf": (321, (5, 0, 0)),
        "io_uring_setup": (425, (1, 0)),
        "io_uring_register": (427, (0, 0, 0, 0)),
        "io_setup": (206, (1, 0)),
        "keyctl": (250, (0, -3, 1)),
        "add_key": (248, (0, 0, 0, 0, -3)),
        "request_key": (249, (0, 0, 0, 0)),
        "userfaultfd": (323, (1,)),
        "perf_event_open": (298, (0, 0, -1, -1, 0)),
        "init_module": (175, (0, 0, 0)),
        "finit_module": (313, (0, 0, 0)),
        "delete_module": (176, (0, 0)),
        "kexec_load": (246, (0, 0, 0, 0)),
        "kexec_file_load": (320, (0, 0, 0, 0, 0)),
        "iopl": (172, (3,)),
        "ioperm": (173, (0, 1, 1)),
        "modify_ldt": (154, (0, 0, 0)),
        "set_gs_base": (158, (0x1001, 0)),
        "personality": (135, (0x0040000,)),
        "memfd_create": (319, (0, 0)),
        "memfd_secret": (447, (0,)),
        "map_shadow_stack": (453, (0, 4096, 0)),
        "syslog": (103, (10, 0, 0)),
        "fanotify_init": (300, (0, 0)),
        "fanotify_mark": (301, (0, 0, 0, -100, 0)),
        "swapon": (167, (0, 0)),
        "swapoff": (168, (0,)),
        "reboot": (169, (0, 0, 0, 0)),
        "acct": (163, (0,)),
        "quotactl": (179, (0, 0, 0, 0)),
        "quotactl_fd": (443, (0, 0, 0, 0)),
        "sethostname": (170, (0, 0)),
        "setdomainname": (171, (0, 0)),
        "settimeofday": (164, (0, 0)),
        "clock_settime": (227, (0, 0)),
        "clock_adjtime": (305, (0, 0)),
        "adjtimex": (159, (0,)),
        "vhangup": (153, ()),
        "uselib": (134, (0,)),
        "sysfs": (139, (3,)),
        "lookup_dcookie": (212, (0, 0, 0)),
        "seccomp_listener": (317, (1, 8, 0)),
        "seccomp_tsync": (317, (1, 1, 0)),
        "landlock_create_ruleset": (444, (0, 0, 1)),
        "landlock_add_rule": (445, (0, 1, 0, 0)),
        "landlock_restrict_self": (446, (0, 0)),
        "lsm_get_self_attr": (459, (100, 0, 0, 0)),
        "lsm_set_self_attr": (460, (100, 0, 0, 0)),
        "inotify_init1": (294, (0,)),
        "inotify_add_watch": (254, (0, 0, 0)),
        "eventfd": (290, (0, 0)),
        "timerfd_create": (283, (1, 0)),
        "signalfd": (289, (-1, 0, 8, 0)),
        "epoll_create1": (291, (0,)),
        "timer_create": (222, (0, 0, 0)),
        "setitimer": (38, (0, 0, 0)),
        "pipe": (22, (0,)),
        "rseq_slice_unknown": (471, (0, 0)),
    },
    "other processes": {
        "ptrace_traceme": (101, (0, 0, 0, 0)),
        "ptrace_seize_first": (101, (0x4206, 1, 0, 0)),
        "pidfd_open_first": (434, (1, 0)),
        "pidfd_send_signal": (424, (3, 0, 0, 0)),
        "pidfd_getfd": (438, (3, 0, 0)),
        "process_vm_writev": (311, (1, 0, 0, 0, 0, 0)),
        "process_madvise": (440, (0, 0, 0, 0, 0)),
        "process_mrelease": (448, (3, 0)),
        "move_pages": (279, (0, 0, 0, 0, 0, 0)),
        "migrate_pages": (256, (0, 0, 0, 0)),
        "mbind": (237, (0, 0, 0, 0, 0, 0)),
        "get_mempolicy": (239, (0, 0, 0, 0, 0)),
        "kcmp": (312, (1, 1, 0, 0, 0)),
        "tkill_first": (200, (1, 0)),
        "kill_group": (62, (0, 0)),
        "kill_everyone": (62, (-1, 0)),
        "queue_signal": (129, (1, 0, 0)),
        "queue_signal_to_thread": (297, (1, 1, 0, 0)),
        "get_robust_list": (274, (1, 0, 0)),
        "capget_first": (125, (0, 0)),
        "sched_setaffinity": (203, (0, 0, 0)),
        "sched_setscheduler": (144, (0, 0, 0)),
        "sched_setattr": (314, (0, 0, 0)),
        "setpriority": (141, (0, 0, -5)),
        "getpriority": (140, (0, 0)),
        "ioprio_set": (251, (1, 0, 0)),
        "wait4": (61, (-1, 0, 1, 0)),
        "vfork": (58, ()),
        "fork": (57, ()),
        "vfork_like_clone": (56, (0x4000 | 17, 0, 0, 0, 0)),
        "clone_parent": (56, (0x8000 | 17, 0, 0, 0, 0)),
        "execveat": (322, (-1, 0, 0, 0, 0)),
        "shmget": (29, (0, 4096, 0o1600)),
        "semget": (64, (0, 1, 0o1600)),
        "msgget": (68, (0, 0o1600)),
        "mq_open": (240, (0, 0, 0, 0)),
        "flock": (73, (0, 2)),
        "futex_wake_new": (454, (0, 0, 1, 0)),
        "futex_waitv": (449, (0, 1, 0, 0, 0)),
    },
    "privilege": {
        "capset": (126, (0, 0)),
        "setuid": (105, (0,)),
        "setresuid": (117, (0, 0, 0)),
        "setfsuid": (122, (0,)),
        "setgid": (106, (0,)),
        "setgroups": (116, (0, 0)),
        "setsid": (112, ()),
        "setpgid": (109, (0, 0)),
        "setrlimit": (160, (7, 0)),
        "keep_capabilities": (157, (8, 1, 0, 0, 0)),
        "set_securebits": (157, (28, 0, 0, 0, 0)),
        "raise_ambient": (157, (47, 2, 21, 0, 0)),
        "prctl_set_mm": (157, (35, 1, 0, 0, 0)),
        "prctl_seccomp": (157, (22, 1, 0, 0, 0)),
        "prctl_subreaper": (157, (36, 1, 0, 0, 0)),
        "prctl_timer_slack": (157, (29, 1, 0, 0, 0)),
        "prctl_memory_merge": (157, (67, 1, 0, 0, 0)),
        "prctl_core_scheduling": (157, (62, 0, 0, 0, 0)),
        "prctl_syscall_dispatch": (157, (59, 0, 0, 0, 0)),
        "prctl_speculation": (157, (53, 0, 0, 0, 0)),
        "prctl_io_flusher": (157, (57, 1, 0, 0, 0)),
    },
    "network and sockets": {
        "socketpair": (53, (1, 1, 0, 0)),
        "bind": (49, (3, 0, 0)),
        "listen": (50, (3, 1)),
        "accept4": (288, (3, 0, 0, 0)),
        "connect": (42, (3, 0, 0)),
        "sendmsg": (46, (3, 0, 0)),
        "sendmmsg": (307, (3, 0, 0, 0)),
        "recvmsg": (47, (3, 0, 0)),
        "recvmmsg": (299, (3, 0, 0, 0, 0)),
        "setsockopt": (54, (3, 1, 26, 0, 0)),
        "send_out_of_band": (44, (3, 0, 0, 1, 0, 0)),
        "receive_out_of_band": (45, (3, 0, 0, 1, 0, 0)),
        "receive_error_queue": (45, (3, 0, 0, 0x2000, 0, 0)),
    },
    "files": {
        "mknod": (133, (0, 0o20600, 0x101)),
        "mknodat": (259, (-100, 0, 0o20600, 0x101)),
        "open_by_handle_at": (304, (-100, 0, 0)),
        "name_to_handle_at": (303, (-100, 0, 0, 0, 0)),
        "openat2": (437, (-100, 0, 0, 0)),
        "symlink": (88, (0, 0)),
        "symlinkat": (266, (0, -100, 0)),
        "link": (86, (0, 0)),
        "linkat": (265, (-100, 0, -100, 0, 0)),
        "chmod": (90, (0, 0)),
        "fchmod": (91, (0, 0)),
        "fchmodat2": (452, (-100, 0, 0, 0)),
        "chown": (92, (0, 0, 0)),
        "fchown": (93, (0, 0, 0)),
        "utimensat": (280, (-100, 0, 0, 0)),
        "setxattr": (188, (0, 0, 0, 0, 0)),
        "getxattr": (191, (0, 0, 0, 0)),
        "truncate": (76, (0, 0)),
        "splice": (275, (0, 0, 0, 0, 0, 0)),
        "tee": (276, (0, 0, 0, 0)),
        "vmsplice": (278, (0, 0, 0, 0)),
        "sendfile": (40, (3, 0, 0, 1)),
        "copy_file_range": (326, (0, 0, 0, 0, 1, 0)),
        "sync": (162, ()),
        "syncfs": (306, (0,)),
        "fsync": (74, (0,)),
        "sync_file_range": (277, (0, 0, 0, 0)),
        "readahead": (187, (0, 0, 1)),
        "fadvise": (221, (0, 0, 0, 4)),
        "mincore": (27, (0, 0, 0)),
        "cachestat": (451, (0, 0, 0, 0)),
        "statfs": (137, (0, 0)),
    },
    "bombs": {
        "mlock": (149, (0, 4096)),
        "mlock2": (325, (0, 4096, 0)),
        "mlockall": (151, (1,)),
        "pkey_alloc": (330, (0, 0)),
        "remap_file_pages": (216, (0, 0, 0, 0, 0)),
    },
}


def preload() -> str:
    return "attacks"


def serve(sock: socket.socket, limits: dict[str, int | str]) -> None:
    global _channel
    _channel = sock
    sock.sendall(encode_frame(FrameKind.HELLO, os.urandom(32)))
    decoder = FrameDecoder()
    while data := sock.recv(65536):
        decoder.feed(data)
        for _, body in decoder:
            order = json.loads(body)
            verdict = attempt({**ATTACKS, **LETHAL}[order["attack"]], order["facts"])
            sock.sendall(encode_frame(FrameKind.DATA, json.dumps(verdict).encode()))


def attempt(attack: Attack, facts: Facts) -> dict[str, object]:
    try:
        return {"open": True, "detail": attack(facts)}
    except (OSError, ValueError, RuntimeError, MemoryError, KeyError) as exc:
        if attack is fill_disk:
            raise  # as a unit's code would let it rise
        return {"open": False, "detail": f"{type(exc).__name__}: {exc}"}


def _attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    KINDS[function.__name__] = _kind
    return function


_kind = ""


def _section(kind: str) -> None:
    """The attacks that follow are of this kind."""
    global _kind
    _kind = kind


def _lethal(function: Attack) -> Attack:
    LETHAL[function.__name__] = function
    return function


def _syscall(nr: int, *args: int) -> int:
    ctypes.set_errno(0)
    result = int(_libc.syscall(nr, *(ctypes.c_long(arg) for arg in args)))
    code = ctypes.get_errno()
    if result < 0 and code in _REFUSED:
        raise OSError(code, os.strerror(code))
    return result


def _raw(nr: int, args: tuple[int, ...]) -> Attack:
    def call(facts: Facts) -> str:
        result = _syscall(nr, *args)
        if result == 0 and nr in (56, 57, 58):
            os._exit(0)  # the child of a clone that should not have been
        return f"reached the kernel: {result}"

    return call


for _kind_of_calls, _calls in _RAW_CALLS.items():
    for _name, (_nr, _args) in _calls.items():
        ATTACKS[f"call_{_name}"] = _raw(_nr, _args)
        KINDS[f"call_{_name}"] = _kind_of_calls


_section("files")


@_attack
def read_host_file(facts: Facts) -> str:
    return Path("/etc/hostname").read_text()


@_attack
def read_host_file_by_dots(facts: Facts) -> str:
    return Path("/tmp/../../../../etc/passwd").read_text()


@_attack
def list_ssh_keys(facts: Facts) -> str:
    return repr(os.listdir("/root/.ssh"))


@_attack
def read_daemon_secret(facts: Facts) -> str:
    return Path(facts["secret_path"]).read_text()


@_attack
def list_root(facts: Facts) -> str:
    return repr(os.listdir("/"))


@_attack
def list_home(facts: Facts) -> str:
    return repr(os.listdir("/home"))


@_attack
def list_old_root(facts: Facts) -> str:
    return repr(os.listdir("/.host"))


@_attack
def poison_packages(facts: Facts) -> str:
    target = Path(json.__file__).with_name("poison.py")
    target.write_text("")
    return str(target)


@_attack
def change_code_in_place(facts: Facts) -> str:
    os.close(os.open(json.__file__, os.O_RDWR))
    return "opened for writing"


@_attack
def write_in_root(facts: Facts) -> str:
    Path("/evil").write_text("")
    return "written"


@_attack
def write_host_tmp(facts: Facts) -> str:
    Path(facts["scratch_path"]).write_text("x")
    return "written"


@_attack
def open_devices(facts: Facts) -> str:
    found = []
    for name in ("mem", "kmsg", "tty", "fuse", "kvm", "vda", "ptmx", "net/tun", "nvidia0", "shm"):
        with contextlib.suppress(OSError):
            os.close(os.open(f"/dev/{name}", os.O_RDONLY))
            found.append(name)
    if not found:
        raise OSError(errno.EACCES, "none")
    return repr(found)


@_attack
def run_file_from_scratch(facts: Facts) -> str:
    Path("/tmp/tool").write_bytes(b"#!/bin/sh\n")
    os.execv("/tmp/tool", ["/tmp/tool"])


@_attack
def read_proc(facts: Facts) -> str:
    return Path(f"/proc/{facts['daemon_pid']}/status").read_text()[:20]


@_attack
def read_own_proc(facts: Facts) -> str:
    return Path("/proc/self/maps").read_text()[:20]


@_attack
def read_daemon_memory(facts: Facts) -> str:
    with Path(f"/proc/{facts['daemon_pid']}/mem").open("rb"):
        return "opened"


@_attack
def read_sys(facts: Facts) -> str:
    return repr(os.listdir("/sys"))


@_attack
def read_cgroups(facts: Facts) -> str:
    return repr(os.listdir("/sys/fs/cgroup"))


@_attack
def stat_host_file(facts: Facts) -> str:
    return repr(Path(facts["secret_path"]).stat().st_size)


@_attack
def ask_whether_host_file_exists(facts: Facts) -> str:
    if not os.access(facts["secret_path"], os.F_OK):
        raise OSError(errno.EACCES, "no answer")
    return "it does"


@_attack
def read_links_of_daemon(facts: Facts) -> str:
    of_daemon = Path("/proc", str(facts["daemon_pid"]))
    return repr([(of_daemon / name).readlink() for name in ("exe", "cwd")])


@_attack
def change_to_host_directory(facts: Facts) -> str:
    os.chdir(Path(facts["secret_path"]).parent)
    return str(Path.cwd())


@_attack
def open_path_only(facts: Facts) -> str:
    return repr(os.open(facts["secret_path"], os.O_PATH))


@_attack
def open_around_the_page_cache(facts: Facts) -> str:
    return repr(os.open(json.__file__, os.O_RDONLY | os.O_DIRECT))


@_attack
def reopen_socket_by_path(facts: Facts) -> str:
    return repr(os.open("/dev/fd/3", os.O_RDWR))


@_attack
def list_shared_memory(facts: Facts) -> str:
    return repr(os.listdir("/dev/shm"))


@_attack
def make_shared_memory_file(facts: Facts) -> str:
    Path("/dev/shm/left").write_text("x")
    return "made"


@_attack
def list_terminals(facts: Facts) -> str:
    return repr(os.listdir("/dev/pts"))


@_attack
def read_run(facts: Facts) -> str:
    return repr(os.listdir("/run"))


@_attack
def read_etc(facts: Facts) -> str:
    return repr([Path("/etc", name).read_bytes()[:8] for name in ("machine-id", "resolv.conf")])


@_attack
def read_kernel_settings(facts: Facts) -> str:
    return Path("/proc/sys/kernel/core_pattern").read_text()


@_attack
def change_kernel_settings(facts: Facts) -> str:
    Path("/proc/sys/kernel/core_pattern").write_text("|/bin/false")
    return "changed"


@_attack
def press_sysrq(facts: Facts) -> str:
    Path("/proc/sysrq-trigger").write_text("?")
    return "pressed"


@_attack
def read_kernel_memory(facts: Facts) -> str:
    return repr(os.open("/proc/kcore", os.O_RDONLY))


@_attack
def read_mount_table(facts: Facts) -> str:
    return Path("/proc/self/mountinfo").read_text()[:40]


@_attack
def write_byte_code(facts: Facts) -> str:
    cached = Path(json.__cached__)
    with cached.open("r+b") as file:
        file.write(b"x")
    return str(cached)


@_attack
def rename_package(facts: Facts) -> str:
    package = Path(json.__file__).parent
    package.rename(package.with_name("json_"))
    return "renamed"


@_attack
def remove_package(facts: Facts) -> str:
    Path(json.__file__).unlink()
    return "removed"


@_attack
def write_to_a_model_cache(facts: Facts) -> str:
    cache = Path(facts["scratch_path"]).with_name("models")
    cache.mkdir(exist_ok=True)
    (cache / "model.safetensors").write_bytes(b"poison")
    return "written"


@_attack
def replace_file_of_host_by_rename(facts: Facts) -> str:
    Path("/tmp/new").write_text("x")
    Path("/tmp/new").rename(facts["secret_path"])
    return "replaced"


@_attack
def move_file_between_mounts(facts: Facts) -> str:
    Path("/tmp/new").write_text("x")
    Path("/tmp/new").rename("/dev/new")
    return "moved"


_section("environment and descriptors")


@_attack
def environment(facts: Facts) -> str:
    if not os.environ:
        raise KeyError("empty")
    return repr(sorted(os.environ))


@_attack
def inherited_descriptors(facts: Facts) -> str:
    found = []
    for fd in range(4, 256):
        with contextlib.suppress(OSError):
            os.fstat(fd)
            found.append(fd)
    if not found:
        raise OSError(errno.EBADF, "none")
    return repr(found)


@_attack
def standard_streams(facts: Facts) -> str:
    kinds = {os.fstat(fd).st_rdev for fd in (0, 1, 2)}
    if kinds == {os.makedev(1, 3)}:
        raise OSError(errno.ENODEV, "all three are /dev/null")
    return repr(kinds)


@_attack
def smuggle_descriptor_out(facts: Facts) -> str:
    told = json.dumps({"open": True, "detail": "sent"}).encode()
    socket.send_fds(_channel, [encode_frame(FrameKind.DATA, told)], [0])
    return "sent"


@_attack
def take_descriptor_in(facts: Facts) -> str:
    return repr(socket.recv_fds(_channel, 1, 1, socket.MSG_DONTWAIT))


@_attack
def steal_descriptor_by_pidfd(facts: Facts) -> str:
    pidfd = os.pidfd_open(facts["daemon_pid"])
    return repr(_syscall(438, pidfd, 3, 0))


def _socket_option(option: int) -> str:
    found = socket.socket(fileno=os.dup(3)).getsockopt(socket.SOL_SOCKET, option, 64)
    return repr(found)


@_attack
def process_descriptor_of_daemon(facts: Facts) -> str:
    """SO_PEERPIDFD makes a new descriptor for the process at the other end."""
    return _socket_option(77)


@_attack
def credentials_of_daemon(facts: Facts) -> str:
    return _socket_option(socket.SO_PEERCRED)


@_attack
def groups_of_daemon(facts: Facts) -> str:
    return _socket_option(59)


@_attack
def attach_filter_to_socket(facts: Facts) -> str:
    return repr(_syscall(54, 3, socket.SOL_SOCKET, 26, 0, 0))


@_attack
def second_stream_over_the_socket(facts: Facts) -> str:
    """MSG_OOB: a byte beside the stream, whose bookkeeping has been exploited before."""
    return repr(_channel.send(b"x", socket.MSG_OOB))


@_attack
def read_environment_block(facts: Facts) -> str:
    block = ctypes.POINTER(ctypes.c_char_p).in_dll(_libc, "environ")
    found = []
    while block and block[len(found)]:
        found.append(block[len(found)])
    if not found:
        raise KeyError("empty")
    return repr(found)


@_attack
def name_of_host(facts: Facts) -> str:
    if os.uname().nodename != facts["host_name"]:
        raise OSError(errno.ENODATA, "another name")
    return "known"


@_attack
def name_of_host_from_memory(facts: Facts) -> str:
    """What the launcher's modules may have cached before the fork."""
    import platform

    if facts["host_name"] not in platform.node():
        raise OSError(errno.ENODATA, "not cached")
    return "cached"


@_attack
def release_of_kernel(facts: Facts) -> str:
    return os.uname().release


@_attack
def memory_of_host(facts: Facts) -> str:
    return repr(os.sysconf("SC_PHYS_PAGES"))


@_attack
def names_of_installed_packages(facts: Facts) -> str:
    return repr(len(os.listdir(Path(facts["site_packages"]))))


@_attack
def path_of_installation(facts: Facts) -> str:
    return json.__file__


@_attack
def precise_timer(facts: Facts) -> str:
    return repr(time.perf_counter_ns())


@_attack
def rename_own_process(facts: Facts) -> str:
    if _libc.prctl(15, b"\x1b[31mfake", 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    return "renamed"


_section("other processes")


@_attack
def see_daemon(facts: Facts) -> str:
    try:
        os.kill(facts["daemon_pid"], 0)
    except PermissionError:
        # Without a filter, this answer comes from a kernel that has found the process.
        if facts["filtered"]:
            raise
        return "it is there"
    return "it can be signalled"


@_attack
def signal_everyone(facts: Facts) -> str:
    os.kill(-1, 0)
    return "signalled"


@_attack
def signal_thread_of_daemon(facts: Facts) -> str:
    return repr(_syscall(234, facts["daemon_pid"], facts["daemon_pid"], 0))


@_attack
def ptrace_daemon(facts: Facts) -> str:
    return repr(_syscall(101, 16, facts["daemon_pid"], 0, 0))


@_attack
def read_memory_of_daemon(facts: Facts) -> str:
    return repr(_syscall(310, facts["daemon_pid"], 0, 0, 0, 0, 0))


@_attack
def limit_daemon(facts: Facts) -> str:
    return repr(resource.prlimit(facts["daemon_pid"], resource.RLIMIT_NOFILE))


@_attack
def fork_process(facts: Facts) -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "forked"


@_attack
def orphan_by_double_fork(facts: Facts) -> str:
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        os._exit(0)
    return "orphaned"


@_attack
def run_shell(facts: Facts) -> str:
    os.execv("/bin/sh", ["sh", "-c", "true"])


@_attack
def run_memfd(facts: Facts) -> str:
    fd = os.memfd_create("x")
    os.execve(fd, ["x"], {})


@_attack
def see_launcher(facts: Facts) -> str:
    if os.getppid() <= 0:
        raise ProcessLookupError("no parent here")
    return repr(os.getppid())


def _launcher(facts: Facts) -> int:
    return os.getppid() if os.getppid() > 0 else int(facts["daemon_pid"])


@_attack
def signal_launcher(facts: Facts) -> str:
    os.kill(_launcher(facts), 0)
    return "it can be signalled"


@_attack
def read_memory_of_launcher(facts: Facts) -> str:
    return repr(_syscall(310, _launcher(facts), 0, 0, 0, 0, 0))


@_attack
def affinity_of_daemon(facts: Facts) -> str:
    return repr(os.sched_getaffinity(facts["daemon_pid"]))


@_attack
def scheduler_of_daemon(facts: Facts) -> str:
    return repr(os.sched_getscheduler(facts["daemon_pid"]))


@_attack
def map_file_shared(facts: Facts) -> str:
    """A page of a file that every worker maps: the beginning of a channel between two of them."""
    with Path(json.__file__).open("rb") as file:
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ).close()
    return "mapped"


@_attack
def wake_over_a_shared_page(facts: Facts) -> str:
    """A futex in a page of a file is keyed by the file, so that another worker could wait on it."""
    with Path(json.__file__).open("rb") as file:
        page = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        return repr(_syscall(202, address, 1, 1, 0, 0, 0))


@_attack
def map_device_zero_shared(facts: Facts) -> str:
    fd = os.open("/dev/zero", os.O_RDWR)
    mmap.mmap(fd, _MIB, mmap.MAP_SHARED).close()
    return "mapped"


def _advise(advice: int) -> str:
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.madvise(advice)
    return "done"


@_attack
def merge_pages_with_others(facts: Facts) -> str:
    """MADV_MERGEABLE: equal pages become one, and the time of a write tells."""
    return _advise(12)


@_attack
def push_pages_to_swap(facts: Facts) -> str:
    return _advise(21)


@_attack
def signal_group(facts: Facts) -> str:
    os.killpg(0, 0)
    return "signalled"


_section("network and sockets")


def _connect(family: int, kind: int, address: Any) -> str:
    with socket.socket(family, kind) as sock:
        sock.settimeout(1)
        sock.connect(address)
        sock.send(b"x")
    return "sent"


@_attack
def tcp_to_host(facts: Facts) -> str:
    return _connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", facts["tcp_port"]))


@_attack
def udp(facts: Facts) -> str:
    return _connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 53))


@_attack
def ipv6(facts: Facts) -> str:
    socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    return "made"


@_attack
def unix_path_socket(facts: Facts) -> str:
    return _connect(socket.AF_UNIX, socket.SOCK_STREAM, facts["unix_path"])


@_attack
def unix_abstract_socket(facts: Facts) -> str:
    return _connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + facts["abstract_name"])


@_attack
def vsock(facts: Facts) -> str:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    return "made"


@_attack
def netlink(facts: Facts) -> str:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
    return "made"


@_attack
def raw_packets(facts: Facts) -> str:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
    return "made"


@_attack
def kernel_crypto_socket(facts: Facts) -> str:
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).close()
    return "made"


@_attack
def send_with_address(facts: Facts) -> str:
    name = b"\0x" + b"\0" * 14
    result = _libc.sendto(3, b"x", 0, 0, name, 16)
    if result < 0:
        raise OSError(ctypes.get_errno(), "sendto")
    return "sent"


_OTHER_FAMILIES = {
    "bluetooth": 31,
    "can": 29,
    "key_management": 15,
    "appletalk": 5,
    "x25": 9,
    "rds": 21,
    "tipc": 30,
    "nfc": 39,
    "xdp": 44,
    "qipcrtr": 42,
    "smc": 43,
    "mctp": 45,
}


def _family(number: int) -> Attack:
    def make(facts: Facts) -> str:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW):
            result = _syscall(41, number, kind, 0)
            if result >= 0:
                return f"made: {result}"
        # Any other errno is the answer of a kernel that was asked.
        return "reached the kernel"

    return make


for _name, _number in _OTHER_FAMILIES.items():
    ATTACKS[f"socket_{_name}"] = _family(_number)
    KINDS[f"socket_{_name}"] = _kind


@_attack
def unix_pair_to_oneself(facts: Facts) -> str:
    left, right = socket.socketpair()
    with left, right:
        return repr(left.fileno())


_section("privilege")


@_attack
def mount_something(facts: Facts) -> str:
    Path("/tmp/m").mkdir(exist_ok=True)
    if _libc.mount(b"x", b"/tmp/m", b"tmpfs", 0, None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return "mounted"


@_attack
def become_dumpable(facts: Facts) -> str:
    if _libc.prctl(4, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    return "set"


@_attack
def be_dumpable(facts: Facts) -> str:
    if _libc.prctl(3, 0, 0, 0, 0) == 0:
        raise OSError(errno.EPERM, "not dumpable")
    return "is dumpable"


@_attack
def outlive_launcher(facts: Facts) -> str:
    if _libc.prctl(1, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    return "death signal cleared"


@_attack
def allow_tracer(facts: Facts) -> str:
    if _libc.prctl(0x59616D61, -1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    return "allowed"


@_attack
def raise_own_limits(facts: Facts) -> str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    return "raised"


@_attack
def have_privileges(facts: Facts) -> str:
    if os.geteuid() == 0 or set(os.getgroups()) - {os.getgid()} or 0 in os.getresuid():
        return repr((os.getresuid(), os.getgroups()))
    raise OSError(errno.EPERM, "none")


@_attack
def terminal_injection(facts: Facts) -> str:
    import fcntl

    fcntl.ioctl(0, 0x5412, b"x")
    return "injected"


@_attack
def signals_from_descriptor(facts: Facts) -> str:
    import fcntl

    fcntl.fcntl(3, fcntl.F_SETOWN, 1)
    return "set"


@_attack
def async_descriptor(facts: Facts) -> str:
    import fcntl

    fcntl.fcntl(3, fcntl.F_SETFL, 0o20000)
    return "set"


@_attack
def shared_anonymous_memory(facts: Facts) -> str:
    mmap.mmap(-1, _MIB).close()
    return "mapped"


_section("bombs")  # open where they get further than the limit that `facts` names


@_attack
def thread_bomb(facts: Facts) -> str:
    stop = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(facts["max_threads"] + 120):
            thread = threading.Thread(target=stop.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        if len(threads) >= facts["max_threads"] + facts["thread_slack"]:
            return f"{len(threads)} threads"
        raise
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return f"{len(threads)} threads"


@_attack
def descriptor_bomb(facts: Facts) -> str:
    fds: list[int] = []
    try:
        while len(fds) < 512:  # below what a user has by default
            fds.append(os.dup(0))
    finally:
        for fd in fds:
            os.close(fd)
    return f"{len(fds)} descriptors"


@_attack
def memory_bomb(facts: Facts) -> str:
    held = []
    taken = 0
    try:
        while taken < 2 * facts["memory_bytes"]:
            held.append(bytearray(b"\1") * (8 * _MIB))
            taken += 8 * _MIB
    finally:
        held.clear()
    return f"{taken} bytes"


@_attack
def memory_bomb_by_protection(facts: Facts) -> str:
    """Read-only pages leave RLIMIT_DATA's account; the address space still counts them."""
    limit = facts["memory_bytes"] + 1024 * _MIB
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    taken = 0
    while taken < limit:
        address = libc.mmap(None, 64 * _MIB, 3, 0x22, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"after {taken}")
        libc.mprotect(address, 64 * _MIB, 1)
        taken += 64 * _MIB
    return f"{taken} bytes"


@_attack
def disk_fill(facts: Facts) -> str:
    path = Path("/tmp/fill")
    written = 0
    try:
        for part in range(4):
            with path.with_name(f"fill{part}").open("wb") as file:
                while written < 2 * facts["tmpfs_bytes"]:
                    written += file.write(b"\1" * _MIB)
                    file.flush()
    finally:
        for part in range(4):
            path.with_name(f"fill{part}").unlink(missing_ok=True)
    return f"{written} bytes"


@_attack
def inode_fill(facts: Facts) -> str:
    made: list[Path] = []
    try:
        for number in range(2 * facts["tmpfs_inodes"]):
            path = Path(f"/tmp/inode{number}")
            path.touch()
            made.append(path)
    finally:
        for path in made:
            path.unlink()
    return f"{len(made)} files"


@_attack
def sparse_file(facts: Facts) -> str:
    with Path("/tmp/sparse").open("wb") as file:
        try:
            file.truncate(2 * facts["tmpfs_bytes"])
        finally:
            Path("/tmp/sparse").unlink()
    return "made"


@_attack
def allocate_file_space(facts: Facts) -> str:
    with Path("/tmp/space").open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 2 * facts["tmpfs_bytes"])
        finally:
            Path("/tmp/space").unlink()
    return "allocated"


@_attack
def deep_directories(facts: Facts) -> str:
    depth, path = 0, Path("/tmp/deep")
    try:
        while depth < 2 * facts["tmpfs_inodes"]:
            path.mkdir()
            path, depth = path / "d", depth + 1
    finally:
        for _ in range(depth):
            path = path.parent
            path.rmdir()
    return f"{depth} directories"


@_attack
def file_names_of_the_longest_kind(facts: Facts) -> str:
    made = 0
    names = [Path("/tmp", f"{number:0255}") for number in range(2 * facts["tmpfs_inodes"])]
    try:
        for name in names:
            name.touch()
            made += 1
    finally:
        for name in names[:made]:
            name.unlink()
    return f"{made} files"


@_attack
def huge_page_mapping(facts: Facts) -> str:
    mmap.mmap(-1, 2 * _MIB, 0x22 | 0x40000).close()
    return "mapped"


@_attack
def locked_mapping(facts: Facts) -> str:
    mmap.mmap(-1, 8 * _MIB, 0x22 | 0x2000).close()
    return "mapped"


@_attack
def growing_mapping(facts: Facts) -> str:
    """One mapping, made larger and larger in place."""
    size = 64 * _MIB
    page = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        while size < facts["memory_bytes"] + 1024 * _MIB:
            size *= 2
            page.resize(size)
    finally:
        page.close()
    return f"{size} bytes"


@_attack
def thread_bomb_by_raw_clone(facts: Facts) -> str:
    import _thread

    stop = threading.Event()
    started = 0
    try:
        for _ in range(facts["max_threads"] + 120):
            _thread.start_new_thread(stop.wait, ())
            started += 1
    except RuntimeError:
        if started >= facts["max_threads"] + facts["thread_slack"]:
            return f"{started} threads"
        raise
    finally:
        stop.set()
        time.sleep(0.05)
    return f"{started} threads"


# lethal


@_lethal
def int80(facts: Facts) -> str:
    """getpid through the 32-bit gate: mov eax, 20; int 0x80; ret."""
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return repr(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


@_lethal
def far_return_32(facts: Facts) -> str:
    """Into a 32-bit code segment (retfq to 0x23), where the same gate has another table."""
    low = mmap.mmap(-1, 4096, 0x22 | 0x40, prot=7)  # MAP_32BIT
    address = ctypes.addressof(ctypes.c_char.from_buffer(low))
    jump = b"\x6a\x23\x68" + struct.pack("<I", address + 32) + b"\x48\xcb"
    low.write(jump.ljust(32, b"\x90") + b"\xb8\x14\x00\x00\x00\xcd\x80\xf4")
    return repr(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


@_lethal
def x32(facts: Facts) -> str:
    return repr(_libc.syscall(ctypes.c_long(0x40000000 | 39)))


@_lethal
def segfault(facts: Facts) -> str:
    return repr(ctypes.string_at(1))


@_lethal
def illegal_instruction(facts: Facts) -> str:
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    page.write(b"\x0f\x0b")
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return repr(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


@_lethal
def stack_overflow(facts: Facts) -> str:
    """A loop of pushes, far past RLIMIT_STACK: push rax; jmp -3."""
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    page.write(b"\x50\xeb\xfd")
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return repr(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


@_lethal
def exit_in_the_middle(facts: Facts) -> str:
    os._exit(3)


@_lethal
def stop_itself(facts: Facts) -> str:
    """SIGSTOP by the one call that may send a signal, and only to itself."""
    _channel.sendall(encode_frame(FrameKind.DATA, b'{"open": true, "detail": "stopping"}'))
    _libc.syscall(234, os.getpid(), os.getpid(), signal.SIGSTOP)
    time.sleep(3600)
    return "slept"


@_lethal
def fill_disk(facts: Facts) -> str:
    """Until the file system says no; what the worker module makes of that is what is tested."""
    with Path("/tmp/fill").open("wb", buffering=0) as file:
        while True:
            file.write(b"\1" * _MIB)


@_lethal
def abort(facts: Facts) -> str:
    os.abort()


@_lethal
def cpu_loop(facts: Facts) -> str:
    while True:
        pass


@_lethal
def sleep(facts: Facts) -> str:
    time.sleep(3600)
    return "slept"


@_lethal
def ignore_signals(facts: Facts) -> str:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _channel.sendall(encode_frame(FrameKind.DATA, b'{"open": true, "detail": "ignoring"}'))
    time.sleep(3600)
    return "slept"


@_lethal
def output_flood(facts: Facts) -> str:
    flood = struct.pack(">I", 4096) + b"\5" + b"\0" * 4095
    while True:
        _channel.sendall(flood)


@_lethal
def touch_memory(facts: Facts) -> str:
    held = []
    while True:
        held.append(bytearray(b"\1") * (16 * _MIB))
