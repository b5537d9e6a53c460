"""Finding peers by need: DHT keys -> candidates -> each one's signed capacity -> ranked.

The DHT is a hint.  What counts is what the peer itself signs, fetched just now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog
import trio

from nextgpu_node.api_types import PeerNeed, PeersReply, PeerView
from nextgpu_node.clock import now_ms
from nextgpu_node.core.choice import rank
from nextgpu_node.daemon.devices import as_view
from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.frames import ByteStream, FrameStream
from nextgpu_node.p2p.network import Network
from nextgpu_protocol.capability import keys_for_need
from nextgpu_protocol.checks import check_capacity_untrusted
from nextgpu_protocol.envelope import open_envelope_untrusted
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.ids import public_key_from_peer_id
from nextgpu_protocol.messages import Capacity

log = structlog.get_logger()

CAPACITY_PROTOCOL = "/nextgpu/capacity/1"
_LOOKUP_DEADLINE_S = 10
_FETCH_DEADLINE_S = 4
_FETCHES_AT_ONCE = 16
_MAX_CANDIDATES = 200
_SETTLE_S = 60
_FIRST_ANNOUNCE_S = 5
_LATER_ANNOUNCE_S = 300


async def serve_capacity(stream: ByteStream, record: Callable[[], bytes]) -> None:
    """Answer one capacity stream with the signed record of this moment."""
    with trio.move_on_after(_FETCH_DEADLINE_S):
        await FrameStream(stream).send(FrameKind.CAPACITY, record())


async def announce_forever(network: Network, keys: Callable[[], Sequence[bytes]]) -> None:
    """Keep our capability keys in the DHT: often at first, while the network is being met."""
    began_s = time.monotonic()
    while True:
        if network.connected_peers():
            await network.announce(keys())
        settled = time.monotonic() - began_s > _SETTLE_S and network.connected_peers() > 0
        await trio.sleep(_LATER_ANNOUNCE_S if settled else _FIRST_ANNOUNCE_S)


class PeerFinder:
    """Answers `nextgpu peers`."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._fetches = trio.CapacityLimiter(_FETCHES_AT_ONCE)

    async def find(self, need: PeerNeed) -> PeersReply:
        """Every reachable peer that fits, best first."""
        candidates = await self._candidates(need)
        views: list[PeerView] = []
        async with trio.open_nursery() as nursery:
            for peer_id in candidates:
                nursery.start_soon(self._fetch_into, peer_id, views)
        return PeersReply(peers=rank(views, need)[: need.limit], candidates=len(candidates))

    async def _candidates(self, need: PeerNeed) -> list[str]:
        found: dict[str, None] = {}

        async def look_up(key: bytes) -> None:
            with trio.move_on_after(_LOOKUP_DEADLINE_S):
                found.update(dict.fromkeys(await self._network.find_providers(key)))

        async with trio.open_nursery() as nursery:
            for key in keys_for_need(need.kind, need.memory_bytes):
                nursery.start_soon(look_up, key)
        return list(found)[:_MAX_CANDIDATES]

    async def _fetch_into(self, peer_id: str, views: list[PeerView]) -> None:
        async with self._fetches:
            try:
                with trio.move_on_after(_FETCH_DEADLINE_S):
                    views.append(await self._fetch(peer_id))
            except (RemoteProtocolError, NetworkError, PeerLost, trio.BrokenResourceError) as exc:
                log.debug("capacity.fetch_failed", cause=type(exc).__name__)

    async def _fetch(self, peer_id: str) -> PeerView:
        stream = await self._network.open_stream(peer_id, CAPACITY_PROTOCOL)
        try:
            # From the open stream on: what a call will cost, not what the first dial did.
            began_s = time.perf_counter()
            body = await FrameStream(stream).expect_untrusted(FrameKind.CAPACITY)
            latency_ms = (time.perf_counter() - began_s) * 1000
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await stream.aclose()
        return _view_untrusted(peer_id, body, latency_ms)


def _view_untrusted(peer_id: str, body: bytes, latency_ms: float) -> PeerView:
    signed = open_envelope_untrusted(Capacity, body)
    check_capacity_untrusted(signed, public_key_from_peer_id(peer_id), now_ms=now_ms())
    capacity = signed.message
    return PeerView(
        peer_id=peer_id,
        latency_ms=round(latency_ms, 2),
        sharing=capacity.sharing,
        reason=capacity.reason,
        devices=[as_view(device) for device in capacity.devices],
        free_slots=capacity.free_slots,
        memory_bytes=capacity.memory_bytes,
        max_seconds=capacity.max_seconds,
        input_bytes=capacity.input_bytes,
        output_bytes=capacity.output_bytes,
        runtime=capacity.runtime,
        table_version=capacity.table_version,
        isolation=list(capacity.isolation),
    )
