"""One exchange with fixed keys, for the tests of every module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nacl.signing import SigningKey

from nextgpu_protocol.envelope import Signed, sign_message
from nextgpu_protocol.ids import PeerKey, UnitId
from nextgpu_protocol.limits import CHUNK_PLAINTEXT_BYTES, GIB
from nextgpu_protocol.messages import (
    SUITE,
    Announcement,
    Capacity,
    DeviceInfo,
    Metering,
    Offer,
    Predecessor,
    Receipt,
    ReceiptAck,
    Successor,
    TokenBlock,
    TokenUse,
    UnitHeader,
    UnitRequest,
    UnitResume,
    WipeStep,
)
from nextgpu_protocol.sealing import KeyPair, StreamKeys, transcript_hash

NOW_MS = 1_800_000_000_000
SUBMITTER = SigningKey(b"s" * 32)
PROVIDER = SigningKey(b"p" * 32)
EPHEMERAL = KeyPair(b"e" * 32)
ONE_TIME = KeyPair(b"o" * 32)

DEVICE = DeviceInfo("cuda", "NVIDIA L4", 24 * GIB, 23 * GIB, "8.9")
REQUEST = UnitRequest(
    suite=SUITE,
    nonce=b"n" * 16,
    provider_key=bytes(PROVIDER.verify_key),
    device_kind="cuda",
    device_memory_bytes=16 * GIB,
    memory_bytes=2 * GIB,
    max_seconds=600,
    input_bytes=GIB,
    output_bytes=GIB,
    table_version=1,
    issued_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + 60_000,
    token=b"",
)
SIGNED_REQUEST = sign_message(REQUEST, SUBMITTER)
OFFER = Offer(
    suite=SUITE,
    offer_id=b"f" * 16,
    one_time_key=ONE_TIME.public,
    request_hash=SIGNED_REQUEST.hash,
    submitter_key=bytes(SUBMITTER.verify_key),
    device=DEVICE,
    memory_bytes=2 * GIB,
    max_seconds=600,
    input_bytes=GIB,
    output_bytes=GIB,
    runtime="torch 2.13.0",
    table_version=1,
    isolation=("namespaces", "seccomp"),
    price=0,
    issued_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + 60_000,
)
SIGNED_OFFER = sign_message(OFFER, PROVIDER)
HEADER = UnitHeader(
    suite=SUITE,
    unit_id=b"u" * 16,
    offer_hash=SIGNED_OFFER.hash,
    ephemeral_key=EPHEMERAL.public,
    chunk_bytes=CHUNK_PLAINTEXT_BYTES,
    issued_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + 60_000,
)
SIGNED_HEADER = sign_message(HEADER, SUBMITTER)
TRANSCRIPT = transcript_hash(SIGNED_OFFER.data, SIGNED_HEADER.data)
RECEIPT = Receipt(
    unit_id=UnitId(b"u" * 16),
    transcript_hash=TRANSCRIPT,
    input_hash=bytes(32),
    output_hash=bytes(32),
    status="done",
    metering=Metering(1, 2, 3, 4, 5),
    isolation=("namespaces",),
    wipe=(WipeStep("scratch gone", True),),
    finished_at_ms=NOW_MS,
)
ACK = ReceiptAck(b"u" * 16, b"h" * 32)
ANNOUNCEMENT = Announcement(
    suite=1,
    key=bytes([7]) * 32,
    addresses=("/ip4/192.0.2.7/tcp/4650",),
    issued_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + 1_800_000,
)
CAPACITY = Capacity(
    suites=(SUITE,),
    devices=(DEVICE,),
    free_slots=1,
    memory_bytes=8 * GIB,
    max_seconds=3600,
    input_bytes=GIB,
    output_bytes=GIB,
    runtime="torch 2.13.0",
    table_version=1,
    isolation=("namespaces",),
    sharing=True,
    reason="",
    issued_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + 60_000,
)

TOKEN_KEY = SigningKey(b"t" * 32)
BLOCK = TokenBlock(
    suite=SUITE,
    previous_hash=b"",
    next_key=bytes(TOKEN_KEY.verify_key),
    gpu_seconds=3600,
    memory_bytes=8 * GIB,
    kinds=("program",),
    audience=b"",
    expires_at_ms=NOW_MS + 60_000,
)
USE = TokenUse(SUITE, b"h" * 32, bytes(SUBMITTER.verify_key), b"n" * 16)

SIGNED: dict[type, tuple[Any, SigningKey]] = {
    UnitRequest: (REQUEST, SUBMITTER),
    Offer: (OFFER, PROVIDER),
    UnitHeader: (HEADER, SUBMITTER),
    Receipt: (RECEIPT, PROVIDER),
    ReceiptAck: (ACK, SUBMITTER),
    UnitResume: (
        UnitResume(SUITE, b"u" * 16, b"h" * 32, 1, 2, NOW_MS, NOW_MS + 60_000),
        SUBMITTER,
    ),
    Capacity: (CAPACITY, PROVIDER),
    Announcement: (ANNOUNCEMENT, PROVIDER),
    TokenBlock: (BLOCK, PROVIDER),
    TokenUse: (USE, TOKEN_KEY),
    Successor: (Successor(SUITE, b"k" * 32, NOW_MS), PROVIDER),
    Predecessor: (Predecessor(SUITE, b"k" * 32, b"h" * 32), SUBMITTER),
}


def signed(cls: type) -> Signed[Any]:
    """The sample of `cls` in its envelope."""
    message, key = SIGNED[cls]
    return sign_message(message, key)


def worker_keys() -> StreamKeys:
    return ONE_TIME.worker_keys_untrusted(EPHEMERAL.public, TRANSCRIPT)


def submitter_keys() -> StreamKeys:
    return EPHEMERAL.submitter_keys(ONE_TIME.public, TRANSCRIPT)


def peer_key(key: SigningKey) -> PeerKey:
    return PeerKey(bytes(key.verify_key))


def fresh_capacity(now_ms: int) -> Capacity:
    """The sample, issued now."""
    return replace(CAPACITY, issued_at_ms=now_ms, expires_at_ms=now_ms + 60_000)
