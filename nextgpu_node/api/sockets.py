"""Listening unix sockets that only their owner can open, one daemon for each.

    runtime directory 0700 ── api.sock 0600, units.sock 0600

A socket file outlives the process that made it.  So before one is replaced it is asked whether
anybody still answers, and asking, removing and binding happen under one lock on the directory:
of two daemons that start together exactly one gets the name.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from nextgpu_node.errors import NextGPUError
from nextgpu_node.paths import check_socket_path, ensure_private_dir
from nextgpu_node.runtime_dir import answers, locked

SOCKET_MODE = 0o600
_BACKLOG = 64


class AlreadyRunning(NextGPUError):
    """Another nextgpud already serves this home directory."""

    exit_code = 2


def listen_private(path: Path) -> socket.socket:
    """A listening stream socket at `path`, mode 0600, non-blocking; the caller closes it.

    Raises AlreadyRunning where a process answers there, ConfigError where the directory is not
    private or the path is too long, NextGPUError where something else has the name.
    """
    check_socket_path(path)
    ensure_private_dir(path.parent)
    with locked(path.parent):
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # The file that bind() makes takes its mode from the socket's own inode (Linux,
            # net/unix/af_unix.c), so there is no moment at which it is open to others.
            os.fchmod(listener.fileno(), SOCKET_MODE)
            listener.bind(os.fspath(path))
            listener.listen(_BACKLOG)
        except OSError as exc:
            listener.close()
            raise NextGPUError(f"{path}: can not listen here: {exc.strerror}.") from exc
    return listener


def remove_listening(path: Path, listener: socket.socket) -> None:
    """Close `listener` and remove its file, unless another process has the name by now."""
    with locked(path.parent):
        listener.close()
        # Nobody of ours answers any more: whoever does is a daemon that came after.
        if _is_socket(path) and not answers(path):
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not _is_socket(path):
        raise NextGPUError(f"{path}: is in the way and is not a socket. Move it away.")
    if answers(path):
        raise AlreadyRunning(
            "Another nextgpud already serves this home directory. "
            "Stop it first, or give this one another --home."
        )
    path.unlink(missing_ok=True)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False
