"""The DHT's messages: one encoding, bounded, and announcements that hold only for their time."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_protocol.dht import (
    HEAD_BYTES,
    MAX_CONTACTS,
    Contact,
    DhtKind,
    DhtMessage,
    Find,
    FindNode,
    Found,
    Nodes,
    Store,
    Stored,
    StoreItem,
    StoreResult,
    body_size_untrusted,
    branch_of,
    check_found_untrusted,
    decode_dht_untrusted,
    encode_dht,
    is_sampled,
    node_place,
    open_announcement_untrusted,
    rank,
    shard_place,
)
from nextgpu_protocol.envelope import sign_message
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.limits import MAX_ANNOUNCEMENT_LIFETIME_MS, MAX_CLOCK_SKEW_MS
from nextgpu_protocol.messages import SUITE, Announcement
from tests.support.messages import NOW_MS, PROVIDER

KEY = hashlib.sha256(b"key").digest()
SIGNER = bytes(PROVIDER.verify_key)
PLAIN = Announcement(SUITE, KEY, ("/ip4/192.0.2.7/tcp/4650",), NOW_MS, NOW_MS + 60_000)
MESSAGES: list[DhtMessage] = [
    FindNode(KEY),
    Nodes((Contact(KEY, ("/ip4/192.0.2.7/tcp/4650",)), Contact(bytes(32), ()))),
    Store((StoreItem(0, b"record"), StoreItem(4, b""))),
    Stored((StoreResult(0, 0), StoreResult(10, 48))),
    Find(KEY, 2, 255),
    Found(3, (b"record",), more=True),
]


def signed(**changes: Any) -> bytes:
    return sign_message(replace(PLAIN, **changes), PROVIDER).data


def refused(data: bytes, now_ms: int = NOW_MS) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        open_announcement_untrusted(data, now_ms=now_ms)
    return caught.value.code


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back_as_they_were(message: DhtMessage) -> None:
    data = encode_dht(message)
    kind, size = body_size_untrusted(data[:HEAD_BYTES])
    assert size == len(data) - HEAD_BYTES
    assert decode_dht_untrusted(kind, data[HEAD_BYTES:]) == message


@given(kind=st.sampled_from(DhtKind), body=st.binary(max_size=200))
def test_garbage_raises_one_kind_of_error(kind: DhtKind, body: bytes) -> None:
    try:
        message = decode_dht_untrusted(kind, body)
    except RemoteProtocolError:
        return
    assert encode_dht(message)[HEAD_BYTES:] == body


@pytest.mark.parametrize(
    "head", [b"\0\0\0\0\x01", b"\0\0\x20\x02\x01", b"\xff" * 5, b"\0\0\0\x05\x07"]
)
def test_a_bad_head_is_refused_before_anything_is_read(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        body_size_untrusted(head)


@pytest.mark.parametrize(
    "message",
    [
        FindNode(KEY[:31]),
        Nodes((Contact(KEY, ()),) * (MAX_CONTACTS + 1)),
        Nodes((Contact(KEY[:31], ()),)),
        Nodes((Contact(KEY, ("/ip4/192.0.2.7/tcp/1",) * 5),)),
        Nodes((Contact(KEY, ("/" + "x" * 128,)),)),
        Store((StoreItem(0, b""),) * 17),
        Store((StoreItem(5, b""),)),
        Stored((StoreResult(0, 49),)),
        Find(KEY, 1, 16),
        Find(KEY, 5, 0),
        Found(49, (), more=False),
    ],
)
def test_amounts_beyond_their_bounds_are_neither_sent_nor_read(message: DhtMessage) -> None:
    with pytest.raises(LocalProtocolError):
        encode_dht(message)


def test_an_announcement_holds_for_its_time_and_no_longer() -> None:
    data = signed()
    for now_ms in (NOW_MS - MAX_CLOCK_SKEW_MS, NOW_MS, NOW_MS + 59_999):
        assert open_announcement_untrusted(data, now_ms=now_ms).signer == SIGNER
    assert refused(data, NOW_MS + 60_000) == ErrorCode.EXPIRED
    assert refused(data, NOW_MS - MAX_CLOCK_SKEW_MS - 1) == ErrorCode.NOT_YET_VALID


def test_an_announcement_can_not_be_changed_lengthened_or_blown_up() -> None:
    data = signed()
    assert refused(data[:-1] + bytes([data[-1] ^ 1])) == ErrorCode.BAD_SIGNATURE
    with pytest.raises(LocalProtocolError):
        signed(expires_at_ms=NOW_MS + MAX_ANNOUNCEMENT_LIFETIME_MS + 1)
    assert refused(signed(suite=2)) == ErrorCode.UNKNOWN_SUITE
    assert refused(data + bytes(1024)) == ErrorCode.TOO_LARGE
    _, payload, key, signature = msgpack.unpackb(data)
    assert (
        refused(msgpack.packb(["capacity", payload, key, signature]))
        == ErrorCode.UNEXPECTED_MESSAGE
    )


def test_an_announcement_of_another_key_or_branch_is_no_answer() -> None:
    found = open_announcement_untrusted(signed(), now_ms=NOW_MS)
    branch = branch_of(SIGNER, 2)
    check_found_untrusted(found, Find(KEY, 2, branch))
    for wanted in (Find(bytes(32), 2, branch), Find(KEY, 2, branch ^ 1)):
        with pytest.raises(RemoteProtocolError):
            check_found_untrusted(found, wanted)


def test_the_examples_of_the_spec() -> None:
    """Fixed values: another implementation must come to the same places."""
    label = b"NextGPU/1 dht node\0"
    assert node_place(SIGNER) == hashlib.sha256(label + SIGNER).digest()
    shard = hashlib.sha256(b"NextGPU/1 dht shard\0" + KEY + b"\x02" + (255).to_bytes(8)).digest()
    assert shard_place(KEY, 2, 255) == shard
    branch = hashlib.sha256(b"NextGPU/1 dht branch\0" + SIGNER).digest()
    assert branch_of(SIGNER, 0) == 0
    assert branch_of(SIGNER, 1) == branch[0] >> 4
    assert branch_of(SIGNER, 4) == int.from_bytes(branch[:2])


def test_a_rate_halves_what_is_sampled() -> None:
    ranks = [rank(KEY, hashlib.sha256(b"%d" % number).digest()) for number in range(4000)]
    assert all(is_sampled(lot, 0) for lot in ranks)
    for sampling in (1, 2, 3):
        assert abs(sum(is_sampled(lot, sampling) for lot in ranks) / 4000 - 0.5**sampling) < 0.04
