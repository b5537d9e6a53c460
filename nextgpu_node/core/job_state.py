"""What a job's journal says, event by event.  Pure.

    queued -> transferring -> starting -> running -> returning -> done | failed | cancelled

Statuses of a shard are those of its latest attempt; the job's own is the furthest of its shards,
until an end is written down.  Whether a process works at it now is not in the journal: that is the
lock's to say (sdk/jobs.py), which turns an open job that nobody works at into "interrupted".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import msgspec

OPEN_STATUSES: Final = ("queued", "transferring", "starting", "running", "returning")
END_STATUSES: Final = ("done", "failed", "cancelled")


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """`at_ms`: milliseconds since the Unix epoch."""

    at_ms: int


class JobBegan(_Event, frozen=True, kw_only=True, tag="job.began"):
    """A process took the job up, for the first time or again."""

    pid: int


class JobEnded(_Event, frozen=True, kw_only=True, tag="job.ended"):
    """`exit_code` is what the command line ended with, or would have."""

    status: str
    why: str = ""
    exit_code: int = 0


class ShardEntered(_Event, frozen=True, kw_only=True, tag="shard.entered"):
    """An attempt of the shard is in this status now, at this peer."""

    shard: int
    status: str
    peer_id: str = ""


class ShardKept(_Event, frozen=True, kw_only=True, tag="shard.kept"):
    """Its result is in the job's directory (or at its output): `digest`, BLAKE2b-256 in hex."""

    shard: int
    peer_id: str
    digest: str
    seconds: float = 0.0
    steps: int = 1
    receipt: bool = False


class ShardFailed(_Event, frozen=True, kw_only=True, tag="shard.failed"):
    """Given up."""

    shard: int
    why: str


class ShardRetracted(_Event, frozen=True, kw_only=True, tag="shard.retracted"):
    """Its result is not to be used; it is done again."""

    shard: int


class ShardConfirmed(_Event, frozen=True, kw_only=True, tag="shard.confirmed"):
    """Another run agreed with its result."""

    shard: int


class Checkpointed(_Event, frozen=True, kw_only=True, tag="shard.checkpointed"):
    """So many of its steps need not be done again."""

    shard: int
    steps: int


class PeerFailed(_Event, frozen=True, kw_only=True, tag="peer.failed"):
    """An attempt ended early; what the peer, or we, said about it."""

    shard: int
    peer_id: str
    why: str


class PeerDistrusted(_Event, frozen=True, kw_only=True, tag="peer.distrusted"):
    """Nothing more goes there."""

    peer_id: str
    why: str


JobEvent: TypeAlias = (
    JobBegan
    | JobEnded
    | ShardEntered
    | ShardKept
    | ShardFailed
    | ShardRetracted
    | ShardConfirmed
    | Checkpointed
    | PeerFailed
    | PeerDistrusted
)


@dataclass(slots=True)
class ShardState:
    status: str = "queued"
    peer_id: str = ""
    why: str = ""
    digest: str = ""
    seconds: float = 0.0
    checkpoint_steps: int = 0
    attempts_lost: int = 0
    confirmed: bool = False


@dataclass(slots=True)
class JobState:
    """Of a job of `shards` shards."""

    shards: list[ShardState]
    ended: str = ""
    why: str = ""
    exit_code: int = 0
    began_ms: int = 0
    ended_ms: int = 0
    distrusted: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The end, or how far the furthest open shard is."""
        if self.ended:
            return self.ended
        at = {shard.status for shard in self.shards}
        reached = [status for status in OPEN_STATUSES if status in at]
        # A map between two shards has done some: it is running, not queued.
        if reached in ([], ["queued"]) and at & set(END_STATUSES):
            return "running"
        return reached[-1] if reached else "queued"

    def counts(self) -> Counter[str]:
        return Counter(shard.status for shard in self.shards)

    def indexes(self, *statuses: str) -> list[int]:
        """The shards in one of `statuses`."""
        return [k for k, shard in enumerate(self.shards) if shard.status in statuses]

    def apply(self, event: JobEvent) -> None:
        """Take one event in.  One about a shard that the job does not have changes nothing."""
        match event:
            case JobBegan():
                self.began_ms = self.began_ms or event.at_ms
                self.ended, self.why, self.exit_code, self.ended_ms = "", "", 0, 0
                self._reopen()
            case JobEnded():
                self.ended, self.why, self.exit_code = event.status, event.why, event.exit_code
                self.ended_ms = event.at_ms
            case PeerDistrusted():
                self.distrusted[event.peer_id] = event.why
            case _:
                if 0 <= event.shard < len(self.shards):
                    self._apply_to(self.shards[event.shard], event)

    def _reopen(self) -> None:
        """What the last process had in hand is nobody's now; what failed is tried again."""
        for shard in self.shards:
            if shard.status != "done":
                shard.status, shard.why = "queued", ""

    def _apply_to(self, shard: ShardState, event: JobEvent) -> None:
        match event:
            case ShardEntered():
                # The copy of a straggler must not make a shard look further back than it is.
                if shard.status != "done":
                    shard.status, shard.peer_id = event.status, event.peer_id
            case ShardKept():
                shard.status, shard.peer_id, shard.why = "done", event.peer_id, ""
                shard.digest, shard.seconds = event.digest, event.seconds
            case ShardFailed():
                shard.status, shard.why = "failed", event.why
            case ShardRetracted():
                shard.status, shard.digest, shard.confirmed = "queued", "", False
            case ShardConfirmed():
                shard.confirmed = True
            case Checkpointed():
                shard.checkpoint_steps = event.steps
            case PeerFailed():
                shard.attempts_lost += 1
                if shard.status != "done":
                    shard.status, shard.why = "queued", event.why
            case _:
                pass


def replay(events: Iterable[JobEvent], shards: int) -> JobState:
    """The state after `events`, from the beginning."""
    state = JobState([ShardState() for _ in range(shards)])
    for event in events:
        state.apply(event)
    return state
