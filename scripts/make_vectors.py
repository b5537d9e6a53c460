#!/usr/bin/env python3
"""Write protocol/vectors/*.json and the tables of the spec that come from code.

    scripts/make_vectors.py            write what has changed
    scripts/make_vectors.py --check    write nothing; exit 1 where a file would change

Everything is built from fixed seeds, so the output never changes by itself.  The bytes are made
here from the spec alone: msgpack directly, Ed25519 and X25519 of OpenSSL (which comes with
libp2p), so that a mistake of `nextgpu_protocol` does not repeat itself in what it is tested with.
Each scenario that must fail has exactly one fault.  Format: protocol/vectors/README.md
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl import bindings as sodium

from nextgpu_protocol.errors import SENTENCES, ErrorCode
from nextgpu_protocol.session import RESUMPTION, TRANSITIONS, SessionState, Table

PROTOCOL = Path(__file__).resolve().parent.parent / "protocol"
VECTORS = PROTOCOL / "vectors"
SPEC = PROTOCOL / "spec"

Fields = dict[str, Any]


@dataclass(frozen=True)
class Vector:
    """One scenario: feed `input`, compare what happens with `expect` and `decoded`."""

    name: str
    comment: str
    kind: str
    input: bytes
    expect: str = "ok"
    params: Fields = field(default_factory=dict)
    decoded: Any = None

    def to_json(self) -> str:
        plain = {
            "name": self.name,
            "comment": self.comment,
            "kind": self.kind,
            "params": jsonable(self.params),
            "input": self.input.hex(),
            "expect": self.expect,
            "decoded": jsonable(self.decoded),
        }
        return json.dumps(plain, indent=1, ensure_ascii=True) + "\n"


Scenario = Callable[[], Iterable[Vector]]
SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    """Register a function that gives one or a few vectors."""
    SCENARIOS.append(function)
    return function


def jsonable(value: Any) -> Any:
    """Bytes become hex; everything else stays."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


# ------------------------------------------------------------------ primitives, from the spec


def seed(label: str) -> bytes:
    return hashlib.blake2b(b"NextGPU vector " + label.encode(), digest_size=32).digest()


def domain(label: str) -> bytes:
    return b"NextGPU/1 " + label.encode() + b"\0"


def hash_of(label: str, *parts: bytes) -> bytes:
    sized = b"".join(struct.pack(">Q", len(part)) + part for part in parts)
    return hashlib.blake2b(domain(label) + sized, digest_size=32).digest()


def ciphertext_hash(*bodies: bytes) -> bytes:
    sized = b"".join(struct.pack(">Q", len(body)) + body for body in bodies)
    return hashlib.sha256(domain("ciphertext") + sized).digest()


def pack(value: Any) -> bytes:
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def plain(value: Any) -> Any:
    """Fields by name -> the array on the wire."""
    if isinstance(value, dict):
        return [plain(item) for item in value.values()]
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


class Identity:
    """An Ed25519 key from a label."""

    def __init__(self, label: str) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed(label))
        self.public = self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def envelope(self, name: str, payload: bytes) -> bytes:
        return pack([name, payload, self.public, self.sign(domain(name) + payload)])


class Exchange:
    """An X25519 pair as crypto_kx_seed_keypair makes it: secret = BLAKE2b-256(seed)."""

    def __init__(self, label: str) -> None:
        self.seed = seed(label)
        self.secret = hashlib.blake2b(self.seed, digest_size=32).digest()
        self._key = X25519PrivateKey.from_private_bytes(self.secret)
        self.public = self._key.public_key().public_bytes_raw()

    def shared(self, peer: bytes) -> bytes:
        return self._key.exchange(X25519PublicKey.from_public_bytes(peer))


SUBMITTER = Identity("submitter")
PROVIDER = Identity("provider")
STRANGER = Identity("stranger")
EPHEMERAL = Exchange("ephemeral")
ONE_TIME = Exchange("one-time")

# ------------------------------------------------------------------ one exchange, field by field

NOW_MS = 1_800_000_000_000
GIB = 1024**3
DEVICE: Fields = {
    "kind": "cuda",
    "name": "NVIDIA L4",
    "memory_total_bytes": 24 * GIB,
    "memory_free_bytes": 23 * GIB,
    "compute_capability": "8.9",
}
REQUEST: Fields = {
    "suite": 1,
    "nonce": seed("nonce")[:16],
    "provider_key": PROVIDER.public,
    "device_kind": "cuda",
    "device_memory_bytes": 16 * GIB,
    "memory_bytes": 2 * GIB,
    "max_seconds": 600,
    "input_bytes": GIB,
    "output_bytes": GIB // 4,
    "table_version": 1,
    "issued_at_ms": NOW_MS,
    "expires_at_ms": NOW_MS + 60_000,
    "token": b"",
    "kind": "program",
}
REQUEST_ENVELOPE = SUBMITTER.envelope("request", pack(plain(REQUEST)))
OFFER: Fields = {
    "suite": 1,
    "offer_id": seed("offer id")[:16],
    "one_time_key": ONE_TIME.public,
    "request_hash": hash_of("envelope", REQUEST_ENVELOPE),
    "submitter_key": SUBMITTER.public,
    "device": DEVICE,
    "memory_bytes": 2 * GIB,
    "max_seconds": 600,
    "input_bytes": GIB,
    "output_bytes": GIB // 4,
    "runtime": "torch 2.13.0",
    "table_version": 1,
    "isolation": ["namespaces", "landlock", "seccomp"],
    "price": 0,
    "issued_at_ms": NOW_MS + 40,
    "expires_at_ms": NOW_MS + 60_040,
}
OFFER_ENVELOPE = PROVIDER.envelope("offer", pack(plain(OFFER)))
HEADER: Fields = {
    "suite": 1,
    "unit_id": seed("unit id")[:16],
    "offer_hash": hash_of("envelope", OFFER_ENVELOPE),
    "ephemeral_key": EPHEMERAL.public,
    "chunk_bytes": 262_144,
    "issued_at_ms": NOW_MS + 80,
    "expires_at_ms": NOW_MS + 60_080,
}
HEADER_ENVELOPE = SUBMITTER.envelope("header", pack(plain(HEADER)))
TRANSCRIPT = hash_of("th", OFFER_ENVELOPE, HEADER_ENVELOPE)
RECEIPT: Fields = {
    "unit_id": HEADER["unit_id"],
    "transcript_hash": TRANSCRIPT,
    "input_hash": ciphertext_hash(b"first frame", b"second frame"),
    "output_hash": ciphertext_hash(),
    "status": "done",
    "metering": {
        "wall_ms": 1200,
        "cpu_ms": 900,
        "peak_memory_bytes": 300_000_000,
        "input_bytes": 23,
        "output_bytes": 0,
    },
    "isolation": ["namespaces", "landlock", "seccomp"],
    "wipe": [{"name": "processes gone", "held": True}, {"name": "scratch gone", "held": True}],
    "finished_at_ms": NOW_MS + 2000,
}
RECEIPT_ENVELOPE = PROVIDER.envelope("receipt", pack(plain(RECEIPT)))
ACK: Fields = {
    "unit_id": HEADER["unit_id"],
    "receipt_hash": hash_of("envelope", RECEIPT_ENVELOPE),
}
RESUME: Fields = {
    "suite": 1,
    "unit_id": HEADER["unit_id"],
    "header_hash": hash_of("envelope", HEADER_ENVELOPE),
    "attempt": 3,
    "received": 40,
    "issued_at_ms": NOW_MS + 5000,
    "expires_at_ms": NOW_MS + 65_000,
}
CAPACITY: Fields = {
    "suites": [1],
    "devices": [DEVICE],
    "free_slots": 1,
    "memory_bytes": 8 * GIB,
    "max_seconds": 3600,
    "input_bytes": 4 * GIB,
    "output_bytes": GIB,
    "runtime": "torch 2.13.0",
    "table_version": 1,
    "isolation": ["namespaces", "landlock", "seccomp"],
    "sharing": True,
    "reason": "",
    "issued_at_ms": NOW_MS,
    "expires_at_ms": NOW_MS + 300_000,
}
ANNOUNCEMENT: Fields = {
    "suite": 1,
    "key": hashlib.sha256(domain("capability") + b"cuda/mem=24..80").digest(),
    "addresses": ["/ip4/192.0.2.7/tcp/4650", "/ip6/2001:db8::7/tcp/4650"],
    "issued_at_ms": NOW_MS,
    "expires_at_ms": NOW_MS + 1_800_000,
}
TOKEN_KEYS = [Identity("token key 1"), Identity("token key 2"), Identity("token key 3")]
BLOCK: Fields = {
    "suite": 1,
    "previous_hash": b"",
    "next_key": TOKEN_KEYS[0].public,
    "gpu_seconds": 3600,
    "memory_bytes": 8 * GIB,
    "kinds": ["program"],
    "audience": b"",
    "expires_at_ms": NOW_MS + 7 * 86_400_000,
}
BLOCK_ENVELOPE = PROVIDER.envelope("token", pack(plain(BLOCK)))
USE: Fields = {
    "suite": 1,
    "token_hash": hash_of("envelope", BLOCK_ENVELOPE),
    "submitter_key": SUBMITTER.public,
    "request_nonce": REQUEST["nonce"],
}
USE_ENVELOPE = TOKEN_KEYS[0].envelope("token use", pack(plain(USE)))
HEIR = Identity("provider, later")
SUCCESSOR: Fields = {"suite": 1, "new_key": HEIR.public, "issued_at_ms": NOW_MS}
SUCCESSOR_ENVELOPE = PROVIDER.envelope("successor", pack(plain(SUCCESSOR)))
PREDECESSOR: Fields = {
    "suite": 1,
    "old_key": PROVIDER.public,
    "successor_hash": hash_of("envelope", SUCCESSOR_ENVELOPE),
}
PREDECESSOR_ENVELOPE = HEIR.envelope("predecessor", pack(plain(PREDECESSOR)))
LINK: Fields = {"successor": SUCCESSOR_ENVELOPE, "predecessor": PREDECESSOR_ENVELOPE}
REFUSAL: Fields = {"code": 22, "detail": "one slot, in use"}
MANIFEST: Fields = {"checkpoint_ms": 5000, "checkpoint_steps": 100, "return_carry": True}
SUMMARY: Fields = {"steps": 3, "load_ms": 120, "run_ms": 45, "stopped_early": False}

SIGNED: dict[str, tuple[Identity, Fields]] = {
    "request": (SUBMITTER, REQUEST),
    "offer": (PROVIDER, OFFER),
    "header": (SUBMITTER, HEADER),
    "receipt": (PROVIDER, RECEIPT),
    "ack": (SUBMITTER, ACK),
    "resume": (SUBMITTER, RESUME),
    "capacity": (PROVIDER, CAPACITY),
    "announcement": (PROVIDER, ANNOUNCEMENT),
    "token": (PROVIDER, BLOCK),
    "token use": (TOKEN_KEYS[0], USE),
    "successor": (PROVIDER, SUCCESSOR),
    "predecessor": (HEIR, PREDECESSOR),
}
MESSAGES: dict[str, Fields] = {name: fields for name, (_, fields) in SIGNED.items()} | {
    "refusal": REFUSAL,
    "resumed": {"received": 12_345},
    "lane ticket": {"port": 4651, "ticket": seed("lane ticket"), "lifetime_ms": 15_000},
    "manifest": MANIFEST,
    "summary": SUMMARY,
    "request token": {"blocks": [BLOCK_ENVELOPE], "use": USE_ENVELOPE},
    "held token": {"blocks": [BLOCK_ENVELOPE], "seed": seed("token key 1")},
    "successions": {"links": [LINK]},
}

