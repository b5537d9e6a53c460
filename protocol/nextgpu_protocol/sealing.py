"""The sealed stream between the submitter's process and one worker.  Spec: 50-sealing.md

    TH      = H("th", offer envelope, header envelope)
    rx, tx  = crypto_kx(epk, otk)                         X25519 + BLAKE2b-512, libsodium
    K, C    = BLAKE2b-256(key = rx or tx, D(label) ‖ TH)  stream key and key commitment
    stream  = header (24) ‖ commitment (32)               the preamble, one DATA frame
              chunk chunk … chunk(FINAL)                  a DATA frame each

libsodium's secretstream says nothing about a missing end, decrypts on after FINAL, and its AEAD
does not commit to its key.  So: FINAL is checked, exactly once, last; and the commitment is
compared before the first chunk is opened.  The first chunk's associated data is TH.

Nothing here does I/O.  `Sealer` makes chunks, `Opener` opens them; both hold one chunk at most.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from nacl import bindings as sodium
from nacl.exceptions import CryptoError

from nextgpu_protocol.envelope import domain, hash_of
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.limits import (
    CHUNK_OVERHEAD_BYTES,
    CHUNK_PLAINTEXT_BYTES,
    PADDING_FLOOR_BYTES,
)

COMMITMENT_BYTES = 32
STREAM_HEADER_BYTES = sodium.crypto_secretstream_xchacha20poly1305_HEADERBYTES
PREAMBLE_BYTES: int = STREAM_HEADER_BYTES + COMMITMENT_BYTES
_TAG_MESSAGE = sodium.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
_TAG_FINAL = sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL


class KeyPair:
    """An X25519 pair for one unit.  The secret has no other name, no file and no repr."""

    __slots__ = ("_secret", "public")

    def __init__(self, seed: bytes) -> None:
        self.public, self._secret = sodium.crypto_kx_seed_keypair(seed)

    def __repr__(self) -> str:
        return "KeyPair(secret=..)"

    def submitter_keys(self, one_time_key: bytes, transcript: bytes) -> StreamKeys:
        """Keys on the submitter's side, where `self` is the ephemeral pair."""
        try:
            receive, send = sodium.crypto_kx_client_session_keys(
                self.public, self._secret, one_time_key
            )
        except (CryptoError, RuntimeError) as exc:
            # A low-order point would give a key that everybody knows.
            raise RemoteProtocolError(ErrorCode.BAD_SEAL, "one-time key") from exc
        return StreamKeys(
            StreamKey.derive(send, "in", transcript), StreamKey.derive(receive, "out", transcript)
        )

    def worker_keys_untrusted(self, ephemeral_key: bytes, transcript: bytes) -> StreamKeys:
        """Keys on the worker's side, where `self` is the one-time pair."""
        try:
            receive, send = sodium.crypto_kx_server_session_keys(
                self.public, self._secret, ephemeral_key
            )
        except (CryptoError, RuntimeError) as exc:
            raise RemoteProtocolError(ErrorCode.BAD_SEAL, "ephemeral key") from exc
        return StreamKeys(
            StreamKey.derive(receive, "in", transcript), StreamKey.derive(send, "out", transcript)
        )


@dataclass(frozen=True, slots=True, repr=False)
class StreamKey:
    """One direction's key and its public commitment."""

    key: bytes
    commitment: bytes
    transcript: bytes

    @classmethod
    def derive(cls, shared: bytes, direction: str, transcript: bytes) -> StreamKey:
        return cls(
            _derive(shared, f"key {direction}", transcript),
            _derive(shared, f"commit {direction}", transcript),
            transcript,
        )


@dataclass(frozen=True, slots=True, repr=False)
class StreamKeys:
    """`inbound` carries program and inputs to the worker, `outbound` its results."""

    inbound: StreamKey
    outbound: StreamKey


def transcript_hash(offer_envelope: bytes, header_envelope: bytes) -> bytes:
    """TH: 32 bytes that bind both signed envelopes, and so request, limits, key and peer."""
    return hash_of("th", offer_envelope, header_envelope)


def _derive(shared: bytes, label: str, transcript: bytes) -> bytes:
    return hashlib.blake2b(domain(label) + transcript, key=shared, digest_size=32).digest()


