"""The runtime directory as the place where processes of one home meet: who answers, who waits.

locked(runtime directory)   a daemon takes its sockets' names, data are deleted: one at a time
answers(socket)             whether a process listens there
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def answers(path: Path) -> bool:
    """Whether a process listens: a full backlog (EAGAIN, unix(7)) is a live one too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; it is only ever held for moments."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
