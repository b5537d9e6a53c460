"""A token bucket that lends: what passes is paid for afterwards, by waiting.  Pure.

The virtual-scheduling form of the leaky bucket (ITU-T I.371, GCRA): one number says when everything
that has passed so far is paid for.
"""

from __future__ import annotations

from dataclasses import dataclass

_BURST_S = 0.1


@dataclass(slots=True)
class TokenBucket:
    """`rate` bytes in a second in the long run, a tenth of that at once; 0 is no limit."""

    rate: int
    _paid_at_s: float = 0.0

    def delay_s(self, size_bytes: int, *, now_s: float) -> float:
        """How long to wait before `size_bytes` pass.  Counts them as passed."""
        if not self.rate:
            return 0.0
        self._paid_at_s = max(now_s, self._paid_at_s) + size_bytes / self.rate
        return max(0.0, self._paid_at_s - now_s - _BURST_S)
