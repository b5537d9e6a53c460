"""What a new worker does to itself, step by step, before it reads its first byte.

Runs between the fork and the worker module, as the first process of its namespaces.  Each step
is named, so that a host that refuses one is told which.  Source: namespaces(7), pivot_root(2),
user_namespaces(7), capabilities(7), close_range(2)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
from collections.abc import Sequence
from typing import Final

from nextgpu_node.sandbox import landlock, seccomp, syscalls
from nextgpu_node.sandbox.policy import EXTRA_THREADS, SCRATCH, Mount, Plan
from nextgpu_node.sandbox.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_REC

WORKER_FD: Final = 3
# What the owner sees in a list of processes; the worker can not rename itself.
_PROCESS_NAME: Final = "nextgpu-worker"
_HOST_NAME: Final = "worker"
NAMESPACE_FLAGS: Final = {
    "user": syscalls.CLONE_NEWUSER,
    "mount": syscalls.CLONE_NEWNS,
    "pid": syscalls.CLONE_NEWPID,
    "network": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}
# Where the new root is put together; any directory that exists everywhere would do.
_STAGE: Final = "/tmp"  # noqa: S108  covered by a private tmpfs at once
_OLD_ROOT: Final = "/.host"
_ABOVE_ALL_TARGETS: Final = 8
_PAGE_BYTES: Final = resource.getpagesize()
_READ_ONLY: Final = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID


class ConfineError(Exception):
    """A layer could not be put in place: `layer` names it."""

    def __init__(self, layer: str, cause: OSError) -> None:
        self.layer = layer
        super().__init__(f"{layer}: {cause.strerror or cause}")


class _Layer:
    """Turns an OSError inside into a ConfineError that names the layer."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise ConfineError(self._name, error) from error


def namespace_flags(plan: Plan) -> int:
    """The clone flags of the plan's namespaces."""
    flags = 0
    for name in plan.namespaces:
        flags |= NAMESPACE_FLAGS[name]
    return flags


def confine(
    plan: Plan,
    *,
    spare_uid: int,
    socket_fd: int,
    launcher_pidfd: int,
    program: bytes | None = None,
) -> int:
    """Put this process under `plan`; the worker's socket, from then on its one descriptor.

    `program` is the plan's filter where it was assembled before, for the process id that this
    process has.  Raises ConfineError; the process must then end without running anything else.
    """
    inherited = _memory_in_use()
    limits = _resolved(dict(plan.rlimits))
    with _Layer("user-namespace"):
        _map_user(plan)
    with _Layer("session"):
        _leave_session()
    with _Layer("host-name"):
        _hide_host_name(plan)
    if plan.mounts:
        with _Layer("private-root"):
            _enter_private_root(plan.mounts, spare_uid if plan.drop_user else None)
    with _Layer("landlock"):
        ruleset = _landlock_ruleset(plan)
    with _Layer("capabilities"):
        _drop_privileges(plan, spare_uid)
    with _Layer("die-with-launcher"):
        _die_with_launcher(plan, launcher_pidfd)
    if plan.close_descriptors:
        with _Layer("descriptors"):
            socket_fd, ruleset = _keep_descriptors(socket_fd, ruleset)
    with _Layer("rlimits"):
        _limit(plan, limits, inherited)
    if ruleset is not None:
        with _Layer("landlock"):
            syscalls.landlock_restrict_self(ruleset)
            os.close(ruleset)
    if plan.clear_environment:
        os.environ.clear()
    if plan.seccomp:
        with _Layer("seccomp"):
            program = program or seccomp.assemble(plan.seccomp, self_pid=os.getpid())
            syscalls.install_seccomp_filter(program)
    return socket_fd


def _map_user(plan: Plan) -> None:
    if not plan.map_user:
        return
    # These files belong to root while the process is not dumpable.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    uid, gid = _outer_ids()
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


_ids_before_fork: tuple[int, int] = (os.getuid(), os.getgid())


def _outer_ids() -> tuple[int, int]:
    # Inside a new user namespace every id reads as 65534 until it is mapped.
    return _ids_before_fork


def _leave_session() -> None:
    """No terminal, a session and a name of its own; first in line when the host runs out of
    memory, last when its disk is busy.  (Processor time: the launcher, once it has said hello.)"""
    os.setsid()
    os.umask(0o077)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    _write("/proc/self/oom_score_adj", "1000")
    _write("/proc/self/comm", _PROCESS_NAME)
    syscalls.set_idle_io_priority()


def _hide_host_name(plan: Plan) -> None:
    if "uts" in plan.namespaces:
        # A service with ProtectHostname= may not; the filter forbids CPU workers to ask as well.
        with contextlib.suppress(PermissionError):
            syscalls.set_host_name(_HOST_NAME)


