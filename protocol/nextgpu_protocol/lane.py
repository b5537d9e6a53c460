"""The bulk lane: a unit's frames over a plain TCP connection.  Spec: 48-lane.md

    S ── D("lane") ‖ lane id (16) ──►  P        then frames both ways
    DATA        as everywhere: its body is sealed from end to end already
    all others  body = ChaCha20-Poly1305-IETF(K, nonce = u32 0 ‖ u64 n, AD = u8 kind, body)

n counts the frames before it in its direction on this lane, so that none can be left out, repeated
or put elsewhere without its being seen at the next frame that is not DATA.  Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nacl import bindings as sodium
from nacl.exceptions import CryptoError

from nextgpu_protocol.envelope import domain
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.session import Side

LANE_ID_BYTES = 16
_HELLO_HEAD = domain("lane")
HELLO_BYTES = len(_HELLO_HEAD) + LANE_ID_BYTES
_TAG_BYTES: int = sodium.crypto_aead_chacha20poly1305_ietf_ABYTES


@dataclass(frozen=True, slots=True)
class LaneEnds:
    """What a ticket is bound to, besides its secret."""

    unit_id: bytes
    submitter_peer: bytes  # the key of the node at each end of the connection that it came over
    provider_peer: bytes


def lane_id(ticket: bytes) -> bytes:
    """What names a lane in the clear; it tells nothing of the ticket."""
    return hashlib.blake2b(domain("lane id"), key=ticket, digest_size=32).digest()[:LANE_ID_BYTES]


def hello(ticket: bytes) -> bytes:
    """The submitter's first bytes on a lane."""
    return _HELLO_HEAD + lane_id(ticket)


def lane_id_untrusted(data: bytes) -> bytes:
    """The lane that HELLO_BYTES ask for."""
    if len(data) != HELLO_BYTES or not data.startswith(_HELLO_HEAD):
        raise RemoteProtocolError(ErrorCode.MALFORMED, "no lane")
    return data[len(_HELLO_HEAD) :]


class LaneCipher:
    """One direction: `seal` for who sends, `open_untrusted` for who receives."""

    def __init__(self, ticket: bytes, ends: LaneEnds, sender: Side) -> None:
        bound = ends.unit_id + ends.submitter_peer + ends.provider_peer
        data = domain(f"lane {sender}") + bound
        self._key = hashlib.blake2b(data, key=ticket, digest_size=32).digest()
        self._count = 0

    def seal(self, frames: Iterable[Frame]) -> list[Frame]:
        """The frames as they go out."""
        return [self._sealed(kind, body) for kind, body in frames]

    def open_untrusted(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """The frames that came.  Raises RemoteProtocolError for the first that does not open."""
        for kind, body in frames:
            if kind is FrameKind.DATA:
                self._count += 1
                yield kind, body
            else:
                yield kind, self._opened_untrusted(kind, body)

    def _sealed(self, kind: FrameKind, body: bytes) -> Frame:
        if kind is FrameKind.DATA:
            self._count += 1
            return kind, body
        sealed: bytes = sodium.crypto_aead_chacha20poly1305_ietf_encrypt(
            body, bytes([kind]), self._next_nonce(), self._key
        )
        return kind, sealed

    def _opened_untrusted(self, kind: FrameKind, body: bytes) -> bytes:
        if len(body) < _TAG_BYTES:
            raise RemoteProtocolError(ErrorCode.BAD_SEAL, "lane")
        try:
            opened: bytes = sodium.crypto_aead_chacha20poly1305_ietf_decrypt(
                body, bytes([kind]), self._next_nonce(), self._key
            )
        except CryptoError as exc:
            raise RemoteProtocolError(ErrorCode.BAD_SEAL, "lane") from exc
        return opened

    def _next_nonce(self) -> bytes:
        nonce = bytes(4) + self._count.to_bytes(8)
        self._count += 1
        return nonce
