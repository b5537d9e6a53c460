"""What was spent is spent, once, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextgpu_node.core.tokens import IssuedToken, Reservation
from nextgpu_node.errors import StoreError
from nextgpu_node.store.token_ledger import TokenLedger

DAY_MS = 86_400_000
TOKEN = IssuedToken(b"t" * 32, 100, 2**30, ("program",), b"a" * 32, 5, DAY_MS)
ONE = Reservation(b"r" * 32, (TOKEN.token_id, b"b" * 32), 60_000)
TWO = Reservation(b"s" * 32, (TOKEN.token_id,), 1000)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[TokenLedger]:
    ledger = TokenLedger(tmp_path / "tokens.sqlite3")
    ledger.open(now_ms=0)
    ledger.add(TOKEN)
    yield ledger
    ledger.close()


def spent_after_restart(ledger: TokenLedger, *, now_ms: int = 0) -> dict[bytes, int]:
    ledger.close()
    return ledger.open(now_ms=now_ms).spent_ms


def test_tokens_and_accounts_come_back(ledger: TokenLedger) -> None:
    ledger.save(ONE)
    ledger.settle(ONE, 1234)
    ledger.save(TWO)
    ledger.settle(TWO, 7)
    ledger.close()
    book = ledger.open(now_ms=0)
    assert book.issued == {TOKEN.token_id: TOKEN}
    assert book.spent_ms == {TOKEN.token_id: 1241, b"b" * 32: 1234}


def test_a_reservation_settles_once(ledger: TokenLedger) -> None:
    ledger.save(ONE)
    for _ in range(3):
        ledger.settle(ONE, 500)
    ledger.settle(TWO, 500)  # never saved
    assert spent_after_restart(ledger)[TOKEN.token_id] == 500


def test_what_a_crash_left_open_is_spent_in_whole_and_only_once(ledger: TokenLedger) -> None:
    ledger.save(ONE)
    assert spent_after_restart(ledger)[TOKEN.token_id] == 60_000
    assert spent_after_restart(ledger)[TOKEN.token_id] == 60_000
    ledger.settle(ONE, 5)  # the unit's end, told late: it was counted at the start
    assert spent_after_restart(ledger)[TOKEN.token_id] == 60_000


def test_a_revocation_outlives_the_process(ledger: TokenLedger) -> None:
    ledger.revoke(TOKEN.token_id)
    ledger.close()
    assert ledger.open(now_ms=0).issued[TOKEN.token_id].revoked


def test_an_expired_token_is_forgotten_after_a_while_with_its_accounts(
    ledger: TokenLedger,
) -> None:
    ledger.save(ONE)
    ledger.settle(ONE, 5)
    ledger.close()
    assert ledger.open(now_ms=DAY_MS + 29 * DAY_MS).issued
    ledger.close()
    book = ledger.open(now_ms=DAY_MS + 31 * DAY_MS)
    assert not book.issued
    assert not book.spent_ms


CRASHING = """
import os, signal, sys
from pathlib import Path
from nextgpu_node.core.tokens import Reservation
from nextgpu_node.store.token_ledger import TokenLedger
ledger = TokenLedger(Path(sys.argv[1]))
ledger.open(now_ms=0)
for index in range(int(sys.argv[2])):
    one = Reservation(index.to_bytes(32), (b"t" * 32,), 1000)
    ledger.save(one)
    if index % 2:
        ledger.settle(one, 10)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_nothing_and_counts_nothing_twice(ledger: TokenLedger, tmp_path: Path) -> None:
    ledger.close()
    path = tmp_path / "tokens.sqlite3"
    done = subprocess.run([sys.executable, "-c", CRASHING, str(path), "9"], check=False)
    assert done.returncode == -signal.SIGKILL
    # 0, 2, 4, 6, 8 were left open: a whole second each; 1, 3, 5, 7 cost 10 ms each.
    assert spent_after_restart(ledger)[TOKEN.token_id] == 5 * 1000 + 4 * 10


def test_the_file_is_private_and_holds_no_more_than_ids_and_numbers(
    ledger: TokenLedger, tmp_path: Path
) -> None:
    assert (tmp_path / "tokens.sqlite3").stat().st_mode & 0o777 == 0o600
    old = os.umask(0)
    try:
        other = TokenLedger(tmp_path / "other")
        other.open(now_ms=0)
        other.close()
    finally:
        os.umask(old)
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o600


def test_a_second_process_is_told_instead_of_counting_beside(
    ledger: TokenLedger, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="locked"):
        TokenLedger(tmp_path / "tokens.sqlite3").open(now_ms=0)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + bytes(4000)])
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokens.sqlite3"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="move it away"):
        TokenLedger(path).open(now_ms=0)
    assert path.read_bytes() == content


def test_a_file_of_a_later_release_is_left_alone(ledger: TokenLedger, tmp_path: Path) -> None:
    ledger.close()
    import sqlite3

    with sqlite3.connect(tmp_path / "tokens.sqlite3") as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(StoreError, match="another release"):
        TokenLedger(tmp_path / "tokens.sqlite3").open(now_ms=0)


def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="closed"):
        TokenLedger(tmp_path / "x").save(ONE)
