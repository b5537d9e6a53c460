"""Which peer first?  Pure.

A peer that can take the unit now comes before one that is full; then the smallest device that
fits, so that a small job leaves the large devices to those who need them; then the nearest.
"""

from __future__ import annotations

from collections.abc import Iterable

from nextgpu_node.api_types import PeerNeed, PeerView


def fits(peer: PeerView, need: PeerNeed) -> bool:
    """True where one of the peer's devices fills the need and the peer is sharing."""
    return peer.sharing and any(
        need.kind in ("any", device.kind) and device.memory_total_bytes >= need.memory_bytes
        for device in peer.devices
    )


def rank(peers: Iterable[PeerView], need: PeerNeed) -> list[PeerView]:
    """The peers that fit, best first."""
    return sorted((peer for peer in peers if fits(peer, need)), key=_preference)


def _preference(peer: PeerView) -> tuple[bool, bool, int, float]:
    has_gpu = any(device.kind != "cpu" for device in peer.devices)
    memory = min(device.memory_total_bytes for device in peer.devices)
    return (peer.free_slots == 0, not has_gpu, memory, peer.latency_ms)
