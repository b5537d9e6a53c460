"""What each side checks in a verified message of the other, in the order of the spec.
Spec: 45-session.md, 55-receipts.md#what-a-submitter-checks, 70-capacity.md

All raise RemoteProtocolError with the code that the other side is told.  Hashes and keys compared
here are public; nothing secret is.
"""

from __future__ import annotations

from dataclasses import dataclass

from nextgpu_protocol.envelope import Signed
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.messages import (
    Capacity,
    Offer,
    Receipt,
    UnitHeader,
    UnitRequest,
    UnitResume,
    check_suite_untrusted,
    check_window_untrusted,
)


def check_request_untrusted(
    request: Signed[UnitRequest], provider_key: bytes, *, now_ms: int
) -> None:
    """The provider: is it of our suite, for us, and in its time?"""
    message = request.message
    check_suite_untrusted(message.suite)
    if message.provider_key != provider_key:
        raise RemoteProtocolError(ErrorCode.WRONG_PEER, "the request is for another provider")
    check_window_untrusted(message.issued_at_ms, message.expires_at_ms, now_ms=now_ms)


def check_offer_untrusted(
    offer: Signed[Offer], request: Signed[UnitRequest], provider_key: bytes, *, now_ms: int
) -> None:
    """The submitter: only an offer of this very peer, for this very request, gets a key from us."""
    message = offer.message
    if offer.signer != provider_key:
        raise RemoteProtocolError(ErrorCode.WRONG_PEER, "the offer")
    if message.request_hash != request.hash:
        raise RemoteProtocolError(ErrorCode.WRONG_OFFER, "request_hash")
    if message.submitter_key != request.signer:
        raise RemoteProtocolError(ErrorCode.WRONG_OFFER, "submitter_key")
    check_suite_untrusted(message.suite)
    check_window_untrusted(message.issued_at_ms, message.expires_at_ms, now_ms=now_ms)
    _check_amounts_untrusted(message, request.message)


def check_header_untrusted(
    header: Signed[UnitHeader],
    request: Signed[UnitRequest],
    offer: Signed[Offer],
    *,
    now_ms: int,
) -> None:
    """The provider: does it take up our offer, by whom it was made to, in time?"""
    message = header.message
    check_suite_untrusted(message.suite)
    if header.signer != request.signer:
        raise RemoteProtocolError(ErrorCode.WRONG_PEER, "header and request differ in signer")
    if message.offer_hash != offer.hash:
        raise RemoteProtocolError(ErrorCode.WRONG_OFFER, "offer_hash")
    if now_ms > offer.message.expires_at_ms:
        raise RemoteProtocolError(ErrorCode.EXPIRED, "the offer")
    check_window_untrusted(message.issued_at_ms, message.expires_at_ms, now_ms=now_ms)


@dataclass(frozen=True, slots=True)
class LentUnitLink:
    """What a provider knows of a unit whose submitter comes back on another stream."""

    unit_id: bytes
    header_hash: bytes
    submitter_key: bytes  # who signed the request and the header
    peer_key: bytes  # at the other end of the connection on which the request came
    last_attempt: int  # 0 before the first
    kept_from: int  # the oldest number that the submitter may have received up to
    sent: int  # frames sent to it so far


def check_resume_untrusted(
    resume: Signed[UnitResume], unit: LentUnitLink, peer_key: bytes, *, now_ms: int
) -> None:
    """The provider: the same peer, the same unit, a new try, and a place from which it can go on.

    `peer_key` is at the other end of the connection on which the message came.
    """
    message = resume.message
    if message.unit_id != unit.unit_id:
        raise RemoteProtocolError(ErrorCode.UNKNOWN_UNIT)
    check_suite_untrusted(message.suite)
    if peer_key != unit.peer_key:
        raise RemoteProtocolError(ErrorCode.WRONG_PEER, "another peer's connection")
    if resume.signer != unit.submitter_key:
        raise RemoteProtocolError(ErrorCode.WRONG_PEER, "another submitter's unit")
    if message.header_hash != unit.header_hash:
        raise RemoteProtocolError(ErrorCode.WRONG_OFFER, "header_hash")
    check_window_untrusted(message.issued_at_ms, message.expires_at_ms, now_ms=now_ms)
    if message.attempt <= unit.last_attempt:
        raise RemoteProtocolError(ErrorCode.REPLAYED, "attempt")
    if not unit.kept_from <= message.received <= unit.sent:
        raise RemoteProtocolError(ErrorCode.WRONG_OFFSET, "received")


@dataclass(frozen=True, slots=True)
class OwnUnit:
    """What a submitter knows of its unit when the receipt comes.

    `sent` is None where the worker did not say that it had read everything.
    """

    provider_key: bytes
    unit_id: bytes
    transcript: bytes
    received: bytes  # hash of the DATA frames that came
    sent: bytes | None  # hash of the DATA frames that went


def check_receipt_untrusted(receipt: Signed[Receipt], unit: OwnUnit) -> None:
    """The submitter: is it of this unit, and of these very bytes?"""
    message = receipt.message
    if receipt.signer != unit.provider_key:
        raise RemoteProtocolError(ErrorCode.WRONG_PEER, "the receipt")
    if message.unit_id != unit.unit_id or message.transcript_hash != unit.transcript:
        raise RemoteProtocolError(ErrorCode.WRONG_OFFER, "the receipt is for another unit")
    if message.output_hash != unit.received:
        raise RemoteProtocolError(ErrorCode.BAD_SEAL, "the receipt names other results")
    if unit.sent is not None and message.input_hash != unit.sent:
        raise RemoteProtocolError(ErrorCode.BAD_SEAL, "the receipt names other inputs")


def check_capacity_untrusted(
    capacity: Signed[Capacity], provider_key: bytes, *, now_ms: int
) -> None:
    """The submitter: does this peer itself say so, and now?"""
    if capacity.signer != provider_key:
        raise RemoteProtocolError(ErrorCode.WRONG_PEER, "capacity")
    message = capacity.message
    check_window_untrusted(message.issued_at_ms, message.expires_at_ms, now_ms=now_ms)


def _check_amounts_untrusted(offer: Offer, request: UnitRequest) -> None:
    """An offer of less than was asked for would end the unit half-way: better not to begin."""
    for name in ("memory_bytes", "max_seconds", "input_bytes", "output_bytes"):
        if getattr(offer, name) < getattr(request, name):
            raise RemoteProtocolError(ErrorCode.OVER_LIMIT, f"the offer's {name}")
    if request.device_kind not in ("any", offer.device.kind):
        raise RemoteProtocolError(ErrorCode.NO_SUCH_DEVICE, "the offer's device")
