"""Capability tokens: a chain of signed blocks that its holders can only narrow.
Spec: 75-tokens.md

    block 1   signed by the issuer's identity          next_key A ─┐
    block 2   signed by A, over the hash of block 1     next_key B ─┐
    use       signed by B, over one request's nonce and submitter

Whoever holds the secret of the last next_key may add a block or use the token.  Taking a block
away needs the secret of the one before, which no later holder has.  Pure: seeds come in.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Final

from nacl.signing import SigningKey

from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.ids import PeerKey
from nextgpu_protocol.limits import MAX_TOKEN_BLOCKS, MAX_TOKEN_BYTES
from nextgpu_protocol.messages import (
    SUITE,
    HeldToken,
    Token,
    TokenBlock,
    TokenUse,
    UnitRequest,
)

PROGRAM_KIND: Final = "program"  # the one kind of work of this version
TEXT_PREFIX: Final = "ngt1_"
_MAX_TEXT_CHARS: Final = len(TEXT_PREFIX) + 2 * MAX_TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class TokenChain:
    """A chain whose signatures and narrowing hold.  Who may use it is not judged yet."""

    blocks: tuple[Signed[TokenBlock], ...]

    @property
    def issuer(self) -> PeerKey:
        return self.blocks[0].signer

    @property
    def token_id(self) -> bytes:
        """32 bytes: the hash of the first block, whoever holds the token now."""
        return self.blocks[0].hash

    @property
    def allows(self) -> TokenBlock:
        """The last block: what may be had."""
        return self.blocks[-1].message

    @property
    def budgets(self) -> tuple[tuple[bytes, int], ...]:
        """Hash and GPU seconds of every block: what is spent counts against each of them."""
        return tuple((block.hash, block.message.gpu_seconds) for block in self.blocks)


# --- made by issuers and holders ----------------------------------------------------------------


def issue_token(allows: TokenBlock, issuer: SigningKey, seed: bytes) -> HeldToken:
    """A new token of one block.  `seed` is 32 fresh random bytes: the holder's secret.

    `previous_hash` and `next_key` of `allows` are set here.
    """
    block = replace(allows, previous_hash=b"", next_key=_public(seed))
    return HeldToken((sign_message(block, issuer).data,), seed)


def attenuate_token(held: HeldToken, allows: TokenBlock, seed: bytes) -> HeldToken:
    """`held` with one block more.  Raises LocalProtocolError where that would not narrow it."""
    try:
        chain = open_chain_untrusted(held.blocks)
        if len(chain.blocks) == MAX_TOKEN_BLOCKS:
            raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "the chain is full")
        block = replace(allows, previous_hash=chain.blocks[-1].hash, next_key=_public(seed))
        _check_narrower(chain.allows, block)
    except RemoteProtocolError as exc:
        raise LocalProtocolError(exc.detail or str(exc)) from exc
    signed = sign_message(block, SigningKey(held.seed))
    return HeldToken((*held.blocks, signed.data), seed)


def use_token(held: HeldToken, submitter_key: bytes, request_nonce: bytes) -> bytes:
    """The `token` field of one request."""
    last = open_envelope_untrusted(TokenBlock, held.blocks[-1])
    use = TokenUse(SUITE, last.hash, submitter_key, request_nonce)
    token = encode_message(Token(held.blocks, sign_message(use, SigningKey(held.seed)).data))
    if len(token) > MAX_TOKEN_BYTES:
        raise LocalProtocolError("the token is too long for a request")
    return token


def format_token(held: HeldToken) -> str:
    """The text that is handed on: whoever has it can spend the token."""
    return TEXT_PREFIX + base64.urlsafe_b64encode(encode_message(held)).decode().rstrip("=")


def parse_token_untrusted(text: str) -> tuple[HeldToken, TokenChain]:
    """The token in `text`, its chain verified.  Raises RemoteProtocolError(BAD_TOKEN)."""
    body = text.removeprefix(TEXT_PREFIX)
    if len(text) > _MAX_TEXT_CHARS or body == text:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, f"a token begins with {TEXT_PREFIX}")
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as exc:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "a token is base64url text") from exc
    try:
        held = decode_message_untrusted(HeldToken, data)
    except RemoteProtocolError as exc:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, exc.detail) from exc
    if format_token(held) != text:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "not its one text form")
    chain = open_chain_untrusted(held.blocks)
    if _public(held.seed) != chain.allows.next_key:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "the secret is not the last block's")
    return held, chain


# --- judged by the issuer -----------------------------------------------------------------------


def open_token_untrusted(data: bytes, *, submitter_key: bytes, request_nonce: bytes) -> TokenChain:
    """The chain of the token in a request, where it was made for just this request.

    Raises RemoteProtocolError(BAD_TOKEN) for everything that is wrong with it.
    """
    if len(data) > MAX_TOKEN_BYTES:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "too large")
    try:
        token = decode_message_untrusted(Token, data)
        use = open_envelope_untrusted(TokenUse, token.use)
    except RemoteProtocolError as exc:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, exc.detail) from exc
    chain = open_chain_untrusted(token.blocks)
    if use.signer != chain.allows.next_key:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "used without the secret of its last block")
    wanted = TokenUse(SUITE, chain.blocks[-1].hash, submitter_key, request_nonce)
    if use.message != wanted:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "made for another request")
    return chain


def open_chain_untrusted(blocks: tuple[bytes, ...]) -> TokenChain:
    """Verify every block and that each narrows the one before.  Raises BAD_TOKEN."""
    try:
        signed = [open_envelope_untrusted(TokenBlock, data) for data in blocks]
    except RemoteProtocolError as exc:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, exc.detail or str(exc)) from exc
    if any(block.message.suite != SUITE for block in signed):
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "suite")
    if signed[0].message.previous_hash:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "the first block is missing")
    for before, block in itertools.pairwise(signed):
        if block.signer != before.message.next_key or block.message.previous_hash != before.hash:
            raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "a block does not follow the one before")
        _check_narrower(before.message, block.message)
    return TokenChain(tuple(signed))


def check_token_untrusted(chain: TokenChain, *, issuers: Set[bytes], now_ms: int) -> None:
    """Was it issued here, and is it still valid?

    `issuers` are the issuer's own key and those that it had before.
    """
    if chain.issuer not in issuers:
        raise RemoteProtocolError(ErrorCode.TOKEN_ISSUER)
    # Without the clock skew: the issuer wrote, or bounded, this time by its own clock.
    if now_ms > chain.allows.expires_at_ms:
        raise RemoteProtocolError(ErrorCode.TOKEN_EXPIRED)


def check_audience_untrusted(chain: TokenChain, holders: Set[bytes]) -> None:
    """May this submitter use it?  `holders` are its key and those that it had before."""
    if chain.allows.audience and chain.allows.audience not in holders:
        raise RemoteProtocolError(ErrorCode.TOKEN_AUDIENCE)


def check_within_token_untrusted(chain: TokenChain, request: UnitRequest) -> None:
    """Does one unit ask for no more than the token allows?  What was spent is not judged here."""
    allows = chain.allows
    if PROGRAM_KIND not in allows.kinds:
        raise RemoteProtocolError(ErrorCode.TOKEN_LIMIT, f"kind {PROGRAM_KIND}")
    if request.memory_bytes > allows.memory_bytes:
        detail = f"memory_bytes: {request.memory_bytes} of {allows.memory_bytes}"
        raise RemoteProtocolError(ErrorCode.TOKEN_LIMIT, detail)
    if request.max_seconds > allows.gpu_seconds:
        detail = f"max_seconds: {request.max_seconds} of {allows.gpu_seconds}"
        raise RemoteProtocolError(ErrorCode.TOKEN_LIMIT, detail)


def _check_narrower(before: TokenBlock, block: TokenBlock) -> None:
    """A block that allows more than the one before is a forgery, not a mistake: refuse it all."""
    for name in ("gpu_seconds", "memory_bytes", "expires_at_ms"):
        if getattr(block, name) > getattr(before, name):
            raise RemoteProtocolError(ErrorCode.BAD_TOKEN, f"{name} is wider than before")
    if not set(block.kinds) <= set(before.kinds):
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "kinds are wider than before")
    if before.audience and block.audience != before.audience:
        raise RemoteProtocolError(ErrorCode.BAD_TOKEN, "the audience is wider than before")


def _public(seed: bytes) -> bytes:
    return bytes(SigningKey(seed).verify_key)
