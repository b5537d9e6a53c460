"""Peers in virtual time around a Schedule: how long each takes, when it dies, where it lies."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nextgpu_node.core.retry import Remedy
from nextgpu_node.core.schedule import (
    HERE,
    Accepted,
    AuditPlan,
    Cancel,
    Check,
    Compare,
    Compared,
    Confirm,
    Distrust,
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
    Tick,
)


@dataclass
class SimulatedPeer:
    """`wrong`: shards that it is wrong about; `refuses`, `fails`: how it ends what it is given.

    Between `dies_s` and `returns_s` nothing runs on it.
    """

    seconds: float = 1.0
    slots: int = 1
    wrong: frozenset[int] = frozenset()
    wrong_canaries: bool = False
    fails: Failed | None = None
    dies_s: float = float("inf")
    returns_s: float = float("inf")

    def is_up(self, now_s: float) -> bool:
        return not self.dies_s <= now_s < self.returns_s


@dataclass
class Simulation:
    """Runs a schedule to its end; what it did is in the fields."""

    peers: Mapping[str, SimulatedPeer]
    shards: Iterable[int]
    plan: AuditPlan = field(default_factory=AuditPlan)
    limits: ScheduleLimits = field(default_factory=ScheduleLimits)
    here: SimulatedPeer = field(default_factory=SimulatedPeer)
    kept: dict[int, str] = field(default_factory=dict)
    times_kept: Counter[int] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)
    starved: set[int] = field(default_factory=set)
    distrusted: dict[str, str] = field(default_factory=dict)
    confirmed: set[int] = field(default_factory=set)
    starts: list[Start] = field(default_factory=list)
    most_in_flight: Counter[str] = field(default_factory=Counter)
    now_s: float = 0.0
    finished: bool = False

    def run(self, until_s: float = 10_000.0) -> Simulation:
        self._schedule = Schedule(self.shards, self.plan, self.limits)
        self._events: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._running: dict[int, Start] = {}
        self._results: dict[int, Any] = {}
        self._paused: dict[str, float] = defaultdict(float)
        self._see()
        while not self.finished and self.now_s < until_s:
            ticks_at_s = self.now_s + 0.1
            if self._events and self._events[0][0] <= ticks_at_s:
                self.now_s, _, event = heapq.heappop(self._events)
                self._deliver(event)
            else:
                self.now_s = ticks_at_s
                self._deliver(Tick())
            self._lose_the_dead()
            self._see()
        assert self.finished, "the schedule never finished"
        return self

    def answer(self, start: Start) -> Any:
        """What this run gives: the right answer is the shard's number."""
        peer = self._peer(start.peer_id)
        lies = peer.wrong_canaries if start.purpose is Purpose.CANARY else start.shard in peer.wrong
        return ("wrong", start.peer_id) if lies else start.shard

    def _peer(self, peer_id: str) -> SimulatedPeer:
        return self.here if peer_id == HERE else self.peers[peer_id]

    def _see(self) -> None:
        up = [
            (name, peer.slots)
            for name, peer in self.peers.items()
            if peer.is_up(self.now_s)
            and self._paused[name] <= self.now_s
            and name not in self.distrusted
        ]
        known = frozenset(
            name
            for name, peer in self.peers.items()
            if peer.is_up(self.now_s) and name not in self.distrusted
        )
        self._deliver(PeersSeen(tuple(up), known))

    def _lose_the_dead(self) -> None:
        for attempt_id, start in list(self._running.items()):
            if start.peer_id != HERE and not self._peer(start.peer_id).is_up(self.now_s):
                del self._running[attempt_id]
                self._deliver(Failed(attempt_id, Remedy.ELSEWHERE, "lost"))

    def _later(self, seconds: float, event: Event) -> None:
        heapq.heappush(self._events, (self.now_s + seconds, next(self._order), event))

    def _deliver(self, event: Event) -> None:
        match event:
            case Succeeded(attempt_id=attempt_id) | Failed(attempt_id=attempt_id):
                known = self._running.pop(attempt_id, None)
                if known is None and not isinstance(event, Failed):
                    return  # cancelled
                if isinstance(event, Failed) and known is not None:
                    self._paused[known.peer_id] = self.now_s + 0.5
            case _:
                pass
        for effect in self._schedule.handle(event, now_s=self.now_s):
            self._perform(effect)

    def _perform(self, effect: Any) -> None:
        match effect:
            case Start():
                self._begin(effect)
            case Cancel(attempt_id=attempt_id):
                self._running.pop(attempt_id, None)
            case Keep(attempt_id=attempt_id, shard=k, peer_id=peer_id):
                assert k not in self.kept, "a second result was kept"
                self.kept[k] = peer_id
                self.times_kept[k] += 1
                self._results[k] = self._results[("attempt", attempt_id)]
            case Retract(shard=k):
                del self.kept[k]
            case Fail(shard=k, why=why):
                self.failed[k] = why
            case Starve(shard=k):
                self.starved.add(k)
            case Distrust(peer_id=peer_id, why=why):
                self.distrusted[peer_id] = why
            case Compare() | Check() | Judge():
                self._examine(effect)
            case Finish():
                self.finished = True
            case _:
                assert isinstance(effect, Confirm)
                self.confirmed.add(effect.shard)

    def _examine(self, effect: Compare | Check | Judge) -> None:
        match effect:
            case Compare(attempt_id=attempt_id, shard=k):
                same = self._results[("attempt", attempt_id)] == self._results[k]
                self._later(0, Compared(attempt_id, same))
            case Check(attempt_id=attempt_id, canary=number):
                same = self._results[("attempt", attempt_id)] == number
                self._later(0, Compared(attempt_id, same))
            case Judge():
                self._later(0, self._judged(effect))

    def _judged(self, effect: Judge) -> Judged:
        truth = self._results[("attempt", effect.attempt_id)]
        runs = {
            effect.kept_by: self._results[effect.shard],
            effect.audited_by: self._results[("attempt", effect.audit_attempt_id)],
        }
        return Judged(
            effect.attempt_id, frozenset(peer for peer, run in runs.items() if run != truth)
        )

    def _begin(self, start: Start) -> None:
        self.starts.append(start)
        self._running[start.attempt_id] = start
        self._results[("attempt", start.attempt_id)] = self.answer(start)
        busy = sum(1 for one in self._running.values() if one.peer_id == start.peer_id)
        self.most_in_flight[start.peer_id] = max(busy, self.most_in_flight[start.peer_id])
        peer = self._peer(start.peer_id)
        if peer.fails is not None:
            end: Event = Failed(
                start.attempt_id,
                peer.fails.remedy,
                peer.fails.why,
                peer.fails.refused,
                peer.fails.unfit,
            )
            self._later(0.01 if peer.fails.refused else peer.seconds, end)
            return
        self._later(0.001, Accepted(start.attempt_id))
        self._later(peer.seconds, Succeeded(start.attempt_id))

    def shares(self) -> Counter[str]:
        """How many results each peer gave."""
        return Counter(self.kept.values())
