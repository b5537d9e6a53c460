"""A signature counts in one place only, for exactly the bytes that were received."""

from __future__ import annotations

import hashlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.envelope import (
    TYPE_NAMES,
    Signed,
    domain,
    hash_of,
    open_envelope_untrusted,
    sign_message,
)
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import peer_id_from_public_key
from nextgpu_protocol.limits import MAX_MESSAGE_BYTES
from nextgpu_protocol.messages import Offer, ReceiptAck, UnitRequest
from tests.protocol import samples

CLASSES = list(samples.SIGNED)


def refused(cls: type, data: bytes) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        open_envelope_untrusted(cls, data)
    return caught.value.code


def rebuilt(data: bytes, index: int, value: Any) -> bytes:
    parts = msgpack.unpackb(data)
    parts[index] = value
    packed: bytes = msgpack.packb(parts)
    return packed


@pytest.mark.parametrize("cls", CLASSES)
def test_a_signed_message_opens_to_itself_and_its_signer(cls: type) -> None:
    message, key = samples.SIGNED[cls]
    signed = samples.signed(cls)
    opened: Signed[Any] = open_envelope_untrusted(cls, signed.data)
    assert opened == signed
    assert opened.message == message
    assert opened.signer == bytes(key.verify_key)
    assert opened.signer_id == peer_id_from_public_key(bytes(key.verify_key))


def test_every_signed_type_has_its_own_name() -> None:
    assert set(TYPE_NAMES) == set(CLASSES)
    assert len(set(TYPE_NAMES.values())) == len(TYPE_NAMES)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("wanted", CLASSES)
def test_a_signature_is_worth_nothing_in_another_place(cls: type, wanted: type) -> None:
    if cls is wanted:
        return
    data = samples.signed(cls).data
    assert refused(wanted, data) is ErrorCode.UNEXPECTED_MESSAGE
    # And with the name changed, so that only the domain in the signature tells them apart.
    assert refused(wanted, rebuilt(data, 0, TYPE_NAMES[wanted])) is ErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize(
    "prefix",
    [
        b"",
        b"request",
        b"NextGPU/1 request",
        b"NextGPU/2 request\0",
        domain("offer"),
        b"noise-libp2p-static-key:",
    ],
)
def test_a_signature_over_another_prefix_does_not_verify(prefix: bytes) -> None:
    payload = encode_message(samples.REQUEST)
    signature = samples.SUBMITTER.sign(prefix + payload).signature
    data = rebuilt(samples.SIGNED_REQUEST.data, 3, signature)
    assert refused(UnitRequest, data) is ErrorCode.BAD_SIGNATURE


def test_no_domain_begins_another() -> None:
    labels = [*TYPE_NAMES.values(), "envelope", "th", "ciphertext", "capability"]
    labels += [f"{what} {way}" for what in ("key", "commit") for way in ("in", "out")]
    domains = [domain(label) for label in labels]
    for first in domains:
        assert [other for other in domains if other.startswith(first)] == [first]


@pytest.mark.parametrize("cls", CLASSES)
def test_any_changed_bit_is_refused(cls: type) -> None:
    data = samples.signed(cls).data
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        refused(cls, bytes(changed))


@pytest.mark.parametrize("index", [1, 2, 3])
def test_a_changed_bit_in_each_part_breaks_the_signature(index: int) -> None:
    part = bytearray(msgpack.unpackb(samples.SIGNED_REQUEST.data)[index])
    part[5] ^= 1
    data = rebuilt(samples.SIGNED_REQUEST.data, index, bytes(part))
    assert refused(UnitRequest, data) is ErrorCode.BAD_SIGNATURE


def test_the_signature_is_checked_before_the_payload_is_decoded() -> None:
    # A broken payload under a broken signature must not reach the message decoder.
    data = rebuilt(samples.SIGNED_REQUEST.data, 1, b"\xc1")
    assert refused(UnitRequest, data) is ErrorCode.BAD_SIGNATURE


def resigned(payload: bytes) -> bytes:
    signature = samples.SUBMITTER.sign(domain("ack") + payload).signature
    key = bytes(samples.SUBMITTER.verify_key)
    packed: bytes = msgpack.packb(["ack", payload, key, signature])
    return packed


def test_a_right_signature_does_not_excuse_a_wrong_payload() -> None:
    payload = encode_message(samples.ACK)
    open_envelope_untrusted(ReceiptAck, resigned(payload))
    assert refused(ReceiptAck, resigned(b"\xdc\x00\x02" + payload[1:])) is ErrorCode.NOT_CANONICAL
    assert refused(ReceiptAck, resigned(payload + b"\0")) is ErrorCode.MALFORMED
    assert refused(ReceiptAck, resigned(bytes(MAX_MESSAGE_BYTES + 1))) is ErrorCode.TOO_LARGE


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, b"ack"), (0, 1), (1, "text"), (1, None), (2, bytes(31)), (2, bytes(33)), (3, bytes(63))],
)
def test_parts_of_another_shape_are_malformed(index: int, value: Any) -> None:
    assert refused(ReceiptAck, rebuilt(samples.signed(ReceiptAck).data, index, value)) is (
        ErrorCode.MALFORMED
    )


def test_the_envelope_itself_has_one_encoding() -> None:
    data = samples.signed(ReceiptAck).data
    assert refused(ReceiptAck, b"\xdc\x00\x04" + data[1:]) is ErrorCode.NOT_CANONICAL
    assert refused(ReceiptAck, b"\x94\xd9\x03" + data[2:]) is ErrorCode.NOT_CANONICAL


def test_an_envelope_over_its_bound_is_refused_unread() -> None:
    assert refused(ReceiptAck, bytes(MAX_MESSAGE_BYTES + 257)) is ErrorCode.TOO_LARGE


@given(st.sampled_from(CLASSES), st.binary(max_size=300))
def test_any_bytes_raise_the_one_error(cls: type, data: bytes) -> None:
    # Nobody finds a signature by chance, so every case fails; the point is how.
    refused(cls, data)


@given(st.binary(max_size=64) | st.text(max_size=8) | st.integers(), st.integers(0, 3))
def test_any_part_in_an_envelope_raises_the_one_error(value: Any, index: int) -> None:
    data = samples.signed(Offer).data
    try:
        changed = rebuilt(data, index, value)
    except OverflowError:
        return
    if changed != data:
        refused(Offer, changed)


def test_two_signers_give_two_hashes_and_two_keys() -> None:
    first = sign_message(samples.ACK, SigningKey(b"1" * 32))
    second = sign_message(samples.ACK, SigningKey(b"2" * 32))
    assert first.hash != second.hash
    assert first.signer != second.signer


def test_a_hash_keeps_its_parts_apart() -> None:
    hashes = {
        hash_of("th", b"ab", b"c"),
        hash_of("th", b"a", b"bc"),
        hash_of("th", b"abc"),
        hash_of("th", b"abc", b""),
        hash_of("envelope", b"ab", b"c"),
    }
    assert len(hashes) == 5


def test_a_hash_is_what_the_spec_says() -> None:
    plain = b"NextGPU/1 th\x00" + (2).to_bytes(8) + b"ab" + (0).to_bytes(8)
    assert hash_of("th", b"ab", b"") == hashlib.blake2b(plain, digest_size=32).digest()
