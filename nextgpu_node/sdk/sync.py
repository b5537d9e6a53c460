"""The client for programs without trio: one call, several steps, or the events of a unit.

    ys = nextgpu.run(program, x)                    one step, outputs by name
    results = nextgpu.run_steps(program, steps)     a scan, or a batch of steps, on one peer
    with nextgpu.run_events(program, steps) as events:  progress, results, checkpoints, receipt
        for event in events: ...

Each opens a unit of its own, in a thread of its own: usable anywhere, also below asyncio or trio.
Many small calls are quicker through an Executor, which keeps units open between them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from nextgpu_node.errors import JobFailed
from nextgpu_node.graph.local import match_inputs
from nextgpu_node.paths import Paths
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import FinalResult, StepResult, UnitEvent
from nextgpu_node.sdk.modules import check_inputs
from nextgpu_node.sdk.unit import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from nextgpu_node.graph.artifact import Program

# Events that wait for their reader; the peer waits behind them.
_READ_AHEAD: Final = 8
_LOOK_S: Final = 0.05


def run(
    program: Program,
    *inputs: Any,
    needs: Needs | None = None,
    paths: Paths | None = None,
    **named: Any,
) -> dict[str, Tensor]:
    """One step of `program` on the best peer that takes it; outputs by name, on the CPU.

    The receipt is verified before this returns.  Raises ProgramError for inputs that do not fit,
    and what `Client.run` raises.
    """
    xs = match_inputs(program.spec, inputs, named)
    (ys,) = run_steps(program, [xs], needs=needs, paths=paths)
    return ys


def run_steps(
    program: Program,
    steps: Iterable[Mapping[str, Tensor]],
    *,
    needs: Needs | None = None,
    paths: Paths | None = None,
    carry: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """The outputs of each step, in order, from one peer; those of a finish graph come last.

    `carry` goes on from an earlier Checkpoint.  The receipt is verified before this returns.
    """
    checked = (_checked(program, xs) for xs in steps)
    with run_events(program, checked, needs=needs, paths=paths, carry=carry) as found:
        results = [e.tensors for e in found if isinstance(e, StepResult | FinalResult)]
    if not results:
        raise JobFailed("The unit ended without results.")
    return results


def _checked(program: Program, xs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    check_inputs(program.spec, xs)
    return xs


@contextmanager
def run_events(
    program: Program,
    steps: Iterable[Mapping[str, Tensor]],
    *,
    needs: Needs | None = None,
    paths: Paths | None = None,
    carry: Mapping[str, Tensor] | None = None,
    return_carry: bool = False,
    checkpoint_ms: int = 0,
    checkpoint_steps: int = 0,
) -> Iterator[Iterator[UnitEvent]]:
    """What happens to one unit, as it happens (sdk/events.py).  Leaving the block ends the unit.

    `steps` is read in another thread.  Iterating raises what `Client.run` raises.
    """
    thread = _UnitThread()

    async def converse() -> None:
        async with (
            open_client(paths) as client,
            client.run(
                program,
                thread.read_elsewhere(steps),
                needs,
                carry=carry,
                return_carry=return_carry,
                checkpoint_ms=checkpoint_ms,
                checkpoint_steps=checkpoint_steps,
            ) as found,
        ):
            async for event in found:
                await thread.hand_out(event)

    with thread.running(converse):
        yield thread.read()


class _UnitThread:
    """A trio thread for one unit, and the queue between it and its reader."""

    def __init__(self) -> None:
        self._events: queue.Queue[UnitEvent | None] = queue.Queue(_READ_AHEAD)
        self._scope = trio.CancelScope()
        self._error: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._abandoned = False

    @contextmanager
    def running(self, converse: Callable[[], Any]) -> Iterator[None]:
        thread = threading.Thread(target=self._run, args=(converse,), name="nextgpu-unit")
        thread.start()
        try:
            yield
        finally:
            self._abandoned = True
            if self._token is not None:
                try:
                    self._token.run_sync_soon(self._scope.cancel)
                except trio.RunFinishedError:
                    self._token = None
            thread.join()

    def _run(self, converse: Callable[[], Any]) -> None:
        async def guarded() -> None:
            self._token = trio.lowlevel.current_trio_token()
            with self._scope:
                if self._abandoned:
                    self._scope.cancel()
                await converse()

        try:
            trio.run(guarded)
        except BaseException as exc:  # for the reader, whatever it is
            self._error = exc
        self._put_last()

    def _put_last(self) -> None:
        while not self._abandoned:
            try:
                self._events.put(None, timeout=_LOOK_S)
                return
            except queue.Full:
                continue

    def read(self) -> Iterator[UnitEvent]:
        while (event := self._events.get()) is not None:
            yield event
        if self._error is not None:
            raise self._error

    async def hand_out(self, event: UnitEvent) -> None:
        while True:
            try:
                self._events.put_nowait(event)
                return
            except queue.Full:
                await trio.sleep(_LOOK_S / 10)

    async def read_elsewhere(self, steps: Iterable[Mapping[str, Tensor]]) -> Any:
        """The caller's iterable may block: it is read in a worker thread, step by step."""
        iterator = iter(steps)
        while True:
            step = await trio.to_thread.run_sync(next, iterator, None, abandon_on_cancel=True)
            if step is None:
                return
            yield step
