"""Jobs and maps over real nodes: what is killed, stopped or lying costs seconds, not results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import trio
from safetensors.torch import load_file, save_file

from nextgpu_node.cli.processes import DaemonProcess, run_cli, wait_until
from nextgpu_node.core.job_state import JobEvent, PeerFailed, ShardKept
from nextgpu_node.core.schedule import detection_rate
from nextgpu_node.errors import NextGPUError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import make_machine, run_local
from nextgpu_node.sdk import map_stream
from nextgpu_node.sdk.audit import Audit
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.map_stream import ShardResult
from nextgpu_node.sdk.mapping import MapOptions
from nextgpu_node.sdk.unit import Needs
from tests.support.nodes import Swarm, Trio, count_peers, swarm

_SMALL, _LIAR = 1, 2


@pytest.fixture(scope="module")
def three() -> Iterator[Swarm]:
    """Two honest providers, the second one small, and one that lies."""
    with swarm(
        3,
        special={_SMALL: {"sharing.max_memory": "256 MiB"}},
        modules={_LIAR: "tests.support.lying_provider"},
    ) as nodes:
        yield nodes


def honest(nodes: Swarm, **options: Any) -> MapOptions:
    """Only the two that do not lie."""
    from nextgpu_node.core.choice import Preferences

    peers = frozenset(p.ready.peer_id for k, p in enumerate(nodes.providers) if k != _LIAR)
    return MapOptions(preferences=Preferences(peers=peers), **options)


def inputs(program: Program, count: int) -> list[dict[str, torch.Tensor]]:
    return [{program.spec.xs[0].name: torch.full((2, 4), float(k))} for k in range(count)]


async def collect(
    nodes: Swarm,
    program: Program,
    shards: list[Any],
    options: MapOptions,
    on_result: Callable[[ShardResult], None] = lambda result: None,
    deadline_s: float = 60,
    **more: Any,
) -> list[ShardResult]:
    found = []
    with trio.fail_after(deadline_s):
        async with (
            open_client(nodes.submitter.paths) as client,
            client.map(program, shards, options, **more) as results,
        ):
            async for result in results:
                on_result(result)
                found.append(result)
    return found


def assert_right(program: Program, results: list[ShardResult], count: int) -> None:
    """Every result once, in order, and equal to what the program gives here."""
    assert [result.index for result in results] == list(range(count))
    for result, xs in zip(results, inputs(program, count), strict=True):
        expected = run_local(program, **xs)
        assert all(torch.equal(result.tensors[name], expected[name]) for name in expected)


# --- maps -------------------------------------------------------------------------------------


async def test_a_map_gives_each_result_once_in_order_over_several_peers(
    three: Swarm, linear: Program
) -> None:
    results = await collect(three, linear, inputs(linear, 24), honest(three))
    assert_right(linear, results, 24)
    assert len({result.peer_id for result in results}) == 2


async def test_a_killed_provider_costs_no_result(three: Swarm) -> None:
    """30 shards; one of the two is killed with -9 in the middle of its work, and comes back."""
    program = export(Work(), (torch.ones(2, 4),))
    victim, order, killed_at = three.providers[0], list[ShardResult](), list[int]()

    def kill(result: ShardResult) -> None:
        order.append(result)
        mine = result.peer_id == victim.ready.peer_id
        if mine and not killed_at and 5 <= len(order) <= 20:
            killed_at.append(len(order))
            victim.kill()

    try:
        with counting(PeerFailed) as failed:
            await collect(three, program, inputs(program, 30), honest(three), kill, ordered=False)
        assert killed_at, "the victim took no part"
        assert_right(program, sorted(order, key=lambda result: result.index), 30)
        # Nobody else failed.  The victim's may not show: copies of its shards elsewhere can be
        # done while its connection is still waited for.
        assert {event.peer_id for event in failed} <= {victim.ready.peer_id}
    finally:
        if victim.returncode is not None:
            victim.start()
            wait_until(lambda: count_peers(three.submitter) == 3, 60, "the provider to be back")


@pytest.mark.slow
async def test_an_owner_who_stops_sharing_costs_no_result(three: Swarm, linear: Program) -> None:
    stopped = three.providers[0]

    def stop(result: ShardResult) -> None:
        if result.index == 3:
            run_cli(stopped.home, "share", "off")

    try:
        results = await collect(three, linear, inputs(linear, 30), honest(three), stop)
        assert_right(linear, results, 30)
    finally:
        run_cli(stopped.home, "share", "on")
        wait_until(lambda: count_peers(three.submitter) == 3, 60, "sharing to be on")


@pytest.mark.slow
async def test_a_provider_that_goes_silent_is_worked_around(three: Swarm, linear: Program) -> None:
    """As behind a cut cable: nothing comes, nothing ends.  Its shards run elsewhere."""
    silent = three.providers[0]

    def silence(result: ShardResult) -> None:
        if result.index == 4:
            os.kill(silent.pid, signal.SIGSTOP)

    options = honest(three, in_flight=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nextgpu_node.sdk.mapping._CLOSE_S", 1.0)
            results = await collect(three, linear, inputs(linear, 30), options, silence)
        assert_right(linear, results, 30)
    finally:
        os.kill(silent.pid, signal.SIGCONT)


class Slow(torch.nn.Module):
    """A running sum beside some hundred milliseconds of work in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        work = x.sum() + torch.zeros(1400, 1400)
        self.total.add_(x + 0.0 * (work @ work).sum())
        return self.total * 1.0


