from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import pytest
import trio

from nextgpu_node.api import server
from nextgpu_node.cli.main import main
from nextgpu_node.paths import Paths
from tests.unit.api.backend import MemoryBackend

CaptureFd: TypeAlias = "pytest.CaptureFixture[str]"


@dataclass(frozen=True)
class Done:
    """A command that ended.  Whatever it did, no user may ever see a traceback."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        assert "Traceback" not in self.out + self.err, self.err


class Cli:
    """`nextgpu` as a process of its own, with a home of its own; stdin is no terminal."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.paths = Paths.under(home)
        self.cwd = home
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "NEXTGPU_HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "nextgpu_node.cli.main", *args]

    def __call__(self, *args: str) -> Done:
        done = subprocess.run(
            self.command(*args),
            env=self.environ,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def here(self, monkeypatch: pytest.MonkeyPatch, capfd: CaptureFd, *args: str) -> Done:
        """The same in this process, which has torch loaded already."""
        monkeypatch.setattr(sys, "argv", ["nextgpu", *args])
        monkeypatch.setenv("NEXTGPU_HOME", str(self.home))
        monkeypatch.chdir(self.cwd)
        monkeypatch.setattr(sys, "stdin", None)
        code = main()
        return Done(code, *capfd.readouterr())

    async def beside(self, *args: str) -> Done:
        """The same while the test itself serves the API."""
        return await trio.to_thread.run_sync(lambda: self(*args))


@pytest.fixture
def cli() -> Iterator[Cli]:
    # Not tmp_path: pytest's own directories are too long for the address of a unix socket.
    with TemporaryDirectory(prefix="ngpu-") as directory:
        yield Cli(Path(directory))


@pytest.fixture
async def backend(nursery: trio.Nursery, cli: Cli) -> MemoryBackend:
    """A daemon's API where `cli` looks for it."""
    backend = MemoryBackend()
    await nursery.start(server.run, backend, cli.paths.api_socket)
    return backend
