"""The typed messages.  Spec: 40-messages.md

Times are milliseconds since the Unix epoch, sizes are bytes, keys are raw 32-byte values.
A field that may be absent is an empty value, never a missing one.  `validate` checks what a type
alone can not say; it raises RemoteProtocolError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import KEY_BYTES, UNIT_ID_BYTES
from nextgpu_protocol.limits import (
    CHUNK_PLAINTEXT_BYTES,
    LANE_TICKET_BYTES,
    MAX_ADDRESS_BYTES,
    MAX_ADDRESSES,
    MAX_ANNOUNCEMENT_LIFETIME_MS,
    MAX_CAPACITY_LIFETIME_MS,
    MAX_CLOCK_SKEW_MS,
    MAX_LANE_TICKET_MS,
    MAX_MEMORY_BYTES,
    MAX_OFFER_LIFETIME_MS,
    MAX_REQUEST_LIFETIME_MS,
    MAX_RESUME_LIFETIME_MS,
    MAX_STREAM_BYTES,
    MAX_SUCCESSIONS,
    MAX_TOKEN_BLOCKS,
    MAX_TOKEN_GPU_SECONDS,
    MAX_UNIT_SECONDS,
)

SUITE: Final = 1  # X25519, XChaCha20-Poly1305 secretstream, BLAKE2b, Ed25519
DEVICE_KINDS: Final = ("any", "cpu", "cuda")
# What a unit runs: data (60-program.md), or functions of a submitter named by the owner.
UNIT_KINDS: Final = ("program", "python")
HASH_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class UnitRequest:
    """What a submitter asks of one provider.  Signed by the submitter."""

    suite: int
    nonce: bytes  # 16 bytes, fresh: makes each request unique
    provider_key: bytes  # the request is worth nothing at another peer
    device_kind: str  # "any", "cpu", "cuda"
    device_memory_bytes: int  # the device must have at least this much in total
    memory_bytes: int  # the worker's memory limit asked for
    max_seconds: int  # wall time asked for
    input_bytes: int  # upper bound of the sealed input stream
    output_bytes: int  # upper bound of the sealed output stream
    table_version: int  # oldest operator table that can run the program
    issued_at_ms: int
    expires_at_ms: int
    token: bytes  # an encoded Token, empty for none
    kind: str = "program"  # "program", "python"

    def validate(self) -> None:
        _one_of("UnitRequest.kind", self.kind, UNIT_KINDS)
        _exact("UnitRequest.nonce", self.nonce, 16)
        _exact("UnitRequest.provider_key", self.provider_key, KEY_BYTES)
        _one_of("UnitRequest.device_kind", self.device_kind, DEVICE_KINDS)
        _at_most("UnitRequest.device_memory_bytes", self.device_memory_bytes, MAX_MEMORY_BYTES)
        _within("UnitRequest.memory_bytes", self.memory_bytes, 1, MAX_MEMORY_BYTES)
        _within("UnitRequest.max_seconds", self.max_seconds, 1, MAX_UNIT_SECONDS)
        _at_most("UnitRequest.input_bytes", self.input_bytes, MAX_STREAM_BYTES)
        _at_most("UnitRequest.output_bytes", self.output_bytes, MAX_STREAM_BYTES)
        _lifetime(self.issued_at_ms, self.expires_at_ms, MAX_REQUEST_LIFETIME_MS)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device as its owner lends it.  `compute_capability` is empty where there is none."""

    kind: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    compute_capability: str

    def validate(self) -> None:
        _one_of("DeviceInfo.kind", self.kind, DEVICE_KINDS[1:])


@dataclass(frozen=True, slots=True)
class Offer:
    """A provider's answer: these limits, this one-time key.  Signed by the provider."""

    suite: int
    offer_id: bytes  # 16 bytes
    one_time_key: bytes  # X25519 public key, born inside the worker
    request_hash: bytes  # hash of the request envelope it answers
    submitter_key: bytes
    device: DeviceInfo
    memory_bytes: int
    max_seconds: int
    input_bytes: int
    output_bytes: int
    runtime: str  # "torch 2.13.0"
    table_version: int
    isolation: tuple[str, ...]  # layers in force around the worker
    price: int  # reserved, 0
    issued_at_ms: int
    expires_at_ms: int

    def validate(self) -> None:
        _exact("Offer.offer_id", self.offer_id, 16)
        _exact("Offer.one_time_key", self.one_time_key, KEY_BYTES)
        _exact("Offer.request_hash", self.request_hash, HASH_BYTES)
        _exact("Offer.submitter_key", self.submitter_key, KEY_BYTES)
        _lifetime(self.issued_at_ms, self.expires_at_ms, MAX_OFFER_LIFETIME_MS)