@pytest.mark.slow
async def test_a_lease_that_is_over_goes_on_from_the_checkpoint(three: Swarm) -> None:
    """Too long for one lease: only from checkpoint to checkpoint does it come to its end."""
    program = export(Slow(), (torch.ones(2),))
    name = program.spec.xs[0].name
    steps = [{name: torch.full((2,), float(k))} for k in range(80)]
    options = honest(three, needs=Needs(max_seconds=5), checkpoint_ms=200)
    began_s = time.monotonic()
    (result,) = await collect(three, program, [steps], options, deadline_s=240)
    machine = make_machine(program)
    expected = [machine.step(step).ys for step in steps]
    (y,) = program.spec.ys
    assert torch.equal(result.tensors[y.name], torch.stack([ys[y.name] for ys in expected]))
    assert time.monotonic() - began_s > 5


class Wide(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 25_000_000).sum(1)  # 800 MB for x of [2, 4]: too much for 256 MiB


async def test_what_is_too_large_for_one_peer_runs_on_another(three: Swarm) -> None:
    program = export(Wide(), (torch.ones(2, 4),))
    results = await collect(three, program, inputs(program, 3), honest(three))
    assert {result.peer_id for result in results} == {three.providers[0].ready.peer_id}


async def test_a_bad_input_fails_alone_and_is_not_tried_twice(
    three: Swarm, linear: Program
) -> None:
    shards: list[Any] = inputs(linear, 8)
    shards[3] = {linear.spec.xs[0].name: torch.ones(7, 7)}
    results = await collect(three, linear, shards, honest(three), return_exceptions=True)
    assert [result.index for result in results if result.error] == [3]
    assert "do not match" in str(results[3].error)
    with pytest.raises(NextGPUError, match="do not match"):
        await collect(three, linear, shards, honest(three))


async def test_an_empty_map_is_done(three: Swarm, linear: Program) -> None:
    assert await collect(three, linear, [], honest(three)) == []


# --- audits -----------------------------------------------------------------------------------


