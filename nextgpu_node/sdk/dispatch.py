"""Calls to peers: a queue for each program, units that empty it, another peer where one is lost.

    submit ──► Lane(program): queue ──► OpenUnit(peer A)  OpenUnit(peer B)  …
                  ▲                          │
                  └──── lost with its unit ──┘          idle for `idle_s`: closed, the peer is free

Units are opened while calls wait and peers are free, and take calls as they answer them, so a slow
peer gets few.  Which peer, how long to leave one alone and what to do about an error is decided by
`core` through the peer book.  Everything here runs in one trio thread.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from nextgpu_node.api_types import PeerView
from nextgpu_node.core.retry import Remedy, remedy_for
from nextgpu_node.errors import DaemonUnreachable, NextGPUError, Refused
from nextgpu_node.sdk.peer_book import PeerBook
from nextgpu_node.sdk.pool import (
    Call,
    CallLost,
    OpenUnit,
    Result,
    Step,
    Work,
    as_work,
    open_calls,
)
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.errors import ErrorCode

if TYPE_CHECKING:
    from nextgpu_node.graph.artifact import Program

# The standard library's: in a user's process it is for the user to turn on.
log = logging.getLogger(__name__)

_POLL_S: Final = 0.1
# A unit costs about this much to open: a queue that is empty sooner is not worth another one.
_WORTH_A_UNIT_S: Final = 0.05
# While nobody knows how long a call takes: so many waiting calls are worth one more unit.
_CALLS_A_UNIT: Final = 16
# How long a first answer may take before other peers are asked to help.
_FIRST_ANSWER_S: Final = 0.1
_RECRUIT_EVERY_S: Final = 0.25
# A slot that we have just left is free again within milliseconds.
_BUSY_RETRIES: Final = 8
_BUSY_RETRY_S: Final = 0.025
_WIPED_S: Final = 1.0
# Another program's calls wait no longer than this for a unit that is never idle.
_FAIR_SHARE_S: Final = 1.0


class Job(Protocol):
    """Somebody's call.  All three are called in the trio thread, the last two at most once."""

    steps: Sequence[Step]

    def start(self) -> bool:
        """It is sent now, perhaps not for the first time.  False where nobody wants it any more."""

    def succeed(self, results: list[Result]) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass(slots=True, eq=False)
class _Ticket:
    """A job on its way.  `avoid` are peers that were too small or too slow for it."""

    job: Job
    call: Call
    failures: int = 0
    alone: bool = False
    dropped: bool = False
    avoid: set[str] = field(default_factory=set)
    error: NextGPUError | None = None
    unit: OpenUnit | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What one dispatcher may use.  Times in seconds.

    `patience_s` is how long calls wait while no peer takes them; `attempts` how often one call is
    sent before the loss of its peer is its own.
    """

    max_units: int = 16
    idle_s: float = 2.0
    patience_s: float = 15.0
    attempts: int = 4


class Dispatcher:
    """`run` it once; `submit` from the same trio thread."""

    def __init__(
        self, units_socket: Path, book: PeerBook, needs: Needs, limits: Limits | None = None
    ) -> None:
        self.units_socket = units_socket
        self.book = book
        self.needs = needs
        self.limits = limits or Limits()
        self.held: Counter[str] = Counter()  # units by peer, open or about to be
        self._recent: dict[str, list[float]] = {}
        self._left_s: dict[str, float] = {}
        self._lanes: dict[int, Lane] = {}
        self._nursery: trio.Nursery | None = None
        self._empty = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then every unit ends at once and every call fails."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for lane in list(self._lanes.values()):
                lane.fail_all(NextGPUError("The executor was ended before this call was run."))
            self._lanes.clear()
            self._empty.set()

    async def close(self) -> None:
        """Wait for every call, then for every unit and its receipt."""
        while self._lanes:
            self._empty = trio.Event()
            for lane in self._lanes.values():
                lane.close_when_done()
            await self._empty.wait()

    def submit(self, program: Program | Work, job: Job) -> Callable[[], None]:
        """Run `job` somewhere.  What is given back drops it: nobody waits for it any more."""
        assert self._nursery is not None
        lane = self._lanes.get(id(program))
        if lane is None:
            lane = self._lanes[id(program)] = Lane(self, program)  # keeps it, and so its id
            self._nursery.start_soon(self._run_lane, lane)
        return lane.push(job)

    async def _run_lane(self, lane: Lane) -> None:
        await lane.run()
        # Neither calls nor units: the program may go from memory.
        del self._lanes[id(lane.program)]
        if not self._lanes:
            self._empty.set()

    @property
    def unit_count(self) -> int:
        return self.held.total()

    def start_soon(self, task: Callable[..., Awaitable[None]], *args: Any) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(task, *args)

    def hold(self, peer_id: str) -> None:
        self.held[peer_id] += 1
        self._recent.setdefault(peer_id, []).append(time.monotonic())

    def release(self, peer_id: str) -> None:
        self._left_s[peer_id] = trio.current_time()
        self.held[peer_id] -= 1
        self.held += Counter()  # drops zeros

    def left_just_now(self, peer_id: str) -> bool:
        """Whether the slot that is in use there is one of ours, which is still being wiped."""
        return trio.current_time() - self._left_s.get(peer_id, -math.inf) < _WIPED_S

    def may_open(self, peer: PeerView) -> bool:
        """Whether this peer should have a slot for one more unit of ours."""
        if not self.held[peer.peer_id]:
            return True
        since_s = time.monotonic() - 3.0  # longer than the book keeps what it knows
        recent = [at_s for at_s in self._recent.get(peer.peer_id, ()) if at_s > since_s]
        self._recent[peer.peer_id] = recent
        return peer.free_slots > len(recent)

    def has_units_beside(self, lane: Lane) -> bool:
        return any(other.units for other in self._lanes.values() if other is not lane)

    def make_room(self, wanting: Lane) -> None:
        """Have another program's unit end, so that `wanting` gets its peer: an idle one at best."""
        others = [
            unit for lane in self._lanes.values() if lane is not wanting for unit in lane.units
        ]
        if any(not unit.is_open for unit in others):
            return  # one is on its way out already
        now_s = trio.current_time()
        idle = [unit for unit in others if not unit.in_flight]
        aged = [unit for unit in others if now_s - unit.began_s > _FAIR_SHARE_S]
        for unit in (idle or sorted(aged, key=lambda unit: unit.began_s))[:1]:
            unit.close()


