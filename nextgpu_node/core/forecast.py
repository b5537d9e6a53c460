"""When will a map be done?  Pure.

The rate is that of the latest completions, stretched by the time since the last one: when
everything stalls, the estimate grows instead of standing still.  Before three completions there is
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

WINDOW: Final = 64
_FEWEST: Final = 3


def shards_per_s(done_s: Sequence[float], now_s: float) -> float | None:
    """The rate over the last WINDOW completions; `done_s` are their times, ascending."""
    recent = done_s[-WINDOW:]
    if len(recent) < _FEWEST:
        return None
    span_s = recent[-1] - recent[0]
    gap_s = span_s / (len(recent) - 1)
    silent_s = max(0.0, now_s - recent[-1] - gap_s)
    return (len(recent) - 1) / max(span_s + silent_s, 1e-9)


def eta_s(done_s: Sequence[float], remaining: int, now_s: float) -> float | None:
    """Seconds until `remaining` more shards are done at the present rate; None if not known yet."""
    rate = shards_per_s(done_s, now_s)
    return None if rate is None else remaining / rate
