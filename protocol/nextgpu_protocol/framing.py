"""Frames: how every hop cuts its byte stream.  Spec: 30-framing.md

    u32 length (big-endian, of kind and body) ‖ u8 kind ‖ body        length <= MAX_FRAME_BYTES

A reset, a crash and a clean close look alike to a reader, so nothing here ends by end-of-file:
a direction is complete only after its END frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.limits import MAX_FRAME_BYTES


class FrameKind(IntEnum):
    """What a frame's body is.  1-31 between peers, 32-47 on a node's local unit socket,
    48-63 between a daemon and its own worker."""

    REQUEST = 1
    OFFER = 2
    REFUSAL = 3
    HEADER = 4
    DATA = 5
    END = 6
    RECEIPT = 7
    ACK = 8
    ERROR = 9
    CANCEL = 10
    CAPACITY = 11
    SUCCESSIONS = 12
    CONNECT = 32
    CONNECTED = 33
    SIGN = 34
    SIGNED = 35
    HELLO = 48
    ASSIGN = 49


_HEAD = struct.Struct(">IB")
HEAD_BYTES = _HEAD.size
_KINDS = {int(kind): kind for kind in FrameKind}

Frame = tuple[FrameKind, bytes]


def frame_header(kind: FrameKind, body_bytes: int) -> bytes:
    """The five bytes before a body of `body_bytes`."""
    if 1 + body_bytes > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"a frame body of {body_bytes} bytes is over the limit")
    return _HEAD.pack(1 + body_bytes, kind)


def encode_frame(kind: FrameKind, body: bytes = b"") -> bytes:
    """One whole frame."""
    return frame_header(kind, len(body)) + body


class FrameDecoder:
    """Cuts fed bytes into frames; holds at most one frame and what was fed last.

    Iterate after each `feed`.  Raises RemoteProtocolError for a length over the bound or an
    unknown kind, before the body is collected.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    @property
    def mid_frame(self) -> bool:
        """True while an incomplete frame is held: an end-of-file now is a truncation."""
        return bool(self._buffer)

    def __iter__(self) -> Iterator[Frame]:
        start = 0
        buffer = self._buffer
        try:
            while len(buffer) - start >= HEAD_BYTES:
                length, kind_byte = _HEAD.unpack_from(buffer, start)
                kind = _check_head_untrusted(length, kind_byte)
                end = start + HEAD_BYTES - 1 + length
                if len(buffer) < end:
                    break
                with memoryview(buffer) as view:
                    body = bytes(view[start + HEAD_BYTES : end])
                start = end
                yield kind, body
        finally:
            if start:
                del buffer[:start]


def _check_head_untrusted(length: int, kind_byte: int) -> FrameKind:
    if not 1 <= length <= MAX_FRAME_BYTES:
        raise RemoteProtocolError(ErrorCode.TOO_LARGE, f"frame length {length}")
    kind = _KINDS.get(kind_byte)
    if kind is None:
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"frame kind {kind_byte}")
    return kind
