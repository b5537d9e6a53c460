"""The zygote: holds torch imported and nothing secret, forks one confined worker per request.

    python -I -m nextgpu_node.sandbox.zygote --worker-module M --control-fd N

It has one thread (a fork copies only the calling one), an empty environment, no descriptor but
its control socket, and never reads from a worker's socket: unit bytes do not pass through it.
It ends when the daemon does, and its workers end with it.

With --single it is the main process of one instance of systemd's nextgpu-worker@.service (tier B):
its control socket is a connection that systemd has accepted, and it ends with its first worker.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before any module that registers one is imported.  They renew locks, which no other
    # thread holds here, and random generators, which `_reseed` does: a sixth of a worker's birth.
    os.register_at_fork = lambda **hooks: None

import argparse
import ctypes
import dataclasses
import errno
import gc
import importlib
import platform
import random
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn

from nextgpu_node.sandbox import control, image, seccomp, syscalls
from nextgpu_node.sandbox.confine import WORKER_FD, ConfineError, confine, namespace_flags
from nextgpu_node.sandbox.layout import read_layout
from nextgpu_node.sandbox.policy import Plan, decode_plan
from nextgpu_node.sandbox.surroundings import read_surroundings
from nextgpu_node.sandbox.zygote_process import TASK_MODULES
from nextgpu_protocol.framing import FrameKind, encode_frame

# A worker that could not be confined says why in an ERROR frame and ends with this code.
EXIT_UNCONFINED: Final = 70
_EXIT_RAISED: Final = 1
# The worker's scratch is full, or a file at its limit: as worker.unit.WorkerExitCode.OVER_LIMIT.
EXIT_OVER_LIMIT: Final = 13
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_M_ARENA_MAX: Final = -8
_WORKER_ARENAS: Final = 2
_HUGE_PAGE_BYTES: Final = 2 * 1024 * 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="nextgpu_node.sandbox.zygote")
    parser.add_argument("--worker-module", required=True)
    parser.add_argument("--control-fd", required=True, type=int)
    parser.add_argument("--single", action="store_true")
    options = parser.parse_args(argv)
    channel = socket.socket(fileno=options.control_fd)
    channel.set_inheritable(False)
    _harden(channel)
    try:
        module, runtime = _load(options.worker_module)
    except Exception as exc:  # whatever a module's import may raise: the daemon is told
        _tell(channel, {"failed": f"{options.worker_module} can not be loaded: {exc!r:.300}"})
        sys.exit(1)
    surroundings = dataclasses.asdict(read_surroundings()) if options.single else None
    layout = dataclasses.asdict(read_layout())
    _tell(channel, {"ready": runtime, "layout": layout, "surroundings": surroundings})
    Zygote(channel, module, single=options.single).serve()


def _harden(channel: socket.socket) -> None:
    """Not readable by others of the same user, gone when the daemon is gone."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(channel, select.POLLHUP)
    if poll.poll(0):
        sys.exit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Interrupts from a terminal are the daemon's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _WORKER_ARENAS)
    image.prepare()


def _load(name: str) -> tuple[ModuleType, str]:
    module = importlib.import_module(name)
    runtime: str = module.preload()
    # The first call imports and allocates (numpy.random: 15 ms); let that be here, once.
    _reseed(module)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"preload() left {threads} threads running; a fork needs one")
    # A worker may not ask for these any more, and shall not find the host's answers cached.
    told = platform.uname()._replace(node="worker", release="", version="")
    platform._uname_cache = told  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()
    if not image.share_memory():
        _collapse_heap()
    return module, runtime


