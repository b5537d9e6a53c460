"""The worker module of the probe: tries a few ways out of the sandbox and says which are open.

HELLO (32 zero bytes), then DATA: the names of the open ways, one a line
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nextgpu_protocol.framing import FrameKind, encode_frame


def preload() -> str:
    return "probe"


def serve(sock: socket.socket, limits: dict[str, int | str]) -> None:
    sock.sendall(encode_frame(FrameKind.HELLO, bytes(32)))
    found = [name for name, attempt in _WAYS_OUT.items() if _is_open(attempt)]
    sock.sendall(encode_frame(FrameKind.DATA, "\n".join(found).encode()))


def _is_open(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _signal_others() -> None:
    # Signal 0 tests the permission alone.
    os.kill(-1, 0)


def _environment() -> None:
    if not os.environ:
        raise FileNotFoundError


def _send_descriptor() -> None:
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"x"], [0])


_WAYS_OUT: Final[dict[str, Callable[[], object]]] = {
    "host files": lambda: Path("/etc/passwd").read_bytes(),
    "processes": lambda: os.listdir("/proc/1"),  # noqa: PTH208  only the call matters
    "network": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
    "local sockets": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close(),
    "new processes": _fork,
    "other programs": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606  refused
    "signals": _signal_others,
    "writing outside": lambda: Path("/nextgpu-probe").touch(),
    "own user": lambda: os.setuid(0),
    "descriptors": _send_descriptor,
    "environment": _environment,
}
