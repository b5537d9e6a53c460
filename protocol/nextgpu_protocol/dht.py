"""The DHT's messages and its places, as plain arithmetic.  Spec: 72-discovery.md

    message = u32 length (big-endian, of kind and body) ‖ u8 kind ‖ body       length <= 8 KiB + 1

    node's place      SHA-256(D("dht node") ‖ public key)
    shard's place     SHA-256(D("dht shard") ‖ key ‖ level ‖ branch)

A key with more providers than one place holds is spread over shards: level l has 16^l of them, and
a provider belongs to the one that its own branch names (prefix hash trees, Ramabhadran et al.,
2004).  A place that is full keeps an evenly drawn sample of known rate 2^-sampling (Wegman's
adaptive sampling, Flajolet 1990), so a reader knows how many there are and where the rest is.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import Signed, domain, open_envelope_untrusted
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import KEY_BYTES
from nextgpu_protocol.limits import (
    MAX_ANNOUNCEMENT_BYTES,
    MAX_CLOCK_SKEW_MS,
    MAX_MESSAGE_BYTES,
)
from nextgpu_protocol.messages import (
    Announcement,
    check_addresses_untrusted,
    check_suite_untrusted,
)

PLACE_BYTES: Final = 32
MAX_LEVEL: Final = 4
MAX_SAMPLING: Final = 48
MAX_CONTACTS: Final = 20
MAX_STORED_AT_ONCE: Final = 16
MAX_PAGES: Final = 64
RANK_BITS: Final = 64


class DhtKind(IntEnum):
    """What a message's body is."""

    FIND_NODE = 1
    NODES = 2
    STORE = 3
    STORED = 4
    FIND = 5
    FOUND = 6


@dataclass(frozen=True, slots=True)
class Contact:
    """A node that serves the DHT, as another one knows it.  A hint: dialling it proves its key."""

    key: bytes
    addresses: tuple[str, ...]

    def validate(self) -> None:
        _exact("Contact.key", self.key, KEY_BYTES)
        check_addresses_untrusted("Contact.addresses", self.addresses)


@dataclass(frozen=True, slots=True)
class FindNode:
    """Which nodes that you know are nearest to this place?"""

    target: bytes

    def validate(self) -> None:
        _exact("FindNode.target", self.target, PLACE_BYTES)


@dataclass(frozen=True, slots=True)
class Nodes:
    contacts: tuple[Contact, ...]

    def validate(self) -> None:
        _at_most("Nodes.contacts", len(self.contacts), MAX_CONTACTS)


@dataclass(frozen=True, slots=True)
class StoreItem:
    """One announcement for the shard of its signer at `level`."""

    level: int
    record: bytes

    def validate(self) -> None:
        _at_most("StoreItem.level", self.level, MAX_LEVEL)


@dataclass(frozen=True, slots=True)
class Store:
    items: tuple[StoreItem, ...]

    def validate(self) -> None:
        _at_most("Store.items", len(self.items), MAX_STORED_AT_ONCE)


@dataclass(frozen=True, slots=True)
class StoreResult:
    """`code` is 0 where the record is held now.  The place holds a share of 2^-sampling."""

    code: int
    sampling: int

    def validate(self) -> None:
        _at_most("StoreResult.sampling", self.sampling, MAX_SAMPLING)


@dataclass(frozen=True, slots=True)
class Stored:
    """One result for each item, in their order."""

    results: tuple[StoreResult, ...]


@dataclass(frozen=True, slots=True)
class Find:
    """What is held for this shard?"""

    key: bytes
    level: int
    branch: int

    def validate(self) -> None:
        _exact("Find.key", self.key, KEY_BYTES)
        _at_most("Find.level", self.level, MAX_LEVEL)
        _at_most("Find.branch", self.branch, 16**self.level - 1)


@dataclass(frozen=True, slots=True)
class Found:
    """One page of the answer; `more` says whether another one follows on the stream."""

    sampling: int
    records: tuple[bytes, ...]
    more: bool

    def validate(self) -> None:
        _at_most("Found.sampling", self.sampling, MAX_SAMPLING)


