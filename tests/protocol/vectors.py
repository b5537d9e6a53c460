"""Feeds a vector of protocol/vectors to the Python implementation.  Format: vectors/README.md"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextgpu_node.core.admission import ReplayCache, check_freshness
from nextgpu_protocol.checks import (
    LentUnitLink,
    OwnUnit,
    check_capacity_untrusted,
    check_header_untrusted,
    check_offer_untrusted,
    check_receipt_untrusted,
    check_resume_untrusted,
)
from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameDecoder, FrameKind
from nextgpu_protocol.ids import PeerKey
from nextgpu_protocol.lane import (
    HELLO_BYTES,
    LaneCipher,
    LaneEnds,
    lane_id,
    lane_id_untrusted,
)
from nextgpu_protocol.messages import (
    Announcement,
    Capacity,
    HeldToken,
    LaneTicket,
    Offer,
    Predecessor,
    Receipt,
    ReceiptAck,
    Refusal,
    Successions,
    Successor,
    Token,
    TokenBlock,
    TokenUse,
    UnitHeader,
    UnitRequest,
    UnitResume,
    UnitResumed,
    check_suite_untrusted,
    check_window_untrusted,
)
from nextgpu_protocol.records import UnitManifest, UnitSummary, read_records_untrusted
from nextgpu_protocol.sealing import CiphertextHash, KeyPair, Opener, StreamKey, transcript_hash
from nextgpu_protocol.session import RESUMPTION, TRANSITIONS, Session
from nextgpu_protocol.succession import predecessors_untrusted
from nextgpu_protocol.tokens import (
    check_audience_untrusted,
    check_token_untrusted,
    check_within_token_untrusted,
    open_token_untrusted,
)
from tests.protocol.samples import REQUEST

PROTOCOL = Path(__file__).resolve().parents[2] / "protocol"

TYPES: dict[str, Any] = {
    "request": UnitRequest,
    "offer": Offer,
    "header": UnitHeader,
    "receipt": Receipt,
    "ack": ReceiptAck,
    "resume": UnitResume,
    "resumed": UnitResumed,
    "lane ticket": LaneTicket,
    "capacity": Capacity,
    "announcement": Announcement,
    "refusal": Refusal,
    "manifest": UnitManifest,
    "summary": UnitSummary,
    "token": TokenBlock,
    "token use": TokenUse,
    "request token": Token,
    "held token": HeldToken,
    "successor": Successor,
    "predecessor": Predecessor,
    "successions": Successions,
}


@dataclass(frozen=True)
class Vector:
    name: str
    comment: str
    kind: str
    params: dict[str, Any]
    input: bytes
    expect: str
    decoded: Any


def load_vectors() -> list[Vector]:
    vectors = []
    for path in sorted((PROTOCOL / "vectors").glob("*.json")):
        plain = json.loads(path.read_text(encoding="utf-8"))
        vectors.append(Vector(**plain | {"input": bytes.fromhex(plain["input"])}))
    return vectors


def run_vector(vector: Vector) -> tuple[str, Any]:
    """What the implementation makes of it: "ok" and what it decoded, or the code's name."""
    runners = {
        "message": _run_message,
        "envelope": _run_envelope,
        "frame": _run_frames,
        "stream": _run_stream,
        "session": _run_session,
        "token": _run_token,
        "check": _run_check,
        "successions": _run_successions,
        "lane": _run_lane,
    }
    try:
        return "ok", runners[vector.kind](vector)
    except RemoteProtocolError as exc:
        return exc.code.name, None


def _run_message(vector: Vector) -> Any:
    return _plain(decode_message_untrusted(TYPES[vector.params["type"]], vector.input))


def _run_envelope(vector: Vector) -> Any:
    signed: Signed[Any] = open_envelope_untrusted(TYPES[vector.params["type"]], vector.input)
    if hasattr(signed.message, "suite"):
        check_suite_untrusted(signed.message.suite)
    if hasattr(signed.message, "issued_at_ms") and hasattr(signed.message, "expires_at_ms"):
        check_window_untrusted(
            signed.message.issued_at_ms,
            signed.message.expires_at_ms,
            now_ms=vector.params.get("now_ms", signed.message.issued_at_ms),
        )
    return {
        "signer": signed.signer.hex(),
        "hash": signed.hash.hex(),
        "message": _plain(signed.message),
    }


def _read_frames(data: bytes) -> list[Frame]:
    """Every frame of a stream that closes after `data`."""
    decoder = FrameDecoder()
    decoder.feed(data)
    frames = list(decoder)
    if decoder.mid_frame:
        raise RemoteProtocolError(ErrorCode.TRUNCATED, "inside a frame")
    return frames


def _run_frames(vector: Vector) -> Any:
    return [[kind.name, body.hex()] for kind, body in _read_frames(vector.input)]


