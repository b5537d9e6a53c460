"""The main job through real processes: what a submitter gets, and what it is told otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import trio
from safetensors.torch import load_file, save_file

from nextgpu_node.cli.processes import run_cli, wait_until
from nextgpu_node.errors import JobFailed, NoPeerFound, PeerLost
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import run_local
from nextgpu_node.sandbox.cgroups import find_hierarchy
from nextgpu_node.sdk.client import Client, Steps, open_client
from nextgpu_node.sdk.events import (
    Checkpoint,
    FinalResult,
    Finished,
    Offered,
    ReceiptVerified,
    Started,
    StepResult,
    UnitEvent,
)
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.program import TENSOR, Graph, Node, ProgramSpec, Ref, TensorSpec
from tests.support.nodes import Trio, has_peer, network_of_three

X = torch.arange(8.0).reshape(2, 4)


class Accumulator(torch.nn.Module):
    """Adds every input to a buffer: the buffer becomes the program's carry."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 1.0


@pytest.fixture
def accumulator() -> Program:
    return export(Accumulator(), (torch.ones(3),))


@pytest.fixture
def files(tmp_path: Path, linear: Program) -> Path:
    """A directory with linear.ngp and its input x.safetensors."""
    linear.save(tmp_path / "linear.ngp")
    save_file({linear.spec.xs[0].name: X}, tmp_path / "x.safetensors")
    return tmp_path


