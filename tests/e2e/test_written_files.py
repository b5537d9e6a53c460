"""Everything that is written in a full session belongs to a kind of the registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nextgpu_node.cli.processes import DaemonProcess, run_cli, wait_until
from nextgpu_node.data import kind_of
from nextgpu_node.graph.artifact import Program
from nextgpu_node.paths import Paths
from tests.support.nodes import LENDING, has_peer
from tests.support.written_files import WriteTrace


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteTrace]:
    """Of all processes that are started from here on."""
    root = Path(tempfile.mkdtemp(prefix="ngpu-w-"))
    try:
        with WriteTrace(root) as trace:
            for name, value in trace.environment().items():
                monkeypatch.setenv(name, value)
            for name in [name for name in os.environ if name.startswith("XDG_")]:
                monkeypatch.delenv(name)
            monkeypatch.chdir(root / "work")
            monkeypatch.setattr(tempfile, "tempdir", str(root / "tmp"))
            yield trace
    finally:
        shutil.rmtree(root)


def run_session(root: Path, program: Program) -> None:
    """Lend, borrow, map, look, change, kill, restart, copy, delete."""
    work = Path("work")
    program.save(root / work / "p.ngp")
    (root / work / "in").mkdir()
    for name in ("one", "two"):
        step = {program.spec.xs[0].name: torch.ones(2, 4)}
        save_file(step, root / work / "in" / f"{name}.safetensors")
    provider = DaemonProcess(root / "lend", settings=LENDING)
    with provider:
        bootstrap = [provider.wait_ready().address]
        submitter = DaemonProcess(root / "borrow", bootstrap=bootstrap)
        with submitter:
            submitter.wait_ready()
            wait_until(lambda: has_peer(submitter), 60, "the provider to be found")
            for words in (
                "run p.ngp --input in/one.safetensors --output y.safetensors --receipt r.json",
                "map p.ngp --inputs in --outputs out",
                "jobs",
                "data export --all -o copy.tar",
                "config set sharing.threads 1",
                "web --print-url",
                "history",
            ):
                run_cli(submitter.home, *words.split())
            run_cli(provider.home, *["invite", "--gpu-seconds", "60", "--expires", "1h"])
            provider.kill()
            provider.start()
            run_cli(provider.home, "share", "off")
        run_cli(submitter.home, "data", "delete", "--all", "--yes")


#: What the session itself names on a command line.
NAMED = ("p.ngp", "y.safetensors", "r.json", "copy.tar", "in", "out")


def is_named(path: Path, work: Path) -> bool:
    """A file that the user asked for, or its draft beside it (files.write_whole)."""
    if work not in path.parents:
        return False
    top = path.relative_to(work).parts[0]
    return top in NAMED or (top.startswith(".") and top[1:].startswith(NAMED))


def unknown_paths(trace: WriteTrace) -> set[Path]:
    homes = [Paths.under(trace.root / name) for name in ("lend", "borrow")]
    own = {trace.root / "lend", trace.root / "borrow"}
    return {
        path
        for path in trace.written - own
        if not is_named(path, trace.root / "work")
        and all(kind_of(path, home) is None for home in homes)
    }


def test_a_session_writes_nothing_that_the_registry_does_not_know(
    trace: WriteTrace, linear: Program
) -> None:
    run_session(trace.root, linear)
    written = trace.written
    kinds = {
        kind.name
        for home in ("lend", "borrow")
        for path in written
        if (kind := kind_of(path, Paths.under(trace.root / home)))
    }
    # The trace works: all of this was written, some of it for moments only.
    assert kinds >= {"config", "identity", "jobs", "peer-history", "tokens", "api-socket", "worker"}
    assert any(path.name == "tokens.sqlite3-journal" for path in written)
    assert any(path.name == "state.json.new" for path in written)
    assert {os.fspath(path) for path in unknown_paths(trace)} == set()


@pytest.mark.parametrize(
    ("code", "where"),
    [
        (
            "open('/dev/shm/ngpu-{}', 'w').close(); import os; os.unlink('/dev/shm/ngpu-{}')",
            "/dev/shm/ngpu-{}",
        ),
        ("import tempfile; tempfile.NamedTemporaryFile(prefix='x').close()", "tmp/x*"),
        (
            "import sqlite3; sqlite3.connect('lend/state/notes').execute('CREATE TABLE t(x)')",
            "lend/state/notes",
        ),
        ("import os; os.system('echo x > home/.shell-wrote-this')", "home/.shell-wrote-this"),
    ],
)
def test_a_file_that_nobody_registered_is_found(trace: WriteTrace, code: str, where: str) -> None:
    (trace.root / "lend" / "state").mkdir(parents=True)
    mark = str(os.getpid())
    script = code.format(mark, mark) if "{}" in code else code
    subprocess.run([sys.executable, "-c", script], cwd=trace.root, check=True)
    found = [path for path in unknown_paths(trace) if path.match(where.format(mark))]
    assert found, unknown_paths(trace)
