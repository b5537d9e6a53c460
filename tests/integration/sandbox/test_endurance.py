"""Thousands of single-use workers, one after the other: nothing is left of any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import trio

from nextgpu_node.errors import SandboxError
from nextgpu_node.sandbox import cgroups, wipe
from tests.support.sandbox import ATTACK_WORKER, SMALL, order, running_launcher

pytestmark = pytest.mark.sandbox

REPOSITORY = Path(__file__).parents[3]
UNITS = int(os.environ.get("NEXTGPU_TEST_UNITS", "2000"))
NAMESPACES = 12
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


_IN_OWN_USER_NAMESPACE = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.integration.sandbox.test_endurance import spend_namespaces
import trio
from pathlib import Path
trio.run(spend_namespaces, Path(sys.argv[1]))
"""


async def spend_namespaces(directory: Path) -> None:
    """Many more units than the kernel allows namespaces at a time (user_namespaces(7), max_…)."""

    def allow(count: int) -> None:
        for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
            Path(f"/proc/sys/user/max_{kind}_namespaces").write_text(str(count))

    async with running_launcher(directory) as launcher:
        allow(NAMESPACES)
        for _ in range(3 * NAMESPACES):
            assert (await (await launcher.spawn(SMALL)).finish()).complete
        # That the kernel counts here at all:
        worker = await launcher.spawn(SMALL)
        allow(1)
        with pytest.raises(SandboxError, match="No space left on device"):
            await launcher.spawn(SMALL)
        await worker.finish()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can map several users into a namespace")
def test_no_namespace_is_left(tmp_path: Path) -> None:
    command = ["unshare", "--user", "sh", "-c", 'read go; exec "$0" "$@"']
    with subprocess.Popen(
        [*command, sys.executable, "-c", _IN_OWN_USER_NAMESPACE, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as daemon:
        own = os.stat("/proc/self/ns/user").st_ino  # noqa: PTH116
        while os.stat(f"/proc/{daemon.pid}/ns/user").st_ino == own:  # noqa: PTH116
            time.sleep(0.01)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{daemon.pid}/{name}").write_text("0 0 65536")
        said, _ = daemon.communicate("go\n", timeout=120)
    assert daemon.returncode == 0, said


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the launcher's descriptors are shown to root alone")
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
