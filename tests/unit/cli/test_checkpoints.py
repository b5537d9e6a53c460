"""Checkpoint files: whole, of one program, and told apart from everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nextgpu_node.cli import checkpoints
from nextgpu_node.cli.checkpoints import CheckpointFile, Interval, Resumed, load_checkpoint
from nextgpu_node.cli.inputs import StepInputs
from nextgpu_node.errors import NextGPUError, UsageError
from nextgpu_protocol.program import TENSOR, Graph, Node, ProgramSpec, Ref, TensorSpec

VECTOR = TensorSpec("s", "float32", (2,))
# s += x, y = s
SPEC = ProgramSpec(
    min_table_version=1,
    carry=(VECTOR,),
    xs=(replace(VECTOR, name="x"),),
    ys=(replace(VECTOR, name="y"),),
    step=Graph((Node("aten.add.Tensor", (Ref(0), Ref(1)), (), TENSOR),), (2, 2)),
)
CARRY = {"s": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("30s", Interval(ms=30_000)),
        ("250ms", Interval(ms=250)),
        ("5m", Interval(ms=300_000)),
        ("1h", Interval(ms=3_600_000)),
        ("100steps", Interval(steps=100)),
        ("1 step", Interval(steps=1)),
    ],
)
def test_an_interval_is_a_time_or_steps(text, interval):
    assert checkpoints.parse_interval(text) == interval


@pytest.mark.parametrize("text", ["", "30", "0s", "0steps", "-1s", "steps", "1.5s", "3 days"])
def test_what_is_no_interval_is_told_with_examples(text):
    with pytest.raises(UsageError, match="30s, 5m, 100steps"):
        checkpoints.parse_interval(text)


def test_a_checkpoint_knows_its_steps_over_several_runs(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    CheckpointFile(path, SPEC, Resumed()).write(4, CARRY)
    first = load_checkpoint(path, SPEC)
    assert first.steps == 4
    CheckpointFile(path, SPEC, first).write(3, {"s": torch.zeros(2)})
    second = load_checkpoint(path, SPEC)
    assert second.steps == 7
    assert second.carry is not None
    assert second.carry["s"].tolist() == [0.0, 0.0]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch):
    path = tmp_path / "state.safetensors"
    file = CheckpointFile(path, SPEC, Resumed())
    file.write(4, CARRY)

    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(NextGPUError, match="No space left"):
        file.write(5, {"s": torch.zeros(2)})
    monkeypatch.undo()
    assert load_checkpoint(path, SPEC).steps == 4
    assert [one.name for one in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (CARRY, None, "is not a checkpoint"),
        (CARRY, {"steps": "4"}, "is not a checkpoint"),
        (CARRY, {"nextgpu": "checkpoint", "steps": "-4"}, "is not a checkpoint"),
        (CARRY, {"nextgpu": "checkpoint", "steps": "4"}, "of another program"),
        ({"t": CARRY["s"]}, "own", "has no s"),
        ({"s": CARRY["s"].half()}, "own", "has no s of float32"),
        ({"s": torch.zeros(3)}, "own", "a dimension of 2 is declared, 3 came"),
    ],
)
def test_what_is_no_checkpoint_of_this_program_is_refused(tmp_path, tensors, metadata, words):
    path = tmp_path / "state.safetensors"
    if metadata == "own":
        hashed = checkpoints.program_hash(SPEC)
        metadata = {"nextgpu": "checkpoint", "steps": "4", "program": hashed}
    save_file(tensors, path, metadata)
    with pytest.raises(UsageError, match=words):
        load_checkpoint(path, SPEC)


def test_only_the_steps_that_are_left_are_sent():
    inputs = StepInputs({"x": torch.arange(10.0).reshape(5, 2)}, 5, sliced=True)
    rest = Resumed(3, CARRY).rest_of(inputs)
    assert [xs["x"].tolist() for xs in rest] == [[6.0, 7.0], [8.0, 9.0]]
    with pytest.raises(UsageError, match="nothing is left"):
        Resumed(5, CARRY).rest_of(inputs)


def test_the_file_that_is_resumed_from_may_be_gone_on_in(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"there already")
    checkpoints.check_checkpoint_out(path, path, force=False)
    with pytest.raises(UsageError, match="exists already"):
        checkpoints.check_checkpoint_out(path, None, force=False)
