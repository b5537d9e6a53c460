"""Each defence, taken away alone, lets at least one attack through.

Defences overlap, so each case first takes away all others that cover the same attack: what then
still blocks it is the defence in question.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nextgpu_node.sandbox.layout import read_layout
from nextgpu_node.sandbox.policy import Plan, plan_worker
from tests.support.sandbox import ATTACK_WORKER, SMALL, attacked_host, running_launcher, verdict

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the attacks use x86_64 system call numbers"
    ),
]

NO_FILTER: dict[str, Any] = {"seccomp": ()}
NO_LANDLOCK: dict[str, Any] = {"landlock": ()}
NO_ROOT: dict[str, Any] = {"mounts": ()}
NO_DROP: dict[str, Any] = {"drop_user": False}


def _without_namespace(plan: Plan, name: str) -> dict[str, Any]:
    return {"namespaces": tuple(kept for kept in plan.namespaces if kept != name)}


@dataclass(frozen=True)
class Case:
    defence: str
    attack: str
    others: dict[str, Any]  # overlapping defences, off in both halves
    removed: dict[str, Any] | str  # the defence itself; a text names a namespace


CASES = [
    Case("seccomp, processes", "fork_process", {}, NO_FILTER),
    Case("seccomp, vsock", "vsock", {}, NO_FILTER),
    Case("seccomp, descriptors out", "smuggle_descriptor_out", {}, NO_FILTER),
    Case("seccomp, namespaces", "call_unshare_user", {}, NO_FILTER),
    Case("seccomp, dumpable", "become_dumpable", {}, NO_FILTER),
    Case("seccomp, death signal", "outlive_launcher", {}, NO_FILTER),
    Case("seccomp, shared memory", "shared_anonymous_memory", {}, NO_FILTER),
    Case("seccomp, wake of others", "wake_over_a_shared_page", {}, NO_FILTER),
    Case("seccomp, shared pages", "map_file_shared", {}, NO_FILTER),
    Case("seccomp, daemon's process", "process_descriptor_of_daemon", {}, NO_FILTER),
    Case("seccomp, out of band", "second_stream_over_the_socket", {}, NO_FILTER),
    Case("seccomp, process name", "rename_own_process", {}, NO_FILTER),
    Case("seccomp, kernel release", "release_of_kernel", {}, NO_FILTER),
    Case("seccomp, page cache", "open_around_the_page_cache", {}, NO_FILTER),
    Case("uts namespace", "name_of_host", NO_FILTER, "uts"),
    Case("landlock", "list_root", {}, NO_LANDLOCK),
    Case("private root", "read_host_file", NO_LANDLOCK, NO_ROOT),
    Case("landlock without a root", "read_host_file", NO_ROOT, NO_LANDLOCK),
    Case("network namespace", "tcp_to_host", NO_FILTER | NO_LANDLOCK, "network"),
    Case("pid namespace", "see_daemon", NO_FILTER | NO_LANDLOCK, "pid"),
    Case("spare uid", "read_daemon_secret", NO_FILTER | NO_LANDLOCK | NO_ROOT, NO_DROP),
    Case(
        "no capabilities",
        "mount_something",
        NO_FILTER | NO_LANDLOCK | NO_DROP,
        {"drop_capabilities": False},
    ),
    Case("not dumpable", "be_dumpable", {}, {"non_dumpable": False}),
    Case("descriptors closed", "inherited_descriptors", {}, {"close_descriptors": False}),
    Case("empty environment", "environment", {}, {"clear_environment": False}),
    Case("thread limit", "thread_bomb", {}, {"rlimits": ()}),
    Case("descriptor limit", "descriptor_bomb", {}, {"rlimits": ()}),
    Case(
        "memory limit",
        "memory_bomb",
        {"cgroup_memory_bytes": 2**31},
        {"extra_data_bytes": 2**32, "extra_address_space_bytes": 2**33},
    ),
    Case("address space limit", "memory_bomb_by_protection", {}, {"rlimits": ()}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.defence)
async def test_attack_goes_through_without_the_defence(case: Case, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_worker(SMALL, read_layout()), **case.others)
    if "uid" in case.defence and not plan.drop_user:
        pytest.skip("only a root daemon changes the user")
    removed = case.removed
    if isinstance(removed, str):
        removed = _without_namespace(plan, removed)
    weak = dataclasses.replace(plan, **removed)
    # pytest's directories are closed to other users; what protects the secret is its own mode.
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(0o755)
    with attacked_host(tmp_path, filtered=bool(plan.seccomp)) as facts:
        async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
            with_defence = await launcher.spawn_planned(plan, wall_s=60)
            blocked = await verdict(with_defence, case.attack, facts)
            await with_defence.finish()
            without_defence = await launcher.spawn_planned(weak, wall_s=60)
            opened = await verdict(without_defence, case.attack, facts)
            await without_defence.finish()
    assert not blocked["open"], blocked["detail"]
    assert opened["open"], opened["detail"]


async def test_disk_fill_goes_through_without_a_size(tmp_path: Path) -> None:
    plan = plan_worker(SMALL, read_layout())
    mounts = tuple(dataclasses.replace(mount, options="") for mount in plan.mounts)
    limits = tuple(pair for pair in plan.rlimits if pair[0] != "RLIMIT_FSIZE")
    weak = dataclasses.replace(plan, mounts=mounts, rlimits=limits)
    with attacked_host(tmp_path) as facts:
        async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
            worker = await launcher.spawn_planned(weak, wall_s=60)
            for attack in ("disk_fill", "inode_fill"):
                assert (await verdict(worker, attack, facts))["open"]
            await worker.finish()
