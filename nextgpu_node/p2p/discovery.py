"""Finding peers by capability: Kademlia provider records under our own protocol id.

A key is 32 bytes that name a capability (the caller hashes its words).  The DHT only hints:
records are unsigned statements of whoever sent them, and a node that has died stays listed for
up to an hour.  Callers ask each peer itself and believe the signature on its answer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

import structlog
import trio
from libp2p.abc import IHost, INetStream
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError
from libp2p.records.validator import NamespacedValidator

from nextgpu_node.p2p.hardening import DHT_PROTOCOL

log = structlog.get_logger()

KEY_BYTES: Final = 32
# A node takes ten provider records per ten seconds from one peer and silently drops the rest
# (libp2p 0.8.1, and js-libp2p's default too).  One second on top for clocks and queues.
ANNOUNCE_BURST: Final = 10
ANNOUNCE_WINDOW_S: Final = 11.0

_DHT_STREAMS_PER_PEER: Final = 4
_DHT_STREAM_S: Final = 10.0
_DHT_HANDLERS: Final = 64
_QUERY_S: Final = 5.0
_QUERIES_AT_ONCE: Final = 6
_PEERS_ASKED: Final = 20
_ADDRESS_LIFETIME_S: Final = 1800
_FEW_PEERS: Final = 8


class Pacer:
    """At most `burst` permissions in any `window_s` seconds, in the order asked for."""

    def __init__(self, burst: int, window_s: float) -> None:
        self._window_s = window_s
        self._given: deque[float] = deque(maxlen=burst)
        self._turn = trio.Lock()

    async def wait_turn(self) -> None:
        async with self._turn:
            if len(self._given) == self._given.maxlen:
                await trio.sleep_until(self._given[0] + self._window_s)
            self._given.append(trio.current_time())


class CapabilityDHT(KadDHT):  # type: ignore[misc]
    """KadDHT with nothing but provider records, and no way for one peer to occupy it."""

    def __init__(self, host: IHost, mode: DHTMode) -> None:
        # No namespaces and strict: every PUT_VALUE of a stranger is refused.  The stock default
        # stores unknown keys unchecked, up to 50,000 of a MiB each.
        nothing = NamespacedValidator({}, strict_validation=True)
        super().__init__(
            host, mode, validator=nothing, validator_changed=True, strict_validation=True
        )
        self._streams_of: Counter[ID] = Counter()
        # The stock limit of twelve is for all peers together (defect 7).
        self._inbound_limiter = trio.CapacityLimiter(_DHT_HANDLERS)

    async def handle_stream(self, stream: INetStream) -> None:
        """Serve one peer's queries: four streams at once, ten seconds each (defect 7)."""
        peer_id = stream.muxed_conn.peer_id
        if self._streams_of[peer_id] >= _DHT_STREAMS_PER_PEER:
            await stream.reset()
            return
        self._streams_of[peer_id] += 1
        try:
            with trio.move_on_after(_DHT_STREAM_S) as scope:
                await super().handle_stream(stream)
            if scope.cancelled_caught:
                await stream.reset()
        finally:
            self._streams_of[peer_id] -= 1
            if not self._streams_of[peer_id]:
                del self._streams_of[peer_id]

    async def add_peer(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        """Enter a peer in the routing table if identify has shown that it serves our DHT.

        The stock class enters whoever asks it something, so that nodes in client mode, which
        answer nothing, fill the tables.
        """
        if DHT_PROTOCOL not in self._protocols_of(peer_id):
            return False
        return bool(await self.routing_table.add_peer(peer_id))

    def _protocols_of(self, peer_id: ID) -> list[str]:
        try:
            return list(self.host.get_peerstore().get_protocols(peer_id))
        except PeerStoreError:
            return []


class Discovery:
    """Announce keys, find who announced one, find a peer's addresses."""

    def __init__(self, host: IHost, dht: CapabilityDHT) -> None:
        self._host = host
        self._dht = dht
        self._pacer = Pacer(ANNOUNCE_BURST, ANNOUNCE_WINDOW_S)

    async def announce(self, keys: Sequence[bytes]) -> None:
        """Tell the peers nearest to each key that we provide it; ten keys per eleven seconds.

        Records live for an hour.  Announce again well before that.
        """
        for key in keys:
            check_key(key)
        for key in keys:
            await self._pacer.wait_turn()
            await self._dht.provider_store.provide(_multihash(key))
            # The library would repeat it by itself after 22 h, unpaced and unasked.
            self._dht.provider_store.providing_keys.discard(_multihash(key))
        log.debug("capabilities.announced", keys=len(keys))

    async def find_providers(self, key: bytes) -> list[str]:
        """Peer ids of those who announced `key`, ourselves excluded, in no particular order.

        The library's own lookup answers from its cache for 48 hours and counts duplicates; this
        one asks the network each time and adds what this node holds for others.
        """
        check_key(key)
        key = _multihash(key)
        found: dict[ID, PeerInfo] = {}
        self._note(self._dht.provider_store.get_providers(key), found)
        nearest = await self._dht.peer_routing.find_closest_peers_network(key)
        slots = trio.CapacityLimiter(_QUERIES_AT_ONCE)

        async def ask(peer_id: ID) -> None:
            async with slots:
                with trio.move_on_after(_QUERY_S):
                    store = self._dht.provider_store
                    told, _ = await store._get_providers_from_peer_with_closers(peer_id, key)
                    self._note(told, found)

        async with trio.open_nursery() as nursery:
            for peer_id in nearest[:_PEERS_ASKED]:
                if peer_id != self._host.get_id():
                    nursery.start_soon(ask, peer_id)
        return [str(peer_id) for peer_id in found]

    def _note(self, providers: Sequence[PeerInfo], found: dict[ID, PeerInfo]) -> None:
        for info in providers:
            if info.peer_id == self._host.get_id():
                continue
            found.setdefault(info.peer_id, info)
            addresses = list(info.addrs)[:16]
            if addresses:
                store = self._host.get_peerstore()
                store.add_addrs(info.peer_id, addresses, _ADDRESS_LIFETIME_S)

    async def find_addresses(self, peer_id: ID) -> bool:
        """Look a peer up in the network; whether its peerstore entry now has addresses."""
        store = self._host.get_peerstore()
        await self._dht.peer_routing.find_closest_peers_network(peer_id.to_bytes())
        try:
            return bool(store.addrs(peer_id))
        except PeerStoreError:
            return False

    async def enter(self, peer_id: ID) -> None:
        """Note a peer that has identified itself; the first few are asked for our neighbours."""
        table = self._dht.routing_table
        is_news = not table.peer_in_table(peer_id)
        if await self._dht.add_peer(peer_id) and is_news and table.size() <= _FEW_PEERS:
            await self._dht.refresh_routing_table()


def check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a capability key has {KEY_BYTES} bytes, not {len(key)}")


def _multihash(key: bytes) -> bytes:
    """`key` as the multihash other DHT implementations expect: sha2-256, 32 bytes."""
    return b"\x12\x20" + key
