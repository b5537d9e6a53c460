"""Valid messages for tests, each field open to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nacl.signing import SigningKey

from nextgpu_node.core.admission import OwnerPolicy
from nextgpu_protocol.envelope import Signed, sign_message
from nextgpu_protocol.limits import GIB, MIB
from nextgpu_protocol.messages import (
    SUITE,
    DeviceInfo,
    Metering,
    Offer,
    UnitHeader,
    UnitRequest,
)

NOW_MS = 1_800_000_000_000
PROVIDER = SigningKey(bytes([1]) * 32)
SUBMITTER = SigningKey(bytes([2]) * 32)
STRANGER = SigningKey(bytes([3]) * 32)

CPU = DeviceInfo("cpu", "Test CPU", 8 * GIB, 6 * GIB, "")

REQUEST = UnitRequest(
    suite=SUITE,
    nonce=bytes(16),
    provider_key=bytes(PROVIDER.verify_key),
    device_kind="any",
    device_memory_bytes=0,
    memory_bytes=GIB,
    max_seconds=60,
    input_bytes=MIB,
    output_bytes=MIB,
    table_version=1,
    issued_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + 60_000,
    token=b"",
)

OFFER = Offer(
    suite=SUITE,
    offer_id=bytes(16),
    one_time_key=bytes([9]) * 32,
    request_hash=bytes(32),
    submitter_key=bytes(SUBMITTER.verify_key),
    device=CPU,
    memory_bytes=2 * GIB,
    max_seconds=60,
    input_bytes=MIB,
    output_bytes=MIB,
    runtime="torch 2.13.0",
    table_version=1,
    isolation=("seccomp",),
    price=0,
    issued_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + 30_000,
)

METERING = Metering(wall_ms=1, cpu_ms=1, peak_memory_bytes=1, input_bytes=1, output_bytes=1)

POLICY = OwnerPolicy(
    sharing=True,
    reason="",
    device=CPU,
    max_concurrent_units=2,
    memory_bytes=2 * GIB,
    max_seconds=600,
    input_bytes=64 * MIB,
    output_bytes=64 * MIB,
    requests_per_minute=5,
)


def request(key: SigningKey = SUBMITTER, *, nonce: int = 0, **changes: Any) -> Signed[UnitRequest]:
    """A signed request; `nonce` makes it another one."""
    return sign_message(replace(REQUEST, nonce=nonce.to_bytes(16), **changes), key)


def offer(**changes: Any) -> Signed[Offer]:
    return sign_message(replace(OFFER, **changes), PROVIDER)


def header(to: Signed[Offer], key: SigningKey = SUBMITTER, **changes: Any) -> Signed[UnitHeader]:
    """A signed header that takes up the offer `to`."""
    plain = UnitHeader(
        suite=SUITE,
        unit_id=bytes(16),
        offer_hash=to.hash,
        ephemeral_key=bytes([8]) * 32,
        chunk_bytes=65_536,
        issued_at_ms=NOW_MS,
        expires_at_ms=NOW_MS + 60_000,
    )
    return sign_message(replace(plain, **changes), key)
