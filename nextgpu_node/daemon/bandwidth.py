"""What the owner gives of the line: one bucket for each direction, all lent units together."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from nextgpu_node.core.bandwidth import TokenBucket


class Bandwidth:
    """`take` before bytes go on.  The rate may change at any time."""

    def __init__(self, bytes_per_second: int = 0) -> None:
        self._bucket = TokenBucket(bytes_per_second)

    def set_rate(self, bytes_per_second: int) -> None:
        """0 is no limit.  Debts of the old rate are forgiven."""
        if bytes_per_second != self._bucket.rate:
            self._bucket = TokenBucket(bytes_per_second)

    async def take(self, size_bytes: int) -> None:
        """Until `size_bytes` may pass."""
        delay_s = self._bucket.delay_s(size_bytes, now_s=trio.current_time())
        if delay_s:
            await trio.sleep(delay_s)


@dataclass(frozen=True, slots=True)
class Line:
    """Both directions: what goes out of this machine, and what comes in."""

    upload: Bandwidth = field(default_factory=Bandwidth)
    download: Bandwidth = field(default_factory=Bandwidth)