DhtMessage = FindNode | Nodes | Store | Stored | Find | Found
_TYPES: Final[dict[DhtKind, type]] = {
    DhtKind.FIND_NODE: FindNode,
    DhtKind.NODES: Nodes,
    DhtKind.STORE: Store,
    DhtKind.STORED: Stored,
    DhtKind.FIND: Find,
    DhtKind.FOUND: Found,
}
_KINDS: Final = {cls: kind for kind, cls in _TYPES.items()}
_HEAD: Final = struct.Struct(">IB")
HEAD_BYTES: Final = _HEAD.size


def encode_dht(message: DhtMessage) -> bytes:
    """One whole message, its head before it."""
    body = encode_message(message)
    return _HEAD.pack(1 + len(body), _KINDS[type(message)]) + body


def body_size_untrusted(head: bytes) -> tuple[DhtKind, int]:
    """What the five bytes of a head announce.  Raises RemoteProtocolError."""
    length, kind = _HEAD.unpack(head)
    if not 1 <= length <= 1 + MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(ErrorCode.TOO_LARGE, f"DHT message of {length} bytes")
    try:
        return DhtKind(kind), length - 1
    except ValueError as exc:
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"DHT message kind {kind}") from exc


def decode_dht_untrusted(kind: DhtKind, body: bytes) -> DhtMessage:
    """The message of that kind.  Raises RemoteProtocolError."""
    message: DhtMessage = decode_message_untrusted(_TYPES[kind], body)
    return message


# Places.


def node_place(public_key: bytes) -> bytes:
    """Where a node stands: 32 bytes."""
    return _sha256("dht node", public_key)


def address_key(public_key: bytes) -> bytes:
    """The key under which a peer announces its addresses to those who know its ID."""
    return _sha256("dht address", public_key)


def branch_of(public_key: bytes, level: int) -> int:
    """The shard of a provider among the 16^level ones of any key."""
    return int.from_bytes(_sha256("dht branch", public_key)[:8]) >> (64 - 4 * level)


def shard_place(key: bytes, level: int, branch: int) -> bytes:
    """Where the announcements of one shard are held: at the nodes nearest to it."""
    return _sha256("dht shard", key + struct.pack(">BQ", level, branch))


def rank(place: bytes, public_key: bytes) -> int:
    """The lot of a provider at a place, below 2^64: even, and the same for every holder."""
    return int.from_bytes(_sha256("dht rank", place + public_key)[:8])


def is_sampled(rank_: int, sampling: int) -> bool:
    """Whether a place that holds a share of 2^-sampling holds this lot."""
    return rank_ >> (RANK_BITS - sampling) == 0


def distance(one: bytes, other: bytes) -> int:
    """Kademlia's XOR metric."""
    return int.from_bytes(one) ^ int.from_bytes(other)


def _sha256(label: str, data: bytes) -> bytes:
    return hashlib.sha256(domain(label) + data).digest()


# Records.


def open_announcement_untrusted(data: bytes, *, now_ms: int) -> Signed[Announcement]:
    """The announcement in `data`, if it holds now.  Raises RemoteProtocolError.

    Without the skew at its end: nothing is held or shown for longer than its signer said.
    """
    if len(data) > MAX_ANNOUNCEMENT_BYTES:
        raise RemoteProtocolError(ErrorCode.TOO_LARGE, "announcement")
    signed = open_envelope_untrusted(Announcement, data)
    check_suite_untrusted(signed.message.suite)
    if now_ms >= signed.message.expires_at_ms:
        raise RemoteProtocolError(ErrorCode.EXPIRED, "announcement")
    if signed.message.issued_at_ms > now_ms + MAX_CLOCK_SKEW_MS:
        raise RemoteProtocolError(ErrorCode.NOT_YET_VALID, "announcement")
    return signed


def check_found_untrusted(found: Signed[Announcement], wanted: Find) -> None:
    """Does this announcement belong into the answer to `wanted`?"""
    if found.message.key != wanted.key or branch_of(found.signer, wanted.level) != wanted.branch:
        raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "an announcement of another place")


def _exact(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"{name} has {size} bytes")


def _at_most(name: str, value: int, high: int) -> None:
    if value > high:
        raise RemoteProtocolError(ErrorCode.OVER_LIMIT, name)