# ------------------------------------------------------------------ messages


def message(name: str, comment: str, type_: str, data: bytes, expect: str = "ok") -> Vector:
    decoded = MESSAGES[type_] if expect == "ok" else None
    return Vector(
        f"message-{name.replace(' ', '-')}",
        comment,
        "message",
        data,
        expect,
        {"type": type_},
        decoded,
    )


def changed(type_: str, **changes: Any) -> bytes:
    return pack(plain(MESSAGES[type_] | changes))


@scenario
def every_message() -> Iterator[Vector]:
    for type_, fields in MESSAGES.items():
        yield message(type_, f"A {type_} with every field.", type_, pack(plain(fields)))


@scenario
def shapes_that_are_no_message() -> Iterator[Vector]:
    good = pack(plain(REFUSAL))
    cases = {
        "empty": (b"", "No bytes at all."),
        "map": (pack(REFUSAL), "A map with the right names: messages are arrays."),
        "map-duplicate-key": (b"\x82\xa4code\x16\xa4code\x17", "A map that repeats a key."),
        "integer": (b"\x16", "An integer where the array should be."),
        "cut-short": (good[:-1], "The last byte is missing."),
        "trailing-byte": (good + b"\xc0", "One more value after the message."),
        "extra-field": (pack([*REFUSAL.values(), 0]), "One field too many."),
        "missing-field": (pack([22]), "One field too few."),
        "no-fields": (b"\x90", "An empty array."),
        "reserved-byte": (b"\x92\x16\xc1", "C1 is never used in msgpack."),
        "nested-bomb": (b"\x91" * 8000, "Eight thousand arrays in each other."),
        "huge-array": (b"\xdd\xff\xff\xff\xff", "An array that claims 2^32-1 items."),
        "huge-text": (b"\x92\x16\xdb\xff\xff\xff\xff", "A text that claims 2^32-1 bytes."),
        "huge-bytes": (b"\x92\x16\xc6\xff\xff\xff\xff", "Bytes that claim 2^32-1 bytes."),
        "huge-map": (b"\x92\x16\xdf\xff\xff\xff\xff", "A map that claims 2^32-1 pairs."),
    }
    for name, (data, comment) in cases.items():
        yield message(name, comment, "refusal", data, "MALFORMED")


@scenario
def too_long_a_message() -> Iterator[Vector]:
    data = changed("request", token=bytes(8100))
    yield message(
        "over-8-kib", "One message of more than 8192 bytes.", "request", data, "TOO_LARGE"
    )


@scenario
def wrong_values_for_an_integer() -> Iterator[Vector]:
    cases = {
        "nil": b"\xc0",
        "true": b"\xc3",
        "negative": b"\xff",
        "two-to-the-63": b"\xcf\x80" + bytes(7),
        "float-one": struct.pack(">Bd", 0xCB, 1.0),
        "float32-one": struct.pack(">Bf", 0xCA, 1.0),
        "nan": struct.pack(">Bd", 0xCB, float("nan")),
        "text": b"\xa11",
        "bytes": b"\xc4\x011",
        "array": b"\x91\x01",
        "map": b"\x80",
        "ext": b"\xd4\x05\x01",
        "ext-empty": b"\xc7\x00\x05",
        "timestamp": b"\xd6\xff" + bytes(4),
    }
    for name, value in cases.items():
        data = b"\x92" + value + pack(REFUSAL["detail"])
        yield message(f"integer-{name}", f"code is {name}.", "refusal", data, "MALFORMED")


@scenario
def wrong_values_for_a_boolean() -> Iterator[Vector]:
    for name, value in {"one": b"\x01", "zero": b"\x00", "nil": b"\xc0"}.items():
        data = b"\x93" + pack(5000) + pack(100) + value
        yield message(f"boolean-{name}", f"return_carry is {name}.", "manifest", data, "MALFORMED")


@scenario
def wrong_values_for_a_text() -> Iterator[Vector]:
    cases = {
        "as-bytes": (b"\xc4\x04busy", "bin where str belongs."),
        "bad-utf8": (b"\xa2\xc3\x28", "A continuation byte is missing."),
        "overlong-utf8": (b"\xa2\xc0\xaf", "A slash in two bytes."),
        "surrogate-utf8": (b"\xa3\xed\xa0\x80", "A lone surrogate, U+D800."),
        "too-long": (pack("x" * 257), "257 bytes; 256 are allowed."),
        "too-long-in-bytes": (pack("é" * 129), "129 letters, but 258 bytes."),
        "line-feed": (pack("a\nb"), "A control character."),
        "escape": (pack("\x1b[31m"), "A terminal escape."),
        "bidi-override": (pack("a\u202eb"), "U+202E turns what follows around."),
        "zero-width": (pack("a\u200bb"), "U+200B is not seen."),
        "no-break-space": (pack("a\u00a0b"), "A space that is not U+0020."),
    }
    for name, (value, comment) in cases.items():
        yield message(f"text-{name}", comment, "refusal", b"\x92\x16" + value, "MALFORMED")


@scenario
def wrong_values_for_bytes_and_lists() -> Iterator[Vector]:
    ack = b"\x92" + pack(ACK["unit_id"])
    yield message(
        "bytes-as-text", "str where bin belongs.", "ack", ack + pack("x" * 32), "MALFORMED"
    )
    yield message("bytes-nil", "nil where bin belongs.", "ack", ack + b"\xc0", "MALFORMED")
    lists = {
        "list-of-65": (["x"] * 65, "65 items; 64 are allowed."),
        "list-item-bytes": (["namespaces", b"seccomp"], "One item is bytes, not text."),
        "list-as-text": ("namespaces", "A text where the list belongs."),
        "list-nested": ([["namespaces"]], "A list in the list."),
    }
    for name, (value, comment) in lists.items():
        yield message(name, comment, "capacity", changed("capacity", isolation=value), "MALFORMED")


@scenario
def encodings_that_are_not_the_canonical_one() -> Iterator[Vector]:
    detail = pack(REFUSAL["detail"])
    text = str(REFUSAL["detail"]).encode()
    cases = {
        "uint8": b"\x92\xcc\x16" + detail,
        "uint16": b"\x92\xcd\x00\x16" + detail,
        "uint32": b"\x92\xce\x00\x00\x00\x16" + detail,
        "uint64": b"\x92\xcf" + (22).to_bytes(8) + detail,
        "int8": b"\x92\xd0\x16" + detail,
        "int64": b"\x92\xd3" + (22).to_bytes(8) + detail,
        "array16": b"\xdc\x00\x02\x16" + detail,
        "array32": b"\xdd\x00\x00\x00\x02\x16" + detail,
        "str8": b"\x92\x16\xd9" + bytes([len(text)]) + text,
        "str16": b"\x92\x16\xda\x00" + bytes([len(text)]) + text,
        "str32": b"\x92\x16\xdb\x00\x00\x00" + bytes([len(text)]) + text,
    }
    for name, data in cases.items():
        comment = f"{name} where a shorter form fits: the same value, not the same bytes."
        yield message(f"not-canonical-{name}", comment, "refusal", data, "NOT_CANONICAL")


@scenario
def bytes_in_a_longer_form() -> Iterator[Vector]:
    for name, head in {"bin16": b"\xc5\x00\x20", "bin32": b"\xc6\x00\x00\x00\x20"}.items():
        data = b"\x92" + pack(ACK["unit_id"]) + head + ACK["receipt_hash"]
        comment = f"{name} where bin8 fits."
        yield message(f"not-canonical-{name}", comment, "ack", data, "NOT_CANONICAL")


@scenario
def fields_of_another_size() -> Iterator[Vector]:
    cases: list[tuple[str, str, int]] = [
        ("request", "nonce", 15),
        ("request", "provider_key", 33),
        ("offer", "offer_id", 0),
        ("offer", "one_time_key", 31),
        ("offer", "request_hash", 64),
        ("offer", "submitter_key", 31),
        ("header", "unit_id", 17),
        ("header", "offer_hash", 31),
        ("header", "ephemeral_key", 33),
        ("announcement", "key", 31),
        ("token", "previous_hash", 31),
        ("token", "next_key", 33),
        ("token", "audience", 31),
        ("token use", "token_hash", 31),
        ("token use", "submitter_key", 0),
        ("token use", "request_nonce", 15),
        ("held token", "seed", 31),
        ("successor", "new_key", 31),
        ("predecessor", "old_key", 33),
        ("predecessor", "successor_hash", 0),
        ("receipt", "unit_id", 15),
        ("receipt", "transcript_hash", 33),
        ("receipt", "input_hash", 0),
        ("receipt", "output_hash", 31),
        ("ack", "unit_id", 17),
        ("ack", "receipt_hash", 31),
        ("resume", "unit_id", 15),
        ("resume", "header_hash", 33),
        ("lane ticket", "ticket", 16),
    ]
    for type_, name, size in cases:
        data = changed(type_, **{name: bytes(size)})
        comment = f"{name} has {size} bytes."
        yield message(
            f"{type_}-{name}-of-{size}".replace("_", "-"), comment, type_, data, "MALFORMED"
        )


@scenario
def values_out_of_their_set() -> Iterator[Vector]:
    cases = [
        ("request", "device_kind", "gpu"),
        ("request", "kind", "shell"),
        ("receipt", "status", "finished"),
        ("offer", "device", DEVICE | {"kind": "any"}),
        ("offer", "device", DEVICE | {"extra": 1}),
        ("receipt", "wipe", [{"name": "scratch gone", "held": 1}]),
        ("announcement", "addresses", ["/ip4/192.0.2.7/tcp/4650"] * 5),
        ("announcement", "addresses", ["/ip4/192.0.2.7/tcp/4650" + "0" * 106]),
    ]
    for number, (type_, name, value) in enumerate(cases):
        data = changed(type_, **{name: value})
        yield message(
            f"{type_}-bad-{name}-{number}".replace("_", "-"),
            f"{name} is none of the values that it may have.",
            type_,
            data,
            "MALFORMED",
        )


@scenario
def amounts_out_of_their_bounds() -> Iterator[Vector]:
    cases = [
        ("request", "device_memory_bytes", 1024 * GIB + 1),
        ("request", "memory_bytes", 0),
        ("request", "memory_bytes", 1024 * GIB + 1),
        ("request", "max_seconds", 0),
        ("request", "max_seconds", 86_401),
        ("request", "input_bytes", 64 * GIB + 1),
        ("request", "output_bytes", 64 * GIB + 1),
        ("header", "chunk_bytes", 4095),
        ("header", "chunk_bytes", 262_145),
        ("lane ticket", "port", 0),
        ("lane ticket", "port", 65_536),
        ("lane ticket", "lifetime_ms", 0),
        ("lane ticket", "lifetime_ms", 30_001),
    ]
    for type_, name, value in cases:
        data = changed(type_, **{name: value})
        comment = f"{name} is {value}."
        title = f"{type_}-{name}-{value}".replace("_", "-")
        yield message(title, comment, type_, data, "OVER_LIMIT")


