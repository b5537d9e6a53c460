"""The bytes of an identity key at rest: as it is, or under a passphrase.  docs/identity.md

    plain    32 bytes, the Ed25519 seed (RFC 8032 section 5.1.5)
    sealed   "NextGPU sealed identity 1\\n" ‖ public key (32) ‖ u32 passes ‖ u64 memory bytes
             ‖ salt (16) ‖ nonce (24) ‖ seed and tag (48)                     big-endian
    export   "NextGPU identity export 1\\n" ‖ sealed ‖ Successions

Sealed with XSalsa20-Poly1305 (NaCl's secretbox) under Argon2id (RFC 9106) of the passphrase.  The
public key stands in the clear, so that a locked node can still be named.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from nacl import pwhash
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox
from nacl.signing import SigningKey
from nacl.utils import random as random_bytes

from nextgpu_node.errors import IdentityError

SEED_BYTES: Final = 32
MAGIC: Final = b"NextGPU sealed identity 1\n"
EXPORT_MAGIC: Final = b"NextGPU identity export 1\n"
_HEAD = struct.Struct(">32sIQ16s24s")
SEALED_BYTES: Final = len(MAGIC) + _HEAD.size + SEED_BYTES + SecretBox.MACBYTES
# RFC 9106 section 4, second recommended option: 64 MiB, three passes.
PASSES: Final = 3
MEMORY_BYTES: Final = 64 * 2**20
# A file that somebody else wrote must not take the machine's memory.
_MOST_PASSES = 64
_MOST_MEMORY_BYTES = 2**30


class WrongPassphrase(IdentityError):
    """The passphrase does not open this key. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A sealed seed, read and not yet opened."""

    public_key: bytes
    passes: int
    memory_bytes: int
    salt: bytes
    nonce: bytes
    box: bytes

    def open(self, passphrase: bytes) -> bytes:
        """The seed.  Raises WrongPassphrase."""
        key = _stretched(passphrase, self.salt, self.passes, self.memory_bytes)
        try:
            seed: bytes = SecretBox(key).decrypt(self.box, self.nonce)
        except CryptoError as exc:
            raise WrongPassphrase from exc
        if bytes(SigningKey(seed).verify_key) != self.public_key:
            raise IdentityError("The key file names another public key than it holds.")
        return seed


def seal(seed: bytes, passphrase: bytes) -> bytes:
    """The sealed form of `seed`."""
    salt, nonce = random_bytes(16), random_bytes(SecretBox.NONCE_SIZE)
    key = _stretched(passphrase, salt, PASSES, MEMORY_BYTES)
    box = SecretBox(key).encrypt(seed, nonce).ciphertext
    public_key = bytes(SigningKey(seed).verify_key)
    return MAGIC + _HEAD.pack(public_key, PASSES, MEMORY_BYTES, salt, nonce) + bytes(box)


def parse(data: bytes) -> bytes | SealedKey:
    """The seed, or the sealed key.  Raises IdentityError where it is neither."""
    if len(data) == SEED_BYTES:
        return data
    if len(data) != SEALED_BYTES or not data.startswith(MAGIC):
        raise IdentityError("does not hold a key.")
    head, box = data[len(MAGIC) :][: _HEAD.size], data[len(MAGIC) + _HEAD.size :]
    public_key, passes, memory_bytes, salt, nonce = _HEAD.unpack(head)
    if not 1 <= passes <= _MOST_PASSES or not 8192 <= memory_bytes <= _MOST_MEMORY_BYTES:
        raise IdentityError("asks for more work to open than any key of ours.")
    return SealedKey(public_key, passes, memory_bytes, salt, nonce, box)


def make_export(seed: bytes, successions: bytes, passphrase: bytes) -> bytes:
    """All that another machine needs to be this node.  Always under a passphrase."""
    return EXPORT_MAGIC + seal(seed, passphrase) + successions


def parse_export(data: bytes) -> tuple[SealedKey, bytes]:
    """The sealed key and the encoded Successions.  Raises IdentityError."""
    begin = len(EXPORT_MAGIC)
    sealed = data[begin : begin + SEALED_BYTES]
    if not data.startswith(EXPORT_MAGIC) or len(sealed) != SEALED_BYTES:
        raise IdentityError("is not an exported identity.")
    key = parse(sealed)
    assert isinstance(key, SealedKey)
    return key, data[begin + SEALED_BYTES :]


def _stretched(passphrase: bytes, salt: bytes, passes: int, memory_bytes: int) -> bytes:
    try:
        key: bytes = pwhash.argon2id.kdf(
            SecretBox.KEY_SIZE, passphrase, salt, opslimit=passes, memlimit=memory_bytes
        )
    except (CryptoError, ValueError, RuntimeError, MemoryError) as exc:
        raise IdentityError(
            "There is not enough memory to open the key with its passphrase."
        ) from exc
    return key
