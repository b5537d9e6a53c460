"""Capability tokens, attacked: what their holders can not do.  Spec: 75-tokens.md"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import sign_message
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.limits import GIB, MAX_TOKEN_BLOCKS, MAX_TOKEN_BYTES
from nextgpu_protocol.messages import HeldToken, Token, TokenBlock
from nextgpu_protocol.tokens import (
    TokenChain,
    attenuate_token,
    check_audience_untrusted,
    check_token_untrusted,
    format_token,
    issue_token,
    open_chain_untrusted,
    open_token_untrusted,
    parse_token_untrusted,
    use_token,
)
from tests.protocol.samples import BLOCK, NOW_MS, PROVIDER, SUBMITTER

NONCE = b"n" * 16
HOLDER = bytes(SUBMITTER.verify_key)
OTHER = bytes(SigningKey(b"x" * 32).verify_key)
ISSUED = issue_token(BLOCK, PROVIDER, b"1" * 32)
NARROW = replace(BLOCK, gpu_seconds=60, memory_bytes=GIB, audience=HOLDER, expires_at_ms=NOW_MS + 9)
NARROWED = attenuate_token(ISSUED, NARROW, b"2" * 32)


def opened(held: HeldToken) -> TokenChain:
    token = use_token(held, HOLDER, NONCE)
    return open_token_untrusted(token, submitter_key=HOLDER, request_nonce=NONCE)


def code_of(token: bytes, *, submitter_key: bytes = HOLDER, nonce: bytes = NONCE) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        open_token_untrusted(token, submitter_key=submitter_key, request_nonce=nonce)
    return caught.value.code


def forged_block(held: HeldToken, **changes: Any) -> HeldToken:
    """`held` with one block more, as a holder signs it who keeps to no rule."""
    chain = open_chain_untrusted(held.blocks)
    seed = b"9" * 32
    fields = {
        "previous_hash": chain.blocks[-1].hash,
        "next_key": bytes(SigningKey(seed).verify_key),
        **changes,
    }
    signed = sign_message(replace(chain.allows, **fields), SigningKey(held.seed))
    return HeldToken((*held.blocks, signed.data), seed)


def test_a_token_and_each_narrowing_of_it_serve() -> None:
    assert opened(ISSUED).allows.gpu_seconds == 3600
    chain = opened(NARROWED)
    assert chain.issuer == bytes(PROVIDER.verify_key)
    assert chain.token_id == opened(ISSUED).token_id
    assert chain.allows.audience == HOLDER
    assert [seconds for _, seconds in chain.budgets] == [3600, 60]


@pytest.mark.parametrize(
    "wider",
    [
        {"gpu_seconds": 61},
        {"memory_bytes": GIB + 1},
        {"kinds": ("function", "program")},
        {"expires_at_ms": NOW_MS + 10},
    ],
)
def test_a_block_that_allows_more_is_refused_field_by_field(wider: dict[str, Any]) -> None:
    assert code_of(use_token(forged_block(NARROWED, **wider), HOLDER, NONCE)) is ErrorCode.BAD_TOKEN
    with pytest.raises(LocalProtocolError, match="wider"):
        attenuate_token(NARROWED, replace(NARROW, **wider), b"3" * 32)


@pytest.mark.parametrize("audience", [b"", OTHER])
def test_an_audience_once_set_can_not_be_stripped_or_changed(audience: bytes) -> None:
    token = use_token(forged_block(NARROWED, audience=audience), OTHER, NONCE)
    assert code_of(token, submitter_key=OTHER) is ErrorCode.BAD_TOKEN


def test_a_chain_cut_anywhere_can_not_be_used_with_the_key_of_its_end() -> None:
    third = attenuate_token(NARROWED, NARROW, b"3" * 32)
    for kept in range(1, 3):
        cut = HeldToken(third.blocks[:kept], third.seed)
        assert code_of(use_token(cut, HOLDER, NONCE)) is ErrorCode.BAD_TOKEN
    assert opened(third)


def test_blocks_of_two_tokens_do_not_mix() -> None:
    larger = issue_token(replace(BLOCK, gpu_seconds=10**6), PROVIDER, b"4" * 32)
    # The same holder, and even the same block key: the hash of the block before still differs.
    same_key = issue_token(replace(BLOCK, gpu_seconds=10**6), PROVIDER, ISSUED.seed)
    for other in (larger, same_key):
        mixed = HeldToken((other.blocks[0], NARROWED.blocks[1]), NARROWED.seed)
        assert code_of(use_token(mixed, HOLDER, NONCE)) is ErrorCode.BAD_TOKEN


def test_a_token_that_nobody_issued_has_its_forger_for_an_issuer() -> None:
    chain = opened(issue_token(BLOCK, SigningKey(b"x" * 32), b"5" * 32))
    with pytest.raises(RemoteProtocolError) as caught:
        check_token_untrusted(chain, issuers={bytes(PROVIDER.verify_key)}, now_ms=NOW_MS)
    assert caught.value.code is ErrorCode.TOKEN_ISSUER


def test_a_use_serves_one_request_of_one_submitter() -> None:
    token = use_token(ISSUED, HOLDER, NONCE)
    assert code_of(token, nonce=b"m" * 16) is ErrorCode.BAD_TOKEN
    assert code_of(token, submitter_key=OTHER) is ErrorCode.BAD_TOKEN
    seen = decode_message_untrusted(Token, token)
    # What is seen in a request holds no secret: with it, no use for another request can be made.
    assert ISSUED.seed not in token
    assert code_of(encode_message(replace(seen, use=seen.blocks[0]))) is ErrorCode.BAD_TOKEN


@given(st.data())
def test_any_changed_bit_of_a_token_is_refused(data: st.DataObject) -> None:
    token = bytearray(use_token(NARROWED, HOLDER, NONCE))
    bit = data.draw(st.integers(0, 8 * len(token) - 1))
    token[bit // 8] ^= 1 << bit % 8
    assert code_of(bytes(token)) is ErrorCode.BAD_TOKEN


@given(st.binary(max_size=300) | st.lists(st.binary(max_size=80)).map(msgpack.packb))
def test_any_bytes_are_a_token_or_the_one_error(data: bytes) -> None:
    assert code_of(data) is ErrorCode.BAD_TOKEN


@pytest.mark.parametrize(
    ("now_ms", "code"), [(9, None), (10, ErrorCode.TOKEN_EXPIRED), (10**9, ErrorCode.TOKEN_EXPIRED)]
)
def test_the_clock_is_held_to_the_millisecond_without_skew(
    now_ms: int, code: ErrorCode | None
) -> None:
    issuers = {bytes(PROVIDER.verify_key)}
    if code is None:
        check_token_untrusted(opened(NARROWED), issuers=issuers, now_ms=NOW_MS + now_ms)
        return
    with pytest.raises(RemoteProtocolError) as caught:
        check_token_untrusted(opened(NARROWED), issuers=issuers, now_ms=NOW_MS + now_ms)
    assert caught.value.code is code


def test_an_audience_is_a_key_that_the_submitter_has_or_had() -> None:
    check_audience_untrusted(opened(NARROWED), {HOLDER})
    check_audience_untrusted(opened(NARROWED), {OTHER, HOLDER})
    check_audience_untrusted(opened(ISSUED), {OTHER})
    with pytest.raises(RemoteProtocolError) as caught:
        check_audience_untrusted(opened(NARROWED), {OTHER})
    assert caught.value.code is ErrorCode.TOKEN_AUDIENCE


def test_the_chain_and_the_token_are_bounded() -> None:
    held = ISSUED
    for index in range(1, MAX_TOKEN_BLOCKS):
        held = attenuate_token(held, NARROW, bytes([index]) * 32)
    assert len(use_token(held, HOLDER, NONCE)) < MAX_TOKEN_BYTES
    with pytest.raises(LocalProtocolError, match="full"):
        attenuate_token(held, NARROW, b"z" * 32)
    assert code_of(bytes(MAX_TOKEN_BYTES + 1)) is ErrorCode.BAD_TOKEN


def test_the_text_form_comes_back_and_has_no_second_spelling() -> None:
    text = format_token(NARROWED)
    held, chain = parse_token_untrusted(text)
    assert held == NARROWED
    assert chain.allows.gpu_seconds == 60
    swapped = format_token(HeldToken(NARROWED.blocks, ISSUED.seed))
    for bad in (text[:-1], text + "A", text + "=", text[5:], f" {text}", "ngt1_", "ngt1_!", swapped,
                text.replace("ngt1_", "ngt2_"), "x" * 10**6):  # fmt: skip
        with pytest.raises(RemoteProtocolError) as caught:
            parse_token_untrusted(bad)
        assert caught.value.code is ErrorCode.BAD_TOKEN


def test_a_held_token_does_not_print_its_secret() -> None:
    assert ISSUED.seed.hex() not in repr(ISSUED)
    assert "1111" not in repr(ISSUED)
    assert isinstance(decode_message_untrusted(HeldToken, encode_message(ISSUED)), HeldToken)
    assert TokenBlock.__name__ not in repr(ISSUED)
