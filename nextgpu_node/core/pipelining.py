"""How many calls may wait at one peer at once?  Pure; times are seconds of one clock.

A few, and the worker idles between them; many, and they wait here while another peer is free.  So
as many as this worker runs in a fraction of a second, measured as it answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# What may wait at one worker, in seconds of its work.
_AHEAD_S: Final = 0.1
# Nothing is known yet: what waits here could be run by a peer that is free.
_FIRST_WINDOW: Final = 1
# Always one behind the one that runs: its way there is free then.
_SMALLEST_WINDOW: Final = 2
_LARGEST_WINDOW: Final = 256
# Of a new figure in the running one: about the last eight answers count.
_WEIGHT: Final = 0.25


@dataclass(slots=True)
class Pace:
    """How quickly one worker answers.  `window` is how many calls may wait there."""

    window: int = _FIRST_WINDOW
    service_s: float = 0.0  # from one answer to the next while calls wait; 0: not known
    longest_s: float = 0.0
    answers: int = 0
    _last_s: float = 0.0

    def restart(self, now_s: float) -> None:
        """The worker is ready: what it took to load is not a call's."""
        self._last_s = now_s

    def answered(self, sent_s: float, now_s: float) -> None:
        """A call that was sent at `sent_s` is answered at `now_s`."""
        # It could not begin before it was there, nor before the one in front of it was done.
        took_s = max(0.0, now_s - max(sent_s, self._last_s))
        self._last_s = now_s
        self.answers += 1
        self.longest_s = max(self.longest_s, took_s)
        known = self.service_s if self.answers > 1 else took_s
        self.service_s = known + _WEIGHT * (took_s - known)
        ahead = _LARGEST_WINDOW if self.service_s <= 0 else round(_AHEAD_S / self.service_s)
        # At most twice as many as before: the first answers come from a cold worker.
        self.window = max(_SMALLEST_WINDOW, min(ahead, 2 * self.window, _LARGEST_WINDOW))

    def has_time(self, age_s: float, lease_s: float, waiting: int) -> bool:
        """Whether one more call would be answered within the lease, as far as is known."""
        if not self.answers:
            return True
        return age_s + (waiting + 1) * self.service_s + self.longest_s < 0.9 * lease_s
