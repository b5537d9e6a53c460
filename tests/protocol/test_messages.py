"""What `validate` refuses: each bound, one step inside and one step outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.limits import (
    CHUNK_PLAINTEXT_BYTES,
    MAX_CAPACITY_LIFETIME_MS,
    MAX_CLOCK_SKEW_MS,
    MAX_MEMORY_BYTES,
    MAX_OFFER_LIFETIME_MS,
    MAX_REQUEST_LIFETIME_MS,
    MAX_STREAM_BYTES,
    MAX_UNIT_SECONDS,
)
from nextgpu_protocol.local import Connect, SignDraft
from nextgpu_protocol.messages import (
    UNIT_STATUSES,
    Refusal,
    check_suite_untrusted,
    check_window_untrusted,
)
from tests.protocol.samples import ACK, CAPACITY, DEVICE, HEADER, NOW_MS, OFFER, RECEIPT, REQUEST


def refused(message: Any, **changes: Any) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        replace(message, **changes).validate()
    return caught.value.code


RANGES = [
    (REQUEST, "device_memory_bytes", 0, MAX_MEMORY_BYTES),
    (REQUEST, "memory_bytes", 1, MAX_MEMORY_BYTES),
    (REQUEST, "max_seconds", 1, MAX_UNIT_SECONDS),
    (REQUEST, "input_bytes", 0, MAX_STREAM_BYTES),
    (REQUEST, "output_bytes", 0, MAX_STREAM_BYTES),
    (HEADER, "chunk_bytes", 4096, CHUNK_PLAINTEXT_BYTES),
]


@pytest.mark.parametrize(("message", "name", "low", "high"), RANGES, ids=lambda v: str(v)[:24])
def test_amounts_stay_in_their_bounds(message: Any, name: str, low: int, high: int) -> None:
    for value in (low, high):
        replace(message, **{name: value}).validate()
    for value in (low - 1, high + 1):
        assert refused(message, **{name: value}) is ErrorCode.OVER_LIMIT


SIZES = [
    (REQUEST, "nonce"),
    (REQUEST, "provider_key"),
    (OFFER, "offer_id"),
    (OFFER, "one_time_key"),
    (OFFER, "request_hash"),
    (OFFER, "submitter_key"),
    (HEADER, "unit_id"),
    (HEADER, "offer_hash"),
    (HEADER, "ephemeral_key"),
    (RECEIPT, "unit_id"),
    (RECEIPT, "transcript_hash"),
    (RECEIPT, "input_hash"),
    (RECEIPT, "output_hash"),
    (ACK, "unit_id"),
    (ACK, "receipt_hash"),
    (Connect(bytes(32)), "peer_key"),
]


@pytest.mark.parametrize(("message", "name"), SIZES, ids=lambda v: str(v)[:24])
def test_keys_hashes_and_ids_have_one_size(message: Any, name: str) -> None:
    right = getattr(message, name)
    message.validate()
    for wrong in (b"", right[:-1], right + b"\0"):
        assert refused(message, **{name: wrong}) is ErrorCode.MALFORMED


LIFETIMES = [
    (REQUEST, MAX_REQUEST_LIFETIME_MS),
    (OFFER, MAX_OFFER_LIFETIME_MS),
    (HEADER, MAX_REQUEST_LIFETIME_MS),
    (CAPACITY, MAX_CAPACITY_LIFETIME_MS),
]


@pytest.mark.parametrize(("message", "longest_ms"), LIFETIMES, ids=lambda v: str(v)[:12])
def test_lifetimes_are_positive_and_bounded(message: Any, longest_ms: int) -> None:
    for lifetime_ms in (1, longest_ms):
        replace(message, expires_at_ms=NOW_MS + lifetime_ms).validate()
    for lifetime_ms in (-1, 0, longest_ms + 1):
        wrong = refused(message, expires_at_ms=NOW_MS + lifetime_ms)
        assert wrong is ErrorCode.MALFORMED


def test_an_offer_lives_a_minute_at_most() -> None:
    assert MAX_OFFER_LIFETIME_MS == 60_000


@pytest.mark.parametrize("kind", ["gpu", "CUDA", "", "cuda:0"])
def test_an_unknown_device_kind_is_refused(kind: str) -> None:
    assert refused(REQUEST, device_kind=kind) is ErrorCode.MALFORMED
    assert refused(DEVICE, kind=kind) is ErrorCode.MALFORMED


def test_a_need_may_say_any_but_a_device_may_not() -> None:
    replace(REQUEST, device_kind="any").validate()
    assert refused(DEVICE, kind="any") is ErrorCode.MALFORMED


def test_a_receipt_has_a_known_status() -> None:
    for status in UNIT_STATUSES:
        replace(RECEIPT, status=status).validate()
    assert refused(RECEIPT, status="finished") is ErrorCode.MALFORMED


def test_only_what_a_submitter_says_is_signed_for_a_local_process() -> None:
    for name in ("request", "header", "ack"):
        SignDraft(name, b"").validate()
    for name in ("offer", "receipt", "capacity", "noise-libp2p-static-key:", ""):
        assert refused(SignDraft(name, b"")) is ErrorCode.UNEXPECTED_MESSAGE


def test_a_code_from_a_newer_peer_reads_as_internal() -> None:
    assert Refusal(22, "").error_code() is ErrorCode.BUSY
    assert Refusal(9999, "").error_code() is ErrorCode.INTERNAL


def test_a_window_holds_to_the_millisecond_with_the_skew() -> None:
    issued, expires = NOW_MS, NOW_MS + 1000
    for now_ms in (issued - MAX_CLOCK_SKEW_MS, expires + MAX_CLOCK_SKEW_MS):
        check_window_untrusted(issued, expires, now_ms=now_ms)
    with pytest.raises(RemoteProtocolError) as caught:
        check_window_untrusted(issued, expires, now_ms=expires + MAX_CLOCK_SKEW_MS + 1)
    assert caught.value.code is ErrorCode.EXPIRED
    with pytest.raises(RemoteProtocolError) as caught:
        check_window_untrusted(issued, expires, now_ms=issued - MAX_CLOCK_SKEW_MS - 1)
    assert caught.value.code is ErrorCode.NOT_YET_VALID


@pytest.mark.parametrize("suite", [0, 2, 2**63 - 1])
def test_every_suite_but_the_first_is_refused(suite: int) -> None:
    check_suite_untrusted(1)
    with pytest.raises(RemoteProtocolError) as caught:
        check_suite_untrusted(suite)
    assert caught.value.code is ErrorCode.UNKNOWN_SUITE
