"""Envelope: a typed message with its Ed25519 signature.  Spec: 20-envelope.md

    [type (text), payload (bytes), public key (32 bytes), signature (64 bytes)]     msgpack array

    signature over  D(type) ‖ payload        D(t) = "NextGPU/1 " ‖ t ‖ 00

The domain string makes a signature worth nothing in any other place.  What is verified and
hashed is always the received bytes, never a re-encoding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgpack
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from nextgpu_protocol.codec import decode_message_untrusted, encode_message, unpack_untrusted
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import PeerId, PeerKey, peer_id_from_public_key, peer_key_untrusted
from nextgpu_protocol.limits import MAX_MESSAGE_BYTES
from nextgpu_protocol.messages import (
    Announcement,
    Capacity,
    Offer,
    Predecessor,
    Receipt,
    ReceiptAck,
    Successor,
    TokenBlock,
    TokenUse,
    UnitHeader,
    UnitRequest,
    UnitResume,
)

T = TypeVar("T")
SIGNATURE_BYTES = 64

# The text on the wire for each message that is ever signed.  A closed set: a node's key signs
# nothing else, so no peer can have it sign bytes of the peer's choosing.
TYPE_NAMES: dict[type, str] = {
    UnitRequest: "request",
    Offer: "offer",
    UnitHeader: "header",
    Receipt: "receipt",
    ReceiptAck: "ack",
    UnitResume: "resume",
    Capacity: "capacity",
    Announcement: "announcement",
    TokenBlock: "token",
    TokenUse: "token use",
    Successor: "successor",
    Predecessor: "predecessor",
}


def domain(label: str) -> bytes:
    """D(label): the prefix of every hash and signature of this protocol."""
    return b"NextGPU/1 " + label.encode("ascii") + b"\0"


def hash_of(label: str, *parts: bytes) -> bytes:
    """BLAKE2b-256 over D(label) and each part behind its 8-byte big-endian length."""
    state = hashlib.blake2b(domain(label), digest_size=32)
    for part in parts:
        state.update(len(part).to_bytes(8))
        state.update(part)
    return state.digest()


@dataclass(frozen=True, slots=True)
class Signed(Generic[T]):
    """A verified message, who signed it, and the exact bytes that were verified."""

    message: T
    signer: PeerKey
    data: bytes

    @property
    def signer_id(self) -> PeerId:
        return peer_id_from_public_key(self.signer)

    @property
    def hash(self) -> bytes:
        """32 bytes that name this envelope in others (request_hash, offer_hash, …)."""
        return hash_of("envelope", self.data)


def sign_message(message: T, key: SigningKey) -> Signed[T]:
    """`message` in an envelope signed by `key`."""
    name = TYPE_NAMES[type(message)]
    payload = encode_message(message)
    signature = key.sign(domain(name) + payload).signature
    public_key = bytes(key.verify_key)
    data: bytes = msgpack.packb([name, payload, public_key, signature], use_bin_type=True)
    return Signed(message, PeerKey(public_key), data)


def open_envelope_untrusted(cls: type[T], data: bytes) -> Signed[T]:
    """Verify the envelope in `data` and decode its message of type `cls`.

    The signature is checked before the payload is decoded.  Raises RemoteProtocolError.
    """
    payload, signer = _verify_untrusted(TYPE_NAMES[cls], data)
    return Signed(decode_message_untrusted(cls, payload), signer, data)


def _verify_untrusted(expected_name: str, data: bytes) -> tuple[bytes, PeerKey]:
    if len(data) > MAX_MESSAGE_BYTES + 256:
        raise RemoteProtocolError(ErrorCode.TOO_LARGE, "envelope")
    plain = unpack_untrusted(data)
    if not isinstance(plain, list) or [type(item) for item in plain] != [str, bytes, bytes, bytes]:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "not an envelope")
    name, payload, public_key, signature = plain
    if msgpack.packb(plain, use_bin_type=True) != data:
        raise RemoteProtocolError(ErrorCode.NOT_CANONICAL, "envelope")
    if name != expected_name:
        raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, f"an {expected_name} was expected")
    signer = peer_key_untrusted(public_key)
    if len(signature) != SIGNATURE_BYTES:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "a signature has 64 bytes")
    try:
        VerifyKey(signer).verify(domain(name) + payload, signature)
    except BadSignatureError as exc:
        raise RemoteProtocolError(ErrorCode.BAD_SIGNATURE, expected_name) from exc
    return payload, signer
