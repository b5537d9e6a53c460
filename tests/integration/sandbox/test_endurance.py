"""Thousands of single-use workers, one after the other: nothing is left of any."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest
import trio

from nextgpu_node.sandbox import cgroups, wipe
from tests.support.sandbox import ATTACK_WORKER, SMALL, order, running_launcher

pytestmark = pytest.mark.sandbox

UNITS = 2000
# One in so many ends by itself, each in another way.
ENDINGS = ("segfault", "illegal_instruction", "exit_in_the_middle", "fill_disk", "int80")


def _state(zygote: int) -> dict[str, int]:
    """Everything that could pile up, counted."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    groups = list(Path("/sys/fs/cgroup").glob("**/nextgpu-*"))
    mine = [group for group in groups if cgroups.owner_name() in group.name]
    return {
        "own descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "launcher's descriptors": len(os.listdir(f"/proc/{zygote}/fd")),  # noqa: PTH208
        "launcher's children": len(psutil.Process(zygote).children(recursive=True)),
        "mounts": len(mounts),
        "workers' mounts": wipe.mounts_left(),
        "cgroups": len(mine),
    }


@pytest.mark.slow
async def test_thousands_of_units_leave_nothing(tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        await (await launcher.spawn(SMALL)).finish()
        assert launcher.zygote_pid is not None
        zygote, before = launcher.zygote_pid, _state(launcher.zygote_pid)
        rss_before = psutil.Process(zygote).memory_info().rss
        for number in range(UNITS):
            worker = await launcher.spawn(SMALL)
            if number % 50 == 0:
                await order(worker, ENDINGS[number // 50 % len(ENDINGS)], {})
                with trio.fail_after(60):
                    await worker.wait()
            assert (await worker.finish()).complete
        assert launcher.zygote_pid == zygote
        assert _state(zygote) == before
        grown = psutil.Process(zygote).memory_info().rss - rss_before
        assert grown < 8 * 1024 * 1024, grown


async def test_leftovers_of_another_boot_are_removed_and_nobody_is_killed_for_them(
    tmp_path: Path,
) -> None:
    """After a power loss the process id in the state file is anybody's."""
    with subprocess.Popen(["sleep", "60"]) as stranger:  # noqa: ASYNC220
        state = {
            "boot": "0" * 32,
            "zygote_pid": stranger.pid,
            "zygote_started": cgroups.start_ticks(stranger.pid),
        }
        (tmp_path / "sandbox").mkdir()
        (tmp_path / "sandbox" / "state.json").write_text(json.dumps(state))
        (tmp_path / "sandbox" / "half-written").write_text("")
        async with running_launcher(tmp_path):
            assert [f.name for f in (tmp_path / "sandbox").iterdir()] == ["state.json"]
            assert stranger.poll() is None
        stranger.kill()