def _enter_private_root(mounts: Sequence[Mount], spare_uid: int | None) -> None:
    syscalls.mount("none", "/", "", syscalls.MS_PRIVATE | MS_REC)
    # Room for directory entries alone: nothing is ever stored in the root itself.
    options = "size=1m,nr_inodes=4096,mode=755"
    syscalls.mount("nextgpu-root", _STAGE, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.umask(0o022)
    os.mkdir(_STAGE + _OLD_ROOT)  # noqa: PTH102
    os.chdir(_STAGE)
    syscalls.pivot_root(".", "." + _OLD_ROOT)
    os.chdir("/")
    for mount in mounts:
        _mount(mount, spare_uid)
    syscalls.detach_mount(_OLD_ROOT)
    os.rmdir(_OLD_ROOT)  # noqa: PTH106
    root_flags = MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | MS_NOSUID | MS_NODEV
    syscalls.mount("none", "/", "", root_flags)
    os.umask(0o077)
    os.chdir(SCRATCH)


def _mount(mount: Mount, spare_uid: int | None) -> None:
    # By os alone, here and below: pathlib would touch a hundred pages more in every worker.
    target = mount.target
    if mount.kind in ("device", "file"):
        _make_directories(target.rpartition("/")[0])
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
    elif mount.kind in ("masked", "frozen"):
        if not os.path.exists(target):  # noqa: PTH110
            return  # this kernel does not have it
    else:
        _make_directories(target)
    match mount.kind:
        case "tree" | "file":
            _bind(mount, _READ_ONLY | syscalls.MOUNT_ATTR_NODEV)
        case "device":
            _bind(mount, _READ_ONLY | syscalls.MOUNT_ATTR_NOEXEC)
        case "scratch":
            owner = "" if spare_uid is None else f",uid={spare_uid},gid={spare_uid}"
            flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
            syscalls.mount("nextgpu-scratch", mount.target, "tmpfs", flags, mount.options + owner)
        case "proc":
            flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
            syscalls.mount("proc", mount.target, "proc", flags)
        case "masked":
            _mask(mount)
        case "frozen":
            syscalls.mount(mount.target, mount.target, "", MS_BIND | MS_REC)
            syscalls.set_mount_attributes(mount.target, _READ_ONLY)


def _make_directories(path: str) -> None:
    if path and not os.path.exists(path):  # noqa: PTH110
        _make_directories(path.rpartition("/")[0])
        os.mkdir(path)  # noqa: PTH102


def _bind(mount: Mount, attributes: int) -> None:
    syscalls.mount(_OLD_ROOT + mount.source, mount.target, "", MS_BIND | MS_REC)
    syscalls.set_mount_attributes(mount.target, attributes)


def _mask(mount: Mount) -> None:
    if mount.source:
        _bind(mount, _READ_ONLY | syscalls.MOUNT_ATTR_NOEXEC)
        return
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC | syscalls.MS_RDONLY
    syscalls.mount("nextgpu-mask", mount.target, "tmpfs", flags, "size=0,nr_inodes=1")


def _landlock_ruleset(plan: Plan) -> int | None:
    if not plan.landlock:
        return None
    # Made before the user changes: in tier C the new one may not reach the paths.
    return landlock.make_ruleset(plan.landlock, plan.landlock_abi)


def _drop_privileges(plan: Plan, spare_uid: int) -> None:
    if plan.drop_capabilities:
        syscalls.drop_bounding_set()
    if plan.drop_user:
        os.setgroups([])
        os.setresgid(spare_uid, spare_uid, spare_uid)
        os.setresuid(spare_uid, spare_uid, spare_uid)
    if plan.drop_capabilities:
        syscalls.clear_capabilities()
    # RLIMIT_CORE does not stop a piped core pattern (systemd-coredump); this does.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0 if plan.non_dumpable else 1)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def _die_with_launcher(plan: Plan, launcher_pidfd: int) -> None:
    if not plan.die_with_launcher:
        return
    # After the change of user, which clears it.
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    gone, _, _ = select.select([launcher_pidfd], [], [], 0)
    if gone:
        os._exit(0)


def _keep_descriptors(socket_fd: int, ruleset: int | None) -> tuple[int, int | None]:
    """0, 1 and 2 become /dev/null, the socket WORKER_FD, the ruleset the next; close the rest."""
    wanted = [os.open("/dev/null", os.O_RDWR), socket_fd]
    if ruleset is not None:
        wanted.append(ruleset)
    # First out of the way of the numbers that they are to have.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL_TARGETS) for fd in wanted]
    for target, fd in zip((0, WORKER_FD, WORKER_FD + 1), high, strict=False):
        os.dup2(fd, target, inheritable=False)
    os.dup2(0, 1)
    os.dup2(0, 2)
    os.closerange(WORKER_FD + len(wanted) - 1, 2**31 - 1)
    return WORKER_FD, None if ruleset is None else WORKER_FD + 1


def _resolved(limits: dict[str, int]) -> dict[str, int]:
    """With a count of this user's threads, while /proc can still be read."""
    extra = limits.pop(EXTRA_THREADS, None)
    if extra is not None:
        limits["RLIMIT_NPROC"] = _threads_of_user(os.getuid()) + extra
    return limits


def _threads_of_user(uid: int) -> int:
    threads = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if entry.stat().st_uid == uid:
                    threads += len(os.listdir(f"{entry.path}/task"))  # noqa: PTH208  names alone
    return threads


def _limit(plan: Plan, limits: dict[str, int], inherited: tuple[int, int]) -> None:
    address_space, data = inherited
    if not limits:
        return
    limits["RLIMIT_DATA"] = data + plan.extra_data_bytes
    if plan.extra_address_space_bytes:
        limits["RLIMIT_AS"] = address_space + plan.extra_address_space_bytes
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        number = _SIGPENDING if kind is None else kind
        resource.setrlimit(number, (value, value))


_SIGPENDING: Final = 11  # RLIMIT_SIGPENDING, which Python's resource module leaves out


def _memory_in_use() -> tuple[int, int]:
    """(address space, private writable memory) in bytes that the fork has inherited."""
    file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    pages = os.read(file, 256).split()
    os.close(file)
    return int(pages[0]) * _PAGE_BYTES, int(pages[5]) * _PAGE_BYTES


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)
