"""Attacks from inside a real worker, by code with all the rights that a worker has."""

from __future__ import annotations

import dataclasses
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from nextgpu_node.daemon.workers import status_of_exit
from nextgpu_node.sandbox.launcher import Launcher
from nextgpu_node.sandbox.policy import Tier
from nextgpu_node.sandbox.slots import WorkerExit
from tests.support import attack_worker
from tests.support.attack_profiles import unexpected_verdicts
from tests.support.sandbox import (
    ATTACK_WORKER,
    SMALL,
    attack_all,
    attacked_host,
    order,
    read_frame,
    running_launcher,
    verdict,
)

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the attacks use x86_64 system call numbers"
    ),
]


# profile -> (tier, device): the three that need nothing but this process's own rights.
_PROFILES: dict[str, tuple[Tier, str]] = {
    "A": ("A", "cpu"),
    "A-gpu": ("A", "cuda:0"),
    "C": ("C", "cpu"),
}
_verdicts: dict[str, dict[str, Any]] = {}


def _verdicts_of(profile: str, factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every attack that leaves its worker alive, made once for each profile."""
    if profile not in _verdicts:
        tier, device = _PROFILES[profile]
        policy = dataclasses.replace(SMALL, device=device)
        directory = factory.mktemp("attacked")
        _verdicts[profile] = trio.run(partial(attack_all, directory, tier=tier, policy=policy))
    return _verdicts[profile]


@pytest.mark.parametrize("profile", _PROFILES)
@pytest.mark.parametrize("kind", sorted(set(attack_worker.KINDS.values())))
def test_attacks_are_blocked(
    kind: str, profile: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    verdicts = _verdicts_of(profile, tmp_path_factory)
    names = [name for name, of_kind in attack_worker.KINDS.items() if of_kind == kind]
    assert names
    told = {name: verdicts[name] for name in names}
    if os.geteuid() != 0 and profile == "C":
        profile = "C-user"
        if not set(os.getgroups()) - {os.getgid()}:
            told.pop("have_privileges", None)  # this user has none to begin with
    assert unexpected_verdicts(profile, told) == {}


async def _end_of(launcher: Launcher, attack: str, **changes: Any) -> WorkerExit:
    policy = SMALL if not changes else type(SMALL)(**{**_fields(), **changes})
    worker = await launcher.spawn(policy)
    await order(worker, attack, {})
    with trio.fail_after(120):
        exit_ = await worker.wait()
    report = await worker.finish()
    assert report.complete, report
    return exit_


def _fields() -> dict[str, Any]:
    return {name: getattr(SMALL, name) for name in type(SMALL).__slots__}


@pytest.mark.parametrize("attack", ["int80", "x32", "far_return_32"])
async def test_foreign_system_call_tables_kill_the_worker(attack: str, tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        exit_ = await _end_of(launcher, attack)
    assert (exit_.reason, exit_.signal) == ("signalled", 31)  # SIGSYS


@pytest.mark.parametrize("attack", ["segfault", "abort", "illegal_instruction", "stack_overflow"])
async def test_crash_is_reported_and_the_next_worker_runs(attack: str, tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        exit_ = await _end_of(launcher, attack)
        assert exit_.reason == "signalled"
        again = await launcher.spawn(SMALL)
        await again.finish()


async def test_exit_in_the_middle_is_reported(tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        exit_ = await _end_of(launcher, "exit_in_the_middle")
    assert (exit_.reason, exit_.code) == ("exited", 3)


@pytest.mark.parametrize("tier", ["A", "C"])
async def test_finish_ends_a_worker_that_has_stopped_itself(tier: Tier, tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER, tier=tier) as launcher:
        worker = await launcher.spawn(SMALL)
        assert (await verdict(worker, "stop_itself", {}))["detail"] == "stopping"
        with trio.fail_after(10):
            assert (await worker.finish()).complete


async def test_cpu_limit_ends_a_busy_loop(tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        exit_ = await _end_of(launcher, "cpu_loop", cpu_s=1)
    assert exit_.reason == "cpu-limit"
    assert 0.6 <= exit_.cpu_s < 2


async def test_wall_limit_ends_a_sleeper(tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        exit_ = await _end_of(launcher, "sleep", wall_s=0.3)
    assert exit_.reason == "timeout"
    assert exit_.wall_s < 2


async def test_a_full_scratch_ends_the_unit_over_its_limit(tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        exit_ = await _end_of(launcher, "fill_disk")
    assert status_of_exit(exit_) == "over_limit"


async def test_memory_error_inside_is_not_a_kill(tmp_path: Path) -> None:
    """The unit's code sees MemoryError, and can say so in words, before any limit kills it."""
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        worker = await launcher.spawn(SMALL)
        answer = await verdict(worker, "touch_memory", {})
        await worker.finish()
    assert answer["detail"].startswith("MemoryError")


async def test_finish_kills_a_worker_that_ignores_signals(tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        worker = await launcher.spawn(SMALL)
        assert (await verdict(worker, "ignore_signals", {}))["detail"] == "ignoring"
        report = await worker.finish()
        assert report.complete
        assert (await worker.wait()).reason == "killed"


async def test_output_flood_waits_for_the_reader(tmp_path: Path) -> None:
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        worker = await launcher.spawn(SMALL)
        await order(worker, "output_flood", {})
        _, body = await read_frame(worker.stream)
        assert len(body) == 4095
        assert (await worker.finish()).complete


async def test_descriptor_sent_to_a_worker_does_not_arrive(tmp_path: Path) -> None:
    """recv(2) drops what a sender attaches; the worker has no other call."""
    async with running_launcher(tmp_path, ATTACK_WORKER) as launcher:
        worker = await launcher.spawn(SMALL)
        with (tmp_path / "file").open("w") as file, attacked_host(tmp_path) as facts:
            import array
            import socket

            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
            stream = worker._slot.stream
            assert stream is not None
            await stream.socket.sendmsg([b""], ancillary)
            answer = await verdict(worker, "inherited_descriptors", facts)
        await worker.finish()
    assert not answer["open"], answer
