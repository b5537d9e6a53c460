"""What a DHT server holds for others, pure.  Spec: 72-discovery.md#what-a-holder-does

    place (32 bytes) -> Shelf: at most 256 announcements, an even sample where there are more

Everything is bounded: by place, by peer, by network, in all, and by time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from nextgpu_protocol.dht import MAX_SAMPLING, branch_of, distance, is_sampled, rank, shard_place
from nextgpu_protocol.envelope import Signed
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.messages import Announcement

SHELF_RECORDS: Final = 256
_SHELF_LOW: Final = SHELF_RECORDS // 4
PER_NETWORK_ON_SHELF: Final = 16
PER_PEER: Final = 64
PER_NETWORK: Final = 2048
MAX_RECORDS: Final = 40_000  # about 25 MB
HELD: Final = 0


@dataclass(frozen=True, slots=True)
class _Held:
    data: bytes
    issued_at_ms: int
    expires_at_ms: int
    rank: int
    network: str
    withdrawn: bool


class _Shelf:
    def __init__(self, place: bytes) -> None:
        self.place = place
        self.sampling = 0
        self.records: dict[bytes, _Held] = {}
        self.networks: Counter[str] = Counter()


class RecordStore:
    """Announcements by place.  `now_ms` is the wall clock, in milliseconds."""

    def __init__(self, own_place: bytes) -> None:
        self._own_place = own_place
        self._shelves: dict[bytes, _Shelf] = {}
        self._per_peer: Counter[bytes] = Counter()
        self._per_network: Counter[str] = Counter()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, signed: Signed[Announcement], level: int, network: str) -> tuple[int, int]:
        """Hold a verified announcement; (0 or an error code, the place's sampling)."""
        message, peer = signed.message, signed.signer
        place = shard_place(message.key, level, branch_of(peer, level))
        shelf = self._shelves.get(place) or _Shelf(place)
        known = shelf.records.get(peer)
        lot = rank(place, peer)
        held = _Held(
            data=signed.data,
            issued_at_ms=message.issued_at_ms,
            expires_at_ms=message.expires_at_ms,
            rank=lot,
            network=network,
            withdrawn=not message.addresses,
        )
        if known is not None:
            return self._renew(shelf, peer, known, held), shelf.sampling
        if not is_sampled(lot, shelf.sampling):
            return ErrorCode.OVER_LIMIT, shelf.sampling
        if not self._may_hold(shelf, peer, network):
            return ErrorCode.RATE_LIMITED, shelf.sampling
        self._shelves[place] = shelf
        self._add(shelf, peer, held)
        while len(shelf.records) > SHELF_RECORDS and shelf.sampling < MAX_SAMPLING:
            self._thin(shelf)
        return (HELD if peer in shelf.records else ErrorCode.OVER_LIMIT), shelf.sampling

    def get(self, place: bytes, now_ms: int) -> tuple[int, list[bytes]]:
        """The place's sampling and what is held there now."""
        shelf = self._shelves.get(place)
        if shelf is None:
            return 0, []
        live = [
            held.data
            for held in shelf.records.values()
            if now_ms < held.expires_at_ms and not held.withdrawn
        ]
        return shelf.sampling, live

    def sweep(self, now_ms: int) -> None:
        """Drop what has expired; shelves that are nearly empty hold a larger share from now on."""
        for place, shelf in list(self._shelves.items()):
            for peer, held in list(shelf.records.items()):
                if now_ms >= held.expires_at_ms:
                    self._remove(shelf, peer)
            if len(shelf.records) < _SHELF_LOW and shelf.sampling:
                shelf.sampling -= 1
            if not shelf.records and not shelf.sampling:
                self._shelves.pop(place, None)

    def _renew(self, shelf: _Shelf, peer: bytes, known: _Held, held: _Held) -> int:
        if held.data == known.data:
            return HELD
        if held.issued_at_ms <= known.issued_at_ms:
            return ErrorCode.REPLAYED
        self._remove(shelf, peer)
        self._shelves.setdefault(shelf.place, shelf)
        self._add(shelf, peer, held)
        return HELD

    def _may_hold(self, shelf: _Shelf, peer: bytes, network: str) -> bool:
        if self._per_peer[peer] >= PER_PEER:
            return False
        if network and shelf.networks[network] >= PER_NETWORK_ON_SHELF:
            return False
        if network and self._per_network[network] >= PER_NETWORK:
            return False
        return self._count < MAX_RECORDS or self._make_room(shelf.place)

    def _make_room(self, place: bytes) -> bool:
        """Give up the shelf that is farthest from us, if it is farther than `place`."""
        farthest = max(self._shelves.values(), key=lambda shelf: self._distance(shelf.place))
        if self._distance(farthest.place) <= self._distance(place):
            return False
        for peer in list(farthest.records):
            self._remove(farthest, peer)
        self._shelves.pop(farthest.place, None)
        return True

    def _distance(self, place: bytes) -> int:
        return distance(place, self._own_place)

    def _thin(self, shelf: _Shelf) -> None:
        shelf.sampling += 1
        for peer, held in list(shelf.records.items()):
            if not is_sampled(held.rank, shelf.sampling):
                self._remove(shelf, peer)

    def _add(self, shelf: _Shelf, peer: bytes, held: _Held) -> None:
        shelf.records[peer] = held
        shelf.networks[held.network] += 1
        self._per_peer[peer] += 1
        self._per_network[held.network] += 1
        self._count += 1

    def _remove(self, shelf: _Shelf, peer: bytes) -> None:
        held = shelf.records.pop(peer)
        shelf.networks[held.network] -= 1
        self._per_network[held.network] -= 1
        self._per_peer[peer] -= 1
        if not self._per_peer[peer]:
            del self._per_peer[peer]
        self._count -= 1
