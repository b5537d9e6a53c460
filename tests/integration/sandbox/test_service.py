"""Tier B on a real systemd: its units as shipped, in a container on this kernel.

The daemon's side runs as `nobody` where namespaces are refused: the host that tier B is for.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import attack_worker
from tests.support.attack_profiles import unexpected_verdicts
from tests.support.host_kinds import REPOSITORY, as_nobody, passable_homes, worker_service_units
from tests.support.sandbox import ATTACK_WORKER
from tests.support.systemd_container import Container, reason_to_skip, systemd_container

pytestmark = [
    # Asked for by name alone: nobody who runs the tests as root expects a second systemd.
    pytest.mark.slow,
    pytest.mark.sandbox,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "none"),
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the attacks use x86_64 system call numbers"
    ),
]

_MAIN = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import json, os, signal, time
from pathlib import Path
import structlog, trio
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
from nextgpu_node.errors import SandboxError
from nextgpu_node.sandbox import zygote_process
from nextgpu_node.sandbox.probe import probe
from nextgpu_node.sandbox.service_launcher import ServiceLauncher
from tests.support.host_kinds import refuse_namespaces
from tests.support.sandbox import SMALL, attack_with, attacked_host, order

told = {{}}
refuse_namespaces()

def groups():
    slice_ = Path("/sys/fs/cgroup/systemd/system.slice")
    return len(list(slice_.glob("*nextgpu*/nextgpu-worker@*")))

async def one_end(launcher, attack, **changes):
    worker = await launcher.spawn(SMALL)
    await order(worker, attack, {{}})
    with trio.fail_after(20):
        exit_ = await worker.wait()
    report = await worker.finish()
    return [exit_.reason, exit_.signal, report.complete]

async def main():
    run = Path("/run/nobody")
    report = probe()
    told["probe"] = [report.tier, list(report.layers), [name for name, _ in report.missing]]
    launcher = ServiceLauncher(runtime_dir=run)
    with attacked_host(run) as facts:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(60):
                await nursery.start(launcher.run)
            began = time.perf_counter()
            worker = await launcher.spawn(SMALL)
            told["spawn_s"] = time.perf_counter() - began
            told["layers"] = list(worker.layers)
            told["verdicts"] = await attack_with(launcher, facts)
            first = await worker.finish()
            told["wipe"] = [list(step) for step in first.steps]
            told["killed"] = (await worker.wait()).reason
            told["ends"] = {{name: await one_end(launcher, name) for name in ("segfault", "int80")}}
            sleeper = await launcher.spawn(SMALL)
            await order(sleeper, "ignore_signals", facts)
            sleeper.restart_clock(0.3)
            with trio.fail_after(10):
                told["timeout"] = (await sleeper.wait()).reason
            told["stubborn_wipe"] = (await sleeper.finish()).complete
            two = [await launcher.spawn(SMALL) for _ in range(2)]
            told["users"] = len({{Path(f"/proc/{{w.pid}}").stat().st_uid for w in two}})
            for w in two:
                await w.finish()
            nursery.cancel_scope.cancel()
    for _ in range(200):
        if not groups():
            break
        time.sleep(0.02)
    told["groups_left"] = groups()

trio.run(main)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Any]]:
    """What the unprivileged side has met, all in one container."""
    more = "mkdir /run/hold /run/nobody; chown 65534 /run/nobody\n" + passable_homes("/run/hold")
    units = worker_service_units(ATTACK_WORKER)
    with systemd_container(units, more) as container:
        started = container.run(["systemctl", "start", "nextgpu-worker.socket"])
        assert started.returncode == 0, started.stderr
        yield _ask(container, _MAIN)


def _ask(container: Container, program: str) -> dict[str, Any]:
    # $1 of the container's own script, seen from outside through its root directory.
    script = Path(f"/proc/{container.pid}/root/run/main.py")
    script.write_text(program)
    done = container.run(as_nobody("/run/main.py"), timeout_s=120)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_probe_finds_the_service_where_namespaces_are_refused(told: dict[str, Any]) -> None:
    tier, layers, missing = told["probe"]
    assert tier == "B"
    assert {"tier-B", "network-namespace", "own-uid", "seccomp", "landlock-7"} <= set(layers)
    assert "namespaces" in missing


def test_worker_names_what_systemd_has_put_around_it(told: dict[str, Any]) -> None:
    assert {"mount-namespace", "ipc-namespace", "user-namespace", "own-uid"} <= set(told["layers"])
    assert "service-memory-limit" in told["layers"]


@pytest.mark.parametrize("kind", sorted(set(attack_worker.KINDS.values())))
def test_attacks_are_blocked_in_the_service(kind: str, told: dict[str, Any]) -> None:
    verdicts = {
        name: verdict
        for name, verdict in told["verdicts"].items()
        if attack_worker.KINDS[name] == kind
    }
    assert verdicts
    assert unexpected_verdicts("B", verdicts) == {}


def test_another_users_worker_is_ended_and_its_service_is_gone(told: dict[str, Any]) -> None:
    steps = dict(told["wipe"])
    assert steps["worker-reaped"]
    assert steps["service-ended"]
    assert steps["no-mount-on-host"]
    assert told["killed"] == "killed"


def test_crashes_in_the_service_are_reported(told: dict[str, Any]) -> None:
    assert told["ends"] == {
        "segfault": ["signalled", 11, True],
        "int80": ["signalled", 31, True],
    }


def test_a_stubborn_worker_of_the_service_is_ended_in_time(told: dict[str, Any]) -> None:
    assert told["timeout"] == "timeout"
    assert told["stubborn_wipe"]


def test_two_workers_of_the_service_have_two_users(told: dict[str, Any]) -> None:
    assert told["users"] == 2


def test_the_service_leaves_no_group(told: dict[str, Any]) -> None:
    assert told["groups_left"] == 0