def _collapse_heap() -> None:
    """Put private memory on huge pages: a fork copies page tables, and this makes them small.

    Measured with torch imported: 6.2 ms a fork before, 2.1 ms after.  Only an optimisation, from
    Linux 6.1 on; the kernel's refusal changes nothing.  Source: madvise(2)
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        private = fields[1] == "rw-p" and (len(fields) == 5 or fields[5] == "[heap]")
        if not private:
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        first, last = -(-start // _HUGE_PAGE_BYTES), end // _HUGE_PAGE_BYTES
        if last > first:
            syscalls.collapse_pages(first * _HUGE_PAGE_BYTES, (last - first) * _HUGE_PAGE_BYTES)


def _tell(channel: socket.socket, head: control.Head, fds: Sequence[int] = ()) -> None:
    channel.sendmsg([control.pack(head)], control.pack_descriptors(fds))


@dataclass(slots=True)
class _Child:
    spawn_id: int
    pid: int
    started: float  # time.monotonic seconds


class Zygote:
    """Answers spawn requests and reaps.  `serve` returns when the daemon closes its end."""

    def __init__(self, channel: socket.socket, module: ModuleType, *, single: bool = False) -> None:
        self._channel = channel
        self._module = module
        self._single = single
        self._children: dict[int, _Child] = {}  # by pidfd
        self._poll = select.poll()
        self._own_pidfd = os.pidfd_open(os.getpid())

    def serve(self) -> None:
        self._poll.register(self._channel, select.POLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd != self._channel.fileno():
                    self._reap(fd)
                    if self._single:
                        return
                elif not self._answer():
                    return

    def _answer(self) -> bool:
        packet, ancillary, _, _ = self._channel.recvmsg(
            control.MAX_PACKET_BYTES, control.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        if not packet:
            return False
        head, tail = control.unpack(packet)
        fds = control.unpack_descriptors(ancillary)
        if "kill" in head:
            self._kill(head["kill"])
            return True
        try:
            self._spawn(head, *_decoded_plan(tail), fds)
        except OSError as exc:
            _tell(self._channel, {"refused": head["spawn"], "error": _why_no_fork(exc)})
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _kill(self, spawn_id: int) -> None:
        for pidfd, child in self._children.items():
            if child.spawn_id == spawn_id:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _spawn(
        self, head: control.Head, plan: Plan, program: bytes | None, fds: Sequence[int]
    ) -> None:
        socket_fd, *cgroup_fds = fds
        into_cgroup = cgroup_fds[0] if cgroup_fds else None
        started = time.monotonic()
        pid, pidfd = syscalls.fork_with_namespaces(namespace_flags(plan), into_cgroup)
        if pid == 0:
            if head.get("task"):
                self._module = importlib.import_module(TASK_MODULES[head["task"]])
            self._become_worker(plan, program, head["spare_uid"], socket_fd)
        self._children[pidfd] = _Child(head["spawn"], pid, started)
        self._poll.register(pidfd, select.POLLIN)
        _tell(self._channel, {"spawned": head["spawn"], "pid": pid}, [pidfd])

    def _become_worker(
        self, plan: Plan, program: bytes | None, spare_uid: int, socket_fd: int
    ) -> NoReturn:
        """In the child: confine, serve one unit, end.  Never returns into the zygote's loop."""
        code = _EXIT_RAISED
        try:
            # The descriptor is closed with all others; the object must not close it again.
            self._channel.detach()
            code = _run_worker(
                self._module,
                plan,
                program,
                spare_uid=spare_uid,
                socket_fd=socket_fd,
                launcher_pidfd=self._own_pidfd,
            )
        except OSError as exc:
            code = EXIT_OVER_LIMIT if exc.errno in _NO_ROOM else _EXIT_RAISED
        finally:
            os._exit(code)

    def _reap(self, pidfd: int) -> None:
        child = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        _, status, usage = os.wait4(child.pid, 0)
        os.close(pidfd)
        head: dict[str, Any] = {
            "exited": child.spawn_id,
            "status": status,
            "wall_s": time.monotonic() - child.started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_bytes": usage.ru_maxrss * 1024,
        }
        _tell(self._channel, head)


@lru_cache(maxsize=8)
def _decoded_plan(data: bytes) -> tuple[Plan, bytes | None]:
    """The plan, and its filter, assembled before the fork where the worker's id is known."""
    plan = decode_plan(data)
    known = plan.seccomp and "pid" in plan.namespaces
    return plan, seccomp.assemble(plan.seccomp, self_pid=1) if known else None


def _run_worker(
    module: ModuleType,
    plan: Plan,
    program: bytes | None,
    *,
    spare_uid: int,
    socket_fd: int,
    launcher_pidfd: int,
) -> int:
    try:
        worker_fd = confine(
            plan,
            spare_uid=spare_uid,
            socket_fd=socket_fd,
            launcher_pidfd=launcher_pidfd,
            program=program,
        )
    except ConfineError as exc:
        _report(socket_fd, exc)
        return EXIT_UNCONFINED
    # Every child has inherited the same generator states.
    _reseed(module)
    with socket.socket(fileno=worker_fd) as sock:
        # What the worker has to say of its end beyond that is sealed to the submitter.
        return int(module.serve(sock, dict(plan.limits)) or 0)


def _reseed(module: ModuleType) -> None:
    random.seed(os.urandom(32))
    reseed = getattr(module, "reseed", None)
    if reseed is not None:
        reseed()


def _report(socket_fd: int, exc: ConfineError) -> None:
    frame = encode_frame(FrameKind.ERROR, str(exc).encode())
    try:
        os.write(socket_fd, frame)
    except OSError:
        # The step that closes all other descriptors was already done.
        os.write(WORKER_FD, frame)


def _why_no_fork(exc: OSError) -> str:
    return f"namespaces: {exc.strerror or exc}"


if __name__ == "__main__":
    main()