def padded_size(content_bytes: int) -> int:
    """Padmé (PETS 2019, Nikitin et al.): at most 12 % overhead, few possible sizes."""
    if content_bytes <= PADDING_FLOOR_BYTES:
        return PADDING_FLOOR_BYTES
    exponent = content_bytes.bit_length() - 1
    low_bits = exponent - exponent.bit_length()
    step: int = 1 << low_bits
    return -(-content_bytes // step) * step


class Sealer:
    """Seals one direction.

    `preamble` first, then each chunk that `seal` gives; the last one with final=True.
    """

    def __init__(self, key: StreamKey) -> None:
        self._state = sodium.crypto_secretstream_xchacha20poly1305_state()
        header = sodium.crypto_secretstream_xchacha20poly1305_init_push(self._state, key.key)
        self.preamble: bytes = header + key.commitment
        self._associated: bytes | None = key.transcript
        self._finished = False

    def seal(self, plaintext: bytes, *, final: bool = False) -> bytes:
        """One chunk of at most CHUNK_PLAINTEXT_BYTES."""
        if self._finished:
            raise LocalProtocolError("the sealed stream has ended")
        if len(plaintext) > CHUNK_PLAINTEXT_BYTES:
            raise LocalProtocolError("the chunk is too large")
        chunk: bytes = sodium.crypto_secretstream_xchacha20poly1305_push(
            self._state, plaintext, self._associated, _TAG_FINAL if final else _TAG_MESSAGE
        )
        self._associated = None
        self._finished = final
        return chunk


class Opener:
    """Opens one direction, frame by frame.  Every failure is a RemoteProtocolError."""

    def __init__(self, key: StreamKey) -> None:
        self._key = key
        self._state: sodium.crypto_secretstream_xchacha20poly1305_state | None = None
        self._associated: bytes | None = key.transcript
        self.finished = False

    def open_untrusted(self, frame_body: bytes) -> bytes:
        """The plaintext of one DATA frame; empty for the preamble."""
        if self._state is None:
            self._start(frame_body)
            return b""
        if self.finished:
            raise RemoteProtocolError(ErrorCode.BAD_SEAL, "data after the final chunk")
        if len(frame_body) > CHUNK_PLAINTEXT_BYTES + CHUNK_OVERHEAD_BYTES:
            raise RemoteProtocolError(ErrorCode.TOO_LARGE, "chunk")
        plaintext: bytes
        try:
            plaintext, tag = sodium.crypto_secretstream_xchacha20poly1305_pull(
                self._state, frame_body, self._associated
            )
        except (CryptoError, RuntimeError, ValueError) as exc:
            raise RemoteProtocolError(ErrorCode.BAD_SEAL) from exc
        if tag not in (_TAG_MESSAGE, _TAG_FINAL):
            raise RemoteProtocolError(ErrorCode.BAD_SEAL, "chunk tag")
        self._associated = None
        self.finished = tag == _TAG_FINAL
        return plaintext

    def check_end_untrusted(self) -> None:
        """At the END frame: was the final chunk seen?"""
        if not self.finished:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, "no final chunk")

    def _start(self, preamble: bytes) -> None:
        if len(preamble) != PREAMBLE_BYTES:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "sealed stream preamble")
        header, commitment = preamble[:STREAM_HEADER_BYTES], preamble[STREAM_HEADER_BYTES:]
        if not hmac.compare_digest(commitment, self._key.commitment):
            raise RemoteProtocolError(ErrorCode.BAD_SEAL, "key commitment")
        state = sodium.crypto_secretstream_xchacha20poly1305_state()
        sodium.crypto_secretstream_xchacha20poly1305_init_pull(state, header, self._key.key)
        self._state = state


class CiphertextHash:
    """What a receipt says of one direction: SHA-256 over each DATA frame body in order.

    Spec: 55-receipts.md#hashes.  Fed by those who relay, so it needs no key.
    """

    def __init__(self) -> None:
        # Not BLAKE2b: gigabytes pass here, and processors have instructions for SHA-256.
        self._state = hashlib.sha256(domain("ciphertext"))

    def update(self, frame_body: bytes | bytearray | memoryview) -> None:
        """Add one DATA frame's body, the preamble's too."""
        self._state.update(len(frame_body).to_bytes(8))
        self._state.update(frame_body)

    def digest(self) -> bytes:
        """32 bytes, of all that was added so far."""
        return self._state.digest()


def sealed_size(content_bytes: int) -> int:
    """Upper bound of the ciphertext of a stream of `content_bytes`, flushed once."""
    padded = padded_size(content_bytes)
    chunks = -(-padded // CHUNK_PLAINTEXT_BYTES)
    return PREAMBLE_BYTES + padded + chunks * CHUNK_OVERHEAD_BYTES
