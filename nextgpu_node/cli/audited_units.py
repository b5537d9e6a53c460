"""The units of a privacy audit: one for each way in which a unit can end, through real daemons.

    success   error   timeout   cancel   worker killed   daemon killed   restart

Each carries a mark of its own and ends while its worker has the mark in memory, but for the first
and the last, which end by themselves.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil
import trio

from nextgpu_node.cli.processes import DaemonProcess
from nextgpu_node.errors import JobFailed, JobTimeout, NextGPUError, PeerLost
from nextgpu_node.privacy.marks import Marks, raised
from nextgpu_node.sdk.client import Client, open_client
from nextgpu_node.sdk.events import ReceiptVerified, StepResult, UnitEvent
from nextgpu_node.sdk.unit import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from nextgpu_node.graph.artifact import Program

_REPEATS: Final = 500
_UNIT_DEADLINE_S: Final = 300
_TIMEOUT_S: Final = 1
_LONG_S: Final = 240

Step = Mapping[str, "Tensor"]
_Unit = AbstractAsyncContextManager[AsyncIterator[UnitEvent]]
Ending = Callable[["AuditedNodes", trio.Event], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class AuditedNodes:
    """The provider and the submitter of one audit."""

    provider: DaemonProcess
    submitter: DaemonProcess

    @property
    def daemons(self) -> dict[str, int]:
        """Those that run, by their part."""
        both = {"provider": self.provider, "submitter": self.submitter}
        return {name: node.pid for name, node in both.items() if node.returncode is None}

    def launchers(self) -> list[int]:
        """The daemons' own child processes."""
        return [c.pid for pid in self.daemons.values() for c in psutil.Process(pid).children()]

    def workers(self) -> list[int]:
        """What runs below the launchers."""
        found = []
        for pid in self.launchers():
            with suppress(psutil.NoSuchProcess):
                found += [c.pid for c in psutil.Process(pid).children(recursive=True)]
        return found


@dataclass(frozen=True, slots=True)
class Exit:
    """How one unit ended, beside how it was to end: its receipt's word, where there is one."""

    unit: str
    wanted: str
    ended: str

    @property
    def held(self) -> bool:
        return self.ended == self.wanted


def make_program() -> Program:
    """y = (x + 1)[index]: the marked bytes, raised; an index too large is an error at run time."""
    import torch

    from nextgpu_node.graph.export import export

    class Raised(torch.nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return torch.index_select(x + 1, 0, index)

    x, index = _inputs(b"a" * 32, 0)
    return export(Raised(), (x, index))


def _inputs(mark: bytes, first: int) -> tuple[Tensor, Tensor]:
    import torch

    x = torch.tensor(list(mark * _REPEATS), dtype=torch.uint8)
    return x, torch.arange(first, first + x.numel())


class AuditedUnits:
    """Runs units of one program and says how each ended.  `during` is called once, while the first
    unit's worker holds its mark and has sent its result."""

    def __init__(self, nodes: AuditedNodes, marks: Marks, program: Program) -> None:
        self.nodes = nodes
        self._marks = marks
        self._program = program

    async def success(self, during: Callable[[], None]) -> Exit:
        async def look(_nodes: AuditedNodes, close_input: trio.Event) -> None:
            during()
            close_input.set()

        return await self._run("success", "done", look)

    async def restart(self) -> Exit:
        return await self._run("restart", "done", _close)

    async def error(self) -> Exit:
        # The whole text arrives; then the program reads past its end.
        return await self._run("error", "failed", _close, first_index=1 << 40)

    async def timeout(self) -> Exit:
        return await self._run("timeout", "timed_out", _wait, max_seconds=_TIMEOUT_S)

    async def cancel(self) -> Exit:
        return await self._run("cancel", "cancelled", None)

    async def worker_killed(self) -> Exit:
        async def kill(nodes: AuditedNodes, _close_input: trio.Event) -> None:
            for pid in nodes.workers():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await trio.sleep_forever()

        return await self._run("worker killed", "worker_crashed", kill)

    async def daemon_killed(self) -> Exit:
        async def kill(nodes: AuditedNodes, _close_input: trio.Event) -> None:
            await trio.to_thread.run_sync(nodes.provider.kill)
            await trio.sleep_forever()

        return await self._run("daemon killed", "peer lost", kill)

    async def _run(
        self,
        unit: str,
        wanted: str,
        ending: Ending | None,
        *,
        first_index: int = 0,
        max_seconds: int = _LONG_S,
    ) -> Exit:
        """`ending` None: leave after the first result, which cancels."""
        mark = self._marks.plant(unit)
        names = [spec.name for spec in self._program.spec.xs]
        step = dict(zip(names, _inputs(mark, first_index), strict=True))
        conversation = _Conversation(self.nodes, mark, ending)
        async with open_client(self.nodes.submitter.paths) as client:
            with trio.move_on_after(_UNIT_DEADLINE_S):
                needs = Needs(max_seconds=max_seconds)
                await conversation.run(client, self._program, step, needs)
        return Exit(unit, wanted, conversation.ended)


class _Conversation:
    """One unit, from its first step to its receipt, or to what came instead of one."""

    def __init__(self, nodes: AuditedNodes, mark: bytes, ending: Ending | None) -> None:
        self.ended = "too late"
        self.failed = False
        self._nodes = nodes
        self._mark = mark
        self._ending = ending
        self._close_input = trio.Event()
        if ending is _close:
            self._close_input.set()

    async def run(self, client: Client, program: Program, step: Step, needs: Needs) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await self._listen(client.run(program, self._steps(step), needs), nursery)
                nursery.cancel_scope.cancel()
        except* PeerLost:
            self.ended = "peer lost"
        except* (JobFailed, JobTimeout):
            # The receipt has said how, before; where there was none, nobody has.
            self.failed = True

    async def _listen(self, unit: _Unit, nursery: trio.Nursery) -> None:
        async with unit as events:
            async for event in events:
                if isinstance(event, StepResult):
                    self._check(event)
                    if self._ending is None:
                        self.ended = "cancelled"
                        return
                    nursery.start_soon(self._ending, self._nodes, self._close_input)
                elif isinstance(event, ReceiptVerified):
                    self.ended = event.receipt.status

    async def _steps(self, step: Step) -> AsyncIterator[Step]:
        yield step
        await self._close_input.wait()

    def _check(self, result: StepResult) -> None:
        (y,) = result.tensors.values()
        if bytes(y.tolist()) != raised(self._mark) * _REPEATS:
            raise NextGPUError("The audit's own unit gave a wrong result.")


async def _close(_nodes: AuditedNodes, close_input: trio.Event) -> None:
    close_input.set()


async def _wait(_nodes: AuditedNodes, _close_input: trio.Event) -> None:
    await trio.sleep_forever()
