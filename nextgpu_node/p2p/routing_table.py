"""Kademlia's routing table, pure: which DHT servers to keep, and which are nearest to a place.

    bucket i   nodes whose place shares exactly i leading bits with ours; 20 of them, and a few
               that wait for a place to become free

Only nodes that have answered us are entered.  Old nodes stay: who has lived long will live longer
(Maymounkov and Mazières, 2002, section 2.2), and newcomers can not flush the table.  One network
(IPv4 /24, IPv6 /48) has at most two nodes in a bucket and ten in the table, so that whoever wants
to surround a place needs many networks, not many keys.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from nextgpu_protocol.dht import PLACE_BYTES, distance, node_place

BUCKET_NODES: Final = 20
PER_NETWORK_IN_BUCKET: Final = 2
PER_NETWORK_IN_TABLE: Final = 10
_WAITING: Final = 5
_FAILURES_TO_LEAVE: Final = 3


@dataclass(frozen=True, slots=True)
class Node:
    """A DHT server.  `network` is its address's, empty where it is not on the public internet."""

    key: bytes  # 32 bytes, its public key
    addresses: tuple[str, ...]
    network: str
    answered_at_s: float
    failures: int = 0

    @property
    def place(self) -> bytes:
        return node_place(self.key)


class _Bucket:
    def __init__(self) -> None:
        self.nodes: OrderedDict[bytes, Node] = OrderedDict()
        self.waiting: OrderedDict[bytes, Node] = OrderedDict()


class RoutingTable:
    """Places are compared with `own_place`; times are seconds of any one clock."""

    def __init__(self, own_place: bytes) -> None:
        self._own_place = own_place
        self._buckets: dict[int, _Bucket] = {}
        self._networks: Counter[str] = Counter()
        self._known: dict[bytes, tuple[int, bytes]] = {}  # key -> bucket, place

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __iter__(self) -> Iterator[Node]:
        for bucket in self._buckets.values():
            yield from bucket.nodes.values()

    def answered(self, node: Node) -> bool:
        """Note that a node has answered just now; whether it is in the table afterwards."""
        place = node.place
        if place == self._own_place:
            return False
        index = self._index(place)
        bucket = self._buckets.setdefault(index, _Bucket())
        if node.key in bucket.nodes:
            old = bucket.nodes[node.key]
            # Its network stays the one that it was counted under.
            bucket.nodes[node.key] = replace(node, network=old.network)
            bucket.nodes.move_to_end(node.key)
            return True
        if self._has_room(bucket, node.network):
            self._enter(index, bucket, node, place)
            return True
        bucket.waiting[node.key] = node
        bucket.waiting.move_to_end(node.key)
        while len(bucket.waiting) > _WAITING:
            bucket.waiting.popitem(last=False)
        return False

    def failed(self, key: bytes) -> None:
        """Note that a node did not answer.  The second time in a row it leaves."""
        if key not in self._known:
            return
        index, _ = self._known[key]
        bucket = self._buckets[index]
        node = bucket.nodes[key]
        if node.failures + 1 < _FAILURES_TO_LEAVE:
            bucket.nodes[key] = replace(node, failures=node.failures + 1)
            return
        self._leave(bucket, node)
        for waiting in reversed(list(bucket.waiting.values())):
            if self._has_room(bucket, waiting.network):
                del bucket.waiting[waiting.key]
                self._enter(index, bucket, waiting, waiting.place)
                return

    def nearest(self, place: bytes, count: int) -> list[Node]:
        """The nodes nearest to `place`, nearest first."""
        keys = sorted(self._known, key=lambda key: distance(self._known[key][1], place))
        return [self._buckets[self._known[key][0]].nodes[key] for key in keys[:count]]

    def quietest(self, before_s: float) -> Node | None:
        """The node that has not answered for longest, if that was before `before_s`."""
        quiet = min(self, key=lambda node: node.answered_at_s, default=None)
        return quiet if quiet is not None and quiet.answered_at_s < before_s else None

    def bucket_indices(self) -> list[int]:
        """Which buckets hold somebody: where a refresh has something to look for."""
        return sorted(index for index, bucket in self._buckets.items() if bucket.nodes)

    def place_in_bucket(self, index: int, noise: bytes) -> bytes:
        """A place that shares exactly `index` leading bits with ours, the rest from `noise`."""
        bits = 8 * PLACE_BYTES
        own, random_bits = int.from_bytes(self._own_place), int.from_bytes(noise)
        tail = bits - index - 1
        head = (own >> tail) ^ 1
        return ((head << tail) | (random_bits & ((1 << tail) - 1))).to_bytes(PLACE_BYTES)

    def _index(self, place: bytes) -> int:
        return 8 * PLACE_BYTES - distance(place, self._own_place).bit_length()

    def _has_room(self, bucket: _Bucket, network: str) -> bool:
        if len(bucket.nodes) >= BUCKET_NODES:
            return False
        if not network:
            return True
        here = sum(node.network == network for node in bucket.nodes.values())
        return here < PER_NETWORK_IN_BUCKET and self._networks[network] < PER_NETWORK_IN_TABLE

    def _enter(self, index: int, bucket: _Bucket, node: Node, place: bytes) -> None:
        bucket.nodes[node.key] = node
        self._known[node.key] = (index, place)
        self._networks[node.network] += 1

    def _leave(self, bucket: _Bucket, node: Node) -> None:
        del bucket.nodes[node.key]
        del self._known[node.key]
        self._networks[node.network] -= 1


def network_of(ip: str) -> str:
    """What one owner usually has as a whole: an IPv4 /24 or IPv6 /48; empty for private ones.

    Loopback, private and link-local addresses are not scarce, and their networks are small: no
    diversity is asked of them.
    """
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not address.is_global:
        return ""
    prefix = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network((address, prefix), strict=False))


def estimate_nodes(places: Iterable[bytes], target: bytes) -> float:
    """How many nodes a network has in which these are the nearest ones to `target`.

    Places are evenly spread, so the k-th nearest lies at about k / (N + 1) of the whole ring.
    """
    ring = 2.0 ** (8 * PLACE_BYTES)
    fractions = sorted(distance(place, target) / ring for place in places)
    if not fractions:
        return 0.0
    return max(float(len(fractions)), len(fractions) / max(fractions[-1], 1e-60) - 1)