def run_command(
    nodes: Trio, files: Path, *more: str, output: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`nextgpu run linear.ngp` for the submitter, as a user types it."""
    output = output or files / "y.safetensors"
    return subprocess.run(
        [
            *(sys.executable, "-m", "nextgpu_node.cli", "--home", str(nodes.submitter.home)),
            *("run", str(files / "linear.ngp"), "--input", str(files / "x.safetensors")),
            *("--output", str(output), *more),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


async def test_a_program_runs_on_the_peer_as_it_would_here(
    nodes: Trio, files: Path, linear: Program
) -> None:
    done = run_command(nodes, files, "--receipt", str(files / "receipt.json"), "--json")
    assert done.returncode == 0, done.stderr
    (name,) = (y.name for y in linear.spec.ys)
    remote = load_file(files / "y.safetensors")[name]
    assert torch.equal(remote, run_local(linear, X)[name])
    reply = json.loads(done.stdout.splitlines()[-1])
    assert reply["peer_id"] == nodes.provider.ready.peer_id
    assert reply["device"]["kind"] == "cpu"
    receipt = json.loads((files / "receipt.json").read_text())["receipt"]
    assert receipt["status"] == "done"
    assert "seccomp" in receipt["isolation"]
    assert receipt["wipe"]
    assert all(step["held"] for step in receipt["wipe"])
    await nodes.wait_idle()


async def test_the_worker_of_a_unit_is_gone_and_another_waits(nodes: Trio, files: Path) -> None:
    before = nodes.worker_pids()
    assert run_command(nodes, files).returncode == 0
    await nodes.wait_idle()
    assert not before & nodes.worker_pids()


async def test_an_open_unit_answers_each_call_and_keeps_its_state(
    nodes: Trio, accumulator: Program
) -> None:
    """The next input is sent only once the last result is here: no batch could do this."""
    got: list[torch.Tensor] = []
    (x,), (y,) = accumulator.spec.xs, accumulator.spec.ys
    answered, answers = trio.open_memory_channel[None](1)

    async def calls() -> AsyncIterator[Mapping[str, torch.Tensor]]:
        for k in range(5):
            yield {x.name: torch.full((3,), float(k))}
            await answers.receive()

    async with (
        open_client(nodes.submitter.paths) as client,
        client.run(accumulator, calls(), return_carry=True) as events,
    ):
        kinds = []
        async for event in events:
            kinds.append(type(event))
            if isinstance(event, StepResult):
                got.append(event.tensors[y.name])
                answered.send_nowait(None)
    assert [float(t[0]) for t in got] == [0.0, 1.0, 3.0, 6.0, 10.0]
    assert kinds.index(Offered) < kinds.index(Started) < kinds.index(Finished)
    assert kinds[-1] is ReceiptVerified
    await nodes.wait_idle()


async def test_a_checkpoint_goes_on_in_a_new_unit_exactly(
    nodes: Trio, accumulator: Program
) -> None:
    (x,), (y,) = accumulator.spec.xs, accumulator.spec.ys
    steps = [{x.name: torch.full((3,), float(k))} for k in (1, 2, 3)]
    whole = await all_events(nodes, accumulator, steps)
    first = await all_events(nodes, accumulator, steps[:2], return_carry=True)
    (checkpoint,) = [event for event in first if isinstance(event, Checkpoint)]
    assert checkpoint.steps == 2
    second = await all_events(nodes, accumulator, steps[2:], carry=checkpoint.carry)
    assert torch.equal(last_result(second)[y.name], last_result(whole)[y.name])


async def test_init_makes_the_first_state_and_finish_sums_up(nodes: Trio) -> None:
    """init: s = c + c; step: s += x, y = s; finish: s * s."""
    vector = TensorSpec("s", "float32", (2,))

    def call(op: str, a: int, b: int) -> Node:
        return Node(f"aten.{op}.Tensor", (Ref(a), Ref(b)), (), TENSOR)

    spec = ProgramSpec(
        min_table_version=1,
        constants=(replace(vector, name="c"),),
        carry=(vector,),
        xs=(replace(vector, name="x"),),
        ys=(replace(vector, name="y"),),
        finish_ys=(replace(vector, name="square"),),
        init=Graph((call("add", 0, 0),), (1,)),
        step=Graph((call("add", 1, 2),), (3, 3)),
        finish=Graph((call("mul", 1, 1),), (2,)),
    )
    program = Program.from_parts(spec, {"c": torch.tensor([1.0, 2.0])})
    events = await all_events(nodes, program, [{"x": torch.ones(2)}, {"x": torch.ones(2)}])
    (final,) = [event for event in events if isinstance(event, FinalResult)]
    assert last_result(events)["y"].tolist() == [4.0, 6.0]
    assert final.tensors["square"].tolist() == [16.0, 36.0]


async def test_an_error_in_the_program_is_told_in_its_own_words(nodes: Trio) -> None:
    class Look(torch.nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(index, x)

    program = export(Look(), (torch.ones(3, 2), torch.tensor([0])))
    names = [spec.name for spec in program.spec.xs]
    step = dict(zip(names, (torch.ones(3, 2), torch.tensor([99])), strict=True))
    with pytest.raises(JobFailed, match=r"operator failed.*embedding"):
        await run_to_end(nodes, program, [step])
    await nodes.wait_idle()


async def test_what_the_callers_own_inputs_raise_comes_back_as_it_is(
    nodes: Trio, linear: Program
) -> None:
    async def broken() -> AsyncIterator[Mapping[str, torch.Tensor]]:
        raise FileNotFoundError("shard 3")
        yield {}

    with pytest.raises(FileNotFoundError, match="shard 3"):
        await run_to_end(nodes, linear, broken())
    await nodes.wait_idle()


async def test_a_need_that_nobody_fills_exits_with_4(nodes: Trio, files: Path) -> None:
    done = run_command(nodes, files, "--vram", "900")
    assert done.returncode == NoPeerFound.exit_code
    assert "Traceback" not in done.stderr
    assert not (files / "y.safetensors").exists()


async def test_a_peer_id_that_nobody_has_is_not_replaced_by_another(
    nodes: Trio, linear: Program
) -> None:
    needs = Needs(peer_id=nodes.first.ready.peer_id)
    async with open_client(nodes.submitter.paths) as client:
        with pytest.raises(NoPeerFound):
            await client.find_peers(needs)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_a_full_disk_leaves_no_half_written_output(
    nodes: Trio, files: Path, small_disk: Path
) -> None:
    class Grow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(4096, 4)

    program = export(Grow(), (X,))
    program.save(files / "linear.ngp")
    save_file({program.spec.xs[0].name: X}, files / "x.safetensors")
    done = run_command(nodes, files, output=small_disk / "y.safetensors")
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert not await trio.to_thread.run_sync(lambda: list(small_disk.iterdir()))
    await nodes.wait_idle()


async def test_a_unit_can_be_cancelled_by_its_id(nodes: Trio, linear: Program) -> None:
    ids: list[str] = []

    async def cancel_when_started(client: Client, event: UnitEvent) -> None:
        if isinstance(event, Offered):
            ids.append(event.unit_id)
        if isinstance(event, Started):
            assert await client.api.cancel_unit(ids[0])

    with pytest.raises(JobFailed, match="cancelled"):
        await run_to_end(nodes, linear, never(), cancel_when_started)
    await nodes.wait_idle()


async def test_switching_sharing_off_ends_the_unit_at_once(nodes: Trio, linear: Program) -> None:
    below = psutil.Process(nodes.provider.pid).children(recursive=True)

    async def switch_off(client: Client, event: UnitEvent) -> None:
        if isinstance(event, Started):
            await trio.to_thread.run_sync(run_cli, nodes.provider.home, "share", "off")

    with pytest.raises(PeerLost, match="owner"):
        await run_to_end(nodes, linear, never(), switch_off)
    try:
        status: Any = run_cli(nodes.provider.home, "status")
        assert status["sharing"]["reason"] == "sharing is off"
        await gone({process.pid for process in below})
    finally:
        run_cli(nodes.provider.home, "share", "on")
    await nodes.wait_idle()


async def test_a_provider_that_is_killed_costs_a_clear_error(files: Path, linear: Program) -> None:
    with network_of_three() as nodes:
        workers = nodes.worker_pids()

        async def kill_provider(client: Client, event: UnitEvent) -> None:
            if isinstance(event, Started):
                nodes.provider.kill()

        with pytest.raises(PeerLost):
            await run_to_end(nodes, linear, never(), kill_provider)
        await gone(workers)
        assert run_cli(nodes.submitter.home, "status")["peer_id"] == nodes.submitter.ready.peer_id
        assert run_command(nodes, files).returncode == NoPeerFound.exit_code
        assert not (files / "y.safetensors").exists()


async def test_a_daemon_that_is_killed_is_started_again_over_its_leftovers(
    files: Path, linear: Program
) -> None:
    with network_of_three() as nodes:
        killed = nodes.provider.pid
        nodes.provider.kill()
        # Where it could make one, the cgroup of its warm worker, which no death takes away.
        assert bool(groups_of(killed)) == (find_hierarchy() is not None)
        peer_id = nodes.provider.ready.peer_id
        assert nodes.provider.start().peer_id == peer_id
        wait_until(lambda: has_peer(nodes.submitter), 60, "the provider to be found again")
        assert run_command(nodes, files).returncode == 0
        assert groups_of(killed) == []


def groups_of(pid: int) -> list[Path]:
    """The cgroups that a daemon of that process id has made for its workers."""
    return list(Path("/sys/fs/cgroup").glob(f"**/nextgpu-{pid}.*"))


async def test_a_second_daemon_of_the_same_home_is_told_so(nodes: Trio) -> None:
    done = await trio.run_process(
        [sys.executable, "-m", "nextgpu_node.daemon.main", "--home", str(nodes.provider.home)],
        check=False,
        capture_stderr=True,
    )
    assert done.returncode == 2
    assert b"already serves this home directory" in done.stderr
    assert b"Traceback" not in done.stderr


async def never() -> AsyncIterator[Mapping[str, torch.Tensor]]:
    """An open input stream on which nothing comes."""
    await trio.sleep_forever()
    yield {}


async def run_to_end(
    nodes: Trio,
    program: Program,
    steps: Steps,
    on_event: Callable[[Client, UnitEvent], Awaitable[None]] | None = None,
) -> None:
    """Run a program for the submitter; `on_event` sees each event."""
    with trio.fail_after(30):
        async with (
            open_client(nodes.submitter.paths) as client,
            client.run(program, steps) as events,
        ):
            async for event in events:
                if on_event is not None:
                    await on_event(client, event)


async def all_events(
    nodes: Trio, program: Program, steps: Steps, **options: Any
) -> list[UnitEvent]:
    with trio.fail_after(30):
        async with (
            open_client(nodes.submitter.paths) as client,
            client.run(program, steps, **options) as events,
        ):
            found = [event async for event in events]
    await nodes.wait_idle()
    return found


def last_result(events: list[UnitEvent]) -> dict[str, torch.Tensor]:
    return [event for event in events if isinstance(event, StepResult)][-1].tensors


async def gone(pids: set[int]) -> None:
    """Until none of these processes exists."""
    await trio.to_thread.run_sync(
        wait_until, lambda: not any(map(psutil.pid_exists, pids)), 10, "the workers to be gone"
    )
