"""Daemons as child processes, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from nextgpu_node.errors import NextGPUError
from nextgpu_node.paths import Paths

_READY_DEADLINE_S = 60
_STOP_DEADLINE_S = 15


@dataclass(frozen=True, slots=True)
class Ready:
    """What a daemon says when it serves."""

    peer_id: str
    address: str  # multiaddr with /p2p/, to bootstrap from


class DaemonProcess:
    """One nextgpud on loopback with a home directory of its own."""

    def __init__(
        self,
        home: Path,
        *,
        bootstrap: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
        log: IO[bytes] | None = None,
        module: str = "nextgpu_node.daemon.main",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`environ` replaces this process's own."""
        self.home = home
        self.paths = Paths.under(home)
        self._settings = {
            "network.listen": '["/ip4/127.0.0.1/tcp/0"]',
            "network.bootstrap": json.dumps(list(bootstrap)),
            **(settings or {}),
        }
        self._log = log
        self._module = module
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DaemonProcess:
        """Started, not yet awaited: several come up side by side."""
        self.begin()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> Ready:
        """Start it and wait until it serves.  Raises NextGPUError if it does not."""
        self.begin()
        return self.wait_ready()

    def begin(self) -> None:
        """Start it without waiting."""
        reader, writer = os.pipe()
        command = [sys.executable, "-m", self._module, "--home", str(self.home)]
        command += ["--ready-fd", str(writer)]
        for key, value in self._settings.items():
            command += ["--set", f"{key}={value}"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(writer,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log or subprocess.DEVNULL,
            start_new_session=True,
            env=self._environ,
        )
        os.close(writer)
        self._ready_pipe = os.fdopen(reader)

    def wait_ready(self) -> Ready:
        """Until it serves."""
        with self._ready_pipe as pipe:
            line = pipe.readline() if _readable(pipe.fileno(), _READY_DEADLINE_S) else ""
        if not line:
            self.stop()
            raise NextGPUError(f"A daemon did not start (exit {self.returncode}).")
        report = json.loads(line)
        self.ready = Ready(report["peer_id"], report["addresses"][0])
        return self.ready

    def stop(self) -> None:
        """Ask it to end, insist after a while."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """kill -9, as a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class CommandFailed(NextGPUError):
    """A command of the demo failed."""


def run_cli(home: Path, *arguments: str, check: bool = True) -> dict[str, object]:
    """`nextgpu --home HOME --json ARGUMENTS…` as a process; its JSON object."""
    done = subprocess.run(
        [sys.executable, "-m", "nextgpu_node.cli", "--home", str(home), "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if check and done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise CommandFailed(f"nextgpu {arguments[0]}: {said[-1] if said else done.returncode}")
    lines = done.stdout.strip().splitlines()
    reply: dict[str, object] = json.loads(lines[-1]) if lines else {}
    return reply


def wait_until(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Poll `condition` until it is true.  Raises NextGPUError naming `what` after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end_s:
            raise NextGPUError(f"Gave up waiting for {what} after {deadline_s:g} s.")
        time.sleep(0.1)


def _readable(descriptor: int, deadline_s: float) -> bool:
    return bool(select.select([descriptor], [], [], deadline_s)[0])
