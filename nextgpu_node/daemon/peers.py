"""Finding peers by need: DHT keys -> candidates -> each one's signed capacity -> ranked.

The DHT is a hint.  What counts is what the peer itself signs, fetched just now.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
# What has been verified by then is the answer; only while there is nothing at all, we wait on.
_ANSWER_S = 1.7
_PATIENCE_S = 10
_FETCH_DEADLINE_S = 4
_FETCHES_AT_ONCE = 24
_MAX_CANDIDATES = 200
_ANNOUNCE_TICK_S = 2
# Soon again after a start, while a network that starts with us is still meeting itself.
_ANNOUNCE_AGAIN_S = (20, 600)
_SLOWEST_RETRY_S = 60.0
_WITHDRAW_S = 1.0
_lots = random.SystemRandom()


async def serve_capacity(stream: ByteStream, record: Callable[[], bytes]) -> None:
    """Answer one capacity stream with the signed record of this moment."""
    with trio.move_on_after(_FETCH_DEADLINE_S):
        await FrameStream(stream).send(FrameKind.CAPACITY, record())


async def announce_forever(network: Network, keys: Callable[[], Sequence[bytes]]) -> None:
    """Keep our capability keys in the DHT: at once where they change, and again in time."""
    announced: list[bytes] = []
    times, failures, due_s, pause_s = 0, 0, 0.0, 0.0
    while True:
        wanted = list(keys())
        if wanted != announced and times:
            times, due_s = 0, 0.0
        is_due = bool(wanted or announced) and trio.current_time() >= due_s
        if is_due and network.connected_peers():
            if await network.announce(wanted) == len(wanted):
                pause_s = _ANNOUNCE_AGAIN_S[min(times, len(_ANNOUNCE_AGAIN_S) - 1)]
                announced, times, failures = wanted, times + 1, 0
            else:
                # Not all of them are held: the network is young, or too busy to be hurried.
                pause_s = min(_ANNOUNCE_TICK_S * 2.0**failures, _SLOWEST_RETRY_S)
                failures += 1
            due_s = trio.current_time() + pause_s * _lots.uniform(0.8, 1.2)
        await trio.sleep(_ANNOUNCE_TICK_S)


async def withdraw(network: Network) -> None:
    """Take our announcements back before we go, as far as a second reaches."""
    with trio.move_on_after(_WITHDRAW_S):
        await network.announce([])


@dataclass(slots=True)
class _Search:
    """One question on its way."""

    need: PeerNeed
    candidates: dict[str, None] = field(default_factory=dict)
    views: list[PeerView] = field(default_factory=list)
    estimate: int = 0
    is_sample: bool = False
    first: trio.Event = field(default_factory=trio.Event)


class PeerFinder:
    """Answers `nextgpu peers`."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._fetches = trio.CapacityLimiter(_FETCHES_AT_ONCE)

    async def find(self, need: PeerNeed) -> PeersReply:
        """The reachable peers that fit, best first: all of them, or of many an even sample."""
        search = _Search(need)
        with trio.move_on_after(_PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._search, search, nursery.cancel_scope)
                await trio.sleep(_ANSWER_S)
                await search.first.wait()
                nursery.cancel_scope.cancel()
        return PeersReply(
            peers=rank(search.views, need)[: need.limit],
            candidates=len(search.candidates),
            estimate=search.estimate,
            sampled=search.is_sample,
        )

    async def _search(self, search: _Search, whole: trio.CancelScope) -> None:
        async with trio.open_nursery() as nursery:
            for key in keys_for_need(search.need.kind, search.need.memory_bytes):
                nursery.start_soon(self._look_up, search, key, nursery)
        whole.cancel()

    async def _look_up(self, search: _Search, key: bytes, nursery: trio.Nursery) -> None:
        found = await self._network.find(key)
        search.estimate += found.estimate
        search.is_sample |= found.is_sample
        ids = [one.signer_id for one in found.records if one.signer_id != self._network.peer_id]
        # The limit must not prefer anybody.
        _lots.shuffle(ids)
        for peer_id in ids:
            if peer_id not in search.candidates and len(search.candidates) < _MAX_CANDIDATES:
                search.candidates[peer_id] = None
                nursery.start_soon(self._fetch_into, peer_id, search)

    async def _fetch_into(self, peer_id: str, search: _Search) -> None:
        async with self._fetches:
            try:
                with trio.move_on_after(_FETCH_DEADLINE_S):
                    search.views.append(await self._fetch(peer_id))
                    search.first.set()
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
