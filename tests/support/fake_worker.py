"""A worker without a process: what a lent unit sees of `sandbox.launcher.Worker`."""

from __future__ import annotations

import trio
import trio.testing

from nextgpu_node.sandbox.launcher import WorkerExit
from nextgpu_node.sandbox.wipe import WipeReport

REPORT = WipeReport(True, True, True, "yes", (("processes gone", True),))


class FakeWorker:
    """`inside` is its own end of the socket; it ends by `end`, by its clock, or by `finish`."""

    public_key = bytes([9]) * 32
    layers = ("none",)

    def __init__(self) -> None:
        self.stream, self.inside = trio.testing.memory_stream_pair()
        self.finished = False
        self.asked_to_give_back = trio.Event()
        self._ending: WorkerExit | None = None
        self._ended = trio.Event()
        self._wall_scope = trio.CancelScope()

    async def run_clock(self) -> None:
        """The launcher's part: end the worker when its time is over."""
        with self._wall_scope:
            await trio.sleep_forever()
        await self.end("timeout")

    def ask_to_give_back(self) -> None:
        self.asked_to_give_back.set()

    def restart_clock(self, wall_s: float) -> None:
        self._wall_scope.deadline = trio.current_time() + wall_s

    async def end(self, reason: str, code: int | None = None) -> None:
        if self._ending is None:
            self._ending = WorkerExit(reason, code, None, 0.0, 0.0, 0)  # type: ignore[arg-type]
            self._ended.set()
            await self.inside.aclose()

    async def wait(self) -> WorkerExit:
        await self._ended.wait()
        assert self._ending is not None
        return self._ending

    async def finish(self) -> WipeReport:
        self.finished = True
        await self.end("killed")
        return REPORT