async def test_a_liar_is_found_excluded_and_its_shards_are_done_again(
    three: Swarm, linear: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = await collect(
        three, linear, inputs(linear, 20), MapOptions(audit=Audit(share=1.0), in_flight=1)
    )
    assert_right(linear, results, 20)
    liar = three.providers[_LIAR].ready.peer_id
    assert liar not in {result.peer_id for result in results}
    why: Any = run_cli(three.submitter.home, "peers", "--why")
    assert {p["peer_id"] for p in why["peers"] if "wrong result" in p["excluded"]} == {liar}
    run_cli_quietly(three, "peers", "--forget")
    again: Any = run_cli(three.submitter.home, "peers", "--why")
    assert not any(p["excluded"] for p in again["peers"])


@pytest.mark.slow
async def test_canaries_find_the_liar_too(three: Swarm, linear: Program) -> None:
    try:
        results = await collect(
            three, linear, inputs(linear, 20), MapOptions(audit=Audit(canaries=2), in_flight=1)
        )
        assert_right(linear, results, 20)
    finally:
        run_cli_quietly(three, "peers", "--forget")


@pytest.mark.slow
async def test_without_an_audit_the_liar_is_believed(three: Swarm, linear: Program) -> None:
    """Seal and receipt are in order: this is what an audit is for."""
    results = await collect(three, linear, inputs(linear, 20), MapOptions(in_flight=1))
    liar = three.providers[_LIAR].ready.peer_id
    assert liar in {result.peer_id for result in results}


@pytest.mark.slow
async def test_the_liar_is_found_as_often_as_the_formula_says(
    three: Swarm, linear: Program
) -> None:
    """Real units: over 24 maps, the sum of 1 - (1 - p)^k for the k that it gave in each."""
    share, maps = 0.15, 24
    liar = three.providers[_LIAR].ready.peer_id
    expected = variance = found = 0.0
    for seed in range(maps):
        run_cli_file(three).unlink(missing_ok=True)
        options = MapOptions(audit=Audit(share=share, seed=seed), in_flight=1)
        # Counted before it is retracted: what the liar gave is what an audit could have seen.
        gave = await count_given(three, linear, inputs(linear, 10), options, liar)
        rate = detection_rate(share, gave)
        expected += rate
        variance += rate * (1 - rate)
        found += liar_is_known(three, liar)
    run_cli_file(three).unlink(missing_ok=True)
    assert expected > 2
    assert abs(found - expected) < 4 * max(variance, 0.25) ** 0.5


async def count_given(
    nodes: Swarm, program: Program, shards: list[Any], options: MapOptions, peer_id: str
) -> int:
    with counting(ShardKept) as given:
        await collect(nodes, program, shards, options)
    return sum(event.peer_id == peer_id for event in given)


_Noted = TypeVar("_Noted", ShardKept, PeerFailed)


@contextmanager
def counting(kind: type[_Noted]) -> Iterator[list[_Noted]]:
    """The events of this kind that maps in this process note meanwhile."""
    found: list[_Noted] = []
    note = map_stream._StreamSink.note

    def noting(self: Any, event: JobEvent) -> None:
        if isinstance(event, kind):
            found.append(event)
        note(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_stream._StreamSink, "note", noting)
        yield found


def liar_is_known(nodes: Swarm, liar: str) -> bool:
    file = run_cli_file(nodes)
    return file.exists() and json.loads(file.read_text())["peers"].get(liar, {}).get("distrusted")


def run_cli_file(nodes: Swarm) -> Path:
    return nodes.submitter.paths.peer_history_file


def run_cli_quietly(nodes: Swarm, *arguments: str) -> None:
    run_cli(nodes.submitter.home, *arguments, check=False)


# --- jobs -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, linear: Program) -> Path:
    """linear.ngp and in/s000.safetensors … in/s009.safetensors."""
    linear.save(tmp_path / "linear.ngp")
    (tmp_path / "in").mkdir()
    for k, xs in enumerate(inputs(linear, 10)):
        save_file(xs, tmp_path / "in" / f"s{k:03}.safetensors")
    return tmp_path


def command(nodes: Swarm | Trio, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "nextgpu_node.cli", "--home", str(nodes.submitter.home)),
        *arguments,
    ]