@scenario
def lifetimes_out_of_their_bounds() -> Iterator[Vector]:
    longest = {"request": 600_000, "offer": 60_000, "header": 600_000, "capacity": 300_000}
    longest |= {"resume": 60_000, "announcement": 1_800_000}
    for type_, longest_ms in longest.items():
        issued = MESSAGES[type_]["issued_at_ms"]
        for name, lifetime in (("zero", 0), ("reversed", -1), ("too-long", longest_ms + 1)):
            data = changed(type_, expires_at_ms=issued + lifetime)
            comment = f"expires_at_ms - issued_at_ms is {lifetime}."
            yield message(f"{type_}-lifetime-{name}", comment, type_, data, "MALFORMED")


# ------------------------------------------------------------------ envelopes


def envelope(
    name: str, comment: str, type_: str, data: bytes, expect: str = "ok", **params: Any
) -> Vector:
    decoded = None
    if expect == "ok":
        signer, fields = SIGNED[type_]
        decoded = {"signer": signer.public, "hash": hash_of("envelope", data), "message": fields}
    given = {"type": type_} | params
    return Vector(
        f"envelope-{name.replace(' ', '-')}", comment, "envelope", data, expect, given, decoded
    )


def request_parts() -> list[Any]:
    parts: list[Any] = msgpack.unpackb(REQUEST_ENVELOPE)
    return parts


