"""Admission: what is refused, with which code, before any worker is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nextgpu_node.core.admission import (
    OwnerPolicy,
    RateLimiter,
    ReplayCache,
    check_freshness,
    check_policy,
)
from nextgpu_protocol.envelope import Signed
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import PeerKey, peer_id_from_public_key
from nextgpu_protocol.limits import GIB, MAX_CLOCK_SKEW_MS
from nextgpu_protocol.messages import UnitRequest
from tests.support.messages import NOW_MS, POLICY, PROVIDER, STRANGER, SUBMITTER, request

OWN_KEY = PeerKey(bytes(PROVIDER.verify_key))
SUBMITTER_ID = peer_id_from_public_key(bytes(SUBMITTER.verify_key))
STRANGER_ID = peer_id_from_public_key(bytes(STRANGER.verify_key))


def code_of(request: Signed[UnitRequest], policy: OwnerPolicy, *, used_slots: int = 0) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        check_policy(request, policy, table_version=1, used_slots=used_slots)
    return caught.value.code


def freshness_code(
    request: Signed[UnitRequest], seen: ReplayCache, *, now_ms: int = NOW_MS
) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        check_freshness(request, OWN_KEY, seen, now_ms=now_ms)
    return caught.value.code


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"sharing": False, "reason": "sharing is off"}, ErrorCode.NOT_SHARING),
        ({"deny": frozenset({SUBMITTER_ID})}, ErrorCode.NOT_ALLOWED),
        ({"allow": frozenset({STRANGER_ID})}, ErrorCode.NOT_ALLOWED),
        (
            {"allow": frozenset({SUBMITTER_ID}), "deny": frozenset({SUBMITTER_ID})},
            ErrorCode.NOT_ALLOWED,
        ),
        ({"device": None}, ErrorCode.NO_SUCH_DEVICE),
        ({"memory_bytes": GIB - 1}, ErrorCode.OVER_LIMIT),
        ({"max_seconds": 59}, ErrorCode.OVER_LIMIT),
        ({"input_bytes": 1}, ErrorCode.OVER_LIMIT),
        ({"output_bytes": 1}, ErrorCode.OVER_LIMIT),
        ({"max_concurrent_units": 0}, ErrorCode.BUSY),
    ],
)
def test_what_the_owner_does_not_allow_is_refused(policy: dict[str, Any], code: ErrorCode) -> None:
    assert code_of(request(), replace(POLICY, **policy)) is code


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"device_kind": "cuda"}, ErrorCode.NO_SUCH_DEVICE),
        ({"device_memory_bytes": 9 * GIB}, ErrorCode.NO_SUCH_DEVICE),
        ({"table_version": 2}, ErrorCode.OLD_TABLE),
        ({"memory_bytes": 3 * GIB}, ErrorCode.OVER_LIMIT),
    ],
)
def test_what_the_node_does_not_have_is_refused(asked: dict[str, Any], code: ErrorCode) -> None:
    assert code_of(request(**asked), POLICY) is code


def test_a_fitting_request_is_granted_what_it_asked_and_the_owners_memory() -> None:
    grant = check_policy(request(), POLICY, table_version=1, used_slots=1)
    assert grant.max_seconds == 60
    assert grant.memory_bytes == POLICY.memory_bytes


def test_all_slots_in_use_is_busy() -> None:
    assert code_of(request(), POLICY, used_slots=2) is ErrorCode.BUSY


def test_a_denied_submitter_does_not_learn_the_load() -> None:
    policy = replace(POLICY, sharing=False, deny=frozenset({SUBMITTER_ID}))
    assert code_of(request(), policy, used_slots=2) is ErrorCode.NOT_ALLOWED


def test_a_request_for_another_provider_is_refused() -> None:
    other = request(provider_key=bytes(STRANGER.verify_key))
    assert freshness_code(other, ReplayCache()) is ErrorCode.WRONG_PEER


def test_an_unknown_suite_is_refused() -> None:
    assert freshness_code(request(suite=2), ReplayCache()) is ErrorCode.UNKNOWN_SUITE


def test_an_expired_request_is_refused() -> None:
    late_ms = NOW_MS + 60_000 + MAX_CLOCK_SKEW_MS + 1
    assert freshness_code(request(), ReplayCache(), now_ms=late_ms) is ErrorCode.EXPIRED


def test_a_request_from_the_future_is_refused() -> None:
    early_ms = NOW_MS - MAX_CLOCK_SKEW_MS - 1
    assert freshness_code(request(), ReplayCache(), now_ms=early_ms) is ErrorCode.NOT_YET_VALID


def test_a_replayed_request_is_refused_for_as_long_as_it_could_pass() -> None:
    seen = ReplayCache()
    check_freshness(request(), OWN_KEY, seen, now_ms=NOW_MS)
    last_ms = NOW_MS + 60_000 + MAX_CLOCK_SKEW_MS
    assert freshness_code(request(), seen) is ErrorCode.REPLAYED
    assert freshness_code(request(), seen, now_ms=last_ms) is ErrorCode.REPLAYED


def test_a_full_replay_cache_refuses_the_new_and_forgets_none() -> None:
    seen = ReplayCache(capacity=2)
    for nonce in (1, 2):
        check_freshness(request(nonce=nonce), OWN_KEY, seen, now_ms=NOW_MS)
    assert freshness_code(request(nonce=3), seen) is ErrorCode.RATE_LIMITED
    assert freshness_code(request(nonce=1), seen) is ErrorCode.REPLAYED


def test_expired_entries_make_room_in_the_replay_cache() -> None:
    seen = ReplayCache(capacity=1)
    seen.check_and_add(b"old", forget_at_ms=10, now_ms=0)
    seen.check_and_add(b"new", forget_at_ms=100, now_ms=11)
    assert len(seen) == 1


def test_the_rate_limit_counts_one_submitter_in_one_minute() -> None:
    limiter = RateLimiter(per_minute=2)
    one, other = PeerKey(bytes(32)), PeerKey(bytes([1]) * 32)
    limiter.check(one, now_ms=0)
    limiter.check(one, now_ms=1)
    with pytest.raises(RemoteProtocolError) as caught:
        limiter.check(one, now_ms=59_999)
    assert caught.value.code is ErrorCode.RATE_LIMITED
    limiter.check(other, now_ms=59_999)
    limiter.check(one, now_ms=60_001)


def test_python_runs_for_the_named_alone_whatever_else_is_allowed() -> None:
    python = request(kind="python")
    assert code_of(python, POLICY) is ErrorCode.PYTHON_NOT_ALLOWED
    for changes in (
        {"serve": "everyone"},
        {"allow": frozenset({SUBMITTER_ID})},
        {"python_allow": frozenset({STRANGER_ID})},
    ):
        assert code_of(python, replace(POLICY, **changes)) is ErrorCode.PYTHON_NOT_ALLOWED
    named = replace(POLICY, python_allow=frozenset({SUBMITTER_ID}))
    assert check_policy(python, named, table_version=1, used_slots=0)
    denied = replace(named, deny=frozenset({SUBMITTER_ID}))
    assert code_of(python, denied) is ErrorCode.NOT_ALLOWED
    # Being named for code is no way in for programs where others are listed.
    listed = replace(named, allow=frozenset({STRANGER_ID}))
    assert code_of(request(), listed) is ErrorCode.NOT_ALLOWED