class Lane:
    """The calls of one program.  `run` from its first call until it has neither calls nor units."""

    def __init__(self, dispatcher: Dispatcher, program: Program | Work) -> None:
        self._dispatcher = dispatcher
        self.program = program
        self._work = as_work(program)
        self._queue: deque[_Ticket] = deque()
        self.units: list[OpenUnit] = []
        self._tickets: dict[OpenUnit, set[_Ticket]] = {}
        self._opening = 0
        self._tended = 0
        self._wake = trio.Event()
        self._resting = True
        self._closing = False
        self._shared = self._work.is_shared
        self._met_daemon = False
        self._unfit: dict[str, NextGPUError] = {}  # peers on which the program does not load
        self._program_bytes = self._work.size_bytes
        self._patient_since_s = trio.current_time()

    def push(self, job: Job) -> Callable[[], None]:
        ticket = _Ticket(job, Call(job.steps, _nothing))
        self._queue.append(ticket)
        self.feed()
        return lambda: self._drop(ticket)

    def close_when_done(self) -> None:
        """Do not wait out the idle time."""
        self._closing = True
        for unit in self.units:
            if not unit.in_flight and not self._queue:
                unit.close()

    def fail_all(self, error: NextGPUError) -> None:
        waiting = list(self._queue)
        self._queue.clear()
        for ticket in waiting:
            # What became of it when it last ran says more than that nobody takes it now.
            ticket.job.fail(ticket.error or error)

    def feed(self) -> None:
        """Give waiting calls to units that have room."""
        for _ in range(len(self._queue)):
            ticket = self._queue[0]
            unit = self._unit_for(ticket)
            if unit is not None:
                self._queue.popleft()
                self._give(unit, ticket)
            elif ticket.avoid or ticket.alone:
                self._queue.rotate(-1)  # a choosy one: let the next try
            else:
                break
        if self._queue and self._resting:
            self._wake.set()
        if self._closing:
            self.close_when_done()

    def _unit_for(self, ticket: _Ticket) -> OpenUnit | None:
        """The unit that should answer soonest."""
        best: OpenUnit | None = None
        best_s = 0.0
        for unit in self.units:
            if unit.peer.peer_id in ticket.avoid or (ticket.alone and unit.in_flight):
                continue
            wait_s = (unit.in_flight + 1) * (unit.pace.service_s or 1.0)
            if (best is None or wait_s < best_s) and unit.has_room(ticket.call):
                best, best_s = unit, wait_s
        return best

    def _give(self, unit: OpenUnit, ticket: _Ticket) -> None:
        if ticket.dropped or not ticket.job.start():
            return
        ticket.call = Call(ticket.job.steps, lambda _: self._done(ticket, unit))
        ticket.unit = unit
        self._tickets[unit].add(ticket)
        unit.put(ticket.call)
        if ticket.alone:
            unit.close()

    def _drop(self, ticket: _Ticket) -> None:
        """Forget a call.  A unit that works for nobody any more is ended, and its peer free."""
        ticket.dropped = True
        unit = ticket.unit
        if unit is not None and all(one.dropped for one in self._tickets[unit]):
            unit.close()
            self._dispatcher.start_soon(unit.cancel)
        self._wake.set()

    # --- what comes back ----------------------------------------------------------------------

    def _done(self, ticket: _Ticket, unit: OpenUnit) -> None:
        ticket.unit = None
        self._tickets[unit].discard(ticket)
        error = ticket.call.error
        if ticket.dropped:
            pass
        elif error is None:
            ticket.job.succeed(ticket.call.results)
        elif isinstance(error, CallLost):
            self._lost(ticket, error)
        else:
            self._failed(ticket, unit, error)
        self.feed()

    def _lost(self, ticket: _Ticket, lost: CallLost) -> None:
        """Not its fault, as far as is known: again, and alone where it may have been."""
        bystander = not lost.suspect and remedy_for(lost.cause) is Remedy.GIVE_UP
        ticket.failures += not bystander
        ticket.alone = ticket.alone or lost.suspect
        ticket.error = None if bystander else lost.cause
        if ticket.failures >= self._dispatcher.limits.attempts:
            ticket.job.fail(lost.cause)
        else:
            self._queue.appendleft(ticket)

    def _failed(self, ticket: _Ticket, unit: OpenUnit, error: NextGPUError) -> None:
        """Its own doing.  What is too large or too slow for this peer may still fit another."""
        ticket.failures += 1
        ticket.avoid.add(unit.peer.peer_id)
        ticket.error = error
        again = remedy_for(error) is Remedy.ELSEWHERE and any(
            peer.peer_id not in ticket.avoid for peer in self._dispatcher.book.candidates()
        )
        if again and ticket.failures < self._dispatcher.limits.attempts:
            self._queue.appendleft(ticket)
        else:
            ticket.job.fail(error)

    # --- units --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Open units while calls wait and peers are free."""
        self._patient_since_s = trio.current_time()
        while self._queue or self._tended:
            self._wake = trio.Event()
            pause_s = await self._recruit()
            self._resting = pause_s == math.inf
            with trio.move_on_after(pause_s):
                await self._wake.wait()
            self._resting = False

    async def _recruit(self) -> float:
        """One more unit, if that is worth it and possible; the seconds until the next look."""
        if any(ticket.dropped for ticket in self._queue):
            self._queue = deque(ticket for ticket in self._queue if not ticket.dropped)
        if not self._queue or self.units:
            self._patient_since_s = trio.current_time()
        if not self._queue:
            return math.inf
        if not self._wants_unit():
            return _POLL_S / 4
        if self._dispatcher.unit_count >= self._dispatcher.limits.max_units:
            return self._wait_for_peers(None)
        try:
            peer = await self._next_peer()
        except DaemonUnreachable as exc:
            return self._wait_for_peers(exc)
        except NextGPUError as exc:  # our own daemon says no: it is of another version, say
            self.fail_all(exc)
            return 0
        self._met_daemon = True
        if peer is None:
            return self._wait_for_peers(None)
        self._opening += 1
        self._tended += 1
        self._dispatcher.hold(peer.peer_id)
        self._dispatcher.start_soon(self._tend, peer)
        return 0

    def _wants_unit(self) -> bool:
        waiting = len(self._queue)
        if not self._tended:
            return True
        if self._dispatcher.unit_count >= self._dispatcher.limits.max_units:
            return False
        if not self._shared:
            return waiting > self._opening
        if self._opening:
            return waiting > _CALLS_A_UNIT * self._opening
        if any(ticket.alone or ticket.avoid for ticket in self._queue) or not self.units:
            return True
        if any(unit.pace.answers for unit in self.units):
            slowest_s = max(unit.pace.service_s for unit in self.units)
            return waiting * slowest_s / len(self.units) > _WORTH_A_UNIT_S
        youngest_s = max(unit.began_s for unit in self.units)
        return trio.current_time() - youngest_s > _FIRST_ANSWER_S

    async def _next_peer(self) -> PeerView | None:
        """The best peer that has a slot for us now; asks the daemon where none is known."""
        for fresh in (False, True):
            if fresh:
                await self._dispatcher.book.refresh()
            candidates = self._dispatcher.book.candidates()
            for peer in candidates:
                if self._dispatcher.may_open(peer) and self._has_work_for(peer):
                    return peer
        self._fail_what_fits_nowhere(candidates)
        return None

    def _has_work_for(self, peer: PeerView) -> bool:
        return any(self._fits(ticket, peer) for ticket in self._queue)

    def _fits(self, ticket: _Ticket, peer: PeerView) -> bool:
        needed = self._program_bytes + ticket.call.input_bytes
        unfit = peer.peer_id in ticket.avoid or peer.peer_id in self._unfit
        return not unfit and needed <= peer.input_bytes

    def _fail_what_fits_nowhere(self, candidates: list[PeerView]) -> None:
        """Too large for every peer that is there.  Where none is there, that is another matter."""
        if not candidates:
            return
        largest = max(peer.input_bytes for peer in candidates)
        for ticket in list(self._queue):
            if not any(self._fits(ticket, peer) for peer in candidates):
                self._queue.remove(ticket)
                needed = self._program_bytes + ticket.call.input_bytes
                known = ticket.error or next(iter(self._unfit.values()), None)
                ticket.job.fail(known or _too_large(needed, largest))

    def _wait_for_peers(self, unreachable: DaemonUnreachable | None) -> float:
        """Nobody is free.  Seconds until the next look; after a while without any, the end."""
        if self._tended:
            return _RECRUIT_EVERY_S
        if self._dispatcher.has_units_beside(self):
            # Our own units hold the peers, and end in time.
            self._patient_since_s = trio.current_time()
        waited_s = trio.current_time() - self._patient_since_s
        if unreachable is not None and not self._met_daemon:
            self.fail_all(unreachable)
        elif waited_s >= self._dispatcher.limits.patience_s:
            self.fail_all(unreachable or self._dispatcher.book.nobody())
        else:
            self._dispatcher.make_room(self)
            return _POLL_S
        return 0

    async def _tend(self, peer: PeerView) -> None:
        """One unit from its request to its receipt."""
        unit: OpenUnit | None = None
        began_s = trio.current_time()
        try:
            async with AsyncExitStack() as stack:
                try:
                    unit = await self._enter(stack, peer)
                finally:
                    self._opening -= 1
                self.units.append(unit)
                self._tickets[unit] = set()
                self.feed()
                await self._until_unwanted(unit)
                self.units.remove(unit)
        except NextGPUError as exc:
            remedy = self._dispatcher.book.failed(peer.peer_id, exc)
            log.debug("unit.not_opened cause=%s remedy=%s", type(exc).__name__, remedy.value)
        finally:
            self._dispatcher.release(peer.peer_id)
            self._tended -= 1
            if unit is not None:
                self._tickets.pop(unit, None)
                if unit in self.units:  # cancelled
                    self.units.remove(unit)
            self._wake.set()
        if unit is not None and unit.error is not None:
            self._note_end(unit, unit.error)
        elif unit is not None:
            seconds = trio.current_time() - began_s
            self._dispatcher.book.succeeded(peer.peer_id, moved_bytes=0, seconds=seconds)

    async def _enter(self, stack: AsyncExitStack, peer: PeerView) -> OpenUnit:
        dispatcher = self._dispatcher
        for tries in itertools.count(1):
            opening = open_calls(dispatcher.units_socket, peer, self._work, dispatcher.needs)
            try:
                return await stack.enter_async_context(opening)
            except Refused as exc:
                wiping = exc.code == ErrorCode.BUSY and dispatcher.left_just_now(peer.peer_id)
                if not wiping or tries == _BUSY_RETRIES:
                    raise
            await trio.sleep(_BUSY_RETRY_S)
        raise AssertionError("unreachable")

    def _note_end(self, unit: OpenUnit, error: NextGPUError) -> None:
        """What the end of `unit` says about its peer, or about the program."""
        log.debug("unit.ended_early cause=%s", type(error).__name__)
        if unit.was_cancelled:
            return  # by us: it says nothing about the peer
        if not unit.failed_in_worker:
            self._dispatcher.book.failed(unit.peer.peer_id, error)
        elif not unit.has_started:
            self._unfit[unit.peer.peer_id] = error
            if remedy_for(error) is Remedy.GIVE_UP:
                self.fail_all(error)  # it would load nowhere

    async def _until_unwanted(self, unit: OpenUnit) -> None:
        """Until it has ended, is to be closed, or nobody called for `idle_s`."""
        idle_s = self._dispatcher.limits.idle_s
        while unit.is_open:
            rest_s = unit.active_s + idle_s - trio.current_time()
            if rest_s <= 0 and not unit.in_flight:
                return
            with trio.move_on_after(max(rest_s, idle_s / 4)):
                await unit.unwanted.wait()


def _too_large(needed: int, largest: int) -> NextGPUError:
    return Refused(
        f"The call needs about {needed:,} bytes of input, program included; the peers that are "
        f"there take at most {largest:,}. Send less at once, or ask for other peers."
    )


def _nothing(_: Call) -> None:
    """Of a call that was not sent yet."""
