"""cgroups on a directory tree that looks like the kernel's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nextgpu_node.sandbox import cgroups, surroundings
from nextgpu_node.sandbox.cgroups import Hierarchy

OWN = {"": "/system.slice/nextgpud.service"}


@pytest.fixture
def delegated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    group = tmp_path / OWN[""].lstrip("/")
    group.mkdir(parents=True)
    (group / "cgroup.controllers").write_text("cpu memory pids\n")
    (group / "cgroup.procs").write_text("41\n42\n")
    monkeypatch.setattr(cgroups.os, "getxattr", _mark(b"1"))
    return group


def _mark(value: bytes) -> Callable[[Path, str], bytes]:
    def getxattr(path: Path, name: str) -> bytes:
        if name == "user.delegate":
            return value
        raise OSError

    return getxattr


def test_delegated_subtree_is_found(delegated: Path, tmp_path: Path) -> None:
    hierarchy = cgroups._find_v2(OWN, tmp_path)
    assert hierarchy is not None
    assert hierarchy.version == 2


def test_group_without_the_mark_is_left_alone(
    delegated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups.os, "getxattr", _mark(b"0"))
    assert cgroups._find_v2(OWN, tmp_path) is None


def test_group_without_the_memory_controller_is_no_use(delegated: Path, tmp_path: Path) -> None:
    (delegated / "cgroup.controllers").write_text("cpu pids\n")
    assert cgroups._find_v2(OWN, tmp_path) is None


def test_daemon_that_already_moved_to_its_leaf_finds_the_parent(
    delegated: Path, tmp_path: Path
) -> None:
    found = cgroups._find_v2({"": OWN[""] + "/nextgpu-daemon"}, tmp_path)
    assert found is not None
    assert found._parent == delegated


def test_claim_moves_the_daemon_and_hands_out_controllers(delegated: Path) -> None:
    Hierarchy(2, delegated).claim()
    assert (delegated / "nextgpu-daemon" / "cgroup.procs").read_text() == "42"
    assert (delegated / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_claim_takes_no_controller_that_was_not_delegated(delegated: Path) -> None:
    (delegated / "cgroup.controllers").write_text("memory pids\n")
    Hierarchy(2, delegated).claim()
    assert (delegated / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_group_of_a_worker_has_its_limits(delegated: Path) -> None:
    group = Hierarchy(2, delegated).create("w1", memory_bytes=1000, pids=5, cpus=2)
    assert (group.directory / "memory.max").read_text() == "1000"
    assert (group.directory / "memory.swap.max").read_text() == "0"
    assert (group.directory / "pids.max").read_text() == "5"
    assert (group.directory / "cpu.max").read_text() == "200000 100000"
    assert group.layer == "cgroup-v2"
    assert group.swap_forbidden()


def test_v1_group_limits_memory(tmp_path: Path) -> None:
    group = Hierarchy(1, tmp_path).create("w1", memory_bytes=1000, pids=5, cpus=2)
    assert (group.directory / "memory.limit_in_bytes").read_text() == "1000"
    assert not group.swap_forbidden()


@pytest.mark.parametrize(("count", "expected"), [(0, False), (2, True)])
def test_kill_by_the_memory_limit_is_seen(count: int, expected: bool, tmp_path: Path) -> None:
    group = Hierarchy(2, tmp_path).create("w1", memory_bytes=1000, pids=5, cpus=2)
    (group.directory / "memory.events").write_text(f"low 0\noom 3\noom_kill {count}\n")
    assert group.out_of_memory() is expected


async def test_remove_takes_the_directory_away(tmp_path: Path) -> None:
    group = cgroups.Group(2, tmp_path / "nextgpu-w1")
    group.directory.mkdir()
    assert await group.remove()
    assert not group.directory.exists()


def test_leftovers_are_those_of_dead_daemons(tmp_path: Path) -> None:
    alive = cgroups.owner_name()
    reused = alive.partition(".")[0] + ".1"  # the same process id, another process
    for name in (f"{alive}-x-1", f"{reused}-x-1", "4194304.7-x-2", "daemon"):
        (tmp_path / f"nextgpu-{name}").mkdir()
    (tmp_path / "other").mkdir()
    found = {group.directory.name for group in Hierarchy(2, tmp_path).leftovers()}
    assert found == {f"nextgpu-{reused}-x-1", "nextgpu-4194304.7-x-2"}


def test_own_groups_are_read_per_controller() -> None:
    text = "4:memory:/a\n2:cpu,cpuacct:/b\n0::/c\n"
    assert surroundings._own_groups(text) == {
        "memory": "/a",
        "cpu": "/b",
        "cpuacct": "/b",
        "": "/c",
    }
