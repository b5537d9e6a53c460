"""Messages and envelopes: the first byte chooses the type and the way in, the rest is a peer's."""

from __future__ import annotations

from typing import Any

import msgpack

from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import TYPE_NAMES, domain, open_envelope_untrusted
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.local import Assignment, Connect, SignDraft
from tests.protocol.samples import SUBMITTER
from tests.protocol.vectors import TYPES

SIGNED_TYPES = tuple(TYPE_NAMES)
CODEC_TYPES = (*TYPES.values(), Assignment, Connect, SignDraft)
_RAW, _AS_ENVELOPE, _SIGNED_FIRST = range(3)
WAY = 64


def codec(data: bytes) -> None:
    if not data:
        return
    way, choice = divmod(data[0], WAY)
    body = data[1:]
    if way == _AS_ENVELOPE:
        _open(SIGNED_TYPES[choice % len(SIGNED_TYPES)], body)
    elif way == _SIGNED_FIRST:
        _open_signed(SIGNED_TYPES[choice % len(SIGNED_TYPES)], body)
    else:
        _decode(CODEC_TYPES[choice % len(CODEC_TYPES)], body)


def _decode(cls: type, body: bytes) -> Any:
    """None, or a message whose one encoding `body` is."""
    try:
        message = decode_message_untrusted(cls, body)
    except RemoteProtocolError:
        return None
    assert encode_message(message) == body
    return message


def _open(cls: type, body: bytes) -> Any:
    try:
        signed = open_envelope_untrusted(cls, body)
    except RemoteProtocolError:
        return None
    assert signed.data == body
    return signed.message


def _open_signed(cls: type, payload: bytes) -> None:
    """A right signature neither excuses a payload nor spoils it."""
    name = TYPE_NAMES[cls]
    signature = SUBMITTER.sign(domain(name) + payload).signature
    envelope = msgpack.packb([name, payload, bytes(SUBMITTER.verify_key), signature])
    assert _open(cls, envelope) == _decode(cls, payload)
