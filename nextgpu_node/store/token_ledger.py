"""The tokens that this node has issued and what was spent of them, in SQLite.

    token        id, what it allows, when, revoked      the text of a token is never here
    spent        block, its token, milliseconds
    reservation  one row while a unit runs; what is left over from a crash is spent in whole

Every method is one transaction that is on the disk when it returns (synchronous=FULL); they
block, so the daemon calls them in a thread.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nextgpu_node.core.tokens import IssuedToken, Reservation, TokenBook
from nextgpu_node.errors import StoreError

_VERSION = 1
_HASH_BYTES = 32
_SCHEMA = """
CREATE TABLE token (
    token_id BLOB PRIMARY KEY, gpu_seconds INTEGER NOT NULL, memory_bytes INTEGER NOT NULL,
    kinds TEXT NOT NULL, audience BLOB NOT NULL, issued_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL, revoked INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE spent (
    block BLOB PRIMARY KEY, token_id BLOB NOT NULL, spent_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE reservation (
    reservation_id BLOB PRIMARY KEY, blocks BLOB NOT NULL, reserved_ms INTEGER NOT NULL
) WITHOUT ROWID;
"""
# Kept a while longer, so that the owner still sees what became of a token.
_KEPT_AFTER_EXPIRY_MS = 30 * 86_400_000


class TokenLedger:
    """The file at `path`.  `open` before anything else; one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def open(self, *, now_ms: int) -> TokenBook:
        """The accounts as they stand.  Reservations of a run that crashed are spent in whole.

        Raises StoreError where the file is damaged, in use, or of another version.
        """
        with self._errors():
            # Made here, so that it never has a wider mode, whatever the umask.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False, timeout=2
            )
            # One writer, and no shared-memory file: locks are kept until the process ends.
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA synchronous=FULL")
            with self._transaction() as database:
                self._prepare(database, now_ms)
            return self._read()

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def add(self, token: IssuedToken) -> None:
        """A token that was just issued."""
        row = (token.token_id, token.gpu_seconds, token.memory_bytes, " ".join(token.kinds),
               token.audience, token.issued_at_ms, token.expires_at_ms, token.revoked)  # fmt: skip
        with self._errors(), self._transaction() as database:
            database.execute("INSERT INTO token VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def revoke(self, token_id: bytes) -> None:
        with self._errors(), self._transaction() as database:
            database.execute("UPDATE token SET revoked = 1 WHERE token_id = ?", (token_id,))

    def save(self, reservation: Reservation) -> None:
        """Before its unit starts."""
        row = (
            reservation.reservation_id,
            b"".join(reservation.blocks),
            reservation.reserved_ms,
        )
        with self._errors(), self._transaction() as database:
            database.execute("INSERT INTO reservation VALUES (?, ?, ?)", row)

    def settle(self, reservation: Reservation, charged_ms: int) -> None:
        """After its unit has ended.  Once: where there is no such reservation, nothing happens."""
        with self._errors(), self._transaction() as database:
            _settle(database, reservation.reservation_id, charged_ms)

    # --- inside -----------------------------------------------------------------------------

    def _prepare(self, database: sqlite3.Connection, now_ms: int) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise StoreError(f"{self._path}: was written by another release (format {version}).")
        left_over = database.execute("SELECT reservation_id, reserved_ms FROM reservation")
        for reservation_id, reserved_ms in left_over.fetchall():
            _settle(database, reservation_id, reserved_ms)
        gone_ms = now_ms - _KEPT_AFTER_EXPIRY_MS
        database.execute(
            "DELETE FROM spent WHERE token_id IN"
            " (SELECT token_id FROM token WHERE expires_at_ms < ?)",
            (gone_ms,),
        )
        database.execute("DELETE FROM token WHERE expires_at_ms < ?", (gone_ms,))

    def _read(self) -> TokenBook:
        database = self._open_database()
        tokens = [
            IssuedToken(token_id, gpu_s, memory, tuple(kinds.split()), audience, issued, expires,
                        bool(revoked))
            for token_id, gpu_s, memory, kinds, audience, issued, expires, revoked
            in database.execute("SELECT * FROM token")
        ]  # fmt: skip
        rows = database.execute("SELECT block, token_id, spent_ms FROM spent")
        book = TokenBook()
        book.load(tokens, {block: (token_id, spent) for block, token_id, spent in rows})
        return book

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            database = self._open_database()
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    def _open_database(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreError("The record of tokens is closed.")
        return self._database

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(
                f"{self._path}: the record of tokens can not be used ({exc}). Restore it from a "
                "backup, or move it away: every token issued so far is refused then."
            ) from exc


def _settle(database: sqlite3.Connection, reservation_id: bytes, charged_ms: int) -> None:
    key = (reservation_id,)
    query = "SELECT blocks FROM reservation WHERE reservation_id = ?"
    row = database.execute(query, key).fetchone()
    if row is None:
        return
    database.execute("DELETE FROM reservation WHERE reservation_id = ?", key)
    blocks = [row[0][at : at + _HASH_BYTES] for at in range(0, len(row[0]), _HASH_BYTES)]
    for block in blocks:
        database.execute(
            "INSERT INTO spent VALUES (?, ?, ?)"
            " ON CONFLICT(block) DO UPDATE SET spent_ms = spent_ms + excluded.spent_ms",
            (block, blocks[0], charged_ms),
        )
