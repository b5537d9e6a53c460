"""An open unit on one peer for one program, shared by many small calls.

    async with open_calls(units_socket, peer, program) as unit:
        results = await unit.call([xs])         # one dict of outputs for each step

    call ──STEP──►  worker  ──RESULT──►  first of the calls that wait

Calls are pipelined: those that wait together travel in one sealed chunk, and since one worker runs
them in order, the next result belongs to the first call that waits.  Programs that keep a carry,
stop early or have a finish graph share nothing: for them a unit takes one call (`is_shared`).

Who retries, and where, is not decided here: a call that the unit did not answer fails with
CallLost, unless it is the one to blame for the end of the unit (docs/executor.md#failures).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from nextgpu_node.api_types import PeerView
from nextgpu_node.core.pipelining import Pace
from nextgpu_node.errors import (
    IntegrityError,
    JobFailed,
    JobTimeout,
    NextGPUError,
    PeerLost,
    Refused,
)
from nextgpu_node.sdk.events import (
    CallResult,
    FinalResult,
    LogText,
    ReceiptVerified,
    Started,
    StepResult,
    UnitEvent,
)
from nextgpu_node.sdk.python_unit import PythonUnit
from nextgpu_node.sdk.unit import Needs, RemoteUnit, open_unit
from nextgpu_protocol.messages import Receipt
from nextgpu_protocol.records import RECORD_HEAD_BYTES
from nextgpu_protocol.sealing import padded_size

if TYPE_CHECKING:
    from torch import Tensor

    from nextgpu_node.graph.artifact import Program

Xs = Mapping[str, "Tensor"]
Ys = dict[str, "Tensor"]
# A step of a program, or a call of a Python unit (python_unit.py); and what it gives.
Step = Any
Result = Any

# Between the end of a unit's input and its receipt: the worker is wiped meanwhile.
_CLOSE_DEADLINE_S: Final = 20.0
# What a safetensors header and the records' heads add to a step, generously.
_STEP_OVERHEAD_BYTES: Final = 2048


class CallLost(NextGPUError):
    """The unit ended before it answered this call. The call itself is not known to be the cause."""

    def __init__(self, cause: NextGPUError, *, suspect: bool) -> None:
        self.cause = cause
        # The worker broke while several calls were with it: one of them may be the reason.
        self.suspect = suspect
        super().__init__(str(cause))


@dataclass(slots=True, eq=False)
class Call:
    """Steps in, results or an error out.  `on_done` is called once, in the trio thread."""

    steps: Sequence[Step]
    on_done: Callable[[Call], None]
    results: list[Result] = field(default_factory=list, repr=False)
    error: NextGPUError | None = None
    sent_s: float = 0.0
    # About what its steps take of the unit's input limit.
    input_bytes: int = 0

    def __post_init__(self) -> None:
        self.input_bytes = sum(step_bytes(xs) for xs in self.steps)


def step_bytes(step: Step) -> int:
    """About what the inputs of one step become when they are sealed."""
    if isinstance(step, bytes):
        return padded_size(len(step) + RECORD_HEAD_BYTES)
    content = sum(tensor.nbytes for tensor in step.values()) + _STEP_OVERHEAD_BYTES
    return padded_size(content + RECORD_HEAD_BYTES)


class Work(Protocol):
    """What a unit is opened for.  `is_shared`: one unit may serve many of its calls."""

    is_shared: bool
    size_bytes: int
    table_version: int
    unit_class: type[RemoteUnit]

    async def start(self, remote: Any) -> None: ...

    async def send(self, remote: Any, steps: Sequence[Step]) -> None: ...

    def log(self, event: LogText) -> None: ...


class ProgramWork:
    """Steps of one program."""

    unit_class: type[RemoteUnit] = RemoteUnit

    def __init__(self, program: Program) -> None:
        self._program = program
        self.is_shared = is_shared(program)
        self.size_bytes = program_bytes(program)
        self.table_version = program.spec.min_table_version

    async def start(self, remote: Any) -> None:
        await remote.start(self._program)

    async def send(self, remote: Any, steps: Sequence[Step]) -> None:
        await remote.send_steps(steps)

    def log(self, event: LogText) -> None:
        """Programs print nothing: their inbox has no such record."""


class PythonWork:
    """Calls of functions.  `on_log` is given (stream, text) of what they print."""

    unit_class: type[RemoteUnit] = PythonUnit
    is_shared = True
    size_bytes = 8192
    table_version = 1

    def __init__(self, on_log: Callable[[int, str], None]) -> None:
        self._on_log = on_log

    async def start(self, remote: Any) -> None:
        await remote.start_calls()

    async def send(self, remote: Any, steps: Sequence[Step]) -> None:
        await remote.send_calls(steps)

    def log(self, event: LogText) -> None:
        self._on_log(event.stream, event.text)


def is_shared(program: Program) -> bool:
    """Whether one unit may serve many calls of `program`: no call leaves a trace for the next."""
    spec = program.spec
    return not spec.carry and spec.stop is None and spec.finish is None


class OpenUnit:
    """The submitter's end of one unit that takes calls.  Made by `open_calls`.

    Everything here runs in one trio thread.  `put` never waits; `call` does.
    """

    def __init__(self, remote: RemoteUnit, peer: PeerView, work: Work) -> None:
        self._remote = remote
        self._work = work
        self.peer = peer
        self.unit_id = remote.unit_id.hex()
        self.is_shared = work.is_shared
        self.began_s = self.active_s = trio.current_time()
        self.pace = Pace()
        self._outgoing: deque[Call] = deque()
        self._in_flight: deque[Call] = deque()
        self._wake = trio.Event()
        self._begun = trio.Event()
        self._started = False
        self._closing = False
        self._unsent_bytes = work.size_bytes
        self._output_left = remote.offer.output_bytes
        self._largest_result = 0
        self.receipt: Receipt | None = None
        self.was_cancelled = False
        self.error: NextGPUError | None = None
        self.ended = trio.Event()
        # Set where it takes no more calls, for whatever reason.
        self.unwanted = trio.Event()

    # --- what a scheduler asks ----------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Calls that wait for their results, sent or about to be."""
        return len(self._in_flight)

    @property
    def is_open(self) -> bool:
        """Whether it takes calls at all."""
        return not self._closing and not self.ended.is_set()

    @property
    def has_started(self) -> bool:
        """Whether the worker has accepted the program."""
        return self._started

    @property
    def failed_in_worker(self) -> bool:
        """Whether the worker itself gave up, and said why under the seal."""
        return self._remote.failure is not None

    def has_room(self, call: Call) -> bool:
        """Whether `call` fits: in what is left of the unit's limits, and behind the others."""
        if not self.is_open:
            return False
        if not self.is_shared:
            return not self._in_flight and not self._closing
        if self._in_flight and len(self._in_flight) >= self.pace.window:
            return False
        inputs = self._remote.sent_bytes + self._unsent_bytes + call.input_bytes
        outputs = (len(self._in_flight) + 1) * self._largest_result
        if inputs > self._remote.offer.input_bytes or outputs > self._output_left:
            return False
        return self.pace.has_time(
            trio.current_time() - self.began_s, self._remote.offer.max_seconds, len(self._in_flight)
        )

    # --- calls --------------------------------------------------------------------------------

    def put(self, call: Call) -> None:
        """Send `call` behind those that wait; it ends by `call.on_done`."""
        assert self.is_open
        self._unsent_bytes += call.input_bytes
        call.sent_s = self.active_s = trio.current_time()
        self._in_flight.append(call)
        self._outgoing.append(call)
        self._wake.set()
        if not self.is_shared:
            self.close()

    async def call(self, steps: Sequence[Step]) -> list[Result]:
        """The outputs of each of `steps`.

        Raises CallLost where the unit ended for another reason than this call, and JobFailed,
        OutOfMemory or JobTimeout where the call is the reason.
        """
        done = trio.Event()
        call = Call(steps, lambda _: done.set())
        self.put(call)
        await done.wait()
        if call.error is not None:
            raise call.error
        return call.results

    def close(self) -> None:
        """Take no more calls; the unit ends when those that it has are answered."""
        self._closing = True
        self.unwanted.set()
        self._wake.set()

    async def cancel(self) -> None:
        """End the unit now: whatever it has not answered is lost."""
        self.close()
        self.was_cancelled = True
        if self.ended.is_set():
            return
        try:
            await self._remote.cancel()
        except PeerLost:
            return  # it has ended already

    # --- the two directions -------------------------------------------------------------------

    async def send_calls(self) -> None:
        """The program, then calls as they come, then the end of the input."""
        try:
            self._begun.set()
            await self._work.start(self._remote)
            self._unsent_bytes -= self._work.size_bytes
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                while self._outgoing:
                    await self._send_batch()
                if self._closing:
                    await self._remote.close_input()
                    return
        except PeerLost:
            return  # the receiving side sees the same end, with the reason in front of it

    async def _send_batch(self) -> None:
        """Everything that waits, in one piece."""
        batch = list(self._outgoing)
        self._outgoing.clear()
        await self._work.send(self._remote, [step for call in batch for step in call.steps])
        self._unsent_bytes -= sum(call.input_bytes for call in batch)

    async def receive_results(self) -> None:
        """Until the unit has ended, in whatever way."""
        await self._begun.wait()
        try:
            async with aclosing(self._remote.events()) as events:
                async for event in events:
                    self._take(event)
        except NextGPUError as exc:
            self.error = exc
        self.end()

    def _take(self, event: UnitEvent) -> None:
        match event:
            case Started():
                self._started = True
                self.pace.restart(trio.current_time())
            case StepResult(tensors=tensors):
                self._take_result(tensors, step_bytes(tensors))
            case CallResult(size_bytes=size_bytes):
                self._take_result(event, size_bytes)
            case LogText():
                self._work.log(event)
            case FinalResult(tensors=tensors):
                self._in_flight[0].results[-1] |= tensors
            case ReceiptVerified(receipt=receipt):
                self.receipt = receipt
            case _:
                pass

    def _take_result(self, result: Result, size: int) -> None:
        self._output_left -= size
        self._largest_result = max(self._largest_result, size)
        if not self._in_flight:
            raise IntegrityError("The peer sent a result that nobody asked for.")
        call = self._in_flight[0]
        call.results.append(result)
        if len(call.results) < len(call.steps) or not self.is_shared:
            return  # a unit of one call is complete with its receipt
        self._in_flight.popleft()
        self.active_s = trio.current_time()
        self.pace.answered(call.sent_s, self.active_s)
        call.on_done(call)

    def end(self) -> None:
        """Tell every call that waits how the unit ended.  Idempotent."""
        if self.ended.is_set():
            return
        self._closing = True
        self.unwanted.set()
        self.ended.set()
        waiting = list(self._in_flight)
        self._in_flight.clear()
        self._outgoing.clear()
        if not self.is_shared and self.error is None and self.receipt is not None:
            for call in waiting:
                call.on_done(call)
            return
        cause = self.error or PeerLost()
        for index, call in enumerate(waiting):
            call.error = self._blame(index, len(waiting), cause)
            call.on_done(call)

    def _blame(self, index: int, count: int, cause: NextGPUError) -> NextGPUError:
        """The error of the call at `index` of `count` that were waiting at the end.

        What the worker says under the seal is about the call that it was working on: the first.
        A worker that was killed says nothing; then it can only be told for a call that was alone.
        """
        if not isinstance(cause, JobFailed | JobTimeout | Refused):
            return CallLost(cause, suspect=False)
        if self.failed_in_worker:
            # Before it started, it was the program that did not load: nobody's call did that.
            guilty = index == 0 or not self._started
            return cause if guilty else CallLost(cause, suspect=False)
        if count == 1 and self._started:
            return cause
        return CallLost(cause, suspect=True)


