"""Which peer first, and why?  Pure.

Each thing that is known of a peer becomes a factor of its cost; 1 is neutral, less is better, and
the cost is their product.  So every choice can be explained in the words of its factors:

    cost 1.42 = latency 1.03 * reliability 1.25 * memory 1.10

A peer that lacks a slot or a GPU costs many times more, which puts it last without ruling it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from nextgpu_node.api_types import DeviceView, PeerNeed, PeerView

# A peer that nobody has tried counts as one that brought back four units of five.
_PRIOR_DONE: Final = 4.0
_PRIOR_ALL: Final = 5.0
_NO_SLOT: Final = 10.0
_NO_GPU: Final = 8.0
_FULL_MEMORY: Final = 4.0
_TRUSTED: Final = 0.5
_SLOW_LATENCY_MS: Final = 100.0
_SLOW_BYTES_PER_S: Final = 10e6
_UNKNOWN_RATE: Final = 1.2
_OVERSIZE: Final = 0.1
_SMALLEST_NEED_BYTES: Final = 10**9


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """What this submitter saw of a peer; counts fade with time.  Nothing about what ran."""

    done: float = 0.0
    lost: float = 0.0
    bytes_per_s: float = 0.0  # 0: not measured
    distrusted: bool = False  # a result, seal or receipt of it was wrong


@dataclass(frozen=True, slots=True)
class Preferences:
    """What the user decided.  `peers` empty: everyone; `max_price` is reserved, all prices are 0.

    `trusted` costs half; with `trusted_only` nobody else is asked.
    """

    peers: frozenset[str] = frozenset()
    trusted: frozenset[str] = frozenset()
    trusted_only: bool = False
    max_price: int | None = None


@dataclass(frozen=True, slots=True)
class Factor:
    """`effect` multiplies the cost; `why` is one line for people."""

    name: str
    effect: float
    why: str


@dataclass(frozen=True, slots=True)
class Appraisal:
    """One peer, weighed.  `excluded` is the reason why it is not asked at all, or empty."""

    peer: PeerView
    factors: tuple[Factor, ...] = field(default=())
    excluded: str = ""

    @property
    def cost(self) -> float:
        return math.prod(factor.effect for factor in self.factors)


def fits(peer: PeerView, need: PeerNeed) -> bool:
    """True where one of the peer's devices fills the need and the peer is sharing."""
    return peer.sharing and bool(_fitting(peer, need))


def rank(peers: Iterable[PeerView], need: PeerNeed) -> list[PeerView]:
    """The peers that fit, best first, by what they say of themselves."""
    return [one.peer for one in choose(peers, need) if not one.excluded]


def choose(
    peers: Iterable[PeerView],
    need: PeerNeed,
    preferences: Preferences | None = None,
    records: dict[str, PeerRecord] | None = None,
) -> list[Appraisal]:
    """Every peer weighed: those to ask, best first, then the excluded ones."""
    preferences, records = preferences or Preferences(), records or {}
    weighed = [
        appraise(peer, need, preferences, records.get(peer.peer_id, PeerRecord())) for peer in peers
    ]
    return sorted(weighed, key=lambda one: (bool(one.excluded), one.cost, one.peer.latency_ms))


def appraise(
    peer: PeerView, need: PeerNeed, preferences: Preferences, record: PeerRecord
) -> Appraisal:
    """`peer` weighed against the need, the user's wishes and what is remembered of it."""
    excluded = _excluded(peer, need, preferences, record)
    if excluded:
        return Appraisal(peer, excluded=excluded)
    device = min(_fitting(peer, need), key=_device_order)
    factors = (
        _load(peer),
        _device(device),
        _memory(device, need),
        _latency(peer),
        _throughput(record),
        _reliability(record),
        _trust(peer, preferences),
    )
    return Appraisal(peer, factors)


def _excluded(peer: PeerView, need: PeerNeed, preferences: Preferences, record: PeerRecord) -> str:
    if not peer.sharing:
        return f"is not sharing: {peer.reason}" if peer.reason else "is not sharing"
    if not _fitting(peer, need):
        return "has no device that fits"
    if preferences.peers and peer.peer_id not in preferences.peers:
        return "is not one of the peers that were named"
    if preferences.trusted_only and peer.peer_id not in preferences.trusted:
        return "is not among your trusted peers"
    if record.distrusted:
        return "gave a wrong result or a broken seal before"
    return ""


def _fitting(peer: PeerView, need: PeerNeed) -> list[DeviceView]:
    return [
        device
        for device in peer.devices
        if need.kind in ("any", device.kind) and device.memory_total_bytes >= need.memory_bytes
    ]


def _device_order(device: DeviceView) -> tuple[bool, int]:
    return (device.kind == "cpu", device.memory_total_bytes)


def _load(peer: PeerView) -> Factor:
    if peer.free_slots:
        return Factor("load", 1.0, f"{peer.free_slots} free slots")
    return Factor("load", _NO_SLOT, "all slots are in use")


def _device(device: DeviceView) -> Factor:
    if device.kind == "cpu":
        return Factor("device", _NO_GPU, "no GPU")
    return Factor("device", 1.0, device.name)


def _memory(device: DeviceView, need: PeerNeed) -> Factor:
    """The smallest that fits, so that a small job leaves the large devices to who needs them."""
    if device.memory_free_bytes < need.memory_bytes:
        return Factor("memory", _FULL_MEMORY, "too little device memory is free now")
    times = device.memory_total_bytes / max(need.memory_bytes, _SMALLEST_NEED_BYTES)
    effect = 1 + _OVERSIZE * max(0.0, math.log2(max(times, 1.0)))
    return Factor("memory", effect, f"{times:.1f} times the memory that is needed")


def _latency(peer: PeerView) -> Factor:
    effect = 1 + peer.latency_ms / _SLOW_LATENCY_MS
    return Factor("latency", effect, f"answered in {peer.latency_ms:.1f} ms")


def _throughput(record: PeerRecord) -> Factor:
    if not record.bytes_per_s:
        return Factor("throughput", _UNKNOWN_RATE, "not measured yet")
    effect = 1 + _SLOW_BYTES_PER_S / record.bytes_per_s
    return Factor("throughput", effect, f"moved {record.bytes_per_s / 1e6:.1f} MB/s")


def _reliability(record: PeerRecord) -> Factor:
    """Laplace's rule: the share of units that came back, pulled towards the prior."""
    seen = record.done + record.lost
    share = (record.done + _PRIOR_DONE) / (seen + _PRIOR_ALL)
    why = f"{record.done:.0f} of {seen:.0f} units came back" if seen >= 1 else "not tried yet"
    return Factor("reliability", 1 / share, why)


def _trust(peer: PeerView, preferences: Preferences) -> Factor:
    if peer.peer_id in preferences.trusted:
        return Factor("trust", _TRUSTED, "you trust it")
    return Factor("trust", 1.0, "a stranger")
