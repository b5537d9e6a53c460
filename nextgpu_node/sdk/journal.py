"""An append-only journal of one job, which survives a kill -9 at any byte.

    crc32 of everything up to and with this line's text, 8 hex digits ‖ " " ‖ JSON ‖ "\\n"

Each line is one write(2), and its checksum is chained to the line before: a torn, lost or changed
line ends what is believed.  A writer cuts the file there and goes on; a reader passes it over.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from nextgpu_node.core.job_state import JobEvent
from nextgpu_node.errors import JobStoreError

_DECODER: Final[msgspec.json.Decoder[JobEvent]] = msgspec.json.Decoder(JobEvent)
_HEAD_BYTES: Final = 9
_MAX_LINE_BYTES: Final = 64 * 1024
_SEED: Final = zlib.crc32(b"nextgpu job journal 1\n")


@dataclass(frozen=True, slots=True)
class Reading:
    """`events` are those before the first byte that can not be believed, at `valid_bytes`."""

    events: list[JobEvent]
    valid_bytes: int
    checksum: int
    damaged_bytes: int


def read_journal(path: Path) -> Reading:
    """Everything that is believed.  Raises JobStoreError where the file can not be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as exc:
        raise JobStoreError(f"{path}: can not be read: {exc.strerror}.") from exc
    return _parse(data, _SEED)


def _parse(data: bytes, checksum: int) -> Reading:
    events: list[JobEvent] = []
    valid_bytes = 0
    while (end := data.find(b"\n", valid_bytes)) >= 0:
        line = data[valid_bytes:end]
        event = _event_of(line, checksum)
        if event is None:
            break
        checksum = zlib.crc32(line[_HEAD_BYTES:], checksum)
        events.append(event)
        valid_bytes = end + 1
    return Reading(events, valid_bytes, checksum, len(data) - valid_bytes)


def _event_of(line: bytes, checksum: int) -> JobEvent | None:
    text = line[_HEAD_BYTES:]
    if line[:_HEAD_BYTES] != _head(text, checksum):
        return None
    try:
        return _DECODER.decode(text)
    except msgspec.DecodeError:
        return None


def _head(text: bytes, checksum: int) -> bytes:
    return b"%08x " % zlib.crc32(text, checksum)


class JournalWriter:
    """The one writer of a journal; the job's lock keeps it alone.  Close it, or use `with`.

    `append` reaches the kernel, and so survives the death of this process; `sync` reaches the
    disk, and so survives a power cut.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> JournalWriter:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> list[JobEvent]:
        """Open or create it, cut off what can not be believed; the events so far."""
        reading = read_journal(self._path)
        try:
            self._descriptor = os.open(
                self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            os.ftruncate(self._descriptor, reading.valid_bytes)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as exc:
            raise JobStoreError(f"{self._path}: can not be written: {exc.strerror}.") from exc
        self._checksum, self._length = reading.checksum, reading.valid_bytes
        return reading.events

    def append(self, event: JobEvent) -> None:
        """Add one event, whole or not at all.  Raises JobStoreError, such as for a full disk."""
        text = msgspec.json.encode(event)
        line = _head(text, self._checksum) + text + b"\n"
        assert len(line) <= _MAX_LINE_BYTES
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                self._cut_back()
                raise JobStoreError(f"{self._path}: the disk is full. Free some space and retry.")
        except OSError as exc:
            self._cut_back()
            raise JobStoreError(f"{self._path}: can not be written: {exc.strerror}.") from exc
        self._checksum = zlib.crc32(text, self._checksum)
        self._length += len(line)

    def sync(self) -> None:
        """Everything so far is on the disk when this returns; it blocks for milliseconds."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as exc:
            raise JobStoreError(f"{self._path}: can not be written: {exc.strerror}.") from exc

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _cut_back(self) -> None:
        """A piece of a line would hide every later one."""
        os.ftruncate(self._descriptor, self._length)
        os.lseek(self._descriptor, 0, os.SEEK_END)


class JournalFollower:
    """Reads on where it stopped: `poll` gives the events that are new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._checksum = _SEED

    def poll(self) -> Iterator[JobEvent]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                reading = _parse(file.read(), self._checksum)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise JobStoreError(f"{self._path}: can not be read: {exc.strerror}.") from exc
        self._offset += reading.valid_bytes
        self._checksum = reading.checksum
        yield from reading.events