def flipped(data: bytes, bit: int) -> bytes:
    changed_bytes = bytearray(data)
    changed_bytes[bit // 8] ^= 1 << bit % 8
    return bytes(changed_bytes)


@scenario
def every_signed_message() -> Iterator[Vector]:
    for type_, (signer, fields) in SIGNED.items():
        data = signer.envelope(type_, pack(plain(fields)))
        yield envelope(type_, f"A signed {type_}, at its time.", type_, data, now_ms=NOW_MS + 100)


@scenario
def signatures_made_for_another_place() -> Iterator[Vector]:
    payload = pack(plain(REQUEST))
    cases = {
        "another-domain": domain("offer") + payload,
        "no-domain": payload,
        "no-zero-byte": domain("request")[:-1] + payload,
        "hashed-first": hash_of("request", payload),
        "other-version": b"NextGPU/2 request\0" + payload,
    }
    for name, signed in cases.items():
        data = pack(["request", payload, SUBMITTER.public, SUBMITTER.sign(signed)])
        comment = "A right signature over something else than D(type) and the payload."
        yield envelope(f"signature-{name}", comment, "request", data, "BAD_SIGNATURE")


@scenario
def one_bit_of_each_part() -> Iterator[Vector]:
    # The last bit of the payload's nonce: what decodes stays a good request.
    places = {"payload": (1, 8 * 5), "public-key": (2, 0), "signature-r": (3, 0)}
    places["signature-s"] = (3, 8 * 32)
    for name, (index, bit) in places.items():
        parts = request_parts()
        parts[index] = flipped(parts[index], bit)
        comment = f"One bit of the {name} is changed."
        yield envelope(f"bit-of-{name}", comment, "request", pack(parts), "BAD_SIGNATURE")


@scenario
def keys_and_signatures_that_are_not_strict() -> Iterator[Vector]:
    parts = request_parts()
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(parts[3][32:], "little") + order
    parts[3] = parts[3][:32] + s.to_bytes(32, "little")
    comment = "S + L in place of S: the other signature that a lax verifier takes."
    yield envelope("signature-malleable", comment, "request", pack(parts), "BAD_SIGNATURE")
    parts = request_parts()
    parts[2] = b"\x01" + bytes(31)
    parts[3] = b"\x01" + bytes(63)
    comment = (
        "The neutral point as key, R neutral, S zero: a lax verifier takes it for any message."
    )
    yield envelope("small-order-key", comment, "request", pack(parts), "BAD_SIGNATURE")
    parts = request_parts()
    parts[2] = STRANGER.public
    yield envelope("another-key", "Another's public key.", "request", pack(parts), "BAD_SIGNATURE")


@scenario
def parts_of_another_shape() -> Iterator[Vector]:
    name, payload, key, signature = request_parts()
    cases: dict[str, Any] = {
        "three-parts": [name, payload, key],
        "five-parts": [name, payload, key, signature, b""],
        "map": {"type": name, "payload": payload, "key": key, "signature": signature},
        "type-bytes": [name.encode(), payload, key, signature],
        "type-number": [1, payload, key, signature],
        "payload-array": [name, msgpack.unpackb(payload), key, signature],
        "key-31": [name, payload, key[:31], signature],
        "key-33": [name, payload, key + b"\0", signature],
        "signature-63": [name, payload, key, signature[:63]],
        "signature-65": [name, payload, key, signature + b"\0"],
        "signature-nil": [name, payload, key, None],
    }
    for case, parts in cases.items():
        comment = "The parts are not text, bytes, 32 bytes, 64 bytes."
        yield envelope(case, comment, "request", pack(parts), "MALFORMED")
    yield envelope("trailing", "A byte too many.", "request", REQUEST_ENVELOPE + b"\0", "MALFORMED")
    yield envelope("cut", "A byte too few.", "request", REQUEST_ENVELOPE[:-1], "MALFORMED")


@scenario
def envelopes_not_canonical() -> Iterator[Vector]:
    name, payload, key, signature = request_parts()
    tail = pack(payload) + pack(key) + pack(signature)
    cases = {
        "array16": b"\xdc\x00\x04" + pack(name) + tail,
        "str8": b"\x94\xd9\x07request" + tail,
        "bin16": b"\x94" + pack(name) + pack(payload) + b"\xc5\x00\x20" + key + pack(signature),
    }
    for case, data in cases.items():
        comment = f"{case} where a shorter form fits; the signature is right."
        yield envelope(f"not-canonical-{case}", comment, "request", data, "NOT_CANONICAL")


@scenario
def right_signatures_over_wrong_payloads() -> Iterator[Vector]:
    good = pack(plain(REQUEST))
    long_form = b"\xdc" + len(REQUEST).to_bytes(2) + good[1:]
    cases = [
        ("payload-not-canonical", long_form, "NOT_CANONICAL"),
        ("payload-trailing", good + b"\0", "MALFORMED"),
        ("payload-empty", b"", "MALFORMED"),
        ("payload-over-limit", changed("request", max_seconds=0), "OVER_LIMIT"),
        ("payload-too-large", changed("request", token=bytes(8100)), "TOO_LARGE"),
    ]
    for name, payload, expect in cases:
        data = SUBMITTER.envelope("request", payload)
        yield envelope(name, "Signed as it is; the payload is wrong.", "request", data, expect)


@scenario
def one_message_in_the_place_of_another() -> Iterator[Vector]:
    for type_, (signer, fields) in SIGNED.items():
        wanted = "offer" if type_ != "offer" else "request"
        data = signer.envelope(type_, pack(plain(fields)))
        comment = f"A right {type_} where a {wanted} belongs."
        yield envelope(f"{type_}-as-{wanted}", comment, wanted, data, "UNEXPECTED_MESSAGE")


@scenario
def an_envelope_over_its_limit() -> Iterator[Vector]:
    data = SUBMITTER.envelope("request", bytes(9000))
    yield envelope("too-large", "More than 8448 bytes.", "request", data, "TOO_LARGE")


@scenario
def times_and_suites() -> Iterator[Vector]:
    skew = 300_000
    issued, expires = REQUEST["issued_at_ms"], REQUEST["expires_at_ms"]
    cases = [
        ("expired", expires + skew + 1, "EXPIRED"),
        ("late-within-skew", expires + skew, "ok"),
        ("not-yet-valid", issued - skew - 1, "NOT_YET_VALID"),
        ("early-within-skew", issued - skew, "ok"),
    ]
    for name, now_ms, expect in cases:
        comment = f"Read at {now_ms}; the window is {issued} to {expires}, five minutes of skew."
        yield envelope(name, comment, "request", REQUEST_ENVELOPE, expect, now_ms=now_ms)
    for suite in (0, 2):
        data = SUBMITTER.envelope("request", changed("request", suite=suite))
        comment = f"Suite {suite}: version 1 speaks suite 1 only."
        yield envelope(f"suite-{suite}", comment, "request", data, "UNKNOWN_SUITE", now_ms=NOW_MS)


def field_ends(fields: Fields) -> dict[str, int]:
    """Where the encoding of each field ends inside the encoded message."""
    values = list(plain(fields))
    ends, at = {}, len(pack([None] * len(values))) - len(values)
    for name, value in zip(fields, values, strict=True):
        at += len(pack(value))
        ends[name] = at
    return ends


@scenario
def one_bit_of_each_field() -> Iterator[Vector]:
    """The signature covers every field: its last byte differs, the form stays."""
    for type_, (signer, fields) in SIGNED.items():
        whole = msgpack.unpackb(signer.envelope(type_, pack(plain(fields))))
        for name, end in field_ends(fields).items():
            broken = list(whole)
            broken[1] = flipped(whole[1], 8 * (end - 1))
            yield envelope(
                f"bit-of-{type_}-{name.replace('_', '-')}",
                f"The lowest bit at the end of {name} is changed.",
                type_, pack(broken), "BAD_SIGNATURE",
            )  # fmt: skip


@scenario
def messages_cut_at_each_field() -> Iterator[Vector]:
    for type_ in ("request", "offer", "receipt"):
        data = pack(plain(MESSAGES[type_]))
        ends = field_ends(MESSAGES[type_])
        for name, end in list(ends.items())[:-1]:
            yield message(
                f"{type_}-cut-after-{name.replace('_', '-')}", f"It ends after {name}.",
                type_, data[:end], "MALFORMED",
            )  # fmt: skip


@scenario
def envelopes_cut_at_each_part() -> Iterator[Vector]:
    at = 1
    for name, part in zip(("type", "payload", "key"), request_parts(), strict=False):
        at += len(pack(part))
        comment = f"It ends after the {name}."
        yield envelope(f"cut-after-{name}", comment, "request", REQUEST_ENVELOPE[:at], "MALFORMED")


@scenario
def values_at_their_ends() -> Iterator[Vector]:
    """What is still allowed."""
    cases: list[tuple[str, str, Fields]] = [
        ("capacity", "greatest-integer", {"free_slots": 2**63 - 1}),
        ("capacity", "beyond-2-to-the-53", {"free_slots": 2**53 + 1}),
        ("capacity", "list-of-64", {"isolation": ["x"] * 64}),
        ("capacity", "no-devices", {"devices": []}),
        ("refusal", "text-of-256-bytes", {"detail": "d" * 256}),
        ("refusal", "text-of-two-byte-letters", {"detail": "\u00e9" * 128}),
        ("refusal", "text-of-four-byte-letters", {"detail": "\U0001f600" * 64}),
        ("refusal", "text-empty", {"detail": ""}),
        ("refusal", "unknown-code", {"code": 12345}),
        ("request", "smallest-amounts", {"memory_bytes": 1, "max_seconds": 1, "input_bytes": 0}),
        ("request", "longest-lifetime", {"expires_at_ms": REQUEST["issued_at_ms"] + 600_000}),
        ("header", "smallest-chunks", {"chunk_bytes": 4096}),
    ]
    for type_, name, changes in cases:
        yield Vector(
            f"message-{type_}-{name}", "The last value that is allowed.", "message",
            changed(type_, **changes), "ok", {"type": type_}, MESSAGES[type_] | changes,
        )  # fmt: skip


# ------------------------------------------------------------------ checks of one side


def check(
    of: str, name: str, comment: str, data: bytes, expect: str = "ok", **changes: Any
) -> Vector:
    """A right envelope, judged by what its reader knows."""
    params = {"of": of} | CHECKED_WITH[of] | changes
    signer = msgpack.unpackb(data)[2]
    good = {"signer": signer, "hash": hash_of("envelope", data)}
    decoded = good if expect == "ok" else None
    return Vector(f"check-{of}-{name}", comment, "check", data, expect, params, decoded)


CHECKED_WITH: dict[str, Fields] = {
    "request": {"provider_key": PROVIDER.public, "seen": [], "now_ms": NOW_MS},
    "offer": {
        "provider_key": PROVIDER.public,
        "request": REQUEST_ENVELOPE,
        "now_ms": NOW_MS + 50,
    },
    "header": {"request": REQUEST_ENVELOPE, "offer": OFFER_ENVELOPE, "now_ms": NOW_MS + 90},
    "receipt": {
        "provider_key": PROVIDER.public,
        "unit_id": HEADER["unit_id"],
        "transcript": TRANSCRIPT,
        "received": RECEIPT["output_hash"],
        "sent": RECEIPT["input_hash"],
    },
    "capacity": {"provider_key": PROVIDER.public, "now_ms": NOW_MS},
    "resume": {
        "unit_id": HEADER["unit_id"],
        "header_hash": hash_of("envelope", HEADER_ENVELOPE),
        "submitter_key": SUBMITTER.public,
        "peer_key": SUBMITTER.public,
        "connection_key": SUBMITTER.public,
        "last_attempt": 2,
        "kept_from": 30,
        "sent": 62,
        "now_ms": NOW_MS + 6000,
    },
}


def signed_with(type_: str, signer: Identity | None = None, **changes: Any) -> bytes:
    own, fields = SIGNED[type_]
    return (signer or own).envelope(type_, pack(plain(fields | changes)))


@scenario
def messages_that_fit_what_their_reader_knows() -> Iterator[Vector]:
    for of in CHECKED_WITH:
        yield check(of, "right", f"The {of} of the exchange.", signed_with(of))
    others = [seed("another request"), seed("yet another")]
    comment = "Other requests were seen before it."
    yield check("request", "not-the-seen-ones", comment, signed_with("request"), seen=others)
    comment = "The worker has not read everything: input_hash is not judged."
    data = signed_with("receipt", input_hash=seed("a prefix"))
    yield check("receipt", "of-a-prefix", comment, data, sent=b"")
    comment = "At its very last moment by the provider's clock."
    end = OFFER["expires_at_ms"]
    yield check("header", "at-the-offers-end", comment, HEADER_ENVELOPE, now_ms=end)


@scenario
def requests_that_are_not_for_this_provider_now() -> Iterator[Vector]:
    good, expires = REQUEST_ENVELOPE, REQUEST["expires_at_ms"]
    digest = hash_of("envelope", good)
    cases: list[tuple[str, bytes, str, Fields]] = [
        ("replayed", good, "REPLAYED", {"seen": [seed("another request"), digest]}),
        ("for-another-provider", good, "WRONG_PEER", {"provider_key": STRANGER.public}),
        ("expired", good, "EXPIRED", {"now_ms": expires + 300_001}),
        ("not-yet-valid", good, "NOT_YET_VALID", {"now_ms": NOW_MS - 300_001}),
        ("suite-2", signed_with("request", suite=2), "UNKNOWN_SUITE", {}),
        ("suite-0", signed_with("request", suite=0), "UNKNOWN_SUITE", {}),
    ]
    for name, data, expect, changes in cases:
        yield check("request", name, "One thing does not fit.", data, expect, **changes)


@scenario
def offers_that_do_not_answer_the_request() -> Iterator[Vector]:
    other = signed_with("request", nonce=bytes(16))
    on_cpu = signed_with("offer", device=DEVICE | {"kind": "cpu"})
    cases: list[tuple[str, bytes, str, Fields]] = [
        ("of-another-peer", signed_with("offer", STRANGER), "WRONG_PEER", {}),
        ("by-the-submitter", signed_with("offer", SUBMITTER), "WRONG_PEER", {}),
        ("for-another-request", OFFER_ENVELOPE, "WRONG_OFFER", {"request": other}),
        ("to-another", signed_with("offer", submitter_key=STRANGER.public), "WRONG_OFFER", {}),
        ("downgraded", signed_with("offer", suite=0), "UNKNOWN_SUITE", {}),
        ("suite-2", signed_with("offer", suite=2), "UNKNOWN_SUITE", {}),
        ("expired", OFFER_ENVELOPE, "EXPIRED", {"now_ms": OFFER["expires_at_ms"] + 300_001}),
        ("early", OFFER_ENVELOPE, "NOT_YET_VALID", {"now_ms": NOW_MS + 40 - 300_001}),
        ("less-memory", signed_with("offer", memory_bytes=1), "OVER_LIMIT", {}),
        ("less-time", signed_with("offer", max_seconds=599), "OVER_LIMIT", {}),
        ("less-input", signed_with("offer", input_bytes=GIB - 1), "OVER_LIMIT", {}),
        ("less-output", signed_with("offer", output_bytes=0), "OVER_LIMIT", {}),
        ("other-device", on_cpu, "NO_SUCH_DEVICE", {}),
    ]  # fmt: skip
    for name, data, expect, changes in cases:
        yield check("offer", name, "One thing does not fit.", data, expect, **changes)


@scenario
def headers_that_do_not_take_up_the_offer() -> Iterator[Vector]:
    other = signed_with("offer", offer_id=bytes(16))
    late = OFFER["expires_at_ms"] + 1
    past, future = (
        signed_with("header", issued_at_ms=NOW_MS + at, expires_at_ms=NOW_MS + at + 100_000)
        for at in (-400_000, 301_000)
    )
    cases: list[tuple[str, bytes, str, Fields]] = [
        ("replayed", HEADER_ENVELOPE, "WRONG_OFFER", {"offer": other}),
        ("of-another-submitter", signed_with("header", STRANGER), "WRONG_PEER", {}),
        ("by-the-provider", signed_with("header", PROVIDER), "WRONG_PEER", {}),
        ("after-the-offer", HEADER_ENVELOPE, "EXPIRED", {"now_ms": late}),
        ("expired", past, "EXPIRED", {}),
        ("not-yet-valid", future, "NOT_YET_VALID", {}),
        ("downgraded", signed_with("header", suite=0), "UNKNOWN_SUITE", {}),
        ("suite-2", signed_with("header", suite=2), "UNKNOWN_SUITE", {}),
    ]  # fmt: skip
    for name, data, expect, changes in cases:
        yield check("header", name, "One thing does not fit.", data, expect, **changes)


@scenario
def receipts_that_are_not_of_this_unit() -> Iterator[Vector]:
    good = RECEIPT_ENVELOPE
    cases: list[tuple[str, bytes, str, Fields]] = [
        ("of-another-peer", signed_with("receipt", STRANGER), "WRONG_PEER", {}),
        ("of-another-unit", good, "WRONG_OFFER", {"unit_id": bytes(16)}),
        ("of-another-transcript", good, "WRONG_OFFER", {"transcript": seed("another")}),
        ("other-results", good, "BAD_SEAL", {"received": seed("other frames")}),
        ("other-inputs", good, "BAD_SEAL", {"sent": seed("other frames")}),
    ]
    for name, data, expect, changes in cases:
        yield check("receipt", name, "One thing does not fit.", data, expect, **changes)


@scenario
def capacities_that_are_another_peers_or_old() -> Iterator[Vector]:
    good = signed_with("capacity")
    cases: list[tuple[str, bytes, str, Fields]] = [
        ("of-another-peer", signed_with("capacity", STRANGER), "WRONG_PEER", {}),
        ("expired", good, "EXPIRED", {"now_ms": CAPACITY["expires_at_ms"] + 300_001}),
        ("not-yet-valid", good, "NOT_YET_VALID", {"now_ms": NOW_MS - 300_001}),
    ]
    for name, data, expect, changes in cases:
        yield check("capacity", name, "One thing does not fit.", data, expect, **changes)


@scenario
def resumes_that_do_not_go_on_with_this_unit() -> Iterator[Vector]:
    good, now = signed_with("resume"), RESUME["expires_at_ms"]
    other = seed("another header")
    cases: list[tuple[str, bytes, str, Fields]] = [
        ("over-another-peers-connection", good, "WRONG_PEER", {"connection_key": STRANGER.public}),
        ("of-another-submitter", signed_with("resume", STRANGER), "WRONG_PEER", {}),
        ("by-the-provider", signed_with("resume", PROVIDER), "WRONG_PEER", {}),
        ("of-another-unit", good, "UNKNOWN_UNIT", {"unit_id": bytes(16)}),
        ("of-another-header", signed_with("resume", header_hash=other), "WRONG_OFFER", {}),
        ("replayed", good, "REPLAYED", {"last_attempt": 3}),
        ("of-an-earlier-attempt", good, "REPLAYED", {"last_attempt": 2**62}),
        ("attempt-0", signed_with("resume", attempt=0), "REPLAYED", {"last_attempt": 0}),
        ("more-than-was-sent", signed_with("resume", received=63), "WRONG_OFFSET", {}),
        ("no-longer-kept", signed_with("resume", received=29), "WRONG_OFFSET", {}),
        ("from-nothing", signed_with("resume", received=0), "WRONG_OFFSET", {}),
        ("expired", good, "EXPIRED", {"now_ms": now + 300_001}),
        ("not-yet-valid", good, "NOT_YET_VALID", {"now_ms": RESUME["issued_at_ms"] - 300_001}),
        ("suite-0", signed_with("resume", suite=0), "UNKNOWN_SUITE", {}),
        ("suite-2", signed_with("resume", suite=2), "UNKNOWN_SUITE", {}),
    ]
    for name, data, expect, changes in cases:
        yield check("resume", name, "One thing does not fit.", data, expect, **changes)
    for name, received in (("all-it-was-sent", 62), ("the-oldest-that-is-kept", 30)):
        data = signed_with("resume", received=received)
        yield check("resume", name, "At the end of what is possible.", data)


# ------------------------------------------------------------------ frames

KINDS = {
    "REQUEST": 1,
    "OFFER": 2,
    "REFUSAL": 3,
    "HEADER": 4,
    "DATA": 5,
    "END": 6,
    "RECEIPT": 7,
    "ACK": 8,
    "ERROR": 9,
    "CANCEL": 10,
    "CAPACITY": 11,
    "SUCCESSIONS": 12,
    "RESUME": 13,
    "RESUMED": 14,
    "LANE": 15,
}


def frame(kind: str, body: bytes = b"") -> bytes:
    return struct.pack(">IB", 1 + len(body), KINDS[kind]) + body


def frames(name: str, comment: str, data: bytes, decoded: Any) -> Vector:
    return Vector(f"frame-{name}", comment, "frame", data, "ok", {}, decoded)


def bad_frames(name: str, comment: str, data: bytes, expect: str) -> Vector:
    return Vector(f"frame-{name}", comment, "frame", data, expect)


@scenario
def frames_that_are_right() -> Iterator[Vector]:
    for kind in KINDS:
        body = kind.lower().encode()
        yield frames(kind.lower(), f"One {kind} frame.", frame(kind, body), [[kind, body]])
    yield frames("none", "No bytes: no frames.", b"", [])
    yield frames("empty-body", "Length 1: a kind and no body.", frame("END"), [["END", b""]])
    several = frame("DATA", b"a") + frame("DATA") + frame("END")
    decoded = [["DATA", b"a"], ["DATA", b""], ["END", b""]]
    yield frames("several", "Three frames in one read.", several, decoded)


@scenario
def frames_that_are_wrong() -> Iterator[Vector]:
    over = struct.pack(">IB", 266_241, 5)
    yield bad_frames("length-zero", "A length that holds no kind.", b"\0\0\0\0\5", "TOO_LARGE")
    comment = "Refused from the five bytes alone: 266240 is the limit."
    yield bad_frames("length-over", comment, over, "TOO_LARGE")
    yield bad_frames("length-huge", "2^32-1 bytes.", b"\xff\xff\xff\xff\5", "TOO_LARGE")
    for kind in (0, 16, 31, 36, 50, 255):
        data = struct.pack(">IB", 1, kind)
        yield bad_frames(f"kind-{kind}", "A kind that does not exist.", data, "MALFORMED")
    whole = frame("DATA", b"abc")
    for size in range(1, len(whole)):
        comment = f"The stream ends after {size} of {len(whole)} bytes."
        yield bad_frames(f"cut-at-{size}", comment, whole[:size], "TRUNCATED")
    comment = "A text protocol knocks: its first letters are read as a length."
    yield bad_frames("http", comment, b"GET / HTTP/1.1\r\n\r\n", "TOO_LARGE")


# ------------------------------------------------------------------ sealed streams


@dataclass(frozen=True)
class Keys:
    """One direction's stream key and commitment."""

    key: bytes
    commitment: bytes
    transcript: bytes


def keyed(shared: bytes, label: str, transcript: bytes) -> bytes:
    data = domain(label) + transcript
    return hashlib.blake2b(data, key=shared, digest_size=32).digest()


def stream_keys(direction: str, transcript: bytes = TRANSCRIPT) -> Keys:
    q = EPHEMERAL.shared(ONE_TIME.public)
    both = hashlib.blake2b(q + EPHEMERAL.public + ONE_TIME.public, digest_size=64).digest()
    shared = both[32:] if direction == "in" else both[:32]
    return Keys(
        keyed(shared, f"key {direction}", transcript),
        keyed(shared, f"commit {direction}", transcript),
        transcript,
    )


MESSAGE_TAG, PUSH_TAG, REKEY_TAG, FINAL_TAG = 0, 1, 2, 3


class Sealing:
    """secretstream under a chosen header.

    init_push would draw a random one; after initialisation the state for pulling is the state for
    pushing, so it is made by init_pull from a header that never changes.
    """

    def __init__(self, keys: Keys, label: str = "header") -> None:
        header = seed(label)[:24]
        self._state = sodium.crypto_secretstream_xchacha20poly1305_state()
        sodium.crypto_secretstream_xchacha20poly1305_init_pull(self._state, header, keys.key)
        self.preamble = header + keys.commitment

    def chunk(self, plaintext: bytes, ad: bytes | None = None, tag: int = MESSAGE_TAG) -> bytes:
        data: bytes = sodium.crypto_secretstream_xchacha20poly1305_push(
            self._state, plaintext, ad, tag
        )
        return data


RECORDS = {"MANIFEST": 1, "PROGRAM": 2, "CONSTANTS": 3, "CARRY": 4, "STEP": 5}
RECORDS |= {"STARTED": 16, "RESULT": 17, "CHECKPOINT": 18, "DONE": 19, "FAILED": 20, "FINAL": 21}
RECORDS |= {"CALL": 6, "LOG": 22, "VALUE": 23, "FILE": 24}


def record(kind: str, body: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">BBI", RECORDS[kind], flags, len(body)) + body


def padded(content: bytes, size: int = 4096) -> bytes:
    return content + bytes(size - len(content))


PLAIN_CHUNKS = [
    record("MANIFEST", pack(plain(MANIFEST))),
    record("STEP", b"first half, ", 1) + record("STEP", b"second half"),
    record("STEP", b"last"),
]
DECODED_RECORDS = [
    ["MANIFEST", pack(plain(MANIFEST)), False],
    ["STEP", b"first half, ", True],
    ["STEP", b"second half", False],
    ["STEP", b"last", False],
]


def sealed(chunks: list[bytes], keys: Keys | None = None) -> list[bytes]:
    """The DATA bodies of a right stream to the worker: preamble, chunks, the last one FINAL."""
    keys = keys or stream_keys("in")
    sealing = Sealing(keys)
    bodies = [sealing.preamble]
    for index, chunk in enumerate(chunks):
        tag = FINAL_TAG if index == len(chunks) - 1 else MESSAGE_TAG
        bodies.append(sealing.chunk(chunk, keys.transcript if index == 0 else None, tag))
    return bodies


def framed(bodies: Iterable[bytes], *, end: bool = True) -> bytes:
    return b"".join(frame("DATA", body) for body in bodies) + (frame("END") if end else b"")


def stream_params(direction: str) -> Fields:
    own, peer = (ONE_TIME, EPHEMERAL) if direction == "in" else (EPHEMERAL, ONE_TIME)
    return {
        "direction": direction,
        "own_seed": own.seed,
        "own_secret_key": own.secret,
        "own_public_key": own.public,
        "peer_public_key": peer.public,
        "offer": OFFER_ENVELOPE,
        "header": HEADER_ENVELOPE,
    }


def stream(
    name: str, comment: str, data: bytes, expect: str, direction: str = "in", **changes: Any
) -> Vector:
    params = stream_params(direction) | changes
    return Vector(f"stream-{name}", comment, "stream", data, expect, params)


def good_stream(name: str, comment: str, bodies: list[bytes], records: Any, way: str) -> Vector:
    keys = stream_keys(way)
    decoded = {
        "transcript_hash": keys.transcript,
        "stream_key": keys.key,
        "commitment": keys.commitment,
        "ciphertext_hash": ciphertext_hash(*bodies),
        "records": records,
    }
    data = framed(bodies)
    return Vector(f"stream-{name}", comment, "stream", data, "ok", stream_params(way), decoded)


@scenario
def streams_that_are_right() -> Iterator[Vector]:
    yield good_stream(
        "in", "To the worker, three chunks.", sealed(PLAIN_CHUNKS), DECODED_RECORDS, "in"
    )
    said_by_worker = [
        ("STARTED", b""),
        ("RESULT", b"an image"),
        ("CHECKPOINT", (3).to_bytes(8) + b"an image"),
        ("FINAL", b"an image"),
        ("DONE", pack(plain(SUMMARY))),
    ]
    content = b"".join(record(kind, body) for kind, body in said_by_worker)
    bodies = sealed([padded(content)], stream_keys("out"))
    decoded = [[kind, body, False] for kind, body in said_by_worker]
    yield good_stream("out", "From the worker, padded to 4096.", bodies, decoded, "out")
    failure = pack([44, ""])
    bodies = sealed([padded(record("FAILED", failure))], stream_keys("out"))
    decoded = [["FAILED", failure, False]]
    yield good_stream("out-failed", "A unit that did not succeed.", bodies, decoded, "out")
    yield good_stream("empty", "One final chunk, no records.", sealed([b""]), [], "in")
    yield good_stream("only-padding", "4096 zero bytes.", sealed([bytes(4096)]), [], "in")


@scenario
def streams_cut_short() -> Iterator[Vector]:
    bodies = sealed(PLAIN_CHUNKS)
    for kept in range(len(bodies)):
        comment = f"END after {kept} of {len(bodies)} DATA frames: FINAL never came."
        yield stream(f"end-after-{kept}", comment, framed(bodies[:kept]), "TRUNCATED")
        comment = f"The connection closes after {kept} of {len(bodies)} DATA frames."
        yield stream(f"close-after-{kept}", comment, framed(bodies[:kept], end=False), "TRUNCATED")
    comment = "Everything is there but the END frame."
    yield stream("no-end", comment, framed(bodies, end=False), "TRUNCATED")
    comment = "The connection closes inside the last DATA frame."
    yield stream("cut-in-frame", comment, framed(bodies, end=False)[:-1], "TRUNCATED")


@scenario
def chunks_out_of_order() -> Iterator[Vector]:
    p, a, b, c = sealed(PLAIN_CHUNKS)
    cases = {
        "first-dropped": [p, b, c],
        "second-dropped": [p, a, c],
        "swapped": [p, b, a, c],
        "first-twice": [p, a, a, b, c],
        "second-twice": [p, a, b, b, c],
        "final-twice": [p, a, b, c, c],
        "preamble-twice": [p, p, a, b, c],
        "final-first": [p, c, a, b],
        "no-preamble": [a, b, c],
    }
    for name, bodies in cases.items():
        # Without a preamble the first chunk is read as one and has another length.
        expect = "MALFORMED" if name == "no-preamble" else "BAD_SEAL"
        yield stream(
            f"chunks-{name}", "The chunks are right, their order is not.", framed(bodies), expect
        )


@scenario
def data_after_the_final_chunk() -> Iterator[Vector]:
    keys = stream_keys("in")
    sealing = Sealing(keys)
    bodies = [sealing.preamble, sealing.chunk(b"", keys.transcript, FINAL_TAG), sealing.chunk(b"")]
    comment = "libsodium opens what comes after FINAL; the protocol does not."
    yield stream("data-after-final", comment, framed(bodies), "BAD_SEAL")


@scenario
def bits_of_a_stream() -> Iterator[Vector]:
    bodies = sealed(PLAIN_CHUNKS)
    size = len(bodies[1])
    places = {
        "header": (0, 0),
        "header-nonce": (0, 8 * 20),
        "commitment": (0, 8 * 24),
        "commitment-end": (0, 8 * 56 - 1),
        "tag": (1, 0),
        "text": (1, 8),
        "mac": (1, 8 * size - 1),
        "final-tag": (3, 0),
    }
    for name, (index, bit) in places.items():
        broken = list(bodies)
        broken[index] = flipped(broken[index], bit)
        yield stream(
            f"bit-of-{name}", f"One bit of the {name} is changed.", framed(broken), "BAD_SEAL"
        )


@scenario
def parts_of_a_wrong_size() -> Iterator[Vector]:
    p, *chunks = sealed(PLAIN_CHUNKS)
    for name, preamble in {"short": p[:-1], "long": p + b"\0", "empty": b""}.items():
        data = framed([preamble, *chunks])
        yield stream(f"preamble-{name}", "A preamble has 56 bytes.", data, "MALFORMED")
    for size in (0, 16):
        comment = f"A chunk of {size} bytes; its overhead alone is 17."
        yield stream(f"chunk-of-{size}", comment, framed([p, bytes(size), *chunks]), "BAD_SEAL")


@scenario
def tags_that_are_not_used() -> Iterator[Vector]:
    keys = stream_keys("in")
    for name, tag in {"push": PUSH_TAG, "rekey": REKEY_TAG, "unknown": 7}.items():
        sealing = Sealing(keys)
        bodies = [sealing.preamble, sealing.chunk(b"", keys.transcript, tag)]
        comment = f"Tag {tag}: only MESSAGE (0) and FINAL (3) are used."
        yield stream(
            f"tag-{name}", comment, framed([*bodies, sealing.chunk(b"", None, 3)]), "BAD_SEAL"
        )


@scenario
def wrong_associated_data() -> Iterator[Vector]:
    keys = stream_keys("in")
    cases = {"missing": (None, None), "other": (bytes(32), None), "twice": (keys.transcript,) * 2}
    for name, (first, second) in cases.items():
        sealing = Sealing(keys)
        bodies = [
            sealing.preamble,
            sealing.chunk(b"", first),
            sealing.chunk(b"", second, FINAL_TAG),
        ]
        comment = "The transcript hash belongs to the first chunk, and to it alone."
        yield stream(f"ad-{name}", comment, framed(bodies), "BAD_SEAL")


@scenario
def wrong_keys() -> Iterator[Vector]:
    right = stream_keys("in")
    reflected = framed(sealed(PLAIN_CHUNKS, stream_keys("out")))
    comment = "What the worker said is played back to it."
    yield stream("reflected", comment, reflected, "BAD_SEAL")
    other = Keys(seed("another key"), right.commitment, right.transcript)
    comment = "Another key behind the right commitment."
    yield stream("wrong-key", comment, framed(sealed(PLAIN_CHUNKS, other)), "BAD_SEAL")
    other = Keys(right.key, seed("another commitment"), right.transcript)
    comment = "The right key behind another commitment."
    yield stream("wrong-commitment", comment, framed(sealed(PLAIN_CHUNKS, other)), "BAD_SEAL")
    good = framed(sealed(PLAIN_CHUNKS))
    header = SUBMITTER.envelope("header", changed("header", unit_id=bytes(16)))
    comment = "The same keys under another header: another transcript."
    yield stream("wrong-header", comment, good, "BAD_SEAL", header=header)
    offer = PROVIDER.envelope("offer", changed("offer", offer_id=bytes(16)))
    comment = "The same keys under another offer: another transcript."
    yield stream("wrong-offer", comment, good, "BAD_SEAL", offer=offer)
    comment = "Another ephemeral key than the one that it was sealed with."
    stranger = Exchange("stranger").public
    yield stream("wrong-ephemeral-key", comment, good, "BAD_SEAL", peer_public_key=stranger)


# Every encoding of a point of small order that X25519 can be given (RFC 7748, 6.1; the list of
# cr.yp.to/ecdh.html).
LOW_ORDER = {
    "zero": bytes(32),
    "one": b"\x01" + bytes(31),
    "order-8-a": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    "order-8-b": bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    "p-minus-1": (2**255 - 20).to_bytes(32, "little"),
    "p": (2**255 - 19).to_bytes(32, "little"),
    "p-plus-1": (2**255 - 18).to_bytes(32, "little"),
}


@scenario
def low_order_points() -> Iterator[Vector]:
    data = framed(sealed(PLAIN_CHUNKS))
    for name, point in LOW_ORDER.items():
        for direction, who in (("in", "ephemeral"), ("out", "one-time")):
            comment = f"A {who} key of small order: the shared secret would be known to all."
            yield stream(
                f"low-order-{direction}-{name}", comment, data, "BAD_SEAL", direction,
                peer_public_key=point,
            )  # fmt: skip


@scenario
def records_that_are_wrong() -> Iterator[Vector]:
    cases = {
        "head-cut": b"\x05\x00\x00\x00\x00",
        "body-cut": record("STEP", b"abc")[:-1],
        "length-huge": b"\x05\x00\xff\xff\xff\xff",
        "kind-7": b"\x07" + bytes(5),
        "kind-25": b"\x19" + bytes(5),
        "kind-255": b"\xff" + bytes(5),
        "flags-2": record("STEP", b"", 2),
        "flags-255": record("STEP", b"", 255),
    }
    for name, chunk in cases.items():
        data = framed(sealed([chunk]))
        yield stream(f"record-{name}", "The seal is right, the record is not.", data, "MALFORMED")


@scenario
def other_frames_in_the_stream() -> Iterator[Vector]:
    bodies = sealed(PLAIN_CHUNKS)
    data = frame("DATA", bodies[0]) + frame("OFFER", OFFER_ENVELOPE) + framed(bodies[1:])
    comment = "A frame that is neither DATA nor END inside the stream."
    yield stream("offer-inside", comment, data, "UNEXPECTED_MESSAGE")


# ------------------------------------------------------------------ sessions


def said(*steps: str) -> bytes:
    """Each step as two bytes: the letter of the side, the kind of its frame."""
    return b"".join(step[0].encode() + bytes([KINDS[step[2:]]]) for step in steps)


def session(
    name: str,
    comment: str,
    steps: tuple[str, ...],
    expect: str,
    state: str,
    table: str = "",
) -> Vector:
    decoded = {"steps": list(steps), "state": state}
    params = {"table": table} if table else {}
    return Vector(f"session-{name}", comment, "session", said(*steps), expect, params, decoded)


OPENED = ("S REQUEST", "P OFFER", "S HEADER")
CONVERSATIONS = {
    "whole": (*OPENED, "S DATA", "P DATA", "S END", "P DATA", "P END", "P RECEIPT", "S ACK"),
    "refused": ("S REQUEST", "P REFUSAL"),
    "offer-declined": ("S REQUEST", "P OFFER", "S CANCEL"),
    "offer-withdrawn": ("S REQUEST", "P OFFER", "P ERROR"),
    "stopped-early": (*OPENED, "P END", "S DATA", "S END", "P RECEIPT", "S ACK"),
    "cancelled": (*OPENED, "S DATA", "S CANCEL", "P DATA", "P END", "P RECEIPT", "S ACK"),
    "cancelled-late": (*OPENED, "S END", "P RECEIPT", "S CANCEL", "S ACK"),
    "crashed": (*OPENED, "S DATA", "P RECEIPT", "S DATA", "S END", "S ACK"),
    "failed": (*OPENED, "S DATA", "P ERROR"),
}


@scenario
def conversations_that_are_right() -> Iterator[Vector]:
    for name, steps in CONVERSATIONS.items():
        yield session(name, "Every step may follow the one before it.", steps, "ok", "closed")


@scenario
def conversations_with_one_wrong_step() -> Iterator[Vector]:
    ended = (*OPENED, "S END", "P END")
    receipted = (*ended, "P RECEIPT")
    cases: list[tuple[str, tuple[str, ...], str, str]] = [
        ("header-first", (), "S HEADER", "idle"),
        ("data-first", (), "S DATA", "idle"),
        ("offer-unasked", (), "P OFFER", "idle"),
        ("request-twice", OPENED[:1], "S REQUEST", "requested"),
        ("data-before-offer", OPENED[:1], "S DATA", "requested"),
        ("receipt-before-offer", OPENED[:1], "P RECEIPT", "requested"),
        ("offer-twice", OPENED[:2], "P OFFER", "offered"),
        ("refusal-after-offer", OPENED[:2], "P REFUSAL", "offered"),
        ("data-before-header", OPENED[:2], "S DATA", "offered"),
        ("results-before-header", OPENED[:2], "P DATA", "offered"),
        ("header-by-provider", OPENED[:2], "P HEADER", "offered"),
        ("header-twice", OPENED, "S HEADER", "streaming"),
        ("refusal-while-streaming", OPENED, "P REFUSAL", "streaming"),
        ("ack-before-receipt", OPENED, "S ACK", "streaming"),
        ("receipt-by-submitter", OPENED, "S RECEIPT", "streaming"),
        ("data-after-end", (*OPENED, "S END"), "S DATA", "input ended"),
        ("end-twice", (*OPENED, "S END"), "S END", "input ended"),
        ("results-after-end", ended, "P DATA", "output ended"),
        ("output-end-twice", ended, "P END", "output ended"),
        ("data-after-cancel", (*OPENED, "S CANCEL"), "S DATA", "cancelled"),
        ("cancel-twice", (*OPENED, "S CANCEL"), "S CANCEL", "cancelled"),
        ("receipt-twice", receipted, "P RECEIPT", "receipted"),
        ("results-after-receipt", receipted, "P DATA", "receipted"),
        ("error-after-receipt", receipted, "P ERROR", "receipted"),
        ("ack-by-provider", receipted, "P ACK", "receipted"),
        ("request-after-close", (*receipted, "S ACK"), "S REQUEST", "closed"),
        ("capacity-in-a-unit", OPENED[:1], "P CAPACITY", "requested"),
        ("resume-first", (), "S RESUME", "idle"),
        ("resume-while-streaming", OPENED, "S RESUME", "streaming"),
        ("resumed-unasked", OPENED, "P RESUMED", "streaming"),
    ]
    for name, before, wrong, state in cases:
        comment = f"The last step, {wrong}, is not in the table."
        yield session(name, comment, (*before, wrong), "UNEXPECTED_MESSAGE", state)


@scenario
def streams_that_take_another_ones_place() -> Iterator[Vector]:
    asked = ("S RESUME",)
    rights = [("taken", "P RESUMED", "streaming"), ("refused", "P REFUSAL", "closed")]
    for name, last, state in rights:
        comment = "How a stream begins that takes the place of one that was lost."
        yield session(f"resuming-{name}", comment, (*asked, last), "ok", state, "resuming")
    cases: list[tuple[str, tuple[str, ...], str, str]] = [
        ("data-first", (), "S DATA", "idle"),
        ("request-first", (), "S REQUEST", "idle"),
        ("resumed-unasked", (), "P RESUMED", "idle"),
        ("data-before-the-answer", asked, "S DATA", "requested"),
        ("resume-twice", asked, "S RESUME", "requested"),
        ("by-the-provider", (), "P RESUME", "idle"),
        ("offer-for-an-answer", asked, "P OFFER", "requested"),
    ]
    for name, before, wrong, state in cases:
        comment = f"The last step, {wrong}, is not in the table of 47-resuming."
        steps = (*before, wrong)
        yield session(f"resuming-{name}", comment, steps, "UNEXPECTED_MESSAGE", state, "resuming")


# ------------------------------------------------------------------ the bulk lane

TICKET = seed("lane ticket")
LANE_ENDS = {
    "unit_id": HEADER["unit_id"],
    "submitter_peer": SUBMITTER.public,
    "provider_peer": PROVIDER.public,
}


def ticketed(label: str, data: bytes = b"", ticket: bytes = TICKET) -> bytes:
    return hashlib.blake2b(domain(label) + data, key=ticket, digest_size=32).digest()


def lane_hello(ticket: bytes = TICKET) -> bytes:
    return domain("lane") + ticketed("lane id", ticket=ticket)[:16]


def on_lane(
    kind: str, body: bytes, number: int, sender: str = "S", ticket: bytes = TICKET, **ends: bytes
) -> bytes:
    """Frame `number` of a lane."""
    if kind != "DATA":
        bound = b"".join((LANE_ENDS | ends).values())
        key = ticketed(f"lane {sender}", bound, ticket)
        nonce = bytes(4) + number.to_bytes(8)
        body = ChaCha20Poly1305(key).encrypt(nonce, body, bytes([KINDS[kind]]))
    return frame(kind, body)


RESUMED_BODY = pack(plain({"received": 40}))
LANE_FRAMES = [("RESUMED", RESUMED_BODY), ("DATA", b"sealed chunk"), ("DATA", b""), ("END", b"")]


def whole_lane(**changes: Any) -> list[bytes]:
    return [on_lane(kind, body, i, **changes) for i, (kind, body) in enumerate(LANE_FRAMES)]


def lane(name: str, comment: str, data: bytes, expect: str = "BAD_SEAL", **ends: Any) -> Vector:
    params = {"ticket": TICKET} | LANE_ENDS | ends
    decoded = [list(each) for each in LANE_FRAMES] if expect == "ok" else None
    return Vector(f"lane-{name}", comment, "lane", data, expect, params, decoded)


@scenario
def a_lane_that_is_right() -> Iterator[Vector]:
    data = lane_hello() + b"".join(whole_lane())
    yield lane("right", "A number, two DATA frames, an END.", data, "ok")


@scenario
def lanes_without_their_ticket() -> Iterator[Vector]:
    good = b"".join(whole_lane())
    other = seed("another ticket")
    yield lane("of-another", "The id of another lane.", lane_hello(other) + good, "UNKNOWN_UNIT")
    comment = "The right id, seen on the way, without the ticket."
    yield lane("without-ticket", comment, lane_hello() + b"".join(whole_lane(ticket=other)))
    for name in LANE_ENDS:
        changed_end = bytes(len(LANE_ENDS[name]))
        comment = f"The reader knows another {name}."
        yield lane(f"other-{name}".replace("_", "-"), comment, lane_hello() + good,
                   **{name: changed_end})  # fmt: skip
    hello = lane_hello()
    yield lane("hello-cut", "The hello ends early.", hello[:-1], "TRUNCATED")
    yield lane("hello-empty", "Nothing.", b"", "TRUNCATED")
    http = b"GET / HTTP/1.1\r\nHost: a.example.org\r\n\r\n"
    yield lane("hello-http", "Another protocol knocks.", http, "MALFORMED")


@scenario
def lanes_that_were_disturbed() -> Iterator[Vector]:
    first, one, two, end = whole_lane()
    hello, reflected = lane_hello(), whole_lane(sender="P")
    cancel = on_lane("CANCEL", b"", 3)
    cases = {
        "reflected": [*reflected],
        "data-dropped": [first, one, end],
        "data-twice": [first, one, one, two, end],
        "data-added": [first, frame("DATA", b"forged"), one, two, end],
        "end-early": [first, one, end, two],
        "number-twice": [first, first, one, two, end],
        "end-as-cancel": [first, one, two, frame("CANCEL", end[5:])],
        "cancel-as-end": [first, one, two, frame("END", cancel[5:])],
        "end-in-clear": [first, one, two, frame("END")],
        "cancel-in-clear": [first, one, two, frame("CANCEL", bytes(16))],
        "bit-of-number": [flipped(first, 8 * 6), one, two, end],
        "bit-of-mac": [first, one, two, flipped(end, 8 * (len(end) - 1))],
    }
    for name, parts in cases.items():
        yield lane(name, "One thing was done on the way.", hello + b"".join(parts))
    cut = hello + first + one + two + end[:-1]
    yield lane("cut", "The connection ends inside a frame.", cut, "TRUNCATED")
    huge = struct.pack(">IB", 266_241, 5)
    yield lane("length-over", "Refused from its head.", hello + first + huge, "TOO_LARGE")


# ------------------------------------------------------------------ capability tokens

WEEK_MS = 7 * 86_400_000
HOUR_MS = 3_600_000


def block(signer: Identity, **changes: Any) -> bytes:
    """One block of a token: BLOCK with changes, signed by `signer`."""
    return signer.envelope("token", pack(plain(BLOCK | changes)))


def chained(*changes: Fields, issuer: Identity = PROVIDER) -> list[bytes]:
    """Blocks that follow each other properly, each with its own changes."""
    blocks: list[bytes] = []
    signer = issuer
    for fields, key in zip(changes, TOKEN_KEYS, strict=False):
        previous = hash_of("envelope", blocks[-1]) if blocks else b""
        blocks.append(
            block(signer, **({"previous_hash": previous, "next_key": key.public} | fields))
        )
        signer = key
    return blocks


def used(blocks: list[bytes], **changes: Any) -> bytes:
    """The token of a request, used with the key of its last block."""
    use = USE | {"token_hash": hash_of("envelope", blocks[-1])} | changes
    key = TOKEN_KEYS[min(len(blocks), len(TOKEN_KEYS)) - 1]
    return pack([blocks, key.envelope("token use", pack(plain(use)))])


def token(name: str, comment: str, data: bytes, expect: str = "ok", **params: Any) -> Vector:
    given: Fields = {
        "issuer": PROVIDER.public,
        "submitter_key": SUBMITTER.public,
        "request_nonce": REQUEST["nonce"],
        "memory_bytes": 2 * GIB,
        "max_seconds": 600,
        "now_ms": NOW_MS,
    } | params
    decoded = None
    if expect == "ok":
        (blocks, _) = msgpack.unpackb(data)
        last = msgpack.unpackb(msgpack.unpackb(blocks[-1])[1])
        hashes = [hash_of("envelope", one) for one in blocks]
        decoded = {"hashes": hashes, "allows": dict(zip(BLOCK, last, strict=True))}
    return Vector(f"token-{name}", comment, "token", data, expect, given, decoded)


NARROWER: Fields = {
    "gpu_seconds": 600,
    "memory_bytes": 2 * GIB,
    "audience": SUBMITTER.public,
    "expires_at_ms": NOW_MS + HOUR_MS,
}


@scenario
def tokens_that_serve() -> Iterator[Vector]:
    yield token("one-block", "As the issuer gave it away.", used(chained({})))
    yield token("narrowed", "A holder narrowed it for one peer.", used(chained({}, NARROWER)))
    again = NARROWER | {"gpu_seconds": 600, "memory_bytes": 2 * GIB}
    yield token("narrowed-twice", "Three blocks.", used(chained({}, NARROWER, again)))
    same = used(chained({}, {}))
    yield token("handed-on-as-it-is", "A block that changes nothing but the key.", same)
    yield token(
        "last-millisecond", "Its very last moment.", used(chained({})), now_ms=NOW_MS + WEEK_MS
    )
    unknown = used(chained({"kinds": ["program", "zzz"]}))
    yield token("kind-of-later", "A kind that nobody knows yet, beside program.", unknown)


@scenario
def tokens_that_widen() -> Iterator[Vector]:
    cases: dict[str, Fields] = {
        "gpu-seconds": {"gpu_seconds": 3601},
        "memory": {"memory_bytes": 8 * GIB + 1},
        "kinds": {"kinds": ["function", "program"]},
        "expiry": {"expires_at_ms": NOW_MS + WEEK_MS + 1},
    }
    for name, wider in cases.items():
        comment = "A holder's block allows more than the block before."
        yield token(f"wider-{name}", comment, used(chained({}, wider)), "BAD_TOKEN")
    first = {"audience": SUBMITTER.public}
    comment = "The second block gives the token back to everybody."
    yield token("audience-stripped", comment, used(chained(first, {"audience": b""})), "BAD_TOKEN")
    other = {"audience": STRANGER.public}
    comment = "The second block names another submitter."
    data = used(chained(first, other), submitter_key=STRANGER.public)
    yield token(
        "audience-changed", comment, data, "BAD_TOKEN", submitter_key=STRANGER.public
    )  # fmt: skip
    comment = "The third block is as wide as the first; the second was narrower."
    yield token("wider-than-between", comment, used(chained({}, NARROWER, {})), "BAD_TOKEN")


@scenario
def chains_that_do_not_hold() -> Iterator[Vector]:
    whole, other = chained({}, NARROWER), chained({"gpu_seconds": 7200}, {"gpu_seconds": 7200})
    cut = USE | {"token_hash": hash_of("envelope", whole[0])}
    stolen = TOKEN_KEYS[1].envelope("token use", pack(plain(cut)))
    comment = "The last block is left out; its holder has only the key after it."
    yield token("truncated", comment, pack([whole[:1], stolen]), "BAD_TOKEN")
    yield token("first-block-missing", "Only the second block.", used_by(1, whole[1:]), "BAD_TOKEN")
    yield token(
        "blocks-swapped", "The right blocks, turned around.", used_by(1, whole[::-1]), "BAD_TOKEN"
    )
    comment = "The first block of a larger token of the same issuer before the second of this one."
    yield token("block-of-another-token", comment, used_by(1, [other[0], whole[1]]), "BAD_TOKEN")
    comment = "A block signed by a key that the block before does not name."
    forged = block(
        STRANGER, previous_hash=hash_of("envelope", whole[0]), next_key=TOKEN_KEYS[1].public
    )
    yield token("block-by-a-stranger", comment, used_by(1, [whole[0], forged]), "BAD_TOKEN")
    unlinked = block(TOKEN_KEYS[0], previous_hash=seed("nothing"), next_key=TOKEN_KEYS[1].public)
    comment = "The second block names another block as the one before it."
    yield token("previous-hash-other", comment, used_by(1, [whole[0], unlinked]), "BAD_TOKEN")
    comment = "The first block claims that one was before it."
    yield token(
        "previous-hash-first", comment, used(chained({"previous_hash": seed("x")})), "BAD_TOKEN"
    )
    changed_bit = bytearray(whole[0])
    changed_bit[80] ^= 1
    yield token(
        "bit-of-block", "One bit of the first block.", used([bytes(changed_bit)]), "BAD_TOKEN"
    )
    envelope_of_capacity = PROVIDER.envelope("capacity", pack(plain(CAPACITY)))
    comment = "Another message that the issuer signed in the place of a block."
    yield token("capacity-as-block", comment, used([envelope_of_capacity]), "BAD_TOKEN")


def used_by(index: int, blocks: list[bytes], **changes: Any) -> bytes:
    """As `used`, by the key of that number."""
    use = USE | {"token_hash": hash_of("envelope", blocks[-1])} | changes
    return pack([blocks, TOKEN_KEYS[index].envelope("token use", pack(plain(use)))])


@scenario
def tokens_of_a_wrong_form() -> Iterator[Vector]:
    good = chained({})
    yield token(
        "empty", "An empty field is no token; one zero byte is none either.", b"\0", "BAD_TOKEN"
    )
    yield token("no-blocks", "No block at all.", pack([[], USE_ENVELOPE]), "BAD_TOKEN")
    yield token("trailing", "A byte after the token.", used(good) + b"\0", "BAD_TOKEN")
    yield token("no-use", "Blocks without a use.", pack([good, b""]), "BAD_TOKEN")
    yield token("over-4-kib", "More than 4096 bytes.", pack([good, bytes(4096)]), "BAD_TOKEN")
    long_form = b"\x92\xdc\x00\x01" + pack(good[0]) + pack(USE_ENVELOPE)
    yield token("not-canonical", "array16 where fixarray fits.", long_form, "BAD_TOKEN")
    for suite in (0, 2):
        data = used(chained({"suite": suite}))
        yield token(f"suite-{suite}", "There is one suite.", data, "BAD_TOKEN")
    orders: dict[str, list[str]] = {"empty": [], "twice": ["program"] * 2, "unsorted": ["b", "a"]}
    for name, kinds in orders.items():
        comment = "kinds is not a strictly ascending list of at least one."
        yield token(f"kinds-{name}", comment, used(chained({"kinds": kinds})), "BAD_TOKEN")
    data = used(chained({"gpu_seconds": 0}))
    yield token("gpu-seconds-0", "It allows nothing.", data, "BAD_TOKEN")
    blocks = [block(PROVIDER)]
    for _ in range(8):
        previous = hash_of("envelope", blocks[-1])
        blocks.append(block(TOKEN_KEYS[0], previous_hash=previous))
    yield token("nine-blocks", "Nine blocks; eight are allowed.", used_by(0, blocks), "BAD_TOKEN")
    yield token("eight-blocks", "Eight blocks, each with the same key.", used_by(0, blocks[:8]))


@scenario
def uses_for_another_request() -> Iterator[Vector]:
    good = chained({})
    comment = "Taken from another's request: the use names that submitter."
    yield token("use-of-another", comment, used(good), "BAD_TOKEN", submitter_key=STRANGER.public)
    nonce = seed("another nonce")[:16]
    comment = "Taken from an earlier request: the use names its nonce."
    yield token("use-of-before", comment, used(good), "BAD_TOKEN", request_nonce=nonce)
    data = used(good, token_hash=seed("x"))
    yield token("use-of-another-token", "It names another block.", data, "BAD_TOKEN")
    data = used(good, suite=2)
    yield token("use-suite-2", "There is one suite.", data, "BAD_TOKEN")
    use = STRANGER.envelope("token use", pack(plain(USE)))
    yield token("use-by-a-stranger", "Signed without the key.", pack([good, use]), "BAD_TOKEN")
    use = TOKEN_KEYS[0].envelope("ack", pack(plain(USE)))
    yield token("use-as-ack", "Signed as another type.", pack([good, use]), "BAD_TOKEN")


@scenario
def tokens_that_do_not_serve_here() -> Iterator[Vector]:
    data = used(chained({}, issuer=STRANGER))
    yield token("other-issuer", "A right token of another provider.", data, "TOKEN_ISSUER")
    late = NOW_MS + WEEK_MS + 1
    comment = "One millisecond after the end; there is no skew."
    yield token("expired", comment, used(chained({})), "TOKEN_EXPIRED", now_ms=late)
    comment = "The second block has expired, the first has not."
    data = used(chained({}, NARROWER))
    yield token("expired-early", comment, data, "TOKEN_EXPIRED", now_ms=NOW_MS + HOUR_MS + 1)
    data = used(chained({}, NARROWER | {"audience": STRANGER.public}))
    yield token("other-audience", "Narrowed for somebody else.", data, "TOKEN_AUDIENCE")
    data = used(chained({"kinds": ["function"]}))
    yield token("other-kind", "It allows no programs.", data, "TOKEN_LIMIT")
    data = used(chained({}))
    yield token(
        "too-much-memory", "8 GiB and a byte.", data, "TOKEN_LIMIT", memory_bytes=8 * GIB + 1
    )
    yield token("too-many-seconds", "3601 of 3600.", data, "TOKEN_LIMIT", max_seconds=3601)


# ------------------------------------------------------------------ successions


def link(old: Identity, new: Identity, **changes: Any) -> Fields:
    """A right succession; `changes` are fields of the predecessor."""
    first = old.envelope("successor", pack(plain(SUCCESSOR | {"new_key": new.public})))
    fields = {"suite": 1, "old_key": old.public, "successor_hash": hash_of("envelope", first)}
    second = new.envelope("predecessor", pack(plain(fields | changes)))
    return {"successor": first, "predecessor": second}


def successions(
    name: str, comment: str, links: list[Fields], expect: str = "ok", peer: Identity = HEIR
) -> Vector:
    data = pack([plain(links)])
    old = [msgpack.unpackb(one["successor"])[2] for one in links] if expect == "ok" else None
    decoded = {"predecessors": old} if expect == "ok" else None
    return Vector(
        f"successions-{name}", comment, "successions", data, expect, {"peer": peer.public}, decoded
    )


@scenario
def successions_that_hold() -> Iterator[Vector]:
    yield successions("none", "A node that has always had its key.", [])
    yield successions("one", "One change of key.", [link(PROVIDER, HEIR)])
    two = [link(STRANGER, PROVIDER), link(PROVIDER, HEIR)]
    yield successions("two", "Two changes.", two)


@scenario
def successions_that_do_not() -> Iterator[Vector]:
    right = link(PROVIDER, HEIR)
    theirs = link(STRANGER, HEIR)
    yield successions("other-peer", "They lead to another key.", [right], "WRONG_PEER", SUBMITTER)
    gap = [link(STRANGER, SUBMITTER), right]
    yield successions("gap", "The first link does not lead to the second.", gap, "WRONG_PEER")
    turned = [right, link(STRANGER, PROVIDER)]
    yield successions("turned-around", "Newest first.", turned, "WRONG_PEER")
    comment = "The heir answers another key than the one that named it."
    yield successions(
        "old-key-other", comment, [link(PROVIDER, HEIR, old_key=STRANGER.public)], "WRONG_PEER"
    )
    comment = "Named an heir, without the heir's word: the answer is a stranger's."
    alone = right | {"predecessor": STRANGER.envelope("predecessor", pack(plain(PREDECESSOR)))}
    yield successions("unwilling-heir", comment, [alone], "WRONG_PEER")
    comment = "Claims a name, without the owner's word: the naming is by a stranger."
    claimed = right | {"successor": theirs["successor"]}
    yield successions("unnamed-heir", comment, [claimed], "WRONG_PEER")
    again = PROVIDER.envelope("successor", pack(plain(SUCCESSOR | {"issued_at_ms": NOW_MS + 1})))
    comment = "The heir has answered an earlier naming."
    yield successions("other-hash", comment, [right | {"successor": again}], "BAD_SIGNATURE")
    changed_bit = right["successor"][:-1] + bytes([right["successor"][-1] ^ 1])
    comment = "One bit of the old key's signature."
    yield successions(
        "bit-of-successor", comment, [right | {"successor": changed_bit}], "BAD_SIGNATURE"
    )
    changed_bit = right["predecessor"][:-1] + bytes([right["predecessor"][-1] ^ 1])
    comment = "One bit of the new key's signature."
    yield successions(
        "bit-of-predecessor", comment, [right | {"predecessor": changed_bit}], "BAD_SIGNATURE"
    )
    swapped = {"successor": right["predecessor"], "predecessor": right["successor"]}
    yield successions("swapped", "Each in the other's place.", [swapped], "UNEXPECTED_MESSAGE")
    circle = [link(HEIR, PROVIDER), right]
    yield successions("circle", "A key comes back.", circle, "MALFORMED")
    names = [Identity(f"name {i}") for i in range(9)] + [HEIR]
    many = [link(a, b) for a, b in itertools.pairwise(names)]
    yield successions("nine", "Nine links; eight are allowed.", many, "MALFORMED")
    yield successions("eight", "Eight links.", many[1:])
    yield successions(
        "suite-2", "There is one suite.", [link(PROVIDER, HEIR, suite=2)], "UNKNOWN_SUITE"
    )
    one_sided = [{"successor": right["successor"], "predecessor": b""}]
    yield successions("one-sided", "The new key says nothing.", one_sided, "MALFORMED")


# ------------------------------------------------------------------ tables of the spec


def table_rows(table: Table) -> list[str]:
    lines = ["| state | sender | frame | next state |", "|---|---|---|---|"]
    for (state, side, kind), following in table.items():
        lines.append(f"| {state.value} | {side} | {kind.name} | {following.value} |")
    return lines


def resumption_table() -> str:
    return "\n".join(table_rows(RESUMPTION))


def transition_table() -> str:
    lines = table_rows(TRANSITIONS)
    last = [state.value for state in SessionState if not any(k[0] is state for k in TRANSITIONS)]
    return "\n".join([*lines, "", f"States without a row: {', '.join(last)}."])


def error_table() -> str:
    lines = ["| code | name | meaning |", "|---|---|---|"]
    lines += [f"| {code.value} | {code.name} | {SENTENCES[code]} |" for code in ErrorCode]
    return "\n".join(lines)


def block_of_hex(*values: tuple[str, bytes]) -> str:
    """Names and bytes, 32 to a line."""
    lines = []
    for name, data in values:
        lines.append(f"{name} ({len(data)})")
        lines += [f"  {data[at : at + 32].hex()}" for at in range(0, len(data), 32)]
    return "\n".join(["```", *lines, "```"])


def field_list(fields: Fields) -> str:
    """Each field with its encoding inside the message."""
    values = zip(fields, plain(fields), strict=True)
    return "\n".join(["```", *(f"{name:22}{pack(value).hex()}" for name, value in values), "```"])


def signed_example(type_: str) -> list[str]:
    signer, fields = SIGNED[type_]
    payload = pack(plain(fields))
    data = signer.envelope(type_, payload)
    head = payload[: len(payload) - sum(len(pack(value)) for value in plain(fields))].hex()
    heading = f"The {type_}, field by field, behind the array's head `{head}`:"
    parts = [("signed bytes", domain(type_) + payload), ("envelope", data)]
    parts.append(("its hash", hash_of("envelope", data)))
    return [heading, field_list(fields), block_of_hex(*parts)]


def key_example() -> str:
    q = EPHEMERAL.shared(ONE_TIME.public)
    both = hashlib.blake2b(q + EPHEMERAL.public + ONE_TIME.public, digest_size=64).digest()
    keys = [(way, stream_keys(way)) for way in ("in", "out")]
    return block_of_hex(
        ("esk", EPHEMERAL.secret), ("epk", EPHEMERAL.public),
        ("osk", ONE_TIME.secret), ("opk", ONE_TIME.public),
        ("TH", TRANSCRIPT), ("q", q), ("s_out", both[:32]), ("s_in", both[32:]),
        *((f"K_{way}", each.key) for way, each in keys),
        *((f"C_{way}", each.commitment) for way, each in keys),
    )  # fmt: skip


def stream_example() -> str:
    names = ("preamble", "chunk 1", "chunk 2", "chunk 3, FINAL")
    bodies = sealed(PLAIN_CHUNKS)
    plain_parts = [(f"plaintext {i + 1}", chunk) for i, chunk in enumerate(PLAIN_CHUNKS)]
    parts = [*plain_parts, *zip(names, bodies, strict=True), ("frames", framed(bodies))]
    return block_of_hex(*parts, ("input_hash", ciphertext_hash(*bodies)))


RECEIPT_EXAMPLE = """\
Of a unit whose input was two DATA bodies, `first frame` and `second frame` in ASCII, and which gave
no output."""


def examples() -> str:
    ids = [("submitter", SUBMITTER.public), ("provider", PROVIDER.public)]
    lines = ["## Keys of the two nodes", block_of_hex(*ids)]
    for type_ in ("request", "offer", "header"):
        lines += [f"## {type_.capitalize()}", *signed_example(type_)]
    lines += [
        "## Key schedule",
        "TH is over the offer's and the header's envelopes above.",
        key_example(),
    ]
    lines += [
        "## One sealed stream",
        "To the worker, without padding (the vector `stream-in`).",
        stream_example(),
    ]
    lines += ["## Receipt", RECEIPT_EXAMPLE, *signed_example("receipt")]
    lines += ["## Ack", *signed_example("ack")]
    return "\n\n".join(lines)


TABLES = {
    "45-session.md": ("transitions", transition_table),
    "47-resuming.md": ("transitions", resumption_table),
    "errors.md": ("codes", error_table),
    "80-examples.md": ("examples", examples),
}


def with_table(page: str, name: str, table: str) -> str:
    """`page` with the text between its two markers replaced."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"the markers of {name!r} are missing")
    return f"{before}{begin}{table}\n{end}{after}"


# ------------------------------------------------------------------ files


def all_vectors() -> list[Vector]:
    vectors = [vector for function in SCENARIOS for vector in function()]
    names = [vector.name for vector in vectors]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SystemExit(f"names used twice: {sorted(twice)}")
    return vectors


def wanted_files() -> dict[Path, str]:
    files = {VECTORS / f"{vector.name}.json": vector.to_json() for vector in all_vectors()}
    for page, (name, make) in TABLES.items():
        path = SPEC / page
        files[path] = with_table(path.read_text(encoding="utf-8"), name, make())
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 on a difference")
    check = parser.parse_args().check
    wanted = wanted_files()
    changes = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    strays = [path for path in VECTORS.glob("*.json") if path not in wanted]
    for path in changes + strays:
        print(("differs: " if check else "changed: ") + str(path.relative_to(PROTOCOL)))
    if not check:
        for path in changes:
            path.write_text(wanted[path], encoding="utf-8")
        for path in strays:
            path.unlink()
    return 1 if check and changes + strays else 0


if __name__ == "__main__":
    sys.exit(main())
