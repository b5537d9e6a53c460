"""Program files: written in one step, read without trust."""

import os
import struct

import pytest
import torch

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.artifact import MAGIC, Program
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import run_local

HEAD = len(MAGIC)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3).eval()
    return export(linear, (torch.randn(2, 4),), dynamic={"input": {0: "batch"}})


@pytest.fixture
def path(program, tmp_path):
    program.save(tmp_path / "model.ngp")
    return tmp_path / "model.ngp"


def test_a_loaded_program_is_the_saved_one(program, path):
    loaded = Program.load(path)
    assert loaded.spec == program.spec
    x = torch.randn(5, 4)
    assert torch.equal(run_local(loaded, x)["output"], run_local(program, x)["output"])
    assert list(path.parent.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_old_file(program, path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        program.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def _replaced(start, piece):
    return lambda data: data[:start] + piece + data[start + len(piece) :]


HOSTILE = {
    "empty": lambda data: b"",
    "another file": lambda data: b"PK\x03\x04" + data,
    "cut short": lambda data: data[:-1],
    "only a head": lambda data: data[: HEAD + 24],
    "bytes too many": lambda data: data + b"\0",
    "a huge length": _replaced(HEAD, struct.pack(">Q", 2**63)),
    "lengths that sum up by wrapping": _replaced(HEAD, struct.pack(">QQ", 2**64 - 1, 2**64 - 1)),
    "a broken program": _replaced(HEAD + 24, b"\xc1"),
    "a broken image": lambda data: data[:-8] + b"[".ljust(8),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name, path):
    path.write_bytes(HOSTILE[name](path.read_bytes()))
    with pytest.raises(ProgramError):
        Program.load(path)


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.ngp")
    with pytest.raises(ProgramError, match="not a regular file"):
        Program.load(tmp_path / "pipe.ngp")


def test_parts_that_do_not_belong_together_are_refused(program):
    with pytest.raises(ProgramError, match="names"):
        Program.from_parts(program.spec, {})
    wrong = {name: tensor.double() for name, tensor in program.constants.items()}
    with pytest.raises(ProgramError, match="dtype"):
        Program.from_parts(program.spec, wrong)


def test_the_summary_names_inputs_outputs_and_operators(program):
    summary = program.summary()
    assert "input: float32 [batch, 4]" in summary
    assert "output: float32 [batch, 3]" in summary
    assert "1 aten.linear.default" in summary
    assert "2 tensors, 60 bytes" in summary
