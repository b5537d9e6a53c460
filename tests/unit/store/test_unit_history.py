"""What is remembered of units, and what is verifiably not."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nextgpu_node.errors import StoreError
from nextgpu_node.store.unit_history import DAY_MS, PastUnit, UnitHistory
from nextgpu_protocol.ids import peer_id_from_public_key
from nextgpu_protocol.messages import Metering

NOW_MS = 1_800_000_000_000
PEER = peer_id_from_public_key(bytes(range(32)))
OTHER = peer_id_from_public_key(bytes(range(1, 33)))
UNIT = PastUnit(
    unit_id=b"\x01" * 16,
    peer=PEER,
    kind="program",
    device="Test CPU",
    started_at_ms=NOW_MS - 1500,
    metering=Metering(1500, 900, 1 << 30, 2048, 1024),
    status="done",
    wiped=True,
    receipt=b"a signed receipt, as it was sent",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "units.sqlite3"


@pytest.fixture
def history(path: Path) -> Iterator[UnitHistory]:
    made = UnitHistory(path)
    made.open()
    yield made
    made.close()


def at(age_ms: int, peer: str = PEER) -> PastUnit:
    """A unit that ended so long before NOW."""
    return replace(UNIT, started_at_ms=UNIT.started_at_ms - age_ms, peer=peer)


def test_a_unit_comes_back_as_it_was_the_newest_first(history: UnitHistory, path: Path) -> None:
    history.add(at(5000))
    history.add(UNIT)
    assert history.newest(10) == [UNIT, at(5000)]
    assert history.newest(1) == [UNIT]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_there_after_a_restart(history: UnitHistory, path: Path) -> None:
    history.add(UNIT)
    history.close()
    again = UnitHistory(path)
    again.open()
    assert again.newest(10) == [UNIT]
    again.close()


@pytest.mark.parametrize("keep_days", [1, 7])
def test_units_are_forgotten_when_their_days_are_over(history: UnitHistory, keep_days: int) -> None:
    history.add(at(keep_days * DAY_MS + 1))
    history.add(at(keep_days * DAY_MS - 1))
    history.tidy(now_ms=NOW_MS, keep_days=keep_days)
    assert [unit.started_at_ms for unit in history.newest(10)] == [
        at(keep_days * DAY_MS - 1).started_at_ms
    ]
    # The clock moves on; the second one's time comes.
    history.tidy(now_ms=NOW_MS + 2, keep_days=keep_days)
    assert history.newest(10) == []


def test_after_a_day_a_peer_is_a_hash_that_still_tells_two_peers_apart(
    history: UnitHistory,
) -> None:
    for peer in (PEER, OTHER):
        for _ in range(2):
            history.add(at(DAY_MS - 1, peer))
    history.tidy(now_ms=NOW_MS, keep_days=7)
    assert {unit.peer for unit in history.newest(10)} == {PEER, OTHER}
    history.tidy(now_ms=NOW_MS + 2, keep_days=7)
    units = history.newest(10)
    assert all(unit.peer_is_hash for unit in units)
    assert len({unit.peer for unit in units}) == 2
    assert not {PEER, OTHER} & {unit.peer for unit in units}


def test_what_was_hashed_or_forgotten_is_nowhere_in_the_file(
    history: UnitHistory, path: Path
) -> None:
    """Without PRAGMA secure_delete the old bytes stand in free pages."""
    for number in range(200):
        history.add(at(DAY_MS + 1 + number))
        history.add(replace(at(0, OTHER), receipt=b"receipt of another" * 20))
    assert PEER.encode() in whole(path)
    history.tidy(now_ms=NOW_MS, keep_days=7)
    assert PEER.encode() not in whole(path)
    assert OTHER.encode() in whole(path)
    history.tidy(now_ms=NOW_MS + 30 * DAY_MS, keep_days=7)
    assert OTHER.encode() not in whole(path)
    assert b"receipt of another" not in whole(path)
    history.add(UNIT)
    history.clear()
    assert PEER.encode() not in whole(path)
    assert history.newest(10) == []


def whole(path: Path) -> bytes:
    """The file, and whatever SQLite keeps beside it."""
    return b"".join(found.read_bytes() for found in sorted(path.parent.iterdir()))


def test_a_cleared_history_hashes_anew(history: UnitHistory) -> None:
    names = []
    for _ in range(2):
        history.add(at(DAY_MS + 1))
        history.tidy(now_ms=NOW_MS, keep_days=7)
        names.append(history.newest(1)[0].peer)
        history.clear()
    assert names[0] != names[1]


def test_units_from_the_future_go_too(history: UnitHistory) -> None:
    history.add(at(-2 * DAY_MS))
    history.tidy(now_ms=NOW_MS, keep_days=7)
    assert history.newest(10) == []


def test_what_peers_used_lately_is_known_while_they_are(history: UnitHistory) -> None:
    history.add(at(DAY_MS - 10))
    history.add(at(10))
    history.add(at(DAY_MS + 10))
    used = history.used_since(NOW_MS - DAY_MS)
    assert used == [(PEER, NOW_MS - DAY_MS + 10, 1500), (PEER, NOW_MS - 10, 1500)]


@pytest.mark.parametrize(
    "damage", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 2000]
)
def test_a_damaged_file_is_begun_anew(path: Path, damage: bytes) -> None:
    path.write_bytes(damage)
    history = UnitHistory(path)
    history.open()
    history.add(UNIT)
    assert history.newest(10) == [UNIT]
    history.close()


def test_a_file_of_another_release_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    history = UnitHistory(path)
    with pytest.raises(StoreError, match="another release"):
        history.open()
    history.close()
    assert path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_without_a_place_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        UnitHistory(tmp_path / "none" / "units").open()
