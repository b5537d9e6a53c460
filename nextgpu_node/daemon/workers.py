"""Warm workers: confined, with a key, waiting for a unit that they do not know yet."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import structlog
import trio

from nextgpu_node.errors import SandboxError
from nextgpu_node.sandbox.launcher import Launcher, Worker
from nextgpu_node.sandbox.policy import WorkerPolicy
from nextgpu_node.sandbox.slots import WorkerExit

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
    15: "owner_stopped",
}
_STATUS_OF_REASON = {"oom": "out_of_memory", "timeout": "timed_out", "cpu-limit": "timed_out"}


def status_of_exit(ending: WorkerExit) -> str:
    """The receipt's word for how a worker ended."""
    if ending.reason == "exited" and ending.code is not None:
        return _STATUS_OF_CODE.get(ending.code, "worker_crashed")
    return _STATUS_OF_REASON.get(ending.reason, "worker_crashed")


class WorkerPool:
    """Keeps `size` workers ready.  `fill` it once, then `run` it for as long as the node lends."""

    def __init__(self, launcher: Launcher, policy: WorkerPolicy, size: int) -> None:
        self._launcher = launcher
        self._policy = policy
        self._size = size
        self._ready: deque[Worker] = deque()
        self._taken = trio.Event()

    @property
    def runtime(self) -> str:
        return self._launcher.runtime

    async def run(self) -> None:
        """Keep the pool at its size until cancelled, then leave no worker."""
        try:
            while True:
                self._taken = trio.Event()
                try:
                    await self.fill()
                except SandboxError:
                    log.warning("worker.start_failed")
                    await trio.sleep(_RETRY_S)
                    continue
                await self._taken.wait()
        finally:
            await self.close()

    async def replace(self, policy: WorkerPolicy, size: int) -> None:
        """Warm workers under the owner's new limits from now on."""
        if (policy, size) != (self._policy, self._size):
            self._policy, self._size = policy, size
            await self._end_ready()
            self._taken.set()

    async def close(self) -> None:
        """End every warm worker now, and make no more."""
        self._size = 0
        await self._end_ready()

    async def _end_ready(self) -> None:
        async with trio.open_nursery() as nursery:
            while self._ready:
                nursery.start_soon(self._ready.popleft().finish)

    async def fill(self) -> None:
        """Bring the pool to its size.  Raises SandboxError where a worker can not be started."""
        while len(self._ready) < self._size:
            self._ready.append(await self._launcher.spawn(self._policy))

    async def take(self, memory_bytes: int) -> Worker:
        """A worker of its own for one unit.  Raises SandboxError where none can be started.

        Warm ones have the owner's memory limit; where less was granted, one is made for it.
        """
        policy = replace(self._policy, memory_bytes=min(memory_bytes, self._policy.memory_bytes))
        while self._ready and policy == self._policy:
            worker = self._ready.popleft()
            self._taken.set()
            if not worker.has_ended:
                return worker
            await worker.finish()
        with trio.move_on_after(_SPAWN_DEADLINE_S):
            return await self._launcher.spawn(policy)
        raise SandboxError("no worker started in time")
