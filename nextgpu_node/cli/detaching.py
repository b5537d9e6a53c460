"""A command whose work goes on when the terminal is gone.

    nextgpu ──fork──► a process of its own session works; plaintext stays with the user's processes
       │                  ▲
       └─ waits, and hands on: its exit code, Ctrl-C (goes on in the background; twice: cancels),
          SIGTERM (ends, to be gone on with)

The fork comes before torch and before any thread; the child says "began" with the job's id.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final

from nextgpu_node.cli.failures import INTERRUPTED, guarded
from nextgpu_node.cli.output import Output
from nextgpu_node.errors import JobFailed
from nextgpu_node.sdk.jobs import Job

_SECOND_CHANCE_S: Final = 2.0
_POLL_S: Final = 0.02

Began = Callable[[Path], None]


def supervise(work: Callable[[Began], int], *, detach: bool, out: Output) -> int:
    """Run `work` in a process of its own; the exit code for this one.

    `work` calls its argument with the job's directory once the job exists.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_the_worker(work, writer, detach=detach, as_json=out.json)
    signal.signal(signal.SIGUSR1, previous)
    os.close(writer)
    try:
        return _Supervisor(pid, reader, out).wait(detach=detach)
    finally:
        os.close(reader)


def _be_the_worker(
    work: Callable[[Began], int], writer: int, *, detach: bool, as_json: bool
) -> None:
    """Never returns: whatever the caller would do next is its parent's to do."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGUSR1, lambda *_: _go_quiet())
        # Ctrl-C is the parent's, and a terminal that closes is no reason to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        def began(directory: Path) -> None:
            if detach:
                sys.stdout.flush()
                sys.stderr.flush()
                _go_quiet()
            os.write(writer, os.fsencode(directory) + b"\n")

        code = guarded(lambda: work(began), as_json=as_json)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        # A fault of our own, which must not unwind into what the parent is doing.
        traceback.print_exc()
    finally:
        os._exit(code)


def _go_quiet() -> None:
    """The terminal belongs to somebody else from here on."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


class _Supervisor:
    def __init__(self, pid: int, reader: int, out: Output) -> None:
        self._pid = pid
        self._reader = reader
        self._out = out
        self._directory: Path | None = None

    def wait(self, *, detach: bool) -> int:
        handlers = {
            signal.SIGTERM: self._hand_on_sigterm,
        }
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            if detach:
                return self._until_began()
            return self._until_ended()
        except KeyboardInterrupt:
            return self._interrupted()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _hand_on_sigterm(self, number: int, frame: FrameType | None) -> None:
        os.kill(self._pid, signal.SIGTERM)

    def _until_began(self) -> int:
        if not self._read_directory(wait=True):
            return self._until_ended()
        job = self._job()
        if self._out.json:
            self._out.print_json(job_id=job.job_id, directory=str(job.directory), status="queued")
        else:
            self._out.say(job.job_id)
            self._out.note(f"Follow it: nextgpu logs -f {job.job_id}")
        return 0

    def _until_ended(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            known = self._read_directory(wait=False)
            hint = f" `nextgpu retry {self._job().job_id}` goes on." if known else ""
            raise JobFailed(f"The process that worked at the job was killed.{hint}")
        return code

    def _interrupted(self) -> int:
        """The first Ctrl-C detaches, a second one cancels; before there is a job, it just ends."""
        if not self._read_directory(wait=False):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            raise KeyboardInterrupt
        os.kill(self._pid, signal.SIGUSR1)
        job = self._job()
        self._out.note(
            "",
            f"Detached. Job {job.job_id} goes on in the background: nextgpu logs -f {job.job_id}",
            "Ctrl-C again, now, cancels it.",
        )
        if self._out.json:
            self._out.print_json(job_id=job.job_id, detached=True)
        try:
            self._give_a_second_chance()
        except KeyboardInterrupt:
            job.cancel()
            self._out.note(f"Cancelled {job.job_id}.")
        return INTERRUPTED

    def _give_a_second_chance(self) -> None:
        until_s = time.monotonic() + _SECOND_CHANCE_S
        while time.monotonic() < until_s:
            pid, _ = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return
            time.sleep(_POLL_S)

    def _read_directory(self, *, wait: bool) -> bool:
        if self._directory is None:
            os.set_blocking(self._reader, wait)
            try:
                line = os.read(self._reader, 8192)
            except BlockingIOError:
                line = b""
            if line:
                self._directory = Path(os.fsdecode(line.rstrip(b"\n")))
        return self._directory is not None

    def _job(self) -> Job:
        assert self._directory is not None
        return Job.at(self._directory)
