"""What changes in the node, as lines of JSON for whoever listens; nothing is looked at otherwise.

    node.status       first of all, and every few seconds: the whole status
    sharing.changed   units.changed   devices.sampled

The node is looked at twice a second and compared with the look before: no part of it has to
remember to tell.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

import msgspec
import trio

from nextgpu_node.api_types import SCHEMA, GpusReply, SharingView, StatusReply, UnitsReply
from nextgpu_node.clock import now_ms

_LOOK_S: Final = 0.5
_LOOKS_PER_SAMPLE: Final = 4
_LOOKS_PER_STATUS: Final = 20


async def follow(
    status: Callable[[], StatusReply],
    units: Callable[[], UnitsReply],
    gpus: Callable[[], Awaitable[GpusReply]],
) -> AsyncGenerator[bytes, None]:
    """Lines, each ending in a line feed, for ever."""
    last_sharing: SharingView | None = None
    last_units: tuple[tuple[str, str, str], ...] = ()
    looks = 0
    while True:
        now = status()
        if looks % _LOOKS_PER_STATUS == 0:
            yield _line("node.status", status=now)
        if now.sharing != last_sharing:
            last_sharing = now.sharing
            yield _line("sharing.changed", sharing=now.sharing)
        here = units()
        if looks == 0 or here.units or last_units:
            known = tuple((unit.unit_id, unit.role, unit.state) for unit in here.units)
            # Their sizes grow all the time: told as often as devices are, or at a change.
            if known != last_units or looks % _LOOKS_PER_SAMPLE == 0:
                last_units = known
                yield _line("units.changed", units=here)
        if looks % _LOOKS_PER_SAMPLE == 0:
            yield _line("devices.sampled", gpus=await gpus())
        looks += 1
        await trio.sleep(_LOOK_S)


def _line(event: str, **about: msgspec.Struct) -> bytes:
    """`about` is the one thing that the event tells of, by its name."""
    told = {"schema": SCHEMA, "event": event, "at_ms": now_ms(), **about}
    return msgspec.json.encode(told) + b"\n"