@dataclass(frozen=True, slots=True)
class UnitHeader:
    """Takes up an offer and opens the sealed stream.  Signed by the submitter."""

    suite: int
    unit_id: bytes
    offer_hash: bytes
    ephemeral_key: bytes  # X25519 public key, fresh for this unit
    chunk_bytes: int  # largest plaintext of one chunk
    issued_at_ms: int
    expires_at_ms: int

    def validate(self) -> None:
        _exact("UnitHeader.unit_id", self.unit_id, UNIT_ID_BYTES)
        _exact("UnitHeader.offer_hash", self.offer_hash, HASH_BYTES)
        _exact("UnitHeader.ephemeral_key", self.ephemeral_key, KEY_BYTES)
        _within("UnitHeader.chunk_bytes", self.chunk_bytes, 4096, CHUNK_PLAINTEXT_BYTES)
        _lifetime(self.issued_at_ms, self.expires_at_ms, MAX_REQUEST_LIFETIME_MS)


@dataclass(frozen=True, slots=True)
class UnitResume:
    """The submitter of a unit is back, on another stream.  Signed by the submitter.

    Spec: 47-resuming.md
    """

    suite: int
    unit_id: bytes
    header_hash: bytes  # hash of the header's envelope: names offer, key and limits too
    attempt: int  # greater in each try: none can be used again
    received: int  # whole frames of the provider that came
    issued_at_ms: int
    expires_at_ms: int

    def validate(self) -> None:
        _exact("UnitResume.unit_id", self.unit_id, UNIT_ID_BYTES)
        _exact("UnitResume.header_hash", self.header_hash, HASH_BYTES)
        _lifetime(self.issued_at_ms, self.expires_at_ms, MAX_RESUME_LIFETIME_MS)


@dataclass(frozen=True, slots=True)
class UnitResumed:
    """The provider goes on too.  Not signed, as a Refusal is not."""

    received: int  # whole frames of the submitter that came


@dataclass(frozen=True, slots=True, repr=False)
class LaneTicket:
    """Opens one lane to one unit, once.  Secret, and not signed: it travels between the two nodes
    alone, over their authenticated connection.  Spec: 48-lane.md
    """

    port: int  # TCP, at the address at which the provider was reached
    ticket: bytes
    lifetime_ms: int  # from when it is received; a clock of one's own tells

    def validate(self) -> None:
        _exact("LaneTicket.ticket", self.ticket, LANE_TICKET_BYTES)
        _within("LaneTicket.port", self.port, 1, 65_535)
        _within("LaneTicket.lifetime_ms", self.lifetime_ms, 1, MAX_LANE_TICKET_MS)


UNIT_STATUSES: Final = (
    "done",
    "failed",
    "cancelled",
    "timed_out",
    "out_of_memory",
    "worker_crashed",
    "submitter_lost",
    "protocol_error",
    "over_limit",
    "owner_stopped",
)


@dataclass(frozen=True, slots=True)
class Metering:
    """What the unit used on the provider."""

    wall_ms: int
    cpu_ms: int
    peak_memory_bytes: int
    input_bytes: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class WipeStep:
    """One verified step of the wipe: what was checked and whether it held."""

    name: str
    held: bool


