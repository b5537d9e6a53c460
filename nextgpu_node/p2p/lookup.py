"""One Kademlia lookup, pure: whom to ask next, and when the nearest nodes have been found.

Drive it with up to PARALLEL questions at once: `next` gives a node to ask, `answered` and `failed`
bring back what came of it.  The network (dht.py) and the simulation run this same class.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Final, Generic, Protocol, TypeVar

from nextgpu_protocol.dht import distance

PARALLEL: Final = 3
# Each answer names the nodes that its giver knows there.  When the three nearest agree, the others
# are taken as heard: asking all eight would treble the questions and tell nothing new.
CONFIRMED: Final = 3
_DEAD_TOLD: Final = 4
# Far above any honest lookup: it bounds what lying nodes can make us do.
MAX_ASKED: Final = 64


class Placed(Protocol):
    """A node by its key and its place."""

    @property
    def key(self) -> bytes: ...

    @property
    def place(self) -> bytes: ...


P = TypeVar("P", bound=Placed)


class Lookup(Generic[P]):
    """Finds the `count` nodes nearest to `target`, from `seeds` on; the nearest `confirmed` of them
    have answered, the others were named by somebody and have not failed."""

    def __init__(
        self,
        target: bytes,
        count: int,
        own_key: bytes,
        seeds: Iterable[P],
        confirmed: int = CONFIRMED,
    ) -> None:
        self._target = target
        self._count = count
        self._confirmed = confirmed
        self._heard: dict[bytes, P] = {}
        self._distance: dict[bytes, int] = {}
        self._waiting: set[bytes] = set()
        self._asked: set[bytes] = {own_key}
        self._failed: set[bytes] = set()
        self._own_key = own_key
        self._teller: dict[bytes, bytes] = {}
        self._dead_told: Counter[bytes] = Counter()
        self._trusted: set[bytes] = set()
        self._add(seeds, own_key)

    @property
    def asked(self) -> int:
        """How many nodes were asked so far."""
        return len(self._asked) - 1

    def next(self) -> P | None:
        """A node to ask now, or None: then wait for an answer, or, if `is_done`, stop."""
        if self.asked >= MAX_ASKED:
            return None
        for key in self._nearest_alive(self._confirmed):
            if key not in self._asked:
                self._asked.add(key)
                self._waiting.add(key)
                return self._heard[key]
        return None

    @property
    def is_done(self) -> bool:
        """True once the nearest nodes that are known have answered."""
        return not self._waiting and (
            self.asked >= MAX_ASKED
            or all(key in self._asked for key in self._nearest_alive(self._confirmed))
        )

    def answered(self, key: bytes, contacts: Iterable[P]) -> None:
        """`key` has answered with the nodes that it knows."""
        self._waiting.discard(key)
        self._trusted.add(self._teller[key])
        self._add(contacts, key)

    def failed(self, key: bytes) -> None:
        self._waiting.discard(key)
        self._failed.add(key)
        teller = self._teller[key]
        self._dead_told[teller] += 1
        if teller != self._own_key and self._dead_told[teller] >= _DEAD_TOLD:
            self._disbelieve(teller)

    def _disbelieve(self, teller: bytes) -> None:
        """Nobody whom this node named has answered: the rest of them is not asked, or it could keep
        a lookup busy with nodes that do not exist."""
        if teller not in self._trusted:
            told = (key for key, by in self._teller.items() if by == teller)
            self._failed.update(key for key in told if key not in self._asked)

    def result(self) -> list[P]:
        """The nearest nodes, nearest first, at most `count`."""
        return [self._heard[key] for key in self._nearest_alive(self._count)]

    def _nearest_alive(self, count: int) -> list[bytes]:
        alive = (key for key in self._heard if key not in self._failed)
        return heapq.nsmallest(count, alive, key=self._distance.__getitem__)

    def _add(self, contacts: Iterable[P], teller: bytes) -> None:
        for contact in contacts:
            if contact.key != self._own_key and contact.key not in self._heard:
                self._heard[contact.key] = contact
                self._teller[contact.key] = teller
                self._distance[contact.key] = distance(contact.place, self._target)
