"""Births, deaths and what is left behind: nothing."""

from __future__ import annotations

# ruff: noqa: PTH208, ASYNC110, ASYNC220, ASYNC240  short looks at /proc, nothing else runs
import dataclasses
import errno
import os
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from nextgpu_node.errors import SandboxError
from nextgpu_node.sandbox import cgroups, wipe
from nextgpu_node.sandbox.launcher import Launcher
from nextgpu_node.sandbox.layout import read_layout
from nextgpu_node.sandbox.policy import MIB, Tier, plan_worker
from nextgpu_protocol.framing import FrameKind, encode_frame
from tests.support.sandbox import (
    ATTACK_WORKER,
    SMALL,
    TORCH_WORKER,
    attacked_host,
    order,
    read_frame,
    running_launcher,
    verdict,
)
from tests.support.torch_worker import OPERATIONS

pytestmark = pytest.mark.sandbox

REPOSITORY = Path(__file__).parents[3]


def _open_descriptors() -> set[str]:
    # The descriptor of the listing itself is among the names, so compare what they point to.
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:
            continue
    return found


def _descriptors_of(zygote: int) -> int | None:
    """How many it has open; None where that is root's to see, since it is not dumpable."""
    return len(os.listdir(f"/proc/{zygote}/fd")) if os.geteuid() == 0 else None


def _is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _until_gone(*pids: int) -> None:
    with trio.fail_after(10):
        while any(_is_alive(pid) for pid in pids):
            await trio.sleep(0.01)


