"""Put on PYTHONPATH by tests/support/written_files.py: each process tells what it opens to write.

Python's audit events (PEP 578) name every path that Python code opens, makes, renames or binds,
wherever it is.  What C libraries write is seen by inotify instead.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_report = os.open(
    os.environ["NEXTGPU_WRITE_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
)


def _paths(event: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if event == "open":
        path, mode, flags = args
        writes = (isinstance(flags, int) and flags & _WRITING) or any(
            c in (mode or "") for c in "wax+"
        )
        return (path,) if writes else ()
    if event in ("os.mkdir", "os.truncate", "sqlite3.connect"):
        return args[:1]
    if event in ("os.rename", "os.link", "os.symlink"):
        return args[1:2]
    if event == "socket.bind":
        return args[1:2]
    return ()


def _hook(event: str, args: tuple[Any, ...]) -> None:
    for path in _paths(event, args):
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        # Relative ones are below the working directory or an open one: inotify watches both.
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if text.startswith("/"):
            try:
                os.write(_report, f"{sys.argv[:1]}\t{text}\n".encode())
            except OSError:
                return


sys.addaudithook(_hook)
