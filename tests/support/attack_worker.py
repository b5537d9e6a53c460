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

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_channel: socket.socket
_MIB = 1024 * 1024
_REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)

# x86_64 numbers of calls with a surface worth attacking: (number, arguments).
_RAW_CALLS: dict[str, tuple[int, tuple[int, ...]]] = {
    "ptrace_traceme": (101, (0, 0, 0, 0)),
    "unshare_user": (272, (0x10000000,)),
    "unshare_network": (272, (0x40000000,)),
    "setns": (308, (0, 0)),
    "chroot": (161, (0,)),
    "pivot_root": (155, (0, 0)),
    "umount": (166, (0, 0)),
    "open_tree": (428, (-100, 0, 0)),
    "fsopen": (430, (0, 0)),
    "mknod": (133, (0, 0o20600, 0x101)),
    "bpf": (321, (5, 0, 0)),
    "io_uring_setup": (425, (1, 0)),
    "keyctl": (250, (0, -3, 1)),
    "add_key": (248, (0, 0, 0, 0, -3)),
    "request_key": (249, (0, 0, 0, 0)),
    "userfaultfd": (323, (1,)),
    "perf_event_open": (298, (0, 0, -1, -1, 0)),
    "init_module": (175, (0, 0, 0)),
    "finit_module": (313, (0, 0, 0)),
    "kexec_load": (246, (0, 0, 0, 0)),
    "iopl": (172, (3,)),
    "ioperm": (173, (0, 1, 1)),
    "modify_ldt": (154, (0, 0, 0)),
    "personality": (135, (0x0040000,)),
    "memfd_create": (319, (0, 0)),
    "memfd_secret": (447, (0,)),
    "syslog": (103, (10, 0, 0)),
    "open_by_handle_at": (304, (-100, 0, 0)),
    "fanotify_init": (300, (0, 0)),
    "swapon": (167, (0, 0)),
    "reboot": (169, (0, 0, 0, 0)),
    "acct": (163, (0,)),
    "quotactl": (179, (0, 0, 0, 0)),
    "sethostname": (170, (0, 0)),
    "settimeofday": (164, (0, 0)),
    "clock_settime": (227, (0, 0)),
    "clock_adjtime": (305, (0, 0)),
    "splice": (275, (0, 0, 0, 0, 0, 0)),
    "vmsplice": (278, (0, 0, 0, 0)),
    "process_vm_writev": (311, (1, 0, 0, 0, 0, 0)),
    "process_madvise": (440, (0, 0, 0, 0, 0)),
    "move_pages": (279, (0, 0, 0, 0, 0, 0)),
    "mbind": (237, (0, 0, 0, 0, 0, 0)),
    "kcmp": (312, (1, 1, 0, 0, 0)),
    "shmget": (29, (0, 4096, 0o1600)),
    "semget": (64, (0, 1, 0o1600)),
    "msgget": (68, (0, 0o1600)),
    "mq_open": (240, (0, 0, 0, 0)),
    "capset": (126, (0, 0)),
    "setuid": (105, (0,)),
    "setgroups": (116, (0, 0)),
    "setsid": (112, ()),
    "setpgid": (109, (0, 0)),
    "socketpair": (53, (1, 1, 0, 0)),
    "listen": (50, (3, 1)),
    "accept4": (288, (3, 0, 0, 0)),
    "connect": (42, (3, 0, 0)),
    "recvmsg": (47, (3, 0, 0)),
    "sendmmsg": (307, (3, 0, 0, 0)),
    "inotify_init1": (294, (0,)),
    "eventfd": (290, (0, 0)),
    "timerfd_create": (283, (1, 0)),
    "signalfd": (289, (-1, 0, 8, 0)),
    "sched_setaffinity": (203, (0, 0, 0)),
    "sched_setscheduler": (144, (0, 0, 0)),
    "setpriority": (141, (0, 0, -5)),
    "ioprio_set": (251, (1, 0, 0)),
    "mlockall": (151, (1,)),
    "pkey_alloc": (330, (0, 0)),
    "seccomp_listener": (317, (1, 8, 0)),
    "landlock_create_ruleset": (444, (0, 0, 1)),
    "name_to_handle_at": (303, (-100, 0, 0, 0, 0)),
    "symlink": (88, (0, 0)),
    "link": (86, (0, 0)),
    "chmod": (90, (0, 0)),
    "utimensat": (280, (-100, 0, 0, 0)),
    "setxattr": (188, (0, 0, 0, 0, 0)),
    "execveat": (322, (-1, 0, 0, 0, 0)),
    "vfork_like_clone": (56, (0x4000 | 17, 0, 0, 0, 0)),
    "clone_new_user": (56, (0x10000000 | 17, 0, 0, 0, 0)),
    "clone3": (435, (0, 0)),
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
        return {"open": False, "detail": f"{type(exc).__name__}: {exc}"}


def _attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


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


def _raw(name: str) -> Attack:
    nr, args = _RAW_CALLS[name]

    def call(facts: Facts) -> str:
        result = _syscall(nr, *args)
        if result == 0 and nr == 56:
            os._exit(0)  # the child of a clone that should not have been
        return f"reached the kernel: {result}"

    return call


ATTACKS.update({f"call_{name}": _raw(name) for name in _RAW_CALLS})


# files


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
    found = [
        name
        for name in ("mem", "kmsg", "tty", "fuse", "kvm", "vda", "ptmx", "net/tun", "nvidia0")
        if Path("/dev", name).exists()
    ]
    if not found:
        raise OSError(errno.ENOENT, "none")
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


# environment and descriptors


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


# other processes


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


# network


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


# privilege and self


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
    if os.geteuid() == 0 or os.getgroups() or 0 in os.getresuid():
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


# bombs: open where they get further than the limit that `facts` names


@_attack
def thread_bomb(facts: Facts) -> str:
    stop = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(facts["max_threads"] + 20):
            thread = threading.Thread(target=stop.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        if len(threads) >= facts["max_threads"]:
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
        while len(fds) < 4096:
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


# lethal


@_lethal
def int80(facts: Facts) -> str:
    """getpid through the 32-bit gate: mov eax, 20; int 0x80; ret."""
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return repr(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


@_lethal
def x32(facts: Facts) -> str:
    return repr(_libc.syscall(ctypes.c_long(0x40000000 | 39)))


@_lethal
def segfault(facts: Facts) -> str:
    return repr(ctypes.string_at(1))


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