async def test_worker_says_hello_and_echoes(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(SMALL)
        assert launcher.runtime == "echo 1.0"
        assert len(worker.public_key) == 32
        await worker.stream.send_all(encode_frame(FrameKind.DATA, b"abc"))
        assert await read_frame(worker.stream) == (FrameKind.DATA, b"abc")
        await worker.stream.send_all(encode_frame(FrameKind.END))
        exit_ = await worker.wait()
        report = await worker.finish()
    assert (exit_.reason, exit_.code, exit_.signal) == ("exited", 0, None)
    assert exit_.peak_rss_bytes > MIB
    assert report.complete
    assert report.tree_killed
    assert report.scratch_gone


async def test_a_worker_comes_after_the_owners_programs(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(SMALL)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(own + 5, 19)
        assert Path(f"/proc/{worker.pid}/comm").read_text() == "nextgpu-worker\n"
        await worker.finish()


@pytest.mark.skipif(os.geteuid() != 0, reason="a worker's memory is shown to root alone")
async def test_an_idle_worker_maps_little_of_what_the_launcher_holds(tmp_path: Path) -> None:
    """Half of everything would be a worker's share, were it not for image.py: 70 MB and more."""
    async with running_launcher(tmp_path, TORCH_WORKER) as launcher:
        worker = await launcher.spawn(dataclasses.replace(SMALL, memory_bytes=1024 * MIB))
        rows = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
        pss_kib = next(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
        await worker.finish()
    if platform.machine() == "x86_64":
        assert pss_kib < 25_000


async def test_finish_is_idempotent_and_safe_from_two_tasks(tmp_path: Path) -> None:
    reports = []

    async def finish(worker: Any) -> None:
        reports.append(await worker.finish())

    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(SMALL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish, worker)
            nursery.start_soon(finish, worker)
        assert await worker.finish() is reports[0] is reports[1]


async def test_finish_completes_in_a_cancelled_task(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(SMALL)
        with trio.CancelScope() as scope:
            scope.cancel()
            await worker.finish()
        assert not _is_alive(worker.pid)


async def test_fifty_units_leave_nothing(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        await (await launcher.spawn(SMALL)).finish()
        before = _open_descriptors(), wipe.mounts_left(), len(os.listdir(tmp_path / "sandbox"))
        assert launcher.zygote_pid is not None
        zygote_before = _descriptors_of(launcher.zygote_pid)
        for _ in range(50):
            worker = await launcher.spawn(SMALL)
            assert (await worker.finish()).complete
        after = _open_descriptors(), wipe.mounts_left(), len(os.listdir(tmp_path / "sandbox"))
        assert before == after
        assert _descriptors_of(launcher.zygote_pid) == zygote_before
        children = Path(f"/proc/{launcher.zygote_pid}/task/{launcher.zygote_pid}/children")
        assert children.read_text() == ""


async def test_dead_zygote_takes_its_workers_and_is_replaced(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(SMALL)
        first = launcher.zygote_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with trio.fail_after(10):
            assert (await worker.wait()).reason == "lost"
            assert not _is_alive(worker.pid)
            again = await launcher.spawn(SMALL)
        assert launcher.zygote_pid != first
        await again.finish()
        assert (await worker.finish()).tree_killed


async def test_worker_survives_its_launcher_without_the_death_signal(tmp_path: Path) -> None:
    """The counterpart: it is the death signal that ends workers, not their socket's end."""
    plan = dataclasses.replace(plan_worker(SMALL, read_layout()), die_with_launcher=False)
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        worker = await launcher.spawn_planned(plan, wall_s=60)
        await order(worker, "sleep", {})
        assert launcher.zygote_pid is not None
        pidfd = os.pidfd_open(worker.pid)
        # Hold the launcher's own clean-up back: it would kill the worker itself.
        worker._slot.pidfd, held = None, worker._slot.pidfd
        os.kill(launcher.zygote_pid, signal.SIGKILL)
        await _until_gone(launcher.zygote_pid)
        with trio.move_on_after(0.3):
            await trio.lowlevel.wait_readable(pidfd)
            pytest.fail("the worker has ended")
        worker._slot.pidfd = held
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        await worker.finish()


async def test_killed_worker_is_reported(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(SMALL)
        os.kill(worker.pid, signal.SIGKILL)
        with trio.fail_after(5):
            exit_ = await worker.wait()
        assert (exit_.reason, exit_.signal) == ("signalled", signal.SIGKILL)
        assert (await worker.finish()).complete


@pytest.mark.parametrize("cancel_after_s", [0.0, 0.001, 0.003, 0.006, 0.010])
async def test_cancelled_spawn_leaves_no_worker(cancel_after_s: float, tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        with trio.move_on_after(cancel_after_s):
            worker = await launcher.spawn(SMALL)
            await worker.finish()
        assert not launcher._slots
        children = Path(f"/proc/{launcher.zygote_pid}/task/{launcher.zygote_pid}/children")
        assert children.read_text() == ""


async def test_cancelled_launcher_ends_all_its_processes(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        workers = [await launcher.spawn(SMALL) for _ in range(3)]
        pids = [worker.pid for worker in workers]
        zygote = launcher.zygote_pid
    assert zygote is not None
    assert not any(_is_alive(pid) for pid in [*pids, zygote])
    assert os.listdir(tmp_path / "sandbox") == []
    assert [(await worker.wait()).reason for worker in workers] == ["killed"] * 3


_DAEMON = """
import sys, trio
from pathlib import Path
from tests.support.sandbox import SMALL, running_launcher
async def main():
    async with running_launcher(Path(sys.argv[1])) as launcher:
        workers = [await launcher.spawn(SMALL) for _ in range(2)]
        print(launcher.zygote_pid, *(worker.pid for worker in workers), file=sys.stderr, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


async def test_killed_daemon_leaves_no_process_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _DAEMON, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as daemon:
        assert daemon.stderr is not None
        line = await trio.to_thread.run_sync(daemon.stderr.readline)
        pids = [int(word) for word in line.split()]
        assert len(pids) == 3
        daemon.kill()
        await trio.to_thread.run_sync(daemon.wait)
    await _until_gone(*pids)
    assert (tmp_path / "sandbox" / "state.json").exists()
    (tmp_path / "sandbox" / "stray").write_text("left by an earlier version")
    async with running_launcher(tmp_path) as launcher:
        assert os.listdir(tmp_path / "sandbox") == ["state.json"]
        if launcher._hierarchy is not None:
            assert list(launcher._hierarchy.leftovers()) == []


_FIRST_PROCESS = """
import os, signal, sys, trio
from pathlib import Path
from tests.support.sandbox import SMALL, running_launcher
async def main():
    assert os.getpid() == 1
    async with running_launcher(Path(sys.argv[1])) as launcher:
        worker = await launcher.spawn(SMALL)
        os.kill(launcher.zygote_pid, signal.SIGKILL)
        await worker.wait()
        report = await worker.finish()
        assert report.tree_killed and report.complete, report
        assert (await (await launcher.spawn(SMALL)).finish()).complete
trio.run(main)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a PID namespace for it")
def test_a_daemon_that_is_a_containers_first_process_reaps_what_a_zygote_left(
    tmp_path: Path,
) -> None:
    container = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        [*container, sys.executable, "-c", _FIRST_PROCESS, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


async def test_module_that_can_not_be_loaded_is_a_clear_error(tmp_path: Path) -> None:
    launcher = Launcher(runtime_dir=tmp_path, worker_module="nextgpu_node.no_such_module")
    with pytest.raises(SandboxError, match="no_such_module can not be loaded"):
        await launcher.run()


async def test_refused_layer_is_named(tmp_path: Path) -> None:
    plan = plan_worker(SMALL, read_layout())
    impossible = dataclasses.replace(plan, landlock=(*plan.landlock, ("/no/such/path", "read")))
    async with running_launcher(tmp_path) as launcher:
        with pytest.raises(SandboxError, match="could not be confined: landlock"):
            await launcher.spawn_planned(impossible, wall_s=60)
        assert not launcher._slots
        await (await launcher.spawn(SMALL)).finish()


async def test_daemon_takes_no_descriptor_from_a_worker(tmp_path: Path) -> None:
    """Even where the filter is gone: the daemon reads with recv(2), which takes none."""
    plan = dataclasses.replace(plan_worker(SMALL, read_layout()), seccomp=())
    with attacked_host(tmp_path) as facts:
        async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
            worker = await launcher.spawn_planned(plan, wall_s=60)
            await worker._slot.wait_joined()  # its cgroup is a file that is open meanwhile
            before = _open_descriptors()
            assert (await verdict(worker, "smuggle_descriptor_out", facts))["open"]
            assert _open_descriptors() == before
            await worker.finish()


async def test_memory_beyond_the_cgroup_is_an_oom(tmp_path: Path) -> None:
    plan = dataclasses.replace(
        plan_worker(SMALL, read_layout()),
        extra_data_bytes=2**34,
        extra_address_space_bytes=2**35,
        cgroup_memory_bytes=64 * MIB,
    )
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        if launcher._hierarchy is None:
            pytest.skip("no cgroup may be made here")
        worker = await launcher.spawn_planned(plan, wall_s=60)
        await order(worker, "touch_memory", {})
        with trio.fail_after(20):
            assert (await worker.wait()).reason == "oom"
        assert (await worker.finish()).complete


async def test_a_worker_that_can_not_join_its_cgroup_gets_no_byte_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = trio.Event()

    async def refuse(group: cgroups.Group, pid: int) -> None:
        await asked.wait()
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(cgroups.Group, "adopt", refuse)
    async with running_launcher(tmp_path) as launcher:
        if launcher._hierarchy is None:
            pytest.skip("no cgroup may be made here")
        worker = await launcher.spawn(SMALL)
        with trio.move_on_after(0.05) as waiting:
            await worker.stream.send_all(encode_frame(FrameKind.DATA, b"abc"))
        assert waiting.cancelled_caught
        asked.set()
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError, match="busy"):
            await worker.stream.send_all(encode_frame(FrameKind.DATA, b"abc"))
        assert (await worker.wait()).reason == "killed"
        assert (await worker.finish()).complete


async def test_restarted_clock_counts_from_then(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(SMALL)
        worker.restart_clock(0.2)
        with trio.fail_after(5):
            assert (await worker.wait()).reason == "timeout"
        await worker.finish()


async def test_torch_runs_inside_and_each_worker_has_its_own_random_state(tmp_path: Path) -> None:
    products = []
    async with running_launcher(tmp_path, TORCH_WORKER) as launcher:
        assert launcher.runtime.startswith("torch ")
        for _ in range(2):
            worker = await launcher.spawn(dataclasses.replace(SMALL, memory_bytes=1024 * MIB))
            await worker.stream.send_all(encode_frame(FrameKind.DATA))
            with trio.fail_after(120):
                products.append((await read_frame(worker.stream))[1])
            await worker.finish()
    assert products[0] != products[1]


@pytest.mark.parametrize("tier", ["A", "C"])
async def test_torch_computes_under_every_layer(tier: Tier, tmp_path: Path) -> None:
    answers = {}
    async with running_launcher(tmp_path, TORCH_WORKER, tier=tier) as launcher:
        worker = await launcher.spawn(dataclasses.replace(SMALL, memory_bytes=1024 * MIB))
        for name in OPERATIONS:
            await worker.stream.send_all(encode_frame(FrameKind.DATA, name.encode()))
            with trio.fail_after(120):
                answers[name] = (await read_frame(worker.stream))[1]
        await worker.finish()
    assert {name: said for name, said in answers.items() if said != b"ok"} == {}


async def test_spawn_after_shutdown_is_refused(tmp_path: Path) -> None:
    async with running_launcher(tmp_path) as launcher:
        pass
    with pytest.raises(SandboxError, match="shutting down"):
        await launcher.spawn(SMALL)


def test_zygote_ends_when_its_control_socket_does(tmp_path: Path) -> None:
    from nextgpu_node.sandbox.zygote_process import start_zygote

    process, channel = start_zygote("tests.support.sandbox_worker")
    with process:
        assert b"ready" in channel.recv(65536)
        channel.close()
        assert process.wait(5) == 0
    assert isinstance(channel, socket.socket)
