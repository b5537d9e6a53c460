"""Capability keys: where a provider is found in the DHT.  Spec: 70-capacity.md

A Kademlia DHT has no range query.  So sizes of memory are cut into nine buckets, and ranges of
buckets have keys: each bucket, each three of them, and all nine.  A provider announces itself under
the three ranges that hold it; a submitter looks under the few that cover what it can use.

    key = SHA-256("NextGPU/1 capability" ‖ 00 ‖ kind ‖ "/mem=" ‖ first GiB ‖ ".." ‖ last GiB)
"""

from __future__ import annotations

import hashlib

from nextgpu_protocol.envelope import domain
from nextgpu_protocol.limits import GIB

# Common sizes of device memory.
BUCKETS_GIB = (0, 1, 4, 8, 12, 16, 24, 40, 80)
_WIDTHS = (9, 3, 1)


def keys_for_capacity(kind: str, memory_total_bytes: int) -> list[bytes]:
    """Every key under which a device of `kind` announces itself, the widest range first."""
    bucket = _bucket(memory_total_bytes)
    return [_key(kind, bucket - bucket % width, width) for width in _WIDTHS]


def keys_for_need(kind: str, memory_bytes: int) -> list[bytes]:
    """Where to look for `kind` ("any" for all) with at least `memory_bytes` in total: at most four
    keys a kind.

    Every match is under these keys; what is found there may be up to one bucket too small, so
    the peer's signed capacity decides.
    """
    kinds = ("cuda", "cpu") if kind == "any" else (kind,)
    return [_key(k, *one) for k in kinds for one in _cover(_bucket(memory_bytes))]


def _bucket(memory_bytes: int) -> int:
    return max(i for i, low in enumerate(BUCKETS_GIB) if low * GIB <= memory_bytes)


def _cover(first: int) -> list[tuple[int, int]]:
    """The widest ranges, (start, width), that make up the buckets from `first` to the last."""
    ranges = []
    while first < len(BUCKETS_GIB):
        width = next(w for w in _WIDTHS if first % w == 0)
        ranges.append((first, width))
        first += width
    return ranges


def _key(kind: str, first: int, width: int) -> bytes:
    low, high = BUCKETS_GIB[first], BUCKETS_GIB[first + width - 1]
    text = f"{kind}/mem={low}..{high}"
    return hashlib.sha256(domain("capability") + text.encode("ascii")).digest()
