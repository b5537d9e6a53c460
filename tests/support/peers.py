"""Peers as a daemon would report them, for tests of what a submitter makes of them."""

from __future__ import annotations

from typing import Any

import msgspec

from nextgpu_node.api_types import DeviceView, PeerNeed, PeersReply, PeerView

GB = 10**9
CARD = DeviceView(
    kind="cuda", name="NVIDIA Example", memory_total_bytes=16 * GB, memory_free_bytes=16 * GB
)
CPU = DeviceView(kind="cpu", name="cpu", memory_total_bytes=8 * GB, memory_free_bytes=8 * GB)


def peer(name: str, **changes: Any) -> PeerView:
    """A peer with one card, one free slot and 5 ms of latency."""
    view = PeerView(
        peer_id=name,
        latency_ms=5.0,
        sharing=True,
        reason="",
        devices=[CARD],
        free_slots=1,
        memory_bytes=GB,
        max_seconds=60,
        input_bytes=GB,
        output_bytes=GB,
        runtime="torch 2.13.0",
        table_version=1,
        isolation=[],
    )
    return msgspec.structs.replace(view, **changes)


class PeerSource:
    """What `ApiClient.peers` answers, changed by the test as it goes on."""

    def __init__(self, *peers: PeerView) -> None:
        self.peers = list(peers)
        self.asked = 0

    async def __call__(self, need: PeerNeed) -> PeersReply:
        self.asked += 1
        return PeersReply(peers=self.peers, candidates=len(self.peers))
