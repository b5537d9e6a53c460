"""What each submitter has used of the last 24 hours.  Pure, and bounded whatever peers do."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from nextgpu_protocol.ids import PeerId

DAY_MS: Final = 86_400_000
# Units of these few minutes are one entry: a peer with thousands of them costs no more than one
# that runs all day.
_SLOT_MS: Final = 600_000
_MAX_TRACKED_PEERS: Final = 4096


@dataclass(slots=True)
class UsageBook:
    """Device milliseconds of each peer, in slots of ten minutes; forgotten after a day."""

    _slots: OrderedDict[PeerId, deque[tuple[int, int]]] = field(default_factory=OrderedDict)

    def add(self, peer: PeerId, used_ms: int, *, at_ms: int) -> None:
        """`peer` has used the device for `used_ms`, up to `at_ms`."""
        slots = self._slots.setdefault(peer, deque())
        self._slots.move_to_end(peer)
        slot = at_ms // _SLOT_MS
        if slots and slots[-1][0] == slot:
            used_ms += slots.pop()[1]
        slots.append((slot, used_ms))
        if len(self._slots) > _MAX_TRACKED_PEERS:
            self._slots.popitem(last=False)

    def used_ms(self, peers: Iterable[PeerId], *, now_ms: int) -> int:
        """What these, all of them names of one submitter, have used in the last 24 hours."""
        return sum(self._used_by(peer, now_ms) for peer in peers)

    def _used_by(self, peer: PeerId, now_ms: int) -> int:
        slots = self._slots.get(peer)
        if slots is None:
            return 0
        while slots and slots[0][0] < (now_ms - DAY_MS) // _SLOT_MS:
            slots.popleft()
        if not slots:
            del self._slots[peer]
        return sum(used_ms for _, used_ms in slots)