def nextgpu(nodes: Swarm | Trio, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(nodes, *arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def map_command(three: Swarm, *more: str) -> tuple[str, ...]:
    peers = [p.ready.peer_id for k, p in enumerate(three.providers) if k != _LIAR]
    named = [word for peer in peers for word in ("--peer", peer)]
    return ("map", "linear.ngp", "--inputs", "in", "--outputs", "out", *named, *more)


def test_a_map_fills_its_directory_and_a_second_one_does_what_is_missing(
    three: Swarm, files: Path, linear: Program
) -> None:
    (files / "in" / "s004.safetensors").write_bytes(b"this is no safetensors file")
    done = nextgpu(three, *map_command(three), cwd=files)
    assert done.returncode == 1
    assert "1 of 10 shards failed, 9 are done" in done.stderr
    assert "s004.safetensors" in done.stderr
    (y,) = linear.spec.ys
    for k in (0, 9):
        got = load_file(files / "out" / f"s{k:03}.safetensors")[y.name]
        assert torch.equal(got, run_local(linear, **inputs(linear, 10)[k])[y.name])
    before = {p.name: p.stat().st_mtime_ns for p in (files / "out").iterdir()}
    assert len(before) == 9

    save_file(inputs(linear, 10)[4], files / "in" / "s004.safetensors")
    again = nextgpu(three, "--json", *map_command(three), cwd=files)
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    assert lines[-1]["done"] == 1
    assert lines[-1]["skipped"] == 9
    assert {line["schema"] for line in lines} == {1}
    after = {p.name: p.stat().st_mtime_ns for p in (files / "out").iterdir()}
    assert before.items() <= after.items()
    nothing = nextgpu(three, *map_command(three), cwd=files)
    assert nothing.stdout == "Nothing to do: all 10 outputs are there.\n"

    save_file(inputs(linear, 10)[5], files / "in" / "s004.safetensors")
    changed = nextgpu(three, *map_command(three), cwd=files)
    assert changed.returncode == 2
    assert "1 output exist" in changed.stderr
    assert "--force" in changed.stderr


def test_a_detached_run_can_be_followed_fetched_and_removed_without_a_trace(
    three: Swarm, files: Path, linear: Program
) -> None:
    peer = three.providers[0].ready.peer_id
    arguments = ("run", "linear.ngp", "--input", "in/s003.safetensors", "--peer", peer)
    done = nextgpu(three, *arguments, "--detach", cwd=files)
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.strip()
    followed = nextgpu(three, "logs", "-f", job_id, cwd=files)
    assert "job.ended" in followed.stdout.splitlines()[-1]
    assert "status=done" in followed.stdout
    listed = run_cli(three.submitter.home, "jobs")["jobs"]
    assert isinstance(listed, list)
    assert {"done"} == {job["status"] for job in listed if job["job_id"] == job_id}
    fetched = nextgpu(three, "results", job_id, "--output", "y.safetensors", cwd=files)
    assert fetched.returncode == 0
    (y,) = linear.spec.ys
    got = load_file(files / "y.safetensors")[y.name]
    assert torch.equal(got, run_local(linear, **inputs(linear, 4)[3])[y.name])

    directory = three.submitter.paths.jobs_dir / job_id
    assert directory.stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o077 == 0 for p in directory.rglob("*"))
    assert nextgpu(three, "rm", job_id, cwd=files).returncode == 0
    assert not [p for p in three.submitter.home.rglob("*") if job_id in str(p)]


@pytest.fixture
def endless(files: Path) -> Path:
    """A program that takes long enough to be interrupted, with a steps axis of 400."""
    program = export(Slow(), (torch.ones(2),))
    program.save(files / "slow.ngp")
    save_file({program.spec.xs[0].name: torch.ones(400, 2)}, files / "long.safetensors")
    return files


def start_endless(three: Swarm, endless: Path) -> subprocess.Popen[str]:
    peer = three.providers[0].ready.peer_id
    arguments = ("run", "slow.ngp", "--input", "long.safetensors", "--steps-axis", "--peer", peer)
    process = subprocess.Popen(
        command(three, *arguments, "--output", "z.safetensors"),
        cwd=endless,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("running"):
            break
    return process


def only_job(three: Swarm) -> dict[str, Any]:
    jobs: Any = run_cli(three.submitter.home, "jobs")["jobs"]
    return next(job for job in jobs if job["status"] not in ("done", "failed", "cancelled"))


def test_ctrl_c_detaches_and_the_job_can_be_cancelled(three: Swarm, endless: Path) -> None:
    process = start_endless(three, endless)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    job = only_job(three)
    assert f"Detached. Job {job['job_id']} goes on" in told
    assert job["status"] == "running"
    assert nextgpu(three, "rm", job["job_id"], cwd=endless).returncode == 1
    assert nextgpu(three, "cancel", job["job_id"], cwd=endless).returncode == 0
    shown = run_cli(three.submitter.home, "show", str(job["job_id"]))
    assert shown["status"] == "cancelled"
    assert not (endless / "z.safetensors").exists()
    assert nextgpu(three, "rm", job["job_id"], cwd=endless).returncode == 0


@pytest.mark.slow
def test_a_second_ctrl_c_cancels(three: Swarm, endless: Path) -> None:
    process = start_endless(three, endless)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if "Ctrl-C again" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert "Cancelled" in told
    assert process.returncode == 130
    assert nextgpu(three, "rm", "--finished", cwd=endless).returncode == 0


@pytest.mark.slow
def test_a_job_whose_process_is_killed_is_interrupted_and_goes_on(
    three: Swarm, files: Path, linear: Program
) -> None:
    program = export(Slow(), (torch.ones(2),))
    program.save(files / "slow.ngp")
    for file in (files / "in").iterdir():
        save_file({program.spec.xs[0].name: torch.ones(12, 2)}, file)
    arguments = [*map_command(three, "--steps-axis", "--in-flight", "1", "--detach")]
    arguments[1] = "slow.ngp"
    job_id = nextgpu(three, *arguments, cwd=files).stdout.strip()
    lock = three.submitter.paths.jobs_dir / job_id / "lock"
    wait_until(lambda: len(list((files / "out").iterdir())) >= 2, 60, "two results")
    os.kill(int(lock.read_text()), signal.SIGKILL)
    wait_until(
        lambda: run_cli(three.submitter.home, "show", job_id)["status"] == "interrupted",
        10,
        "the lock to be free",
    )
    before = {p.name: p.stat().st_mtime_ns for p in (files / "out").iterdir()}
    done = nextgpu(three, "retry", job_id, cwd=files)
    assert done.returncode == 0, done.stderr
    after = {p.name: p.stat().st_mtime_ns for p in (files / "out").iterdir()}
    assert len(after) == 10
    assert before.items() <= after.items()


class Work(torch.nn.Module):
    """Twice x, behind about a tenth of a second of work: long enough to be killed in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        work = x.sum() + torch.zeros(1000, 1000)
        for _ in range(2):
            work = torch.tanh(work @ work * 1e-3)
        return x * 2 + 0 * work.sum()


@pytest.mark.slow
async def test_200_shards_over_6_nodes_of_which_a_third_is_killed_and_comes_back() -> None:
    """Two of six are killed with -9 in the middle of shards; both come back and give results."""
    program = export(Work(), (torch.ones(2, 4),))
    order: list[ShardResult] = []
    back: dict[str, int] = {}  # how many results were there when it lent again
    with swarm(6) as nodes:
        victims = nodes.providers[:2]
        async with trio.open_nursery() as nursery:

            async def kill_and_start(victim: DaemonProcess) -> None:
                victim.kill()
                await trio.to_thread.run_sync(victim.start)
                back[victim.ready.peer_id] = len(order)

            def kill(result: ShardResult) -> None:
                order.append(result)
                if len(order) in (20, 40):
                    nursery.start_soon(kill_and_start, victims[len(order) // 20 - 1])

            with counting(PeerFailed) as failed:
                await collect(
                    nodes, program, inputs(program, 200), MapOptions(), kill, 400, ordered=False
                )
    assert_right(program, sorted(order, key=lambda result: result.index), 200)
    for victim in victims:
        peer_id = victim.ready.peer_id
        assert any(event.peer_id == peer_id for event in failed), "it had nothing to lose"
        later = order[back[peer_id] :]
        assert any(result.peer_id == peer_id for result in later), "it was not asked again"
