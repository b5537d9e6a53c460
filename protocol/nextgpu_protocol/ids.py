"""Names of things on the wire.  Spec: 10-identity.md

A peer is its Ed25519 public key.  Its text form is the libp2p peer ID of that key: the identity
multihash of the protobuf-encoded key, in base58btc (libp2p/specs peer-ids).

    00 24 08 01 12 20 ‖ public key (32 bytes)        -> "12D3KooW…"
"""

from __future__ import annotations

from typing import NewType

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError

PeerKey = NewType("PeerKey", bytes)  # 32 bytes, Ed25519 public key
PeerId = NewType("PeerId", str)  # base58btc text of the same key
UnitId = NewType("UnitId", bytes)  # 16 bytes, chosen by the submitter

KEY_BYTES = 32
UNIT_ID_BYTES = 16

_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGIT = {letter: value for value, letter in enumerate(_ALPHABET)}
# 38 bytes need at most 52 base58 digits; anything longer is refused before it is computed.
_MAX_PEER_ID_CHARS = 52


def peer_id_from_public_key(public_key: bytes) -> PeerId:
    """The text peer ID of a 32-byte Ed25519 public key."""
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(_base58_encode(_PEER_ID_PREFIX + public_key))


def public_key_from_peer_id(peer_id: str) -> PeerKey:
    """The 32-byte key inside a peer ID.

    Raises ValueError where the text is not the peer ID of an Ed25519 key.
    """
    if len(peer_id) > _MAX_PEER_ID_CHARS:
        raise ValueError("too long for a peer ID")
    raw = _base58_decode(peer_id)
    if len(raw) != len(_PEER_ID_PREFIX) + KEY_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise ValueError("not the peer ID of an Ed25519 key")
    return PeerKey(raw[len(_PEER_ID_PREFIX) :])


def peer_key_untrusted(value: bytes) -> PeerKey:
    """`value` as a peer's key, or RemoteProtocolError."""
    if len(value) != KEY_BYTES:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "a peer key has 32 bytes")
    return PeerKey(value)


def _base58_encode(data: bytes) -> str:
    number = int.from_bytes(data)
    digits = ""
    while number:
        number, remainder = divmod(number, 58)
        digits = _ALPHABET[remainder] + digits
    zeros = len(data) - len(data.lstrip(b"\0"))
    return _ALPHABET[0] * zeros + digits


def _base58_decode(text: str) -> bytes:
    number = 0
    for letter in text:
        if letter not in _DIGIT:
            raise ValueError("not base58 text")
        number = number * 58 + _DIGIT[letter]
    zeros = len(text) - len(text.lstrip(_ALPHABET[0]))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8)
