"""Inputs are held against the program before anything is sent; each mistake is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nextgpu_node.cli.inputs import load_program, prepare_steps, read_tensors
from nextgpu_node.errors import NextGPUError, ProgramError, UsageError
from nextgpu_protocol.program import Graph, ProgramSpec, Symbol, TensorSpec

SPEC = ProgramSpec(
    min_table_version=1,
    step=Graph((), ()),
    xs=(TensorSpec("x", "float32", ("batch", 3)), TensorSpec("mask", "int64", ("batch",))),
    symbols=(Symbol("batch", 1, 4),),
)


def _write(path: Path, **tensors: torch.Tensor) -> Path:
    file = path / "x.safetensors"
    save_file(tensors, file)
    return file


def _batch(size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(size, 3), "mask": torch.ones(size, dtype=torch.int64)}


def test_inputs_come_in_the_programs_order(tmp_path: Path) -> None:
    inputs = prepare_steps(SPEC, _write(tmp_path, **_batch(2)), steps_axis=False, steps=None)
    (step,) = inputs
    assert list(step) == ["x", "mask"]
    assert step["x"].shape == (2, 3)


def test_a_leading_axis_is_sliced_into_steps(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(18.0).reshape(3, 2, 3), "mask": torch.zeros(3, 2).long()}
    file = _write(tmp_path, **tensors)
    inputs = prepare_steps(SPEC, file, steps_axis=True, steps=None)
    assert inputs.count == 3
    assert [step["x"][0, 0].item() for step in inputs] == [0.0, 6.0, 12.0]
    assert prepare_steps(SPEC, file, steps_axis=True, steps=2).count == 2


def test_a_program_without_inputs_needs_no_file() -> None:
    spec = ProgramSpec(min_table_version=1, step=Graph((), ()))
    inputs = prepare_steps(spec, None, steps_axis=False, steps=5)
    assert list(inputs) == [{}] * 5


@pytest.mark.parametrize(
    ("tensors", "options", "sentence"),
    [
        ({"x": torch.ones(2, 3)}, {}, "has no 'mask'; the program takes x, mask"),
        ({**_batch(2), "y": torch.ones(1)}, {}, "'y' is not an input"),
        ({**_batch(2), "x": torch.ones(2, 3).double()}, {}, "x is float64, .* takes float32"),
        ({**_batch(2), "x": torch.ones(2, 4)}, {}, "a dimension of 3 is declared, 4 came"),
        ({**_batch(2), "x": torch.ones(6)}, {}, "2 dimensions are declared, 1 came"),
        ({**_batch(2), "mask": torch.ones(3).long()}, {}, "batch is 2 elsewhere, here 3"),
        (_batch(5), {}, "batch is 5, the program takes 1 to 4"),
        (_batch(2), {"steps": 2}, "--steps-axis"),
        (_batch(2), {"steps": 0}, "--steps takes a whole number"),
        (_batch(2), {"steps_axis": True, "steps": 3}, "holds 2 steps, --steps asks for 3"),
        (_batch(0), {"steps_axis": True}, "one length from 1 on: x 0, mask 0"),
        ({**_batch(2), "mask": torch.tensor(1)}, {"steps_axis": True}, "x 2, mask 0"),
    ],
)
def test_a_mismatch_names_the_file_and_what_was_expected(
    tmp_path: Path, tensors: dict[str, torch.Tensor], options: dict[str, int], sentence: str
) -> None:
    file = _write(tmp_path, **tensors)
    wanted = {"steps_axis": False, "steps": None, **options}
    with pytest.raises(UsageError, match=sentence) as caught:
        prepare_steps(SPEC, file, **wanted)  # type: ignore[arg-type]
    assert "steps" in sentence or str(file) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff" * 100, (1 << 40).to_bytes(8, "little")])
def test_a_file_that_is_no_safetensors_is_said_so(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(UsageError, match=r"x\.safetensors: is not a safetensors file"):
        read_tensors(file)


def test_a_file_that_can_not_be_read_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can not be read: No such file"):
        read_tensors(tmp_path / "none")
    with pytest.raises(UsageError, match="can not be read: Is a directory"):
        read_tensors(tmp_path)
    with pytest.raises(ProgramError, match="can not be read: No such file"):
        load_program(tmp_path / "none")


def test_a_program_that_is_none_is_said_so(tmp_path: Path) -> None:
    file = tmp_path / "model.ngp"
    file.write_bytes(b"PK\x03\x04 a pickle, perhaps")
    with pytest.raises(NextGPUError, match=r"not a NextGPU program") as caught:
        load_program(file)
    assert caught.value.exit_code == 2
    assert str(file) in str(caught.value)
