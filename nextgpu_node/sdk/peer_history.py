"""What this submitter remembers of peers: counts and a rate, never what ran there.

One small JSON file of ours, 0600: at most MAX_PEERS peers, the longest unseen forgotten first;
counts halve each week.  `submit.remember_peers = false` keeps nothing, and the file may be deleted
at any time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from nextgpu_node.clock import now_ms
from nextgpu_node.core.choice import PeerRecord
from nextgpu_node.errors import ConfigError
from nextgpu_node.paths import ensure_private_dir

MAX_PEERS: Final = 512
_MAX_FILE_BYTES: Final = 1024 * 1024
_DAY_MS: Final = 86_400_000
_HALF_LIFE_DAYS: Final = 7.0
_WEIGHT_OF_NEWEST: Final = 0.3


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Times are whole days: when within a day somebody worked is nobody's business."""

    day: int
    done: float = 0.0
    lost: float = 0.0
    bytes_per_s: float = 0.0
    distrusted: bool = False


class _File(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    peers: dict[str, _Entry] = {}


class PeerHistory:
    """Reads and writes the file at `path`; with None nothing is kept.

    A file that can not be read counts as empty: this is advice, no job may fail over it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def records(self) -> dict[str, PeerRecord]:
        """By peer id, faded to today."""
        today = _today()
        return {peer_id: _faded(entry, today) for peer_id, entry in self._load().peers.items()}

    def add(self, seen: Mapping[str, PeerRecord]) -> None:
        """What happened with each peer since the last time: its counts are added up."""
        if self._path is None or not seen:
            return
        try:
            ensure_private_dir(self._path.parent)
            with _locked(self._path):
                peers = dict(self._load().peers)
                today = _today()
                for peer_id, record in seen.items():
                    old = _faded(peers.pop(peer_id, _Entry(day=today)), today)
                    peers[peer_id] = _entry(together(old, record), today)
                self._save(_bounded(peers))
        except (OSError, ConfigError):
            return

    def forget(self) -> None:
        """Delete everything that is remembered."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path.with_suffix(".lock").unlink(missing_ok=True)

    def _load(self) -> _File:
        if self._path is None:
            return _File()
        try:
            with self._path.open("rb") as file:
                return msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=_File)
        except (OSError, msgspec.DecodeError):
            return _File()

    def _save(self, peers: dict[str, _Entry]) -> None:
        assert self._path is not None
        part = self._path.with_suffix(".part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(_File(peers=peers)))
        part.replace(self._path)


def _bounded(peers: dict[str, _Entry]) -> dict[str, _Entry]:
    """The order of the file is that of use: the first was not seen for the longest."""
    return dict(list(peers.items())[-MAX_PEERS:])


def _faded(entry: _Entry, today: int) -> PeerRecord:
    share = 0.5 ** (max(0, today - entry.day) / _HALF_LIFE_DAYS)
    return PeerRecord(entry.done * share, entry.lost * share, entry.bytes_per_s, entry.distrusted)


def together(old: PeerRecord, new: PeerRecord) -> PeerRecord:
    """Counts added; of the rates the newer one counts for a third."""
    return PeerRecord(
        done=old.done + new.done,
        lost=old.lost + new.lost,
        bytes_per_s=_mixed(old.bytes_per_s, new.bytes_per_s),
        distrusted=old.distrusted or new.distrusted,
    )


def _entry(record: PeerRecord, day: int) -> _Entry:
    return _Entry(
        day=day,
        done=round(record.done, 3),
        lost=round(record.lost, 3),
        bytes_per_s=round(record.bytes_per_s),
        distrusted=record.distrusted,
    )


def _mixed(old: float, new: float) -> float:
    if not (old and new):
        return old or new
    return old + _WEIGHT_OF_NEWEST * (new - old)


def _today() -> int:
    return now_ms() // _DAY_MS


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Several jobs of one user write here."""
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
