"""Every file that a session of processes writes, without privileges.

    WriteTrace(root)      inotify on everything below `root`: any process, any language, also files
                          that are gone again, and directories made on the way
    trace.environment()   home, temporary and working directories below `root`, and an audit hook
                          in every Python process that names what it opens anywhere else

Only what a confined worker writes is not seen: to its own tmpfs (docs/attacks.md).
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

# <sys/inotify.h>
_MODIFY, _MOVED_TO, _CREATE, _ISDIR = 0x2, 0x80, 0x100, 0x40000000
_OVERFLOW = 0x4000
_HEAD = struct.Struct("iIII")
# Kernel interfaces and devices, not files on a disk.
_NOT_STORAGE = ("/proc/", "/sys/", "/dev/null", "/dev/pts/", "/dev/tty", "/dev/nvidia")


class WriteTrace:
    """Use `with`; afterwards `written` has every path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: set[Path] = set()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._watched: dict[int, Path] = {}
        self._stop_reader, self._stop_writer = os.pipe()

    def environment(self) -> Mapping[str, str]:
        """For the session's processes."""
        for name in ("home", "tmp", "work"):
            (self.root / name).mkdir(mode=0o700)
        tracer = Path(__file__).parent / "write_tracer"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
        return inherited | {
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "PYTHONPATH": str(tracer),
            "NEXTGPU_WRITE_TRACE": str(self._report),
        }

    @property
    def _report(self) -> Path:
        return self.root.with_name(self.root.name + "-report")

    def __enter__(self) -> WriteTrace:
        self._descriptor = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        assert self._descriptor >= 0
        self._watch(self.root)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_writer, b"x")
        self._thread.join()
        for descriptor in (self._descriptor, self._stop_reader, self._stop_writer):
            os.close(descriptor)

    @property
    def written(self) -> set[Path]:
        """Absolute paths, those of the kernel's own interfaces left out."""
        opened = {Path(line.split("\t")[1]) for line in self._reported()}
        own = {self.root, self.root / "home", self.root / "tmp", self.root / "work", self._report}
        return {
            path
            for path in self._found | opened
            if path not in own and not str(path).startswith(_NOT_STORAGE)
        }

    def _reported(self) -> list[str]:
        return self._report.read_text().splitlines() if self._report.exists() else []

    def _watch(self, directory: Path) -> None:
        mask = _MODIFY | _MOVED_TO | _CREATE
        watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), mask)
        if watch < 0:
            return  # gone again: what was in it told its own makers
        self._watched[watch] = directory
        # Made before the watch was there.
        for entry in _entries(directory):
            self._found.add(entry)
            if entry.is_dir() and not entry.is_symlink():
                self._watch(entry)

    def _follow(self) -> None:
        while True:
            ready, _, _ = select.select([self._descriptor, self._stop_reader], [], [])
            if self._descriptor in ready:
                self._take(os.read(self._descriptor, 1 << 20))
            elif self._stop_reader in ready:
                return

    def _take(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            watch, mask, _, length = _HEAD.unpack_from(data, at)
            name = data[at + _HEAD.size : at + _HEAD.size + length].rstrip(b"\0")
            at += _HEAD.size + length
            assert not mask & _OVERFLOW, "the kernel dropped events: the trace is not complete"
            if watch in self._watched and name:
                path = self._watched[watch] / os.fsdecode(name)
                self._found.add(path)
                if mask & _ISDIR:
                    self._watch(path)


def _entries(directory: Path) -> Iterator[Path]:
    try:
        yield from directory.iterdir()
    except OSError:
        return
