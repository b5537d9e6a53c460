"""Many shards over peers that come and go: who runs what next?  Pure.

    PeersSeen  Accepted  Succeeded  Failed  Compared  Judged  Tick
        └────────────── handle(event, now_s=…) ──────────────┘
    Start  Cancel  Keep  Compare  Check  Judge  Distrust  Retract  Confirm  Fail  Finish

Work is pulled: a peer gets its next shard when it has a free slot, so a slow peer gets few.  When
no shard waits, an idle peer takes a copy of one that runs far longer than it should; the first
result is kept and the other copy is cancelled.

    audit     a shard of the sample runs once more, on another peer or here, and is compared
    referee   where the two differ: a third run, here if possible, decides who was wrong
    canary    a shard whose answer is known is given to a peer among its others
    distrust  a peer that was wrong gets nothing more, and every result of it that nobody
              confirmed is taken back and done again
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import median
from typing import Final, TypeAlias

from nextgpu_node.core.retry import Remedy

# This machine, where it runs a shard itself: to audit where there is one peer, and to decide.
HERE: Final = "here"

_STRAGGLES: Final = 1.5
_SHORTEST_STRAGGLE_S: Final = 0.5
_REMEMBERED_TIMES: Final = 64
_WEIGHT_OF_NEWEST: Final = 0.3


class Purpose(Enum):
    WORK = "work"
    AUDIT = "audit"
    REFEREE = "referee"
    CANARY = "canary"


@dataclass(frozen=True, slots=True)
class ScheduleLimits:
    """`failures`: attempts of one shard that may end badly; a refusal is none.

    `at_once`: attempts that run at the same moment, over all peers; each may hold a unit, and so a
    few open files of two daemons and a part of the network.

    `patience_s`: how long nothing may run before what waits is given up; `first_patience_s`: the
    same for as long as nobody ever took anything and nobody is there who might.
    """

    failures: int = 6
    copies: int = 2
    at_once: int = 128
    patience_s: float = 60.0
    first_patience_s: float = 60.0
    # Among strangers: one peer's word that a shard fails everywhere is not enough.
    confirm_failures: bool = False


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """Drawn before anything runs, so that no peer can tell what will be looked at.

    `canary_turns`: each peer gets canary number i as its turn number `canary_turns[i]`.
    """

    sampled: frozenset[int] = frozenset()
    canary_turns: tuple[int, ...] = ()


# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeersSeen:
    """Who may be asked now, best first, with how many shards at a time; `known` also counts those
    that are only paused."""

    slots: tuple[tuple[str, int], ...]
    known: frozenset[str]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The peer took the unit: from here on the attempt counts as running."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class Succeeded:
    attempt_id: int


@dataclass(frozen=True, slots=True)
class Failed:
    """How and why an attempt ended without a result.

    `refused`: it never began.  `unfit`: too little memory or time there for this shard.
    `progressed`: it left a later checkpoint behind, so no time was lost."""

    attempt_id: int
    remedy: Remedy
    why: str
    refused: bool = False
    unfit: bool = False
    progressed: bool = False
    # The shard could not even be read here: no peer's word is needed.
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Compared:
    """What a Compare or a Check found."""

    attempt_id: int
    agrees: bool


@dataclass(frozen=True, slots=True)
class Judged:
    """What a Judge found: the peers whose results differ from the referee's."""

    attempt_id: int
    wrong: frozenset[str]


@dataclass(frozen=True, slots=True)
class Suspected:
    """A peer broke its word outside of an attempt, such as at the end of an open unit."""

    peer_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event: TypeAlias = PeersSeen | Accepted | Succeeded | Failed | Compared | Judged | Suspected | Tick

# --- effects ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Run `shard` (of CANARY: the canary of that number) on `peer_id`, which may be HERE."""

    attempt_id: int
    shard: int
    peer_id: str
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class Cancel:
    attempt_id: int


@dataclass(frozen=True, slots=True)
class Keep:
    """This attempt's outcome is the result of the shard."""

    attempt_id: int
    shard: int
    peer_id: str


@dataclass(frozen=True, slots=True)
class Compare:
    """Hold this audit against the kept result; answer with Compared.  Keep the outcome at hand."""

    attempt_id: int
    shard: int
    kept_by: str
    audited_by: str


