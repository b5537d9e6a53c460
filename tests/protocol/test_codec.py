"""One message, one encoding; and nothing but RemoteProtocolError comes out of a peer's bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.ids import PeerKey
from nextgpu_protocol.limits import MAX_LIST_ITEMS, MAX_MESSAGE_BYTES, MAX_TEXT_BYTES
from nextgpu_protocol.local import Assignment, Connect, SignDraft
from nextgpu_protocol.messages import Capacity, DeviceInfo, Refusal, UnitRequest
from nextgpu_protocol.records import UnitManifest, UnitSummary
from tests.protocol import samples

UNSIGNED: list[Any] = [
    Refusal(22, "busy"),
    UnitManifest(5000, 100, True),
    UnitSummary(1, 2, 3, False),
    Connect(bytes(32)),
    SignDraft("request", b"payload"),
    Assignment(b"offer", b"header"),
]
MESSAGES: list[Any] = [message for message, _ in samples.SIGNED.values()] + UNSIGNED
CLASSES = [type(message) for message in MESSAGES]

# Everything that msgpack can say, well formed or nearly so.
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=40)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    lambda inner: st.lists(inner, max_size=16) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=30,
)


def fails(cls: type, data: bytes) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_message_untrusted(cls, data)
    return caught.value.code


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: Any) -> None:
    assert decode_message_untrusted(type(message), encode_message(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_shorter_prefix_is_malformed(message: Any) -> None:
    data = encode_message(message)
    for size in range(len(data)):
        assert fails(type(message), data[:size]) is ErrorCode.MALFORMED


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_trailing_byte_is_malformed(message: Any) -> None:
    data = encode_message(message)
    for byte in range(256):
        assert fails(type(message), data + bytes([byte])) is ErrorCode.MALFORMED


def decodes_canonically_or_raises_the_one_error(cls: type, data: bytes) -> None:
    try:
        message: Any = decode_message_untrusted(cls, data)
    except RemoteProtocolError:
        return
    assert encode_message(message) == data


@given(st.sampled_from(CLASSES), st.binary(max_size=200))
def test_any_bytes_decode_canonically_or_raise_the_one_error(cls: type, data: bytes) -> None:
    decodes_canonically_or_raises_the_one_error(cls, data)


@given(st.sampled_from(CLASSES), plain_values)
def test_any_value_decodes_canonically_or_raises_the_one_error(cls: type, value: Any) -> None:
    decodes_canonically_or_raises_the_one_error(cls, msgpack.packb(value))


@given(st.sampled_from(MESSAGES), st.data())
def test_a_damaged_message_decodes_canonically_or_raises_the_one_error(
    message: Any, data: st.DataObject
) -> None:
    encoded = bytearray(encode_message(message))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    decodes_canonically_or_raises_the_one_error(type(message), bytes(encoded))


@given(st.integers(0, 2**63 - 1), st.text(max_size=64))
def test_what_encodes_decodes(code: int, detail: str) -> None:
    message = Refusal(code, detail)
    try:
        data = encode_message(message)
    except LocalProtocolError:
        assert not detail.isprintable() or len(detail.encode("utf-8", "replace")) > MAX_TEXT_BYTES
        return
    assert decode_message_untrusted(Refusal, data) == message


INT_FORMS = {
    "uint8": b"\xcc\x16",
    "uint16": b"\xcd\x00\x16",
    "uint32": b"\xce\x00\x00\x00\x16",
    "uint64": b"\xcf" + (22).to_bytes(8),
    "int8": b"\xd0\x16",
    "int16": b"\xd1\x00\x16",
    "int32": b"\xd2\x00\x00\x00\x16",
    "int64": b"\xd3" + (22).to_bytes(8),
}


@pytest.mark.parametrize("form", INT_FORMS)
def test_an_integer_in_a_longer_form_is_not_canonical(form: str) -> None:
    data = b"\x92" + INT_FORMS[form] + b"\xa0"
    assert fails(Refusal, data) is ErrorCode.NOT_CANONICAL


NOT_AN_INT: dict[str, Any] = {
    "nil": None,
    "true": True,
    "float": 22.0,
    "nan": float("nan"),
    "negative": -1,
    "over 63 bits": 2**63,
    "text": "22",
    "bytes": b"\x16",
    "list": [22],
    "map": {},
    "ext": msgpack.ExtType(5, b"\x16"),
    "timestamp": msgpack.Timestamp(0),
}


@pytest.mark.parametrize("name", NOT_AN_INT)
def test_another_type_is_no_integer(name: str) -> None:
    assert fails(Refusal, msgpack.packb([NOT_AN_INT[name], "busy"])) is ErrorCode.MALFORMED


@pytest.mark.parametrize("value", [0, 1, None, "true", b""])
def test_another_type_is_no_boolean(value: Any) -> None:
    assert fails(UnitManifest, msgpack.packb([5000, 100, value])) is ErrorCode.MALFORMED


def test_bytes_and_text_are_not_each_other() -> None:
    assert fails(Refusal, msgpack.packb([22, b"busy"])) is ErrorCode.MALFORMED
    assert fails(Connect, msgpack.packb(["x" * 32])) is ErrorCode.MALFORMED


@pytest.mark.parametrize(
    "raw", [b"\xa2\xc3\x28", b"\xa2\xc0\xaf", b"\xa3\xed\xa0\x80", b"\xa1\xff"]
)
def test_text_that_is_not_utf8_is_malformed(raw: bytes) -> None:
    assert fails(Refusal, b"\x92\x16" + raw) is ErrorCode.MALFORMED


@pytest.mark.parametrize("text", ["a\n", "\x1b[2J", "\x7f", "\u202e", "\u200b", "\u2028", "\ue000"])
def test_text_that_could_rewrite_a_terminal_is_malformed(text: str) -> None:
    assert fails(Refusal, msgpack.packb([22, text])) is ErrorCode.MALFORMED
    with pytest.raises(LocalProtocolError):
        encode_message(Refusal(22, text))


def test_text_is_bounded_in_bytes_not_letters() -> None:
    for text in ("x" * MAX_TEXT_BYTES, "é" * (MAX_TEXT_BYTES // 2)):
        data = msgpack.packb([22, text])
        assert decode_message_untrusted(Refusal, data).detail == text
        assert fails(Refusal, msgpack.packb([22, text + "x"])) is ErrorCode.MALFORMED


def test_a_list_is_bounded_in_items() -> None:
    plain = msgpack.unpackb(encode_message(samples.CAPACITY))
    place = list(Capacity.__dataclass_fields__).index("isolation")
    plain[place] = ["x"] * MAX_LIST_ITEMS
    assert len(decode_message_untrusted(Capacity, msgpack.packb(plain)).isolation) == MAX_LIST_ITEMS
    plain[place] = ["x"] * (MAX_LIST_ITEMS + 1)
    assert fails(Capacity, msgpack.packb(plain)) is ErrorCode.MALFORMED


@pytest.mark.parametrize("fields", [[], [22], [22, "", 0], [[22, ""]], {"code": 22, "detail": ""}])
def test_other_fields_are_malformed(fields: Any) -> None:
    assert fails(Refusal, msgpack.packb(fields)) is ErrorCode.MALFORMED


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa0", b"\xdc\x00\x01", b"\x9f"])
def test_nested_bombs_are_malformed(opener: bytes) -> None:
    data = (opener * MAX_MESSAGE_BYTES)[:MAX_MESSAGE_BYTES]
    assert fails(Refusal, data) is ErrorCode.MALFORMED


@pytest.mark.parametrize("head", [0xC6, 0xC9, 0xDB, 0xDD, 0xDF])
def test_a_length_of_four_gigabytes_is_malformed(head: int) -> None:
    assert fails(Refusal, bytes([head]) + b"\xff" * 4) is ErrorCode.MALFORMED


def test_a_message_over_the_bound_is_too_large_before_it_is_read() -> None:
    assert fails(Refusal, b"\xc1" * (MAX_MESSAGE_BYTES + 1)) is ErrorCode.TOO_LARGE
    with pytest.raises(LocalProtocolError, match="larger"):
        encode_message(Assignment(bytes(MAX_MESSAGE_BYTES), b""))


def test_a_wrong_field_is_named_and_its_content_is_not() -> None:
    plain = msgpack.unpackb(encode_message(samples.CAPACITY))
    plain[list(Capacity.__dataclass_fields__).index("devices")][0][1] = b"private"
    with pytest.raises(RemoteProtocolError) as caught:
        decode_message_untrusted(Capacity, msgpack.packb(plain))
    assert "Capacity.devices: DeviceInfo.name" in caught.value.detail
    assert "private" not in str(caught.value)


def test_our_own_wrong_values_are_our_own_errors() -> None:
    wrong: list[Any] = [
        Refusal("22", "busy"),  # type: ignore[arg-type]
        Refusal(-1, "busy"),
        Connect(bytes(31)),
        SignDraft("receipt", b""),
        DeviceInfo("any", "x", 1, 1, ""),
    ]
    for message in wrong:
        with pytest.raises(LocalProtocolError):
            encode_message(message)


def test_an_error_code_may_stand_where_its_number_does() -> None:
    data = encode_message(Refusal(ErrorCode.BUSY, ""))
    assert decode_message_untrusted(Refusal, data).code == 22
    assert data == encode_message(Refusal(22, ""))


def test_a_field_type_that_the_wire_does_not_have_is_our_own_error() -> None:
    @dataclass(frozen=True)
    class Wrong:
        value: float

    with pytest.raises(LocalProtocolError, match="float"):
        encode_message(Wrong(1.0))


def test_a_named_type_is_read_as_what_it_names() -> None:
    @dataclass(frozen=True)
    class Named:
        key: PeerKey

    message = Named(PeerKey(b"k"))
    assert decode_message_untrusted(Named, encode_message(message)) == message
    assert fails(Named, msgpack.packb(["k"])) is ErrorCode.MALFORMED


def test_a_request_is_small() -> None:
    # limits.md promises that the bound of 8 KiB is far from real messages.
    assert len(encode_message(samples.REQUEST)) < 300
    assert len(samples.SIGNED_OFFER.data) < 600
    assert isinstance(samples.REQUEST, UnitRequest)
