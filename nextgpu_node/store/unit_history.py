"""What ran here, for the owner of this machine: times, sizes, outcomes, receipts; never content.

    unit    one row for each unit that got a receipt
    salt    random bytes; with them a peer's ID is hashed after a day

Rows go after `keep_days`, and their bytes in the file with them: PRAGMA secure_delete clears freed
cells and pages, and VACUUM writes what is left anew, since pages that were split hold copies of
rows in between.  What a file system or a disk keeps of its old blocks is beyond that.  The rollback
journal is kept in memory: on disk it would hold what was just deleted.  A crash can therefore
damage the file; a damaged one is deleted and begun anew: it is a record, and nothing rests on it.

Methods block: the daemon calls them in a thread.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from nextgpu_node.errors import StoreError
from nextgpu_protocol.ids import PeerId
from nextgpu_protocol.messages import Metering

log = structlog.get_logger()

DAY_MS: Final = 86_400_000
_VERSION: Final = 1
_SALT_BYTES: Final = 32
_HASH_CHARS: Final = 32
# About 40 MB; the oldest go first.
_MAX_ROWS: Final = 50_000
_SCHEMA: Final = (
    """CREATE TABLE unit (
        finished_at_ms INTEGER NOT NULL, started_at_ms INTEGER NOT NULL, unit_id BLOB NOT NULL,
        peer TEXT NOT NULL, peer_is_hash INTEGER NOT NULL, kind TEXT NOT NULL,
        device TEXT NOT NULL, wall_ms INTEGER NOT NULL, cpu_ms INTEGER NOT NULL,
        peak_memory_bytes INTEGER NOT NULL, input_bytes INTEGER NOT NULL,
        output_bytes INTEGER NOT NULL, status TEXT NOT NULL, wiped INTEGER NOT NULL,
        receipt BLOB NOT NULL
    )""",
    "CREATE INDEX unit_by_time ON unit (finished_at_ms)",
    "CREATE TABLE salt (salt BLOB NOT NULL)",
)
_INSERT: Final = "INSERT INTO unit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_COLUMNS: Final = (
    "unit_id, peer, kind, device, started_at_ms, wall_ms, cpu_ms, peak_memory_bytes, input_bytes,"
    " output_bytes, status, wiped, receipt, peer_is_hash"
)


@dataclass(frozen=True, slots=True)
class PastUnit:
    """A unit that ended here.  `peer` is a peer ID, or a hash of one where `peer_is_hash`.

    `metering` is the receipt's own; `receipt` is the signed message as the submitter got it.
    """

    unit_id: bytes
    peer: str
    kind: str
    device: str
    started_at_ms: int
    metering: Metering
    status: str
    wiped: bool
    receipt: bytes
    peer_is_hash: bool = False

    @property
    def finished_at_ms(self) -> int:
        return self.started_at_ms + self.metering.wall_ms


class UnitHistory:
    """The file at `path`.  `open` before anything else; one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def open(self) -> None:
        """Raises StoreError where there is no place for it.  A damaged file is begun anew."""
        try:
            self._open()
        except sqlite3.DatabaseError:
            log.warning("history.damaged")
            self.close()
            with self._errors():
                self._path.unlink(missing_ok=True)
                self._open()

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def add(self, unit: PastUnit) -> None:
        """One more unit."""
        metering = unit.metering
        row = (
            unit.finished_at_ms, unit.started_at_ms, unit.unit_id, unit.peer, unit.peer_is_hash,
            unit.kind, unit.device, metering.wall_ms, metering.cpu_ms, metering.peak_memory_bytes,
            metering.input_bytes, metering.output_bytes, unit.status, unit.wiped, unit.receipt,
        )  # fmt: skip
        with self._transaction() as database:
            database.execute(_INSERT, row)

    def newest(self, limit: int) -> list[PastUnit]:
        """Up to `limit` units, the last one first."""
        query = f"SELECT {_COLUMNS} FROM unit ORDER BY finished_at_ms DESC LIMIT ?"  # noqa: S608
        with self._transaction() as database:
            return [_unit(row) for row in database.execute(query, (limit,))]

    def used_since(self, since_ms: int) -> list[tuple[PeerId, int, int]]:
        """(peer, when it ended, device milliseconds) of units whose peer is still known."""
        query = "SELECT peer, finished_at_ms, wall_ms FROM unit WHERE finished_at_ms > ?"
        with self._transaction() as database:
            rows = database.execute(query + " AND NOT peer_is_hash ORDER BY 2", (since_ms,))
            return [(PeerId(peer), at_ms, wall_ms) for peer, at_ms, wall_ms in rows]

    def tidy(self, *, now_ms: int, keep_days: int) -> None:
        """Forget what is too old, and who sent what is older than a day.

        Rows from the future, of a clock that was wrong, are too old too.
        """
        before = self._connected().total_changes
        self._forget(now_ms, keep_days)
        if self._connected().total_changes != before:
            self._rewrite()

    def _forget(self, now_ms: int, keep_days: int) -> None:
        with self._transaction() as database:
            database.execute(
                "DELETE FROM unit WHERE finished_at_ms < ? OR finished_at_ms > ?",
                (now_ms - keep_days * DAY_MS, now_ms + DAY_MS),
            )
            database.execute(
                "DELETE FROM unit WHERE rowid <= (SELECT max(rowid) FROM unit) - ?", (_MAX_ROWS,)
            )
            old = database.execute(
                "SELECT DISTINCT peer FROM unit WHERE finished_at_ms < ? AND NOT peer_is_hash",
                (now_ms - DAY_MS,),
            ).fetchall()
            salt = _salt(database) if old else b""
            for (peer,) in old:
                database.execute(
                    "UPDATE unit SET peer = ?, peer_is_hash = 1"
                    " WHERE peer = ? AND finished_at_ms < ? AND NOT peer_is_hash",
                    (hashed(peer, salt), peer, now_ms - DAY_MS),
                )

    def clear(self) -> None:
        """Forget everything, the salt too: later hashes compare with none from before."""
        with self._transaction() as database:
            database.execute("DELETE FROM unit")
            database.execute("DELETE FROM salt")
        self._rewrite()

    # --- inside -----------------------------------------------------------------------------

    def _open(self) -> None:
        with self._file_errors():
            # Made here, so that it never has a wider mode, whatever the umask.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._database = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=2
        )
        self._database.execute("PRAGMA secure_delete=ON")
        self._database.execute("PRAGMA journal_mode=MEMORY")
        self._database.execute("PRAGMA temp_store=MEMORY")
        self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._database.execute("PRAGMA synchronous=NORMAL")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise StoreError(f"{self._path}: was written by another release (format {version}).")
        if version == 0:
            with self._transaction() as database:
                for statement in _SCHEMA:
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_VERSION}")
        elif self._database.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")

    def _rewrite(self) -> None:
        with self._errors(), self._lock:
            self._connected().execute("VACUUM")

    def _connected(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreError("The history is closed.")
        return self._database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            database = self._connected()
            with self._errors():
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    database.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        database.execute("ROLLBACK")
                    raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StoreError(
                f"{self._path}: the history can not be used ({exc}). "
                "Clear it: nextgpu history --clear"
            ) from exc

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StoreError(f"{self._path}: can not be made: {exc.strerror}.") from exc


def hashed(peer: str, salt: bytes) -> str:
    """A peer's name in this record and in no other."""
    return hashlib.blake2b(peer.encode(), key=salt, digest_size=_HASH_CHARS // 2).hexdigest()


def _salt(database: sqlite3.Connection) -> bytes:
    row = database.execute("SELECT salt FROM salt").fetchone()
    if row is not None:
        return bytes(row[0])
    salt = os.urandom(_SALT_BYTES)
    database.execute("INSERT INTO salt VALUES (?)", (salt,))
    return salt


def _unit(row: tuple[Any, ...]) -> PastUnit:
    unit_id, peer, kind, device, started_at_ms, *used, status, wiped, receipt, is_hash = row
    wall_ms, cpu_ms, peak_memory_bytes, input_bytes, output_bytes = used
    metering = Metering(wall_ms, cpu_ms, peak_memory_bytes, input_bytes, output_bytes)
    return PastUnit(
        unit_id, peer, kind, device, started_at_ms, metering, status, bool(wiped), receipt,
        bool(is_hash),
    )  # fmt: skip
