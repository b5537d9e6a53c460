"""export, inspect and run as a user calls them; no peer is needed for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.local import run_local
from tests.unit.cli.conftest import CaptureFd, Cli

MODELS = """
import torch

class Doubler(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.linear = torch.nn.Linear(width, 2)

    def forward(self, x):
        return {"y": self.linear(x) * 2}

def make():
    return Doubler()

def fails():
    raise RuntimeError("no weights here")

ready = Doubler().eval()
number = 3
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: their own module, example inputs, an exported program."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "my_models.py").write_text(MODELS)
    (directory / "broken.py").write_text("import torch\nraise ValueError('not today')\n")
    save_file({"x": torch.arange(6.0).reshape(2, 3)}, directory / "x.safetensors")
    return directory


@pytest.fixture(scope="module")
def program(project: Path) -> Path:
    from nextgpu_node.graph.export import export

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    export(double, (), {"x": torch.zeros(2, 3)}).save(project / "double.ngp")
    return project / "double.ngp"


@pytest.fixture
def at_project(cli: Cli, project: Path) -> Cli:
    cli.cwd = project
    return cli


def test_export_then_inspect(
    at_project: Cli, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: CaptureFd
) -> None:
    monkeypatch.syspath_prepend(str(project))
    options = ["-o", "out.ngp", "--example", "x.safetensors", "--dynamic", "x:0=batch", "--json"]
    done = at_project.here(monkeypatch, capfd, "export", "my_models:make", *options)
    assert (done.code, done.err) == (0, "")
    exported = json.loads(done.out)
    assert exported["schema"] == 1
    assert exported["bytes"] == (project / "out.ngp").stat().st_size
    program = Program.load(project / "out.ngp")
    assert program.spec.xs[0].shape == ("batch", 3)
    assert run_local(program, x=torch.ones(1, 3))["y"].shape == (1, 2)
    shown = at_project.here(monkeypatch, capfd, "inspect", "out.ngp")
    assert (shown.code, shown.out) == (0, program.summary() + "\n")
    args = ["my_models:make", "-o", "out.ngp", "--example", "x.safetensors"]
    again = at_project.here(monkeypatch, capfd, "export", *args)
    assert again.code == 2
    assert "--force" in again.err


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("my_models", "is not MODULE:OBJECT"),
        ("no_such_module:x", "There is no module 'no_such_module' here"),
        ("my_models:Nothing", "my_models has no 'Nothing'"),
        ("my_models:number", "is a int, not an nn.Module"),
        ("my_models:fails", "RuntimeError: no weights here"),
        ("broken:x", "ValueError: not today"),
    ],
)
def test_a_target_that_is_no_module_is_said_so(
    project: Path, monkeypatch: pytest.MonkeyPatch, target: str, sentence: str
) -> None:
    from nextgpu_node.cli.programs import _load_module
    from nextgpu_node.errors import UsageError

    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    with pytest.raises(UsageError, match=sentence):
        _load_module(target)


@pytest.mark.parametrize("option", ["x", "x:0", "x=batch", "x:0=", "x:a=batch", ":0=b", "x:0=2b"])
def test_a_dynamic_that_is_none_is_said_so(at_project: Cli, option: str) -> None:
    from nextgpu_node.cli.programs import _parse_dynamic
    from nextgpu_node.errors import UsageError

    with pytest.raises(UsageError, match="x:0=batch"):
        _parse_dynamic((option,))


def test_example_inputs_that_do_not_fit_are_said_so(
    at_project: Cli, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: CaptureFd
) -> None:
    save_file({"z": torch.ones(2, 3)}, project / "z.safetensors")
    monkeypatch.syspath_prepend(str(project))
    args = ["my_models:ready", "-o", "o.ngp", "--example", "z.safetensors"]
    done = at_project.here(monkeypatch, capfd, "export", *args)
    assert done.code == 2
    assert "do not fit" in done.err
    assert not (project / "o.ngp").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["nothing.ngp", "--output", "y"], "nothing.ngp: can not be read: No such file"),
        (["x.safetensors", "--output", "y"], "x.safetensors: This is not a NextGPU program"),
        (["none.py", "--output", "y"], "none.py: can not be read: No such file"),
        (["my_models.py", "--output", "."], ".: is not empty"),
        (["double.ngp", "--output", "y", "--", "more"], "Only scripts (.py) take arguments"),
        (["double.ngp", "--output", "y"], "takes inputs (x). Name a file: --input"),
        (["double.ngp", "--input", "none", "--output", "y"], "none: can not be read"),
        (["double.ngp", "--input", "double.ngp", "--output", "y"], "is not a safetensors file"),
        (["double.ngp", "--input", "wide.safetensors", "--output", "y"], "3 is declared, 4 came"),
        (["double.ngp", "--input", "x.safetensors", "--output", "double.ngp"], "--force"),
        (["double.ngp", "--output", "y", "--memory", "much"], "--memory takes a size"),
        (["double.ngp", "--output", "y", "--vram", "4000"], "--vram takes a size"),
        (["double.ngp", "--output", "y", "--max-seconds", "0"], "--max-seconds"),
        (["double.ngp", "--output", "y", "--peer", "12D3KooW"], "--peer takes a peer ID"),
    ],
)
def test_run_refuses_before_anything_is_sent(
    at_project: Cli,
    project: Path,
    program: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: CaptureFd,
    args: list[str],
    sentence: str,
) -> None:
    save_file({"x": torch.ones(2, 4)}, project / "wide.safetensors")
    done = at_project.here(monkeypatch, capfd, "run", *args)
    assert done.code == 2
    assert done.out == ""
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not (project / "y").exists()


def test_run_without_a_daemon_is_exit_code_3(
    at_project: Cli,
    project: Path,
    program: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: CaptureFd,
) -> None:
    args = ["double.ngp", "--input", "x.safetensors", "--output", "y"]
    done = at_project("run", *args)
    assert done.code == 3
    assert done.err.splitlines() == [
        "queued: looking for a peer",
        "nextgpu: No nextgpud answers here. Start it with `nextgpu up`.",
    ]
    quiet = at_project.here(monkeypatch, capfd, "run", *args, "--quiet", "--json")
    assert json.loads(quiet.out)["exit_code"] == 3
    assert len(quiet.err.splitlines()) == 1
    assert not (project / "y").exists()
