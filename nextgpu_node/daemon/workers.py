"""Warm workers: confined, with a key, waiting for a unit that they do not know yet."""

from __future__ import annotations

from collections import deque

import structlog
import trio

from nextgpu_node.errors import SandboxError
from nextgpu_node.sandbox.launcher import Launcher, Worker, WorkerExit
from nextgpu_node.sandbox.policy import WorkerPolicy

log = structlog.get_logger()

_RETRY_S = 5
_SPAWN_DEADLINE_S = 30

# Exit codes of `worker.unit.WorkerExitCode`, as a receipt words them.
_STATUS_OF_CODE = {
    0: "done",
    10: "failed",
    11: "out_of_memory",
    12: "protocol_error",
    13: "over_limit",
    14: "submitter_lost",
}
_STATUS_OF_REASON = {"oom": "out_of_memory", "timeout": "timed_out", "cpu-limit": "timed_out"}


def status_of_exit(ending: WorkerExit) -> str:
    """The receipt's word for how a worker ended."""
    if ending.reason == "exited" and ending.code is not None:
        return _STATUS_OF_CODE.get(ending.code, "worker_crashed")
    return _STATUS_OF_REASON.get(ending.reason, "worker_crashed")


class WorkerPool:
    """Keeps `size` workers ready while the node lends, and none while it does not."""

    def __init__(self, launcher: Launcher, policy: WorkerPolicy, size: int) -> None:
        self._launcher = launcher
        self._policy = policy
        self._size = size
        self._ready: deque[Worker] = deque()
        self._changed = trio.Event()
        self._active = False

    @property
    def runtime(self) -> str:
        return self._launcher.runtime

    def set_active(self, active: bool) -> None:
        """Fill the pool, or give its memory back."""
        self._active = active
        self._changed.set()

    async def run(self) -> None:
        """Keep the pool at its size until cancelled, then leave no worker."""
        try:
            while True:
                self._changed = trio.Event()
                await self._adjust()
                await self._changed.wait()
        finally:
            await self._drain()

    async def wait_ready(self) -> None:
        """Until the first warm worker is there.  Raises SandboxError where none comes up."""
        worker = await self.take()
        self._ready.append(worker)

    async def take(self) -> Worker:
        """A worker of its own for one unit.  Raises SandboxError where none can be started."""
        while self._ready:
            worker = self._ready.popleft()
            self._changed.set()
            if not worker.has_ended:
                return worker
            await worker.finish()
        with trio.move_on_after(_SPAWN_DEADLINE_S):
            return await self._launcher.spawn(self._policy)
        raise SandboxError("no worker started in time")

    async def _adjust(self) -> None:
        if not self._active:
            await self._drain()
        while self._active and len(self._ready) < self._size:
            try:
                self._ready.append(await self._launcher.spawn(self._policy))
            except SandboxError:
                log.warning("worker.start_failed")
                await trio.sleep(_RETRY_S)

    async def _drain(self) -> None:
        while self._ready:
            await self._ready.popleft().finish()
