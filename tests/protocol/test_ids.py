"""Peer IDs agree with libp2p's, and nothing else passes for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import (
    peer_id_from_public_key,
    peer_key_untrusted,
    public_key_from_peer_id,
)

# Made with py-libp2p 0.8.1, which shares no code with ours:
#   ID.from_pubkey(create_new_key_pair(seed).public_key)
# for the seeds 00…00, 00 01 … 1f, and the Ed25519 key of libp2p/specs peer-ids (7e0830…ee7d).
KNOWN = {
    "3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29": (
        "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    ),
    "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8": (
        "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
    ),
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e": (
        "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
    ),
}
# A peer ID of another key type: the SHA-256 multihash of an RSA key.
RSA_PEER_ID = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.mark.parametrize(("public_key", "peer_id"), KNOWN.items())
def test_peer_id_is_the_one_that_libp2p_gives(public_key: str, peer_id: str) -> None:
    assert peer_id_from_public_key(bytes.fromhex(public_key)) == peer_id
    assert public_key_from_peer_id(peer_id).hex() == public_key


@given(st.binary(min_size=32, max_size=32))
def test_every_key_comes_back_from_its_peer_id(public_key: bytes) -> None:
    assert public_key_from_peer_id(peer_id_from_public_key(public_key)) == public_key


@given(
    st.text(max_size=60) | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmno", max_size=60)
)
def test_any_text_is_a_peer_id_in_its_one_form_or_a_value_error(text: str) -> None:
    try:
        public_key = public_key_from_peer_id(text)
    except ValueError:
        return
    assert peer_id_from_public_key(public_key) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        RSA_PEER_ID,
        "1" + next(iter(KNOWN.values())),
        next(iter(KNOWN.values()))[:-1],
        next(iter(KNOWN.values())) + "1",
        next(iter(KNOWN.values())).replace("2", "0", 1),
        "z" * 52,
    ],
)
def test_other_texts_are_no_peer_id(text: str) -> None:
    with pytest.raises(ValueError):
        public_key_from_peer_id(text)


def test_a_megabyte_of_digits_is_refused_before_it_is_computed() -> None:
    with pytest.raises(ValueError, match="too long"):
        public_key_from_peer_id("z" * 1_000_000)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError):
        peer_id_from_public_key(bytes(size))
    with pytest.raises(RemoteProtocolError) as caught:
        peer_key_untrusted(bytes(size))
    assert caught.value.code is ErrorCode.MALFORMED


def test_a_key_of_32_bytes_is_taken() -> None:
    assert peer_key_untrusted(bytes(32)) == bytes(32)
