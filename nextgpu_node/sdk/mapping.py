"""A map: many shards of one program over many peers.

    core/schedule.py decides  ◄── events ──  MapRun  ── effects ──►  runners: units on peers
                                               │
                                               └──►  Sink: results, positions, JobEvents

Exactly one result of each shard is kept.  A shard that fails is listed, and the map goes on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from nextgpu_node.api_types import PeerView
from nextgpu_node.clock import now_ms
from nextgpu_node.core.choice import Preferences
from nextgpu_node.core.job_state import (
    Checkpointed,
    JobEvent,
    PeerDistrusted,
    PeerFailed,
    ShardConfirmed,
    ShardEntered,
    ShardFailed,
    ShardKept,
    ShardRetracted,
)
from nextgpu_node.core.retry import Remedy
from nextgpu_node.core.schedule import (
    HERE,
    Accepted,
    Cancel,
    Check,
    Compare,
    Compared,
    Confirm,
    Distrust,
    Effect,
    Event,
    Fail,
    Failed,
    Finish,
    Judge,
    Judged,
    Keep,
    PeersSeen,
    Purpose,
    Retract,
    Schedule,
    ScheduleLimits,
    Start,
    Starve,
    Succeeded,
    Suspected,
    Tick,
)
from nextgpu_node.errors import (
    DaemonUnreachable,
    JobTimeout,
    NextGPUError,
    OutOfMemory,
    Refused,
    UsageError,
)
from nextgpu_node.sdk.attempt import AttemptOptions, Outcome, Position, Steps, Tensors
from nextgpu_node.sdk.audit import Audit, agree, hardware_class
from nextgpu_node.sdk.client import Client
from nextgpu_node.sdk.events import Checkpoint, UnitEvent
from nextgpu_node.sdk.peer_book import PeerBook
from nextgpu_node.sdk.peer_history import PeerHistory
from nextgpu_node.sdk.results import tensors_digest, together
from nextgpu_node.sdk.runners import FreshUnits, RunHere, Runner, SharedUnits, can_share
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.errors import ErrorCode

if TYPE_CHECKING:
    from torch import Tensor

    from nextgpu_node.graph.artifact import Program

_TICK_S: Final = 0.1
_REFRESH_S: Final = 2.0
_DAEMON_RETRY_S: Final = 1.0
# Beyond the lease the provider ends the unit itself; this is for one that does not answer.
_LEASE_GRACE_S: Final = 90.0
# All results are here: a peer that is slow with its receipt, or silent, holds nobody up for long.
_CLOSE_S: Final = 20.0
# Outcomes that are here and not yet stored: what bounds the memory of a map.
_MAX_UNSTORED: Final = 32


class Shard(Protocol):
    """One piece of a map."""

    @property
    def name(self) -> str: ...

    def load(self) -> Steps:
        """The inputs of each step.  May block; what it raises fails this shard alone."""


@dataclass(frozen=True, slots=True)
class Canary:
    """Inputs whose answer is known, of the same program."""

    steps: Steps = field(repr=False)
    answer: Tensors = field(repr=False)


@dataclass(frozen=True, slots=True)
class MapOptions:
    """`in_flight`: shards that one peer has at a time, at most.  `here`: no peer is asked at all.

    `stack`: results of steps get a leading axis also where there is one step.
    """

    needs: Needs = field(default_factory=Needs)
    preferences: Preferences = field(default_factory=Preferences)
    in_flight: int = 4
    audit: Audit = field(default_factory=Audit)
    canaries: Sequence[Canary] = ()
    checkpoint_ms: int = 0
    checkpoint_steps: int = 0
    return_carry: bool = False
    here: bool = False
    stack: bool = False
    # A unit for each shard, also where several could share one: its events and its own receipt.
    fresh_units: bool = False
    limits: ScheduleLimits = field(default_factory=ScheduleLimits)


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """The one result of a shard that is kept."""

    tensors: dict[str, Tensor] = field(repr=False)
    peer_id: str
    seconds: float
    outcome: Outcome = field(repr=False)


class Sink(Protocol):
    """Where a map puts what it has.  Calls for one shard come one after the other."""

    def note(self, event: JobEvent) -> None: ...

    async def store(self, shard: int, result: ShardOutcome) -> None:
        """Keep the result; ShardKept is noted after it."""

    async def drop(self, shard: int) -> None:
        """Forget the result."""

    async def fail(self, shard: int, error: NextGPUError) -> None:
        """There will be no result."""

    async def save_position(self, shard: int, position: Position) -> None:
        """Keep what another process could go on from."""

    async def flush(self) -> None:
        """What was noted so far survives a power cut when this returns."""


class _Watcher:
    """Carries what one attempt reports to the map."""

    def __init__(self, run: MapRun, start: Start) -> None:
        self._run = run
        self._start = start
        self.began_from = run.position_of(start).steps

    def entered(self, status: str) -> None:
        self._run.attempt_entered(self._start, status)

    def reached(self, position: Position) -> None:
        if self._start.purpose is Purpose.WORK:
            self._run.attempt_reached(self._start.shard, position)

    def saw(self, event: UnitEvent) -> None:
        if self._start.purpose is not Purpose.WORK:
            return
        if isinstance(event, Checkpoint):
            # A unit counts from where it began; the shard may have begun elsewhere.
            event = replace(event, steps=self.began_from + event.steps)
        self._run.on_unit_event(self._start.shard, event)


class MapRun:
    """One map from its first shard to its last receipt.  `run` it once.

    `positions` are where shards go on from, of an earlier process; `on_unit_event` sees every event
    of fresh units that work.
    """

    def __init__(
        self,
        client: Client,
        program: Program,
        shards: Mapping[int, Shard],
        options: MapOptions,
        sink: Sink,
        *,
        history: PeerHistory | None = None,
        positions: Mapping[int, Position] | None = None,
        on_unit_event: Callable[[int, UnitEvent], None] | None = None,
    ) -> None:
        self._client = client
        self._program = program
        self._shards = shards
        self._options = options
        self._sink = sink
        self.on_unit_event = on_unit_event or (lambda shard, event: None)
        self.book = PeerBook(client.api.peers, options.needs, options.preferences, history)
        self._positions = dict(positions or {})
        self._plan = options.audit.draw(list(shards))
        limits = replace(options.limits, confirm_failures=options.audit.is_on)
        self._schedule = Schedule(shards, self._plan, limits)
        self._here = RunHere(program)
        self._scopes: dict[int, trio.CancelScope] = {}
        self._starts: dict[int, Start] = {}
        self._outcomes: dict[int, ShardOutcome] = {}
        self._in_doubt: dict[int, ShardOutcome] = {}
        self._views: dict[str, PeerView] = {}
        self._slots: dict[str, int] = {}
        self._jobs: dict[int, deque[Callable[[], Any]]] = {}
        self._canaries: list[Canary] = list(options.canaries)
        self._unstored = trio.CapacityLimiter(_MAX_UNSTORED)
        self._finished = trio.Event()
        self._stored = trio.Event()
        self._examining: set[int] = set()
        self._failure: NextGPUError | None = None
        self._show_again_s = math.inf

    async def run(self) -> None:
        """Until every shard is kept or given up.

        Raises DaemonUnreachable where our own nextgpud stays away, and what the sink raises.
        """
        if not self._shards:
            return
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._runner = self._make_runner(nursery)
                await self._prepare_canaries()
                nursery.start_soon(self._watch_peers)
                nursery.start_soon(self._tick)
                await self._finished.wait()
                await self._settle()
                nursery.cancel_scope.cancel()
        finally:
            self.book.save()
        if self._failure is not None:
            raise self._failure

    async def _settle(self) -> None:
        """Everything stored, and each open unit's receipt here."""
        while self._jobs:
            self._stored = trio.Event()
            await self._stored.wait()
        if isinstance(self._runner, SharedUnits) and self._failure is None:
            with trio.move_on_after(_CLOSE_S):
                await self._runner.aclose()

    def _make_runner(self, nursery: trio.Nursery) -> Runner:
        options = self._options
        if can_share(self._program) and not options.fresh_units:
            socket = self._client.paths.units_socket
            return SharedUnits(socket, self._program, options.needs, nursery, self._suspect)
        settings = AttemptOptions(
            options.needs, options.checkpoint_ms, options.checkpoint_steps, options.return_carry
        )
        return FreshUnits(self._client, self._program, settings)

    async def _prepare_canaries(self) -> None:
        """Known answers: the user's own, or shards of this map computed here first."""
        missing = self._options.audit.canaries - len(self._canaries)
        for k in list(self._shards)[: max(0, missing)]:
            steps = await self._load(k)
            outcome = await self._here.run(None, steps, Position(), _Silent())
            self._canaries.append(Canary(steps, self._tensors(outcome)))

    # --- peers and time -------------------------------------------------------------------

    async def _watch_peers(self) -> None:
        """Keep the schedule's view of peers fresh; a daemon that is away for long ends the map."""
        if self._options.here:
            self._views[HERE] = _this_machine()
            self._handle(PeersSeen(((HERE, 1),), frozenset({HERE})))
            return
        away_since_s: float | None = None
        while True:
            try:
                held = {peer_id: self._runner.units_on(peer_id) for peer_id in self._views}
                await self.book.refresh()
                self._count_slots(held)
                away_since_s = None
            except DaemonUnreachable as exc:
                now_s = trio.current_time()
                away_since_s = now_s if away_since_s is None else away_since_s
                never_there = not self._views
                if never_there or now_s - away_since_s > self._options.limits.patience_s:
                    self._end(exc)
                    return
                await trio.sleep(_DAEMON_RETRY_S)
                continue
            self._show_peers()
            await trio.sleep(_REFRESH_S)

    def _show_peers(self) -> None:
        if self._options.here:
            return
        slots = []
        for peer in self.book.candidates():
            self._views[peer.peer_id] = peer
            slots.append((peer.peer_id, self._slots_of(peer)))
        self._show_again_s = self.book.next_return_s()
        self._handle(PeersSeen(tuple(slots), self.book.known()))

    def _count_slots(self, held: Mapping[str, int]) -> None:
        """What each has free besides the units that were `held` when it said so; at least one,
        since asking is how to find out."""
        for peer in self.book.candidates():
            seen = peer.free_slots + held.get(peer.peer_id, 0)
            self._slots[peer.peer_id] = max(1, self._slots.get(peer.peer_id, 0), seen)

    def _slots_of(self, peer: PeerView) -> int:
        return min(self._options.in_flight, self._slots.get(peer.peer_id, 1))

    async def _tick(self) -> None:
        """Who failed, and whose pause is over, is looked at here: once for many failures."""
        while True:
            await trio.sleep(_TICK_S)
            if trio.current_time() >= self._show_again_s:
                self._show_peers()
            self._handle(Tick())

    # --- decisions, performed -------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        for effect in self._schedule.handle(event, now_s=trio.current_time()):
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Start():
                self._starts[effect.attempt_id] = effect
                self._nursery.start_soon(self._attempt, effect)
            case Cancel(attempt_id=attempt_id):
                if attempt_id in self._scopes:
                    self._scopes[attempt_id].cancel()
                self._starts.pop(attempt_id, None)
            case Distrust(peer_id=peer_id, why=why):
                self.book.distrust(peer_id, why)
                self._sink.note(PeerDistrusted(at_ms=now_ms(), peer_id=peer_id, why=why))
            case Compare() | Check() | Judge():
                self._examining.add(effect.attempt_id)
                self._nursery.start_soon(self._examine, effect)
            case Finish():
                self._finished.set()
            case _:
                self._perform_on_shard(effect)

    def _perform_on_shard(self, effect: Keep | Retract | Confirm | Fail | Starve) -> None:
        match effect:
            case Keep(attempt_id=attempt_id, shard=k):
                if k in self._plan.sampled:
                    self._in_doubt[k] = self._outcomes[attempt_id]
                self._positions.pop(k, None)
                self._then(k, partial(self._store, k, self._outcomes[attempt_id]))
            case Retract(shard=k):
                self._in_doubt.pop(k, None)
                self._then(k, partial(self._drop, k))
            case Confirm(shard=k):
                self._in_doubt.pop(k, None)
                self._then(k, partial(self._confirm, k))
            case Fail(shard=k, why=why):
                self._then(k, partial(self._fail, k, why, None))
            case Starve(shard=k):
                self._then(k, partial(self._fail, k, "", self.book.nobody()))

    def _end(self, error: NextGPUError) -> None:
        self._failure = self._failure or error
        self._finished.set()

    def _suspect(self, peer_id: str, error: NextGPUError) -> None:
        self._handle(Suspected(peer_id, str(error)))

    # --- one attempt ----------------------------------------------------------------------

    async def _attempt(self, start: Start) -> None:
        with trio.CancelScope() as scope:
            if start.attempt_id not in self._starts:
                return  # cancelled before it began
            self._scopes[start.attempt_id] = scope
            event = await self._attempt_once(start)
        self._scopes.pop(start.attempt_id, None)
        if scope.cancelled_caught or self._starts.pop(start.attempt_id, None) is None:
            self._outcomes.pop(start.attempt_id, None)
            return
        self._handle(event)
        # Where our own daemon is away, asking the next peer would only spin.
        if isinstance(event, Failed) and event.remedy is not Remedy.LOCAL:
            self._show_again_s = 0.0
        if start.attempt_id not in self._examining:
            self._outcomes.pop(start.attempt_id, None)

    async def _attempt_once(self, start: Start) -> Succeeded | Failed:
        try:
            steps = await self._steps_of(start)
        except NextGPUError as exc:
            return Failed(start.attempt_id, Remedy.GIVE_UP, str(exc), ours=True)
        watcher = _Watcher(self, start)
        peer = self._views.get(start.peer_id)
        try:
            outcome = await self._run_on(start, peer, steps, watcher)
        except NextGPUError as exc:
            return self._failed(start, exc, watcher.began_from)
        result = ShardOutcome(self._tensors(outcome), start.peer_id, outcome.seconds, outcome)
        self._outcomes[start.attempt_id] = result
        if start.peer_id != HERE:
            self.book.succeeded(start.peer_id)
        return Succeeded(start.attempt_id)

    async def _run_on(
        self, start: Start, peer: PeerView | None, steps: Steps, watcher: _Watcher
    ) -> Outcome:
        since = self.position_of(start)
        watcher.entered("queued")
        if start.peer_id == HERE or peer is None:
            return await self._here.run(None, steps, since, watcher)
        _check_size(peer, self._program, steps)
        lease_s = self._options.needs.max_seconds or peer.max_seconds
        with trio.move_on_after(lease_s + _LEASE_GRACE_S):
            return await self._runner.run(peer, steps, since, watcher)
        raise JobTimeout("The peer went silent, and its lease is over.")

    def _failed(self, start: Start, error: NextGPUError, began_from: int) -> Failed:
        """What an error means for the shard and for its peer."""
        too_large = isinstance(error, Refused) and error.code == ErrorCode.OVER_LIMIT
        progressed = self.position_of(start).steps > began_from
        if isinstance(error, JobTimeout) and progressed:
            # The lease is over, as agreed: no reason to leave this peer alone for a while.
            remedy = Remedy.ELSEWHERE
            self.book.succeeded(start.peer_id)
        elif start.peer_id == HERE or too_large:
            remedy = Remedy.ELSEWHERE if too_large else Remedy.GIVE_UP
        else:
            remedy = self.book.failed(start.peer_id, error)
        if isinstance(error, Refused) and error.code == ErrorCode.BUSY:
            units = self._runner.units_on(start.peer_id)
            self._slots[start.peer_id] = max(1, units)
        if start.purpose is Purpose.WORK:
            self._sink.note(
                PeerFailed(at_ms=now_ms(), shard=start.shard, peer_id=start.peer_id, why=str(error))
            )
        crashed = error.code == ErrorCode.WORKER_CRASHED
        return Failed(
            start.attempt_id,
            remedy,
            str(error),
            refused=remedy is Remedy.LOCAL or (isinstance(error, Refused) and not too_large),
            unfit=too_large or crashed or isinstance(error, OutOfMemory | JobTimeout),
            progressed=progressed,
        )

    async def _steps_of(self, start: Start) -> Steps:
        if start.purpose is Purpose.CANARY:
            return self._canaries[start.shard].steps
        return await self._load(start.shard)

    async def _load(self, k: int) -> Steps:
        shard = self._shards[k]
        try:
            return await trio.to_thread.run_sync(shard.load)
        except NextGPUError:
            raise
        # Whatever the caller's own code raises is about this shard alone.
        except Exception as exc:
            raise UsageError(f"{shard.name}: can not be read: {type(exc).__name__}: {exc}") from exc

    def _tensors(self, outcome: Outcome) -> dict[str, Tensor]:
        joined = together(outcome.ys, stack=self._options.stack)
        return joined | dict(outcome.final or {})

    # --- what attempts report -------------------------------------------------------------

    def position_of(self, start: Start) -> Position:
        """Where this attempt begins: an audit runs all of it again."""
        if start.purpose is not Purpose.WORK:
            return Position()
        return self._positions.get(start.shard, Position())

    def attempt_entered(self, start: Start, status: str) -> None:
        if status in ("transferring", "running"):
            self._handle(Accepted(start.attempt_id))
        if start.purpose is Purpose.WORK:
            self._sink.note(
                ShardEntered(
                    at_ms=now_ms(), shard=start.shard, status=status, peer_id=start.peer_id
                )
            )

    def attempt_reached(self, k: int, position: Position) -> None:
        if position.steps <= self._positions.get(k, Position()).steps:
            return
        self._positions[k] = position
        if self._program.spec.carry:
            self._then(k, partial(self._save_position, k, position))

    # --- storing, one thing after the other for each shard --------------------------------

    def _then(self, k: int, job: Callable[[], Any]) -> None:
        queue = self._jobs.get(k)
        if queue is None:
            self._jobs[k] = deque([job])
            self._nursery.start_soon(self._work_off, k)
        else:
            queue.append(job)

    async def _work_off(self, k: int) -> None:
        queue = self._jobs[k]
        async with self._unstored:
            while queue:
                try:
                    await queue.popleft()()
                except NextGPUError as exc:
                    self._end(exc)
        del self._jobs[k]
        self._stored.set()

    async def _store(self, k: int, result: ShardOutcome) -> None:
        await self._sink.store(k, result)
        digest = await trio.to_thread.run_sync(tensors_digest, result.tensors)
        self._sink.note(
            ShardKept(
                at_ms=now_ms(),
                shard=k,
                peer_id=result.peer_id,
                digest=digest,
                seconds=round(result.seconds, 6),
                steps=len(result.outcome.ys),
                receipt=result.outcome.receipt is not None,
            )
        )
        await self._sink.flush()

    async def _drop(self, k: int) -> None:
        self._sink.note(ShardRetracted(at_ms=now_ms(), shard=k))
        await self._sink.drop(k)

    async def _confirm(self, k: int) -> None:
        self._sink.note(ShardConfirmed(at_ms=now_ms(), shard=k))

    async def _fail(self, k: int, why: str, error: NextGPUError | None) -> None:
        error = error or ShardLost(why)
        self._sink.note(ShardFailed(at_ms=now_ms(), shard=k, why=str(error)))
        await self._sink.fail(k, error)

    async def _save_position(self, k: int, position: Position) -> None:
        await self._sink.save_position(k, position)
        self._sink.note(Checkpointed(at_ms=now_ms(), shard=k, steps=position.steps))

    # --- audits ---------------------------------------------------------------------------

    async def _examine(self, effect: Compare | Check | Judge) -> None:
        event = await trio.to_thread.run_sync(self._verdict, effect)
        if not isinstance(effect, Compare) or event == Compared(effect.attempt_id, agrees=True):
            self._outcomes.pop(effect.attempt_id, None)
        self._handle(event)

    def _verdict(self, effect: Compare | Check | Judge) -> Compared | Judged:
        found = self._outcomes[effect.attempt_id].tensors
        match effect:
            case Check(canary=number):
                agrees = agree(found, self._canaries[number].answer, same_class=False)
                return Compared(effect.attempt_id, agrees)
            case Compare(shard=k, kept_by=kept_by, audited_by=audited_by):
                same_class = self._class_of(kept_by) == self._class_of(audited_by)
                kept = self._in_doubt.get(k)
                agrees = kept is not None and agree(kept.tensors, found, same_class=same_class)
                return Compared(effect.attempt_id, agrees)
            case Judge(shard=k, audit_attempt_id=audit):
                runs = {
                    effect.kept_by: self._in_doubt.get(k),
                    effect.audited_by: self._outcomes.pop(audit, None),
                }
                wrong = {
                    peer_id
                    for peer_id, run in runs.items()
                    if run is not None and not agree(run.tensors, found, same_class=False)
                }
                return Judged(effect.attempt_id, frozenset(wrong))

    def _class_of(self, peer_id: str) -> tuple[object, ...]:
        return hardware_class(None if peer_id == HERE else self._views.get(peer_id))


class ShardLost(NextGPUError):
    """The shard was given up."""


class _Silent:
    """Watches nothing."""

    def entered(self, status: str) -> None: ...

    def reached(self, position: Position) -> None: ...

    def saw(self, event: UnitEvent) -> None: ...


def _check_size(peer: PeerView, program: Program, steps: Steps) -> None:
    """Refused before a byte is sent, instead of in the middle by a peer that reads no further."""
    from nextgpu_node.graph.tensors import image_bytes
    from nextgpu_node.sdk.pool import step_bytes

    needed = image_bytes(program.constants) + sum(step_bytes(xs) for xs in steps)
    if needed > peer.input_bytes:
        error = Refused(
            f"It needs about {needed:,} bytes of input, program included; "
            f"the peer takes {peer.input_bytes:,}. Cut it into smaller shards."
        )
        error.code = ErrorCode.OVER_LIMIT
        raise error


def _this_machine() -> PeerView:
    return PeerView(
        peer_id=HERE,
        latency_ms=0.0,
        sharing=True,
        reason="",
        devices=[],
        free_slots=1,
        memory_bytes=0,
        max_seconds=0,
        input_bytes=0,
        output_bytes=0,
        runtime="",
        table_version=0,
        isolation=[],
    )