def _run_stream(vector: Vector) -> Any:
    given = {name: bytes.fromhex(v) for name, v in vector.params.items() if name != "direction"}
    key = _stream_key(vector.params["direction"], given)
    opener, digest = Opener(key), CiphertextHash()
    records, ended = [], False
    for kind, body in _read_frames(vector.input):
        if kind is FrameKind.END:
            opener.check_end_untrusted()
            ended = True
            continue
        if kind is not FrameKind.DATA:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, kind.name)
        digest.update(body)
        for record in read_records_untrusted(opener.open_untrusted(body)):
            records.append([record.kind.name, bytes(record.body).hex(), record.more])
    if not ended:
        raise RemoteProtocolError(ErrorCode.TRUNCATED, "no END")
    return {
        "transcript_hash": key.transcript.hex(),
        "stream_key": key.key.hex(),
        "commitment": key.commitment.hex(),
        "ciphertext_hash": digest.digest().hex(),
        "records": records,
    }


def _stream_key(direction: str, given: dict[str, bytes]) -> StreamKey:
    pair = KeyPair(given["own_seed"])
    assert pair.public == given["own_public_key"]
    transcript = transcript_hash(given["offer"], given["header"])
    if direction == "in":
        return pair.worker_keys_untrusted(given["peer_public_key"], transcript).inbound
    return pair.submitter_keys(given["peer_public_key"], transcript).outbound


def _run_session(vector: Vector) -> Any:
    table = {"transitions": TRANSITIONS, "resuming": RESUMPTION}[
        vector.params.get("table", "transitions")
    ]
    sides = {"S": Session("S", table), "P": Session("P", table)}
    steps = []
    for side, kind_byte in zip(vector.input[::2], vector.input[1::2], strict=True):
        sender, kind = chr(side), FrameKind(kind_byte)
        receiver = sides["P" if sender == "S" else "S"]
        receiver.received_untrusted(kind)
        sides[sender].sending(kind)
        steps.append(f"{sender} {kind.name}")
    assert sides["S"].state is sides["P"].state
    return {"steps": steps, "state": sides["S"].state.value}


def _run_token(vector: Vector) -> Any:
    given = vector.params
    submitter, nonce = bytes.fromhex(given["submitter_key"]), bytes.fromhex(given["request_nonce"])
    chain = open_token_untrusted(vector.input, submitter_key=submitter, request_nonce=nonce)
    issuers = frozenset({bytes.fromhex(given["issuer"])})
    check_token_untrusted(chain, issuers=issuers, now_ms=given["now_ms"])
    check_audience_untrusted(chain, {submitter})
    asked = {name: given[name] for name in ("memory_bytes", "max_seconds")}
    check_within_token_untrusted(chain, dataclasses.replace(REQUEST, **asked))
    hashes = [block.hash.hex() for block in chain.blocks]
    return {"hashes": hashes, "allows": _plain(chain.allows)}


def _run_check(vector: Vector) -> Any:
    given, now_ms = vector.params, vector.params.get("now_ms", 0)
    signed: Signed[Any] = open_envelope_untrusted(TYPES[given["of"]], vector.input)
    match given["of"]:
        case "request":
            seen = ReplayCache()
            for digest in given["seen"]:
                seen.check_and_add(bytes.fromhex(digest), forget_at_ms=now_ms, now_ms=0)
            check_freshness(signed, PeerKey(_bytes(given["provider_key"])), seen, now_ms=now_ms)
        case "offer":
            request = open_envelope_untrusted(UnitRequest, _bytes(given["request"]))
            check_offer_untrusted(signed, request, _bytes(given["provider_key"]), now_ms=now_ms)
        case "header":
            request = open_envelope_untrusted(UnitRequest, _bytes(given["request"]))
            offer = open_envelope_untrusted(Offer, _bytes(given["offer"]))
            check_header_untrusted(signed, request, offer, now_ms=now_ms)
        case "receipt":
            names = ("provider_key", "unit_id", "transcript", "received", "sent")
            plain = {name: _bytes(given[name]) for name in names}
            check_receipt_untrusted(signed, OwnUnit(**plain | {"sent": plain["sent"] or None}))
        case "resume":
            names = ("unit_id", "header_hash", "submitter_key", "peer_key")
            keys: dict[str, Any] = {name: _bytes(given[name]) for name in names}
            counts = {name: given[name] for name in ("last_attempt", "kept_from", "sent")}
            connection = _bytes(given["connection_key"])
            unit = LentUnitLink(**keys, **counts)
            check_resume_untrusted(signed, unit, connection, now_ms=now_ms)
        case "capacity":
            check_capacity_untrusted(signed, _bytes(given["provider_key"]), now_ms=now_ms)
    return {"signer": signed.signer.hex(), "hash": signed.hash.hex()}


def _run_lane(vector: Vector) -> Any:
    given = {name: _bytes(value) for name, value in vector.params.items()}
    ticket, head = given.pop("ticket"), vector.input[:HELLO_BYTES]
    if len(head) < HELLO_BYTES:
        raise RemoteProtocolError(ErrorCode.TRUNCATED, "hello")
    if lane_id_untrusted(head) != lane_id(ticket):
        raise RemoteProtocolError(ErrorCode.UNKNOWN_UNIT)
    cipher = LaneCipher(ticket, LaneEnds(**given), "S")
    opened = cipher.open_untrusted(_read_frames(vector.input[HELLO_BYTES:]))
    return [[kind.name, body.hex()] for kind, body in opened]


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text)


def _run_successions(vector: Vector) -> Any:
    keys = predecessors_untrusted(vector.input, bytes.fromhex(vector.params["peer"]))
    return {"predecessors": [key.hex() for key in keys]}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
