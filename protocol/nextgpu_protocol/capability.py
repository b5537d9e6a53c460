"""Capability keys: where a provider is found in the DHT.  Spec: 70-capacity.md

A Kademlia DHT has no range query.  So a provider announces itself under every memory bucket at
or below its own, and a submitter looks under the largest bucket that its need fills.

    key = SHA-256("NextGPU/1 capability" ‖ 00 ‖ kind ‖ "/mem>=" ‖ GiB)
"""

from __future__ import annotations

import hashlib

from nextgpu_protocol.envelope import domain
from nextgpu_protocol.limits import GIB

# Common sizes of device memory.  At most 10 keys per device kind: what a DHT server accepts from
# one peer in ten seconds.
BUCKETS_GIB = (0, 1, 4, 8, 12, 16, 24, 40, 80)


def keys_for_capacity(kind: str, memory_total_bytes: int) -> list[bytes]:
    """Every key under which a device of `kind` announces itself, smallest bucket first."""
    return [_key(kind, b) for b in BUCKETS_GIB if b * GIB <= memory_total_bytes]


def keys_for_need(kind: str, memory_bytes: int) -> list[bytes]:
    """Where to look for `kind` ("any" for all) with at least `memory_bytes` in total.

    Every match is under these keys; what is found there may be up to one bucket too small, so
    the peer's signed capacity decides.
    """
    bucket = max(b for b in BUCKETS_GIB if b * GIB <= memory_bytes)
    kinds = ("cuda", "cpu") if kind == "any" else (kind,)
    return [_key(k, bucket) for k in kinds]


def _key(kind: str, bucket_gib: int) -> bytes:
    text = f"{kind}/mem>={bucket_gib}"
    return hashlib.sha256(domain("capability") + text.encode("ascii")).digest()