@asynccontextmanager
async def open_calls(
    units_socket: Path, peer: PeerView, program: Program | Work, needs: Needs | None = None
) -> AsyncIterator[OpenUnit]:
    """A unit on `peer` that takes calls of `program` until the block is left.

    Leaving it in the ordinary way waits for the answers that are due and for the receipt; leaving
    it by an exception ends the unit at once.  Raises Refused, PeerLost, IntegrityError or
    DaemonUnreachable where the unit can not be opened; how it ends is in `unit.error`.
    """
    work = as_work(program)
    opening = open_unit(
        units_socket,
        peer,
        needs or Needs(),
        table_version=work.table_version,
        unit_class=work.unit_class,
    )
    async with opening as remote:
        unit = OpenUnit(remote, peer, work)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(unit.send_calls)
                nursery.start_soon(unit.receive_results)
                yield unit
                unit.close()
                await _wait_for_end(unit)
                nursery.cancel_scope.cancel()
        finally:
            unit.end()


def as_work(program: Program | Work) -> Work:
    """A program as what a unit is opened for; work of another kind as it is."""
    return program if isinstance(program, ProgramWork | PythonWork) else _of_program(program)


def _of_program(program: Any) -> Work:
    return ProgramWork(program)


async def _wait_for_end(unit: OpenUnit) -> None:
    """Until the receipt is there: for as long as answers are due, and a while."""
    while not unit.ended.is_set():
        due = unit.in_flight
        with trio.move_on_after(_CLOSE_DEADLINE_S):
            await unit.ended.wait()
        if not due and not unit.ended.is_set():
            unit.error = PeerLost("The peer did not send the unit's receipt in time.")
            return


def program_bytes(program: Program) -> int:
    """About what the program and its tensors take of a unit's input limit."""
    tensors = [*program.constants.values(), *program.carry.values()]
    return padded_size(sum(tensor.nbytes for tensor in tensors) + 64 * 1024)
