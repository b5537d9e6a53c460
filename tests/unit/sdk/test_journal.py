"""The journal of a job, cut and changed at every byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nextgpu_node.core.job_state import (
    Checkpointed,
    JobBegan,
    JobEnded,
    JobEvent,
    PeerFailed,
    ShardEntered,
    ShardFailed,
    ShardKept,
    ShardRetracted,
    replay,
)
from nextgpu_node.errors import JobStoreError
from nextgpu_node.sdk.journal import JournalFollower, JournalWriter, read_journal

EVENTS: list[JobEvent] = [
    JobBegan(at_ms=1, pid=7),
    ShardEntered(at_ms=2, shard=0, status="running", peer_id="a"),
    PeerFailed(at_ms=3, shard=0, peer_id="a", why="lost “it”\n"),
    Checkpointed(at_ms=4, shard=0, steps=3),
    ShardKept(at_ms=5, shard=0, peer_id="b", digest="00", seconds=0.5),
    ShardRetracted(at_ms=6, shard=0),
    ShardFailed(at_ms=7, shard=0, why="no"),
    JobEnded(at_ms=8, status="failed", why="1 of 1"),
]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    with JournalWriter(path) as writer:
        for event in EVENTS:
            writer.append(event)
        writer.sync()
    return path


def test_what_was_appended_is_read(journal: Path) -> None:
    assert read_journal(journal).events == EVENTS
    assert journal.stat().st_mode & 0o777 == 0o600


def test_cut_at_every_byte_it_keeps_every_whole_line_and_goes_on(journal: Path) -> None:
    data = journal.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    more = JobBegan(at_ms=99, pid=8)
    for length in range(len(data) + 1):
        journal.write_bytes(data[:length])
        whole = sum(end <= length for end in ends)
        assert read_journal(journal).events == EVENTS[:whole]
        with JournalWriter(journal) as writer:
            writer.append(more)
        assert read_journal(journal).events == [*EVENTS[:whole], more]
        assert read_journal(journal).damaged_bytes == 0


def test_a_changed_byte_ends_what_is_believed_there(journal: Path) -> None:
    data = journal.read_bytes()
    for index in range(len(data)):
        journal.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        line = data[:index].count(b"\n")
        assert read_journal(journal).events == EVENTS[:line]


def test_a_line_that_is_missing_or_moved_is_noticed(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert read_journal(journal).events == EVENTS[:2]
    journal.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert read_journal(journal).events == EVENTS[:1]


def test_a_follower_gets_each_event_once_and_waits_for_whole_lines(journal: Path) -> None:
    data = journal.read_bytes()
    follower = JournalFollower(journal)
    got: list[JobEvent] = []
    for length in range(0, len(data) + 1, 7):
        journal.write_bytes(data[:length])
        got += follower.poll()
    journal.write_bytes(data)
    got += follower.poll()
    assert got == EVENTS
    assert list(JournalFollower(journal.with_name("none")).poll()) == []


def append_many(writer: JournalWriter, event: JobEvent) -> None:
    for _ in range(100):
        writer.append(event)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_no_piece_of_a_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)], check=True)
    try:
        with JournalWriter(disk / "journal") as writer:
            event = ShardFailed(at_ms=1, shard=0, why="x" * 1000)
            with pytest.raises(JobStoreError, match=r"disk is full|No space left"):
                append_many(writer, event)
            reading = read_journal(disk / "journal")
        assert len(reading.events) >= 3
        assert set(reading.events) == {event}
        assert reading.damaged_bytes == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_killed_while_it_writes_it_can_be_opened(tmp_path: Path) -> None:
    """A real process, a real SIGKILL: whatever is there is a prefix of what was appended."""
    path = tmp_path / "journal"
    code = (
        "import sys, pathlib\n"
        "from nextgpu_node.core.job_state import JobBegan\n"
        "from nextgpu_node.sdk.journal import JournalWriter\n"
        "with JournalWriter(pathlib.Path(sys.argv[1])) as writer:\n"
        "    for n in range(10**9):\n"
        "        writer.append(JobBegan(at_ms=n, pid=1))\n"
        "        if n == 500: print('going', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as out:
        out.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    with JournalWriter(path) as writer:
        writer.append(JobBegan(at_ms=0, pid=2))
    events = read_journal(path).events
    assert len(events) > 500
    assert [event.at_ms for event in events[:-1]] == list(range(len(events) - 1))


def test_a_second_start_tries_again_what_failed_and_keeps_what_is_done() -> None:
    state = replay(
        [
            JobBegan(at_ms=1, pid=1),
            ShardKept(at_ms=2, shard=0, peer_id="a", digest="00"),
            ShardFailed(at_ms=3, shard=1, why="no"),
            ShardEntered(at_ms=3, shard=2, status="running"),
            JobEnded(at_ms=4, status="failed", why="1 of 3"),
        ],
        3,
    )
    assert state.status == "failed"
    state.apply(JobBegan(at_ms=5, pid=2))
    assert [shard.status for shard in state.shards] == ["done", "queued", "queued"]
    assert state.status == "running"  # some of it is done


@pytest.mark.parametrize("status", ["queued", "transferring", "starting", "running", "returning"])
def test_a_job_is_where_its_furthest_shard_is(status: str) -> None:
    events: list[JobEvent] = [
        JobBegan(at_ms=1, pid=1),
        ShardEntered(at_ms=2, shard=1, status=status),
    ]
    assert replay(events, 2).status == status


def test_events_about_shards_that_a_job_does_not_have_change_nothing() -> None:
    assert replay([ShardFailed(at_ms=1, shard=5, why="?")], 2).status == "queued"