# How the machine was set up by its owner, not something that is done after a unit.  A receipt tells
# it, and a unit counts as wiped all the same.
OWNER_WIPE_STEPS = ("no-swap",)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Signed evidence, by the provider, of what it did with one unit.  Not proof of deletion."""

    unit_id: bytes
    transcript_hash: bytes  # binds the offer and the header
    input_hash: bytes  # of the ciphertext that the provider received
    output_hash: bytes  # of the ciphertext that the provider sent
    status: str
    metering: Metering
    isolation: tuple[str, ...]
    wipe: tuple[WipeStep, ...]
    finished_at_ms: int

    @property
    def failed_wipe_steps(self) -> list[str]:
        """Steps that the provider says did not hold, but for those that are its owner's alone."""
        return [s.name for s in self.wipe if not s.held and s.name not in OWNER_WIPE_STEPS]

    def validate(self) -> None:
        _exact("Receipt.unit_id", self.unit_id, UNIT_ID_BYTES)
        _exact("Receipt.transcript_hash", self.transcript_hash, HASH_BYTES)
        _exact("Receipt.input_hash", self.input_hash, HASH_BYTES)
        _exact("Receipt.output_hash", self.output_hash, HASH_BYTES)
        _one_of("Receipt.status", self.status, UNIT_STATUSES)


@dataclass(frozen=True, slots=True)
class ReceiptAck:
    """The submitter has the receipt.  Signed by the submitter."""

    unit_id: bytes
    receipt_hash: bytes

    def validate(self) -> None:
        _exact("ReceiptAck.unit_id", self.unit_id, UNIT_ID_BYTES)
        _exact("ReceiptAck.receipt_hash", self.receipt_hash, HASH_BYTES)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a provider lends at this moment.  Signed by the provider, fetched from it directly."""

    suites: tuple[int, ...]
    devices: tuple[DeviceInfo, ...]
    free_slots: int
    memory_bytes: int  # largest worker memory limit
    max_seconds: int
    input_bytes: int
    output_bytes: int
    runtime: str
    table_version: int
    isolation: tuple[str, ...]
    sharing: bool
    reason: str  # why it is not sharing, in one line; empty when it is
    issued_at_ms: int
    expires_at_ms: int

    def validate(self) -> None:
        _lifetime(self.issued_at_ms, self.expires_at_ms, MAX_CAPACITY_LIFETIME_MS)


@dataclass(frozen=True, slots=True)
class Announcement:
    """ "I am found under `key`, at these addresses."  Signed by who says so.  Spec: 72-discovery.md

    Without addresses it takes an earlier one back.
    """

    suite: int
    key: bytes  # a capability key, or the peer's own address key
    addresses: tuple[str, ...]  # multiaddrs
    issued_at_ms: int
    expires_at_ms: int

    def validate(self) -> None:
        _exact("Announcement.key", self.key, HASH_BYTES)
        check_addresses_untrusted("Announcement.addresses", self.addresses)
        _lifetime(self.issued_at_ms, self.expires_at_ms, MAX_ANNOUNCEMENT_LIFETIME_MS)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was refused, or a stream ended.  Unsigned: it changes no state elsewhere."""

    code: int
    detail: str

    def error_code(self) -> ErrorCode:
        """The code as this side knows it; a code from a newer peer becomes INTERNAL."""
        try:
            return ErrorCode(self.code)
        except ValueError:
            return ErrorCode.INTERNAL


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """One block of a capability token: all that may be had with it.  Spec: 75-tokens.md

    The first is signed by the issuer, each other one by the `next_key` of the block before.
    """

    suite: int
    previous_hash: bytes  # hash of the block before; empty in the first
    next_key: bytes  # Ed25519 key that may add a block, or use the token
    gpu_seconds: int  # in all, over every use
    memory_bytes: int  # of the worker, for each unit
    kinds: tuple[str, ...]  # of work; in ascending order
    audience: bytes  # the one submitter key that may use it; empty for whoever holds it
    expires_at_ms: int

    def validate(self) -> None:
        if len(self.previous_hash) not in (0, HASH_BYTES):
            raise RemoteProtocolError(ErrorCode.MALFORMED, "TokenBlock.previous_hash")
        _exact("TokenBlock.next_key", self.next_key, KEY_BYTES)
        _within("TokenBlock.gpu_seconds", self.gpu_seconds, 1, MAX_TOKEN_GPU_SECONDS)
        _within("TokenBlock.memory_bytes", self.memory_bytes, 1, MAX_MEMORY_BYTES)
        if not self.kinds or list(self.kinds) != sorted(set(self.kinds)):
            raise RemoteProtocolError(ErrorCode.MALFORMED, "TokenBlock.kinds is not in order")
        if len(self.audience) not in (0, KEY_BYTES):
            raise RemoteProtocolError(ErrorCode.MALFORMED, "TokenBlock.audience")


