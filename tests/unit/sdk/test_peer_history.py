"""What is remembered of peers: little, bounded, private, and easy to be rid of."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from nextgpu_node.core.choice import PeerRecord
from nextgpu_node.sdk import peer_history
from nextgpu_node.sdk.peer_history import MAX_PEERS, PeerHistory

ONE = {"a": PeerRecord(done=1)}


def history(tmp_path: Path) -> PeerHistory:
    return PeerHistory(tmp_path / "state" / "peer-history.json")


def test_counts_add_up_and_are_there_for_the_next_job(tmp_path: Path) -> None:
    first = history(tmp_path)
    for _ in range(3):
        first.add({"a": PeerRecord(done=1, bytes_per_s=10e6)})
    first.add({"a": PeerRecord(lost=1), "b": PeerRecord(distrusted=True)})
    records = history(tmp_path).records()
    assert records["a"] == PeerRecord(3, 1, 10e6)
    assert records["b"].distrusted
    (file,) = (tmp_path / "state").glob("*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_counts_halve_each_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history(tmp_path).add(ONE)
    today = peer_history._today()
    monkeypatch.setattr(peer_history, "_today", lambda: today + 7)
    assert history(tmp_path).records()["a"].done == pytest.approx(0.5)


def test_the_longest_unseen_peer_is_forgotten_first(tmp_path: Path) -> None:
    one = history(tmp_path)
    one.add({f"p{index}": PeerRecord(done=1) for index in range(MAX_PEERS)})
    one.add({"p0": PeerRecord(done=1)})
    one.add({"newcomer": PeerRecord(done=1)})
    records = one.records()
    assert len(records) == MAX_PEERS
    assert {"p0", "newcomer"} <= records.keys()
    assert "p1" not in records


def test_off_keeps_nothing_and_forget_leaves_nothing(tmp_path: Path) -> None:
    off = PeerHistory(None)
    off.add(ONE)
    assert off.records() == {}
    on = history(tmp_path)
    on.add(ONE)
    on.forget()
    assert on.records() == {}
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"peers": 3}', b"\xff" * 100])
def test_a_damaged_file_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "peer-history.json").write_bytes(content)
    one = history(tmp_path)
    assert one.records() == {}
    one.add(ONE)
    assert one.records()["a"].done == 1
