"""Plain values: what goes out comes back, and nothing else comes out of any bytes."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.values import (
    MAX_VALUE_DEPTH,
    Buffer,
    decode_value_untrusted,
    encode_value,
)

PLAIN = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, type(None))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(scalars, inner)
        | st.sets(scalars)
        | st.frozensets(scalars)
    ),
    max_leaves=20,
)


def no_buffer(_: Any) -> Any:
    return None


def refuse(_: Buffer) -> Any:
    raise RemoteProtocolError(ErrorCode.MALFORMED)


@given(values)
def test_what_goes_out_comes_back_with_its_types(value: Any) -> None:
    back = decode_value_untrusted(encode_value(value, no_buffer), refuse)
    assert back == value
    assert type(back) is type(value)


@given(st.binary(max_size=200))
def test_any_bytes_give_plain_data_or_an_error(data: bytes) -> None:
    try:
        value = decode_value_untrusted(data, refuse)
    except RemoteProtocolError:
        return
    assert isinstance(value, PLAIN)


trees = st.recursive(
    scalars.filter(lambda v: not isinstance(v, complex | int) or isinstance(v, bool))
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from(["l", "u", "s", "f", "d", "I", "C", "t", "a", "z"]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=30,
)


@given(trees)
def test_any_tree_gives_plain_data_or_an_error(tree: Any) -> None:
    try:
        value = decode_value_untrusted(msgpack.packb(tree), refuse)
    except RemoteProtocolError:
        return
    assert isinstance(value, PLAIN)


@pytest.mark.parametrize(
    "tree",
    [
        ["x", []],  # no such tag
        ["l"],
        ["l", {}],
        ["d", [[1]]],
        ["d", [[["l", []], 1]]],  # a key that can not be hashed
        ["s", [["l", []]]],
        ["I", "1e5"],
        ["I", "٣"],
        ["I", "9" * 5000],
        ["C", 1, 2],
        ["t", -1],
        ["t", True],
        ["os", "system", "true"],
        [[], []],
        msgpack.Timestamp(0),
        msgpack.ExtType(5, b"x"),
    ],
)
def test_malformed_trees(tree: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_value_untrusted(msgpack.packb(tree), refuse)


def test_depth_is_bounded_both_ways() -> None:
    value: Any = []
    for _ in range(MAX_VALUE_DEPTH + 1):
        value = [value]
    with pytest.raises(LocalProtocolError, match="deeply"):
        encode_value(value, no_buffer)
    tree: Any = None
    for _ in range(100):  # less than msgpack itself refuses
        tree = ["l", [tree]]
    with pytest.raises(RemoteProtocolError):
        decode_value_untrusted(msgpack.packb(tree), refuse)


def test_a_type_of_somebodys_own_is_named_and_not_sent() -> None:
    class Mine(dict):  # a subclass could carry code of its own
        pass

    with pytest.raises(LocalProtocolError, match="Mine"):
        encode_value([Mine()], no_buffer)


def test_not_a_number_is_a_number() -> None:
    assert math.isnan(decode_value_untrusted(encode_value(math.nan, no_buffer), refuse))
