"""nextgpud that leaks on purpose: what a line on its leak socket says, it keeps where that says.

memory TEXT | file TEXT | unlinked TEXT | shm TEXT | sysv TEXT | child TEXT
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from nextgpu_node.daemon.main import main

SOCKET = "leak.sock"
SHARED = Path("/dev/shm")
_kept: list[object] = []
_libc = ctypes.CDLL(None, use_errno=True)


def leak_socket(home: Path) -> Path:
    return home / SOCKET


def _in_memory(text: bytes, _home: Path) -> None:
    _kept.append(bytearray(text))


def _in_a_file(text: bytes, home: Path) -> None:
    (home / "state" / "notes").write_bytes(text)


def _in_an_unlinked_file(text: bytes, _home: Path) -> None:
    file = tempfile.TemporaryFile()  # noqa: SIM115  open as long as this process
    # Not as it is: so that it is not found in this process's memory alone.
    file.write(text.hex().encode())
    file.flush()
    _kept.append(file)


def _in_shared_memory(text: bytes, _home: Path) -> None:
    (SHARED / f"leak-{os.getpid()}").write_bytes(text)


def _in_a_sysv_segment(text: bytes, _home: Path) -> None:
    segment = _libc.shmget(0, len(text), 0o1600)  # IPC_CREAT | 0600
    _libc.shmat.restype = ctypes.c_void_p
    address = _libc.shmat(segment, None, 0)
    ctypes.memmove(address, text, len(text))
    _libc.shmctl(segment, 0, None)  # IPC_RMID: gone with this process


def _in_a_child(text: bytes, _home: Path) -> None:
    code = "import sys; kept = sys.stdin.buffer.readline(); sys.stdin.buffer.read()"
    child = subprocess.Popen([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.write(text + b"\n")
    child.stdin.flush()
    _kept.append(child)


_LEAKS: dict[str, Callable[[bytes, Path], None]] = {
    "memory": _in_memory,
    "file": _in_a_file,
    "unlinked": _in_an_unlinked_file,
    "shm": _in_shared_memory,
    "sysv": _in_a_sysv_segment,
    "child": _in_a_child,
}


def _serve(home: Path) -> None:
    home.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(leak_socket(home)))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                way, _, text = connection.recv(4096).partition(b" ")
                _LEAKS[way.decode()](text, home)
                connection.sendall(b"done")


def leak(home: Path, way: str, text: bytes) -> None:
    """Tell the daemon of that home to leak `text`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.fspath(leak_socket(home)))
        connection.sendall(way.encode() + b" " + text)
        assert connection.recv(16) == b"done"


if __name__ == "__main__":
    place = Path(sys.argv[sys.argv.index("--home") + 1])
    threading.Thread(target=_serve, args=(place,), daemon=True).start()
    sys.exit(main())
