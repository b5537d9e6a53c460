"""The peers of one job: who is there, who may be asked now, and what happened with each.

    refresh() ──► our daemon ──► candidates(), best first
    succeeded / failed ──► pauses, exclusions, history

One book is shared by everything that one process submits to the same needs.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

import trio

from nextgpu_node.api_types import PeerNeed, PeersReply, PeerView
from nextgpu_node.core.choice import Appraisal, PeerRecord, Preferences, choose
from nextgpu_node.core.retry import Remedy, is_lasting, pause_s, remedy_for
from nextgpu_node.errors import NextGPUError, NoPeerFound, OutOfMemory, Refused
from nextgpu_node.sdk.peer_history import PeerHistory, together
from nextgpu_node.sdk.unit import Needs

_FRESH_S: Final = 2.0
_MANY_PEERS: Final = 200
_SHOWN_REASONS: Final = 3
# Less than this says more about the latency than about the throughput.
_MEASURABLE_BYTES: Final = 1_000_000


@dataclass(slots=True)
class _Standing:
    """A peer in this job.  `out` is why it is asked no more; failures are those in a row."""

    failures: int = 0
    paused_until_s: float = 0.0
    out: str = ""
    last_words: str = ""

    def may_be_asked(self, now_s: float) -> bool:
        return not self.out and self.paused_until_s <= now_s


# Of a peer that nothing happened with yet; only read.
_UNKNOWN: Final = _Standing()


class PeerBook:
    """`ask` is `client.api.peers`; `needs.peer_id` and `preferences.peers` narrow whom to ask."""

    def __init__(
        self,
        ask: Callable[[PeerNeed], Awaitable[PeersReply]],
        needs: Needs,
        preferences: Preferences | None = None,
        history: PeerHistory | None = None,
    ) -> None:
        self._ask = ask
        self._history = history or PeerHistory(None)
        self._need = PeerNeed(
            kind=needs.kind, memory_bytes=needs.device_memory_bytes, limit=_MANY_PEERS
        )
        preferences = preferences or Preferences()
        if needs.wanted_peer is not None:
            preferences = replace(preferences, peers=preferences.peers | {needs.wanted_peer})
        self._preferences = preferences
        self._seen: dict[str, PeerRecord] = {}
        self._weighed: list[Appraisal] = []
        self._standings: dict[str, _Standing] = {}
        self._refreshed_s = float("-inf")
        self._refreshing = trio.Lock()
        self._asked = 0

    async def refresh(self) -> None:
        """Ask our daemon who is there; not more often than every two seconds.

        Raises DaemonUnreachable.
        """
        async with self._refreshing:
            if trio.current_time() - self._refreshed_s < _FRESH_S:
                return
            self.save()
            reply = await self._ask(self._need)
            self._weighed = choose(
                reply.peers, self._need, self._preferences, self._history.records()
            )
            self._asked = reply.candidates
            self._refreshed_s = trio.current_time()

    def appraisals(self) -> list[Appraisal]:
        """Everybody, weighed: those that may be asked, best first, then the excluded ones."""
        told = [
            replace(one, excluded=one.excluded or self._seen_as(one).out) for one in self._weighed
        ]
        return sorted(told, key=lambda one: bool(one.excluded))

    def known(self) -> frozenset[str]:
        """Whom to ask now or after a pause: everybody who is not excluded."""
        return frozenset(
            one.peer.peer_id
            for one in self._weighed
            if not one.excluded and not self._seen_as(one).out
        )

    def candidates(self) -> list[PeerView]:
        """Whom to ask now, best first: neither excluded nor paused."""
        now_s = trio.current_time()
        return [
            one.peer
            for one in self._weighed
            if not one.excluded and self._seen_as(one).may_be_asked(now_s)
        ]

    def next_return_s(self) -> float:
        """When the next pause is over, in trio's time; infinity where nobody is paused."""
        now_s = trio.current_time()
        pauses = (one.paused_until_s for one in self._standings.values() if not one.out)
        return min((end_s for end_s in pauses if end_s > now_s), default=math.inf)

    def succeeded(self, peer_id: str, *, moved_bytes: int = 0, seconds: float = 0.0) -> None:
        """A unit or a call came back; bytes and seconds of its transfer, where known."""
        self._standings[peer_id] = _Standing()
        measured = seconds > 0 and moved_bytes >= _MEASURABLE_BYTES
        rate = moved_bytes / seconds if measured else 0.0
        self._see(peer_id, PeerRecord(done=1, bytes_per_s=rate))

    def failed(self, peer_id: str, error: NextGPUError) -> Remedy:
        """Take down why it failed there, and say what to do now."""
        remedy = remedy_for(error)
        standing = self._standing(peer_id)
        if remedy in (Remedy.LOCAL, Remedy.GIVE_UP):
            return remedy
        standing.failures += 1
        standing.last_words = str(error)
        pause = pause_s(standing.failures, jitter=random.random())  # noqa: S311  spreads load
        standing.paused_until_s = trio.current_time() + pause
        if remedy is Remedy.DISTRUST:
            self.distrust(peer_id, str(error))
        elif is_lasting(error):
            standing.out = str(error)
        elif not isinstance(error, Refused | OutOfMemory):
            self._see(peer_id, PeerRecord(lost=1))
        return remedy

    def distrust(self, peer_id: str, why: str) -> None:
        """Nothing more goes to this peer, now and in later jobs."""
        standing = self._standing(peer_id)
        standing.out = standing.last_words = why
        self._see(peer_id, PeerRecord(distrusted=True))

    def save(self) -> None:
        """Hand what was seen to the history; `refresh` does so too."""
        seen, self._seen = self._seen, {}
        self._history.add(seen)

    def _see(self, peer_id: str, seen: PeerRecord) -> None:
        self._seen[peer_id] = together(self._seen.get(peer_id, PeerRecord()), seen)

    def nobody(self) -> NextGPUError:
        """Why nobody took the work: NoPeerFound, or Refused where peers were there."""
        words = Counter(
            one.excluded or self._seen_as(one).last_words or "was not asked yet"
            for one in self.appraisals()
        )
        here = {one.peer.peer_id for one in self._weighed}
        gone = [s for peer, s in self._standings.items() if peer not in here and s.failures]
        words.update(standing.last_words for standing in gone)
        if not words:
            return NoPeerFound(
                f"No peer that fits is sharing now ({self._asked} asked). "
                "Try again later, ask for less, or see `nextgpu doctor`."
            )
        told = "; ".join(f"{count} x {why}" for why, count in words.most_common(_SHOWN_REASONS))
        return Refused(f"No peer took the work ({sum(words.values())} known): {told}")

    def _seen_as(self, one: Appraisal) -> _Standing:
        return self._standings.get(one.peer.peer_id, _UNKNOWN)

    def _standing(self, peer_id: str) -> _Standing:
        return self._standings.setdefault(peer_id, _Standing())
