"""Frames: how every hop cuts its byte stream.  Spec: 30-framing.md

    u32 length (big-endian, of kind and body) ‖ u8 kind ‖ body        length <= MAX_FRAME_BYTES

A reset, a crash and a clean close look alike to a reader, so nothing here ends by end-of-file:
a direction is complete only after its END frame.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
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
    RESUME = 13
    RESUMED = 14
    LANE = 15
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
_MANY_PIECES = 64


def frame_header(kind: FrameKind, body_bytes: int) -> bytes:
    """The five bytes before a body of `body_bytes`."""
    if 1 + body_bytes > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"a frame body of {body_bytes} bytes is over the limit")
    return _HEAD.pack(1 + body_bytes, kind)


def encode_frame(kind: FrameKind, body: bytes = b"") -> bytes:
    """One whole frame."""
    return frame_header(kind, len(body)) + body


def encode_frames(frames: Iterable[Frame]) -> bytes:
    """Whole frames, one behind the other: one write for many."""
    pieces: list[bytes] = []
    for kind, body in frames:
        pieces += (frame_header(kind, len(body)), body)
    return b"".join(pieces)


class FrameDecoder:
    """Cuts fed bytes into frames; holds at most one frame and what was fed last.

    Iterate after each `feed`.  Raises RemoteProtocolError for a length over the bound or an
    unknown kind, before the body is collected.
    """

    def __init__(self) -> None:
        # What was fed, as it came: a body is copied once, when all of it is here.
        self._pieces: deque[memoryview] = deque()
        self._held = 0
        self._head: tuple[FrameKind, int] | None = None
        self._refusal: RemoteProtocolError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        if data:
            # A buffer that can change belongs to its owner: the bytes are ours only when copied.
            self._pieces.append(memoryview(data if type(data) is bytes else bytes(data)))
            self._held += len(data)
            if len(self._pieces) > _MANY_PIECES:
                # Byte by byte, a frame would weigh two hundred times its size.
                joined = b"".join(self._pieces)
                self._pieces = deque([memoryview(joined)])

    @property
    def mid_frame(self) -> bool:
        """True while an incomplete frame is held: an end-of-file now is a truncation."""
        return bool(self._held) or self._head is not None

    def __iter__(self) -> Iterator[Frame]:
        while True:
            if self._head is None:
                if self._held < HEAD_BYTES and self._refusal is None:
                    return
                self._head = self._read_head_untrusted()
            kind, body_bytes = self._head
            if self._held < body_bytes:
                return
            self._head = None
            yield kind, self._take(body_bytes)

    def _read_head_untrusted(self) -> tuple[FrameKind, int]:
        if self._refusal is not None:
            raise self._refusal
        length, kind_byte = _HEAD.unpack(self._take(HEAD_BYTES))
        try:
            return _check_head_untrusted(length, kind_byte), length - 1
        except RemoteProtocolError as exc:
            # Nothing behind a bad head can be told apart, now or later.
            self._refusal = exc
            raise

    def _take(self, size: int) -> bytes:
        """The first `size` bytes that are held."""
        self._held -= size
        taken: list[memoryview] = []
        while size:
            piece = self._pieces.popleft()
            if len(piece) > size:
                self._pieces.appendleft(piece[size:])
                piece = piece[:size]
            taken.append(piece)
            size -= len(piece)
        return b"".join(taken)


def _check_head_untrusted(length: int, kind_byte: int) -> FrameKind:
    if not 1 <= length <= MAX_FRAME_BYTES:
        raise RemoteProtocolError(ErrorCode.TOO_LARGE, f"frame length {length}")
    kind = _KINDS.get(kind_byte)
    if kind is None:
        raise RemoteProtocolError(ErrorCode.MALFORMED, f"frame kind {kind_byte}")
    return kind
