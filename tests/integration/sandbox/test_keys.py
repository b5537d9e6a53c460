"""The one-time key: born in the worker, another one each time, and in nobody else's memory."""

from __future__ import annotations

# ruff: noqa: ASYNC220  the scanner is a process of its own, and nothing else runs
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from nextgpu_node.sandbox.policy import MIB, Tier, WorkerPolicy
from tests.support.host_kinds import REPOSITORY
from tests.support.sandbox import SMALL, running_launcher

pytestmark = pytest.mark.sandbox

# Another process: what scans must not hold the key in the memory that it scans.
_SCAN = """
import json, sys
from pathlib import Path
from nextgpu_node.privacy.marks import Found
from nextgpu_node.privacy.places import search_memory
worker, *others = map(int, sys.argv[1:])
secret = Path(f"/proc/{worker}/root/tmp/secret").read_bytes()
class Secret:
    def search(self, data):
        return Found(data.count(secret))
def counts(*pids):
    looks = [search_memory("", pid, Secret()) for pid in pids]
    assert not any(look.unsearched for look in looks), looks
    return json.dumps([look.found.count for look in looks])
print(counts(worker, *others))
sys.stdout.flush()
sys.stdin.readline()
print(counts(*others))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root")
async def test_the_secret_key_is_in_the_worker_alone_and_gone_with_it(tmp_path: Path) -> None:
    async with running_launcher(tmp_path, "tests.support.key_worker") as launcher:
        worker = await launcher.spawn(SMALL)
        pids = [str(pid) for pid in (worker.pid, os.getpid(), launcher.zygote_pid)]
        with subprocess.Popen(
            [sys.executable, "-c", _SCAN, *pids],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as scanner:
            assert scanner.stdin is not None
            assert scanner.stdout is not None
            in_worker, in_daemon, in_launcher = json.loads(
                await trio.to_thread.run_sync(scanner.stdout.readline)
            )
            # The search finds it where it is.
            assert in_worker > 0
            assert (in_daemon, in_launcher) == (0, 0)
            await worker.finish()
            scanner.stdin.write("again\n")
            scanner.stdin.flush()
            after = json.loads(await trio.to_thread.run_sync(scanner.stdout.readline))
            assert after == [0, 0]


@pytest.mark.parametrize("tier", ["A", "C"])
async def test_no_two_workers_share_a_key(tier: Tier, tmp_path: Path) -> None:
    """In tier A every worker is process 1 of its namespace: no generator may go by that."""
    policy = WorkerPolicy(memory_bytes=512 * MIB, max_threads=2, wall_s=60)
    module = "nextgpu_node.worker.main"
    async with running_launcher(tmp_path, module, tier=tier) as launcher:
        workers = [await launcher.spawn(policy) for _ in range(8)]
        assert len({worker.public_key for worker in workers}) == len(workers)
        for worker in workers:
            await worker.finish()