@dataclass(frozen=True, slots=True)
class Check:
    """Hold this canary against its known answer; answer with Compared."""

    attempt_id: int
    canary: int
    peer_id: str


@dataclass(frozen=True, slots=True)
class Judge:
    """Hold the kept result and the audit against the referee's; answer with Judged."""

    attempt_id: int
    shard: int
    kept_by: str
    audit_attempt_id: int
    audited_by: str


@dataclass(frozen=True, slots=True)
class Distrust:
    peer_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Retract:
    """The kept result of this shard may be wrong: drop it, the shard is done again."""

    shard: int


@dataclass(frozen=True, slots=True)
class Confirm:
    """Another run agreed with the kept result of this shard."""

    shard: int


@dataclass(frozen=True, slots=True)
class Fail:
    """The shard is given up."""

    shard: int
    why: str


@dataclass(frozen=True, slots=True)
class Starve:
    """Nobody took the shard in `patience_s`: the book of peers knows why."""

    shard: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Every shard is done or given up, and every audit has agreed."""


Effect: TypeAlias = (
    Start
    | Cancel
    | Keep
    | Compare
    | Check
    | Judge
    | Distrust
    | Retract
    | Confirm
    | Fail
    | Starve
    | Finish
)

# --- state ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Shard:
    audited: bool
    failures: int = 0
    avoid: set[str] = field(default_factory=set)
    running: set[int] = field(default_factory=set)
    condemned_by: set[str] = field(default_factory=set)  # they say that it fails anywhere
    kept_by: str | None = None
    confirmed: bool = False
    failed: bool = False
    audit_attempt_id: int | None = None  # the audit that differs, while a referee is sought
    audited_by: str | None = None
    checking: int | None = None  # the attempt of an audit or referee that runs or is compared

    @property
    def needs_work(self) -> bool:
        return self.kept_by is None and not self.failed

    @property
    def needs_check(self) -> bool:
        """An audit or a referee is still to come."""
        return self.audited and self.kept_by is not None and not self.confirmed


@dataclass(slots=True)
class _Peer:
    slots: int = 0
    running: set[int] = field(default_factory=set)
    turns: int = 0
    canaries: int = 0
    mean_s: float = 0.0
    distrusted: bool = False

    @property
    def has_slot(self) -> bool:
        return not self.distrusted and len(self.running) < self.slots


@dataclass(slots=True)
class _Attempt:
    start: Start
    began_s: float
    accepted: bool = False


class Schedule:
    """Every decision of one map: give `handle` each event, perform what it returns, in order."""

    def __init__(
        self,
        shards: Iterable[int],
        plan: AuditPlan | None = None,
        limits: ScheduleLimits | None = None,
    ) -> None:
        self._plan = plan or AuditPlan()
        self._limits = limits or ScheduleLimits()
        self._shards = {k: _Shard(audited=k in self._plan.sampled) for k in shards}
        # In order, so that results in order come early; a set could not say who is next.
        self._waiting = dict.fromkeys(self._shards)
        self._unchecked: dict[int, None] = {}
        self._unsettled = set(self._shards)
        # What a Compared or a Judged is about: a shard, or a peer with its canary.
        self._checks: dict[int, int | str] = {}
        self._peers: dict[str, _Peer] = {HERE: _Peer(slots=1)}
        self._order: list[str] = []
        self._known: frozenset[str] = frozenset()
        self._attempts: dict[int, _Attempt] = {}
        self._next_id = 0
        self._times_s: list[float] = []
        self._alive_s: float | None = None
        self._has_looked = False
        self._was_accepted = False
        self._finished = False

    def handle(self, event: Event, *, now_s: float) -> list[Effect]:
        """What to do about `event`."""
        if self._finished:
            return []
        if self._alive_s is None:
            self._alive_s = now_s
        effects = self._react(event, now_s)
        effects += self._assign(now_s)
        effects += self._give_up(now_s)
        if not self._unsettled:
            self._finished = True
            effects += [Cancel(attempt_id) for attempt_id in self._attempts]
            effects.append(Finish())
        return effects

    @property
    def typical_s(self) -> float | None:
        """The median time of one shard, or None before the first."""
        return median(self._times_s) if self._times_s else None

    def in_flight(self, peer_id: str) -> int:
        """Attempts that `peer_id` has now."""
        return len(self._peers[peer_id].running) if peer_id in self._peers else 0

    def _react(self, event: Event, now_s: float) -> list[Effect]:
        match event:
            case PeersSeen():
                self._see_peers(event)
                return []
            case Accepted(attempt_id=attempt_id):
                if attempt_id in self._attempts:
                    self._attempts[attempt_id].accepted = self._was_accepted = True
                    self._alive_s = now_s
                return []
            case Succeeded(attempt_id=attempt_id):
                return self._succeeded(attempt_id, now_s)
            case Failed():
                return self._failed(event, now_s)
            case Compared():
                return self._compared(event)
            case Judged():
                return self._judged(event)
            case Suspected(peer_id=peer_id, why=why):
                return self._distrust(peer_id, why)
            case Tick():
                return []

    def _see_peers(self, event: PeersSeen) -> None:
        self._has_looked = True
        self._known = event.known
        self._order = [peer_id for peer_id, _ in event.slots]
        for peer_id, slots in event.slots:
            self._peers.setdefault(peer_id, _Peer()).slots = slots

    # --- ends of attempts -----------------------------------------------------------------

    def _take(self, attempt_id: int) -> _Attempt | None:
        """The attempt, which no longer runs; None where it was cancelled before it ended."""
        attempt = self._attempts.pop(attempt_id, None)
        if attempt is not None:
            self._peers[attempt.start.peer_id].running.discard(attempt_id)
            if attempt.start.purpose is not Purpose.CANARY:
                self._shards[attempt.start.shard].running.discard(attempt_id)
        return attempt

    def _succeeded(self, attempt_id: int, now_s: float) -> list[Effect]:
        attempt = self._take(attempt_id)
        if attempt is None:
            return []
        self._alive_s = now_s
        start = attempt.start
        match start.purpose:
            case Purpose.WORK:
                self._measure(start.peer_id, now_s - attempt.began_s)
                return self._keep(start)
            case Purpose.CANARY:
                self._checks[attempt_id] = start.peer_id
                return [Check(attempt_id, start.shard, start.peer_id)]
            case Purpose.AUDIT:
                return self._compare(start)
            case Purpose.REFEREE:
                return self._judge(start)

    def _measure(self, peer_id: str, seconds: float) -> None:
        peer = self._peers[peer_id]
        weight = _WEIGHT_OF_NEWEST if peer.mean_s else 1.0
        peer.mean_s += weight * (seconds - peer.mean_s)
        self._times_s = [*self._times_s[1 - _REMEMBERED_TIMES :], seconds]

    def _keep(self, start: Start) -> list[Effect]:
        shard = self._shards[start.shard]
        if not shard.needs_work or self._peers[start.peer_id].distrusted:
            return []
        shard.kept_by = start.peer_id
        # What this machine computed itself needs nobody's word.
        shard.confirmed = start.peer_id == HERE
        self._waiting.pop(start.shard, None)
        if shard.needs_check:
            self._unchecked[start.shard] = None
        else:
            self._unsettled.discard(start.shard)
        effects: list[Effect] = [Keep(start.attempt_id, start.shard, start.peer_id)]
        return effects + [self._cancel(attempt_id) for attempt_id in list(shard.running)]

    def _cancel(self, attempt_id: int) -> Effect:
        self._take(attempt_id)
        return Cancel(attempt_id)

    def _failed(self, event: Failed, now_s: float) -> list[Effect]:
        attempt = self._take(event.attempt_id)
        if attempt is None:
            return []
        if not event.refused:
            self._alive_s = now_s
        start = attempt.start
        effects: list[Effect] = []
        match event.remedy:
            case Remedy.DISTRUST:
                effects += self._distrust(start.peer_id, event.why)
            case Remedy.WAIT | Remedy.ELSEWHERE | Remedy.LOCAL:
                # Until the next PeersSeen says otherwise: it is full, or not there any more.
                if start.peer_id != HERE:
                    peer = self._peers[start.peer_id]
                    peer.slots = min(peer.slots, len(peer.running))
            case Remedy.GIVE_UP:
                pass
        match start.purpose:
            case Purpose.WORK:
                return effects + self._work_failed(start, event)
            case Purpose.CANARY:
                self._peers[start.peer_id].canaries -= 1
            case Purpose.AUDIT | Purpose.REFEREE:
                return effects + self._check_failed(start, event)
        return effects

    def _work_failed(self, start: Start, event: Failed) -> list[Effect]:
        shard = self._shards[start.shard]
        if not shard.needs_work:
            return []
        if event.remedy is Remedy.GIVE_UP and (
            event.ours or self._is_condemned(shard, start.peer_id)
        ):
            return self._fail(start.shard, event.why)
        if event.unfit and not event.progressed:
            shard.avoid.add(start.peer_id)
        if not event.refused and not event.progressed:
            shard.failures += 1
        exhausted = shard.failures >= self._limits.failures
        fits_nobody = bool(self._known) and self._known <= shard.avoid
        if not shard.running and (exhausted or fits_nobody):
            return self._fail(start.shard, event.why)
        if not shard.running:
            self._waiting[start.shard] = None
        return []

    def _is_condemned(self, shard: _Shard, peer_id: str) -> bool:
        """Whether the word of `peer_id` that the shard fails everywhere settles it."""
        shard.condemned_by.add(peer_id)
        if not self._limits.confirm_failures or peer_id == HERE or len(shard.condemned_by) > 1:
            return True
        shard.avoid.add(peer_id)
        return self._known <= shard.avoid

    def _fail(self, k: int, why: str) -> list[Effect]:
        shard = self._shards[k]
        shard.failed = True
        self._unsettled.discard(k)
        self._unchecked.pop(k, None)
        self._waiting.pop(k, None)
        cancels = [self._cancel(attempt_id) for attempt_id in list(shard.running)]
        return [*cancels, Fail(k, why)]

    def _check_failed(self, start: Start, event: Failed) -> list[Effect]:
        """The audit goes to another peer; where it fails everywhere, the result is not used."""
        shard = self._shards[start.shard]
        shard.checking = None
        if not shard.needs_check:
            return []
        if event.unfit or event.remedy is Remedy.GIVE_UP:
            shard.avoid.add(start.peer_id)
        shard.failures += not event.refused
        if shard.failures < self._limits.failures:
            return []
        return self._fail_unchecked(start.shard, event.why)

    def _fail_unchecked(self, k: int, why: str) -> list[Effect]:
        self._shards[k].kept_by = None
        told = f"its audit could not be done: {why}" if why else "nobody could audit it"
        return [Retract(k), *self._fail(k, told)]

    # --- audits ---------------------------------------------------------------------------

    def _compare(self, start: Start) -> list[Effect]:
        shard = self._shards[start.shard]
        if not shard.needs_check or shard.kept_by is None:
            shard.checking = None
            return []
        shard.audited_by = start.peer_id
        self._checks[start.attempt_id] = start.shard
        return [Compare(start.attempt_id, start.shard, shard.kept_by, start.peer_id)]

    def _compared(self, event: Compared) -> list[Effect]:
        match self._checks.pop(event.attempt_id, None):
            case int(k):
                return self._audit_compared(k, event)
            case str(peer_id) if not event.agrees:
                return self._distrust(peer_id, "it failed a canary")
            case _:
                return []

    def _audit_compared(self, k: int, event: Compared) -> list[Effect]:
        shard = self._shards[k]
        if shard.checking != event.attempt_id or not shard.needs_check:
            return []
        shard.checking = None
        if event.agrees:
            return self._confirm(k)
        if shard.audited_by == HERE and shard.kept_by is not None:
            return self._distrust(shard.kept_by, "its result differs from the one computed here")
        shard.audit_attempt_id = event.attempt_id
        return []

    def _confirm(self, k: int) -> list[Effect]:
        self._shards[k].confirmed = True
        self._unchecked.pop(k, None)
        self._unsettled.discard(k)
        return [Confirm(k)]

    def _judge(self, start: Start) -> list[Effect]:
        shard = self._shards[start.shard]
        if shard.kept_by is None or shard.audit_attempt_id is None or shard.audited_by is None:
            shard.checking = None
            return []
        self._checks[start.attempt_id] = start.shard
        return [
            Judge(
                start.attempt_id,
                start.shard,
                shard.kept_by,
                shard.audit_attempt_id,
                shard.audited_by,
            )
        ]

    def _judged(self, event: Judged) -> list[Effect]:
        k = self._checks.pop(event.attempt_id, None)
        if not isinstance(k, int) or self._shards[k].checking != event.attempt_id:
            return []
        shard = self._shards[k]
        shard.checking = shard.audit_attempt_id = None
        effects: list[Effect] = []
        if shard.kept_by is not None and shard.kept_by not in event.wrong:
            effects += self._confirm(k)
        for peer_id in sorted(event.wrong):
            effects += self._distrust(peer_id, "its result differs from two others")
        return effects

    def _distrust(self, peer_id: str, why: str) -> list[Effect]:
        peer = self._peers.setdefault(peer_id, _Peer())
        if peer.distrusted or peer_id == HERE:
            return []
        peer.distrusted = True
        effects: list[Effect] = [Distrust(peer_id, why)]
        for attempt_id in list(peer.running):
            start = self._attempts[attempt_id].start
            effects.append(self._cancel(attempt_id))
            self._reopen_check_or_work(start)
        for k, shard in self._shards.items():
            if shard.kept_by == peer_id and not shard.confirmed:
                effects += self._retract(k, shard)
        return effects

    def _reopen_check_or_work(self, start: Start) -> None:
        if start.purpose is Purpose.CANARY:
            return
        shard = self._shards[start.shard]
        if start.purpose is not Purpose.WORK:
            shard.checking = None
        elif shard.needs_work and not shard.running:
            self._waiting[start.shard] = None

    def _retract(self, k: int, shard: _Shard) -> list[Effect]:
        """What an audit of it found so far is void as well."""
        cancels = [self._cancel(attempt_id) for attempt_id in list(shard.running)]
        shard.kept_by = shard.audited_by = shard.audit_attempt_id = shard.checking = None
        self._unchecked.pop(k, None)
        self._waiting[k] = None
        self._unsettled.add(k)
        return [*cancels, Retract(k)]

    # --- assigning ------------------------------------------------------------------------

    def _assign(self, now_s: float) -> list[Effect]:
        """One shard for each peer in turn, until nobody has a slot or nothing fits.

        Those with the least to do come first, so that a unit that is open is used again before
        another one is opened.
        """
        effects: list[Effect] = []
        gave = True
        while gave and self._has_work:
            gave = False
            for peer_id in sorted(self._order, key=self.in_flight):
                if len(self._attempts) >= self._limits.at_once or not self._has_work:
                    break
                if self._peers[peer_id].has_slot and (start := self._next_for(peer_id, now_s)):
                    effects.append(start)
                    gave = True
        if self._peers[HERE].has_slot and (start := self._next_here(now_s)):
            effects.append(start)
        return effects

    @property
    def _has_work(self) -> bool:
        """Whether there may be something to give; a straggler is known by the typical time."""
        return bool(self._waiting or self._unchecked or (self._attempts and self._times_s))

    def _next_for(self, peer_id: str, now_s: float) -> Start | None:
        peer = self._peers[peer_id]
        turns = self._plan.canary_turns
        if (
            peer.canaries < len(turns)
            and peer.turns >= turns[peer.canaries]
            and (self._waiting or self._unchecked)
        ):
            peer.canaries += 1
            return self._start(peer.canaries - 1, peer_id, Purpose.CANARY, now_s)
        for k in self._waiting:
            if peer_id not in self._shards[k].avoid:
                return self._start(k, peer_id, Purpose.WORK, now_s)
        for k in self._unchecked:
            purpose = self._check_purpose(k, peer_id)
            if purpose is not None:
                return self._start(k, peer_id, purpose, now_s)
        slow = self._straggler_for(peer_id, now_s)
        return None if slow is None else self._start(slow, peer_id, Purpose.WORK, now_s)

    def _check_purpose(self, k: int, peer_id: str) -> Purpose | None:
        """What `peer_id` may do about the audit of shard `k`."""
        shard = self._shards[k]
        if shard.checking is not None or peer_id == shard.kept_by or peer_id in shard.avoid:
            return None
        if shard.audit_attempt_id is None:
            return Purpose.AUDIT
        # A judgement is done here first, which nobody can buy; a third peer is the way out where
        # the shard does not fit this machine.
        return Purpose.REFEREE if HERE in shard.avoid and peer_id != shard.audited_by else None

    def _next_here(self, now_s: float) -> Start | None:
        """A referee's run, or an audit for which there is no second peer."""
        for k in self._unchecked:
            shard = self._shards[k]
            if shard.checking is not None or HERE in shard.avoid:
                continue
            if shard.audit_attempt_id is not None:
                return self._start(k, HERE, Purpose.REFEREE, now_s)
            others = {
                peer_id
                for peer_id in self._known - {shard.kept_by} - shard.avoid
                if not self._is_distrusted(peer_id)
            }
            if not others:
                return self._start(k, HERE, Purpose.AUDIT, now_s)
        return None

    def _is_distrusted(self, peer_id: str) -> bool:
        return peer_id in self._peers and self._peers[peer_id].distrusted

    def _straggler_for(self, peer_id: str, now_s: float) -> int | None:
        """The shard whose only copy is the latest of all that `peer_id` would finish sooner."""
        typical_s = self.typical_s
        if self._waiting or typical_s is None:
            return None
        here_s = self._peers[peer_id].mean_s or typical_s
        worst: tuple[float, int] | None = None
        for attempt in self._attempts.values():
            start = attempt.start
            if start.purpose is not Purpose.WORK or start.peer_id == peer_id:
                continue
            shard = self._shards[start.shard]
            if len(shard.running) >= self._limits.copies or peer_id in shard.avoid:
                continue
            elapsed_s = now_s - attempt.began_s
            left_s = self._peers[start.peer_id].mean_s - elapsed_s
            late = elapsed_s > max(_STRAGGLES * typical_s, _SHORTEST_STRAGGLE_S)
            stolen = left_s > max(_STRAGGLES * here_s, _SHORTEST_STRAGGLE_S)
            lateness_s = max(elapsed_s, left_s)
            if (late or stolen) and (worst is None or lateness_s > worst[0]):
                worst = (lateness_s, start.shard)
        return None if worst is None else worst[1]

    def _start(self, shard: int, peer_id: str, purpose: Purpose, now_s: float) -> Start:
        start = Start(self._next_id, shard, peer_id, purpose)
        self._next_id += 1
        self._attempts[start.attempt_id] = _Attempt(start, now_s)
        peer = self._peers[peer_id]
        peer.running.add(start.attempt_id)
        peer.turns += purpose is Purpose.WORK
        if purpose is not Purpose.CANARY:
            self._shards[shard].running.add(start.attempt_id)
        if purpose is Purpose.WORK:
            self._waiting.pop(shard, None)
        elif purpose is not Purpose.CANARY:
            self._shards[shard].checking = start.attempt_id
        return start

    @property
    def _patience_s(self) -> float:
        hopeless = self._has_looked and not self._was_accepted and not self._known
        return self._limits.first_patience_s if hopeless else self._limits.patience_s

    # --- the end --------------------------------------------------------------------------

    def _give_up(self, now_s: float) -> list[Effect]:
        """Nothing runs, and nobody took anything for too long."""
        assert self._alive_s is not None
        if any(attempt.accepted for attempt in self._attempts.values()):
            self._alive_s = now_s
        if now_s - self._alive_s < self._patience_s:
            return []
        effects: list[Effect] = []
        for k in sorted(self._unsettled):
            if self._shards[k].needs_check:
                effects += self._fail_unchecked(k, "")
            else:
                effects += [e for e in self._fail(k, "") if not isinstance(e, Fail)]
                effects.append(Starve(k))
        return effects


def draw_sample(shards: Sequence[int], share: float, draws: Sequence[float]) -> frozenset[int]:
    """Each shard with probability `share`, independently: `draws` are uniform in [0, 1).

    A peer that is wrong in k shards is then found with probability 1 - (1 - share)^k.
    """
    return frozenset(k for k, draw in zip(shards, draws, strict=True) if draw < share)


def detection_rate(share: float, wrong: int) -> float:
    """The probability that an audit of `share` finds a peer with `wrong` wrong results."""
    return 1.0 - (1.0 - share) ** wrong