@dataclass(frozen=True, slots=True)
class TokenUse:
    """Shows the token's last key, for one request.  Signed by the `next_key` of the last block."""

    suite: int
    token_hash: bytes  # hash of the last block
    submitter_key: bytes  # who signs the request
    request_nonce: bytes

    def validate(self) -> None:
        _exact("TokenUse.token_hash", self.token_hash, HASH_BYTES)
        _exact("TokenUse.submitter_key", self.submitter_key, KEY_BYTES)
        _exact("TokenUse.request_nonce", self.request_nonce, 16)


@dataclass(frozen=True, slots=True)
class Token:
    """What a request carries: the chain of blocks and their use, each an envelope."""

    blocks: tuple[bytes, ...]
    use: bytes

    def validate(self) -> None:
        _count("Token.blocks", self.blocks, MAX_TOKEN_BLOCKS)


@dataclass(frozen=True, slots=True, repr=False)
class HeldToken:
    """What a holder keeps and hands on: the blocks, and the secret of the last `next_key`."""

    blocks: tuple[bytes, ...]
    seed: bytes  # Ed25519, 32 bytes

    def validate(self) -> None:
        _count("HeldToken.blocks", self.blocks, MAX_TOKEN_BLOCKS)
        _exact("HeldToken.seed", self.seed, KEY_BYTES)


@dataclass(frozen=True, slots=True)
class Successor:
    """ "`new_key` is who I am from now on."  Signed by the old key.  Spec: 15-succession.md"""

    suite: int
    new_key: bytes
    issued_at_ms: int

    def validate(self) -> None:
        _exact("Successor.new_key", self.new_key, KEY_BYTES)


@dataclass(frozen=True, slots=True)
class Predecessor:
    """ "I was `old_key`."  Signed by the new key, over the old one's statement."""

    suite: int
    old_key: bytes
    successor_hash: bytes  # hash of the Successor's envelope

    def validate(self) -> None:
        _exact("Predecessor.old_key", self.old_key, KEY_BYTES)
        _exact("Predecessor.successor_hash", self.successor_hash, HASH_BYTES)


@dataclass(frozen=True, slots=True)
class Succession:
    """One change of key, signed from both sides; each an envelope."""

    successor: bytes
    predecessor: bytes


@dataclass(frozen=True, slots=True)
class Successions:
    """Every change of key of one node, oldest first.  Not signed as a whole."""

    links: tuple[Succession, ...]

    def validate(self) -> None:
        if len(self.links) > MAX_SUCCESSIONS:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "Successions.links are too many")


def check_window_untrusted(issued_at_ms: int, expires_at_ms: int, *, now_ms: int) -> None:
    """Refuse what has expired or is dated in the future, clocks being MAX_CLOCK_SKEW_MS apart."""
    if now_ms > expires_at_ms + MAX_CLOCK_SKEW_MS:
        raise RemoteProtocolError(ErrorCode.EXPIRED)
    if issued_at_ms > now_ms + MAX_CLOCK_SKEW_MS:
        raise RemoteProtocolError(ErrorCode.NOT_YET_VALID)


def check_addresses_untrusted(name: str, addresses: tuple[str, ...]) -> None:
    """Refuse more addresses, or longer ones, than a peer has any use for."""
    if len(addresses) > MAX_ADDRESSES:
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"{name} are too many")
    if any(len(address.encode()) > MAX_ADDRESS_BYTES for address in addresses):
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"{name} are too long")


def check_suite_untrusted(suite: int) -> None:
    """Refuse every suite but the one that this version speaks."""
    if suite != SUITE:
        raise RemoteProtocolError(ErrorCode.UNKNOWN_SUITE, f"suite {suite}")


def _exact(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"{name} has {size} bytes")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"{name} is none of its values")


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RemoteProtocolError(ErrorCode.OVER_LIMIT, f"{name} is not from {low} to {high}")


def _at_most(name: str, value: int, high: int) -> None:
    _within(name, value, 0, high)


def _count(name: str, items: tuple[bytes, ...], most: int) -> None:
    if not 1 <= len(items) <= most:
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"{name} has from 1 to {most} items")


def _lifetime(issued_at_ms: int, expires_at_ms: int, longest_ms: int) -> None:
    if not 0 < expires_at_ms - issued_at_ms <= longest_ms:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "the lifetime is not in its bounds")
