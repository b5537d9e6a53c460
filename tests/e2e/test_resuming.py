"""Training and generation through real daemons: interrupted, resumed, and none the wiser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from safetensors.torch import load_file, save_file
from torch import nn

from nextgpu_node.errors import JobFailed
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.generation import generate_program, generation_steps
from nextgpu_node.graph.optimizers import AdamW
from nextgpu_node.graph.trained import load_carry_into
from nextgpu_node.graph.training import train_step
from nextgpu_node.sdk.client import Steps, open_client
from nextgpu_node.sdk.events import Checkpoint, StepResult
from tests.support.models import tiny_llama
from tests.support.nodes import Trio

STEPS = 6
Tensors = Mapping[str, torch.Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, 4, 8, generator=generator)
    return [{"input": x, "target": torch.tensor([0, 1, 2, 0])} for x in inputs]


@pytest.fixture(scope="module")
def training() -> Program:
    first = batches()[0]
    return train_step(
        network(), nn.CrossEntropyLoss(), first["input"], first["target"],
        optimizer=AdamW(lr=1e-2), seed=7,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sampling() -> Program:
    return generate_program(tiny_llama(), max_length=32, temperature=1.0, top_p=0.9, seed=7)


@pytest.mark.parametrize("kind", ["training", "sampling"])
async def test_a_run_whose_worker_is_killed_goes_on_from_its_checkpoint_bit_for_bit(
    nodes: Trio, training: Program, sampling: Program, kind: str
) -> None:
    program = training if kind == "training" else sampling
    prompt = torch.tensor([1, 2, 3])
    steps = batches() if kind == "training" else list(generation_steps(prompt, STEPS))
    whole, last = await run(nodes, program, steps, return_carry=True)

    checkpoint, early = await run_until_killed(nodes, program, steps, after=4)
    assert checkpoint.steps == 4
    await nodes.wait_idle()
    late, resumed = await run(nodes, program, steps[4:], carry=checkpoint.carry, return_carry=True)
    assert same([*early, *late], whole)
    assert last is not None
    assert resumed is not None
    assert same([resumed.carry], [last.carry])


async def test_what_was_trained_there_is_in_the_module_here(nodes: Trio, training: Program) -> None:
    _, last = await run(nodes, training, batches(), return_carry=True)
    assert last is not None
    module = load_carry_into(network(), last.carry)
    assert torch.equal(module[0].weight, last.carry["model/0.weight"])
    assert not torch.equal(module[0].weight, network()[0].weight)


def run_cli_training(nodes: Trio, files: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "nextgpu_node.cli", "--home", str(nodes.submitter.home)),
            *("run", str(files / "training.ngp"), "--input", str(files / "batches.safetensors")),
            *("--steps-axis", "--quiet", "--json", *more),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


async def test_the_command_line_keeps_a_checkpoint_and_resumes_from_it(
    nodes: Trio, training: Program, tmp_path: Path
) -> None:
    training.save(tmp_path / "training.ngp")
    stacked = {name: torch.stack([one[name] for one in batches()]) for name in batches()[0]}
    save_file(stacked, tmp_path / "batches.safetensors")
    state = tmp_path / "state.safetensors"

    def run_it(output: str, *more: str) -> Any:
        done = run_cli_training(nodes, tmp_path, "--output", str(tmp_path / output), *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    run_it("whole.safetensors")
    run_it("early.safetensors", "--steps", "4", "--checkpoint-out", str(state),
           "--checkpoint-every", "3steps")  # fmt: skip
    assert run_it(
        "late.safetensors", "--resume-from", str(state), "--checkpoint-out", str(state)
    )["steps"] == STEPS - 4  # fmt: skip
    losses = [load_file(tmp_path / f"{n}.safetensors")["loss"] for n in ("whole", "early", "late")]
    assert torch.equal(losses[0], torch.cat(losses[1:]))
    done = run_cli_training(nodes, tmp_path, "--output", str(tmp_path / "more.safetensors"),
                            "--resume-from", str(state))  # fmt: skip
    assert done.returncode == 2
    assert "nothing is left to do" in done.stderr
    await nodes.wait_idle()


async def run(
    nodes: Trio, program: Program, steps: Steps, **options: Any
) -> tuple[list[Tensors], Checkpoint | None]:
    """The outputs of each step, and the last checkpoint."""
    results: list[Tensors] = []
    last: Checkpoint | None = None
    with trio.fail_after(60):
        async with (
            open_client(nodes.submitter.paths) as client,
            client.run(program, steps, **options) as events,
        ):
            async for event in events:
                if isinstance(event, StepResult):
                    results.append(event.tensors)
                if isinstance(event, Checkpoint):
                    last = event
    await nodes.wait_idle()
    return results, last


async def run_until_killed(
    nodes: Trio, program: Program, steps: list[Any], *, after: int
) -> tuple[Checkpoint, list[Tensors]]:
    """A run that asks for its state every 2 steps, and loses its worker after `after` of them."""
    results: list[Tensors] = []
    last: Checkpoint | None = None

    async def some_then_none() -> AsyncIterator[Tensors]:
        for xs in steps[:after]:
            yield xs
        await trio.sleep_forever()

    with pytest.raises(JobFailed), trio.fail_after(60):  # noqa: PT012
        async with (
            open_client(nodes.submitter.paths) as client,
            client.run(program, some_then_none(), checkpoint_steps=2) as events,
        ):
            async for event in events:
                if isinstance(event, StepResult):
                    results.append(event.tensors)
                if isinstance(event, Checkpoint):
                    last = event
                    if event.steps == after:
                        for pid in nodes.worker_pids():
                            os.kill(pid, signal.SIGKILL)
    assert last is not None
    return last, results


def same(left: list[Tensors], right: list[Tensors]) -> bool:
    return len(left) == len(right) and all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(left, right, strict=True)
    )
