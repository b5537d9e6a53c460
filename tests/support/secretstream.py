"""A second, slow secretstream in plain Python.  Spec: 50-sealing.md#secretstream

It shares no code with libsodium, so it shows that the page says enough, and it opens the inside
of a chunk to the tests that forge one.  Never for real data: nothing here is constant-time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_CONSTANTS = struct.unpack("<4I", b"expand 32-byte k")
_MASK = 0xFFFFFFFF
P1305 = 2**130 - 5

Words = list[int]


def _quarter(x: Words, a: int, b: int, c: int, d: int) -> None:
    for left, right, into, shift in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x[left] = (x[left] + x[right]) & _MASK
        mixed = x[into] ^ x[left]
        x[into] = ((mixed << shift) | (mixed >> (32 - shift))) & _MASK


def _rounds(state: Words) -> Words:
    x = list(state)
    for _ in range(10):
        for i in range(4):
            _quarter(x, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            _quarter(x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return x


def hchacha20(key: bytes, nonce16: bytes) -> bytes:
    """draft-irtf-cfrg-xchacha 2.2: a 32-byte subkey."""
    x = _rounds([*_CONSTANTS, *struct.unpack("<8I", key), *struct.unpack("<4I", nonce16)])
    return struct.pack("<8I", *x[:4], *x[12:])


def chacha20_block(key: bytes, nonce12: bytes, counter: int) -> bytes:
    """RFC 8439 2.3: 64 bytes of key stream."""
    state = [*_CONSTANTS, *struct.unpack("<8I", key), counter, *struct.unpack("<3I", nonce12)]
    return struct.pack(
        "<16I", *((a + b) & _MASK for a, b in zip(_rounds(state), state, strict=True))
    )


def poly1305_terms(key: bytes) -> tuple[int, int]:
    """The two secret numbers r and s of a 32-byte one-time key (RFC 8439 2.5)."""
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    return r, int.from_bytes(key[16:], "little")


def poly1305_blocks(data: bytes) -> list[int]:
    """Each block as the number that the polynomial takes."""
    parts = [data[i : i + 16] for i in range(0, len(data), 16)]
    return [int.from_bytes(part + b"\x01", "little") for part in parts]


def poly1305(key: bytes, data: bytes) -> bytes:
    r, s = poly1305_terms(key)
    total = 0
    for block in poly1305_blocks(data):
        total = (total + block) * r % P1305
    return ((total + s) % 2**128).to_bytes(16, "little")


@dataclass
class Chunk:
    """One chunk's parts: `authenticated` is what Poly1305 runs over, under `mac_key`."""

    sealed_tag: bytes
    ciphertext: bytes
    mac_key: bytes
    authenticated: bytes

    @property
    def mac(self) -> bytes:
        return poly1305(self.mac_key, self.authenticated)

    @property
    def data(self) -> bytes:
        return self.sealed_tag + self.ciphertext + self.mac


class ReferenceStream:
    """secretstream's sending side under a chosen 24-byte header.  No rekeying: tags 0 and 3."""

    def __init__(self, key: bytes, header: bytes) -> None:
        self._key = hchacha20(key, header[:16])
        self._counter = 1
        self._inner_nonce = header[16:]

    @property
    def nonce(self) -> bytes:
        return struct.pack("<I", self._counter) + self._inner_nonce

    def keystream(self, size: int) -> bytes:
        """What the text of the next chunk is mixed with."""
        blocks = range(2, 2 + -(-size // 64))
        return b"".join(chacha20_block(self._key, self.nonce, n) for n in blocks)[:size]

    def sealed_tag_block(self, tag: int) -> bytes:
        block = chacha20_block(self._key, self.nonce, 1)
        return bytes([block[0] ^ tag]) + block[1:]

    def parts(self, ciphertext: bytes, ad: bytes, tag: int) -> Chunk:
        """The next chunk around a given ciphertext.  Does not move the stream on."""
        block = self.sealed_tag_block(tag)
        # libsodium pads the ciphertext by its length modulo 16, not up to 16: part of the format.
        authenticated = (
            ad
            + bytes(-len(ad) % 16)
            + block
            + ciphertext
            + bytes(len(ciphertext) % 16)
            + struct.pack("<QQ", len(ad), 64 + len(ciphertext))
        )
        mac_key = chacha20_block(self._key, self.nonce, 0)[:32]
        return Chunk(block[:1], ciphertext, mac_key, authenticated)

    def push(self, plaintext: bytes, ad: bytes = b"", tag: int = 0) -> bytes:
        stream = self.keystream(len(plaintext))
        chunk = self.parts(bytes(a ^ b for a, b in zip(plaintext, stream, strict=True)), ad, tag)
        mixed = zip(self._inner_nonce, chunk.mac[:8], strict=True)
        self._inner_nonce = bytes(a ^ b for a, b in mixed)
        self._counter += 1
        return chunk.data
