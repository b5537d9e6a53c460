"""Records: what the sealed stream says.  Spec: 50-sealing.md#records

    chunk plaintext = record record … [padding]
    record          = u8 kind ‖ u8 flags ‖ u32 length (big-endian) ‖ body
    flags           = 01 MORE: the next record of this kind continues this body

Whole records only: a record never spans chunks, so a reader holds one chunk and hands each
fragment straight to where it belongs.  A kind byte of 0 ends the records of its chunk: what
follows is padding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.limits import CHUNK_PLAINTEXT_BYTES
from nextgpu_protocol.sealing import padded_size

Piece = bytes | bytearray | memoryview


class RecordKind(IntEnum):
    """1-15 to the worker, 16-31 from it."""

    PADDING = 0
    MANIFEST = 1  # UnitManifest: how to run
    PROGRAM = 2  # the program, see 60-program.md
    CONSTANTS = 3  # safetensors image, in the order of the program's constants
    CARRY = 4  # safetensors image: initial state, or a checkpoint to go on from
    STEP = 5  # safetensors image: the inputs of one step
    CALL = 6  # u8 form ‖ a pickled call or a script, see 65-python.md
    STARTED = 16  # the program is loaded
    RESULT = 17  # safetensors image: the outputs of one step
    CHECKPOINT = 18  # u64 steps done ‖ safetensors image of the carry
    DONE = 19  # UnitSummary
    FAILED = 20  # Refusal: code and detail
    FINAL = 21  # safetensors image: the outputs of the finish graph
    LOG = 22  # u8 stream ‖ UTF-8 text
    VALUE = 23  # u8 outcome ‖ u32 tree bytes ‖ tree ‖ safetensors image, see 65-python.md
    FILE = 24  # u16 name bytes ‖ name ‖ content


@dataclass(frozen=True, slots=True)
class UnitManifest:
    """How the worker runs the program.  Encoded as a message (00-conventions.md)."""

    checkpoint_ms: int  # seal the carry back this often; 0 for never
    checkpoint_steps: int  # seal it back after each so many steps; 0 for never
    return_carry: bool  # seal the carry back at the end


@dataclass(frozen=True, slots=True)
class UnitSummary:
    """What the worker says at the end, inside the seal."""

    steps: int
    load_ms: int
    run_ms: int
    stopped_early: bool


@dataclass(frozen=True, slots=True)
class Record:
    """One record.  `more` says that the body goes on in the next record of this kind."""

    kind: RecordKind
    body: memoryview
    more: bool


_HEAD = struct.Struct(">BBI")
_MORE = 1
_KINDS = {int(kind): kind for kind in RecordKind}
RECORD_HEAD_BYTES = _HEAD.size


class RecordWriter:
    """Packs bodies into chunk plaintexts.

    `write` gives the chunks that became full; `flush` gives the rest, padded, so that what is
    seen on the wire between two flushes has one of few sizes.
    """

    def __init__(self) -> None:
        # One buffer for the writer's life: a fresh one for each chunk costs more than its copy.
        self._chunk = memoryview(bytearray(CHUNK_PLAINTEXT_BYTES))
        self._used = 0
        self._since_flush = 0

    def write(self, kind: RecordKind, pieces: Iterable[Piece]) -> Iterator[bytes]:
        """One body, given in pieces, as one or more records."""
        previous: memoryview | None = None
        for piece in pieces:
            view = memoryview(piece).cast("B") if len(memoryview(piece)) else memoryview(b"")
            if previous is not None:
                yield from self._fragments(kind, previous, more=True)
            previous = view
        yield from self._fragments(kind, previous or memoryview(b""), more=False)

    def flush(self) -> Iterator[bytes]:
        """Everything written so far.  The last chunk given may be sealed as the final one."""
        missing = padded_size(self._since_flush) - self._since_flush
        while missing > (room := self._room):
            missing -= room
            yield self._take(room)
        yield self._take(missing)
        self._since_flush = 0

    def flush_marked(self) -> Iterator[tuple[bytes, bool]]:
        """As `flush`, each chunk with whether it is the last."""
        chunks = self.flush()
        chunk = next(chunks)
        for following in chunks:
            yield chunk, False
            chunk = following
        yield chunk, True

    @property
    def _room(self) -> int:
        return CHUNK_PLAINTEXT_BYTES - self._used

    def _fragments(self, kind: RecordKind, body: memoryview, *, more: bool) -> Iterator[bytes]:
        while True:
            room = self._room - RECORD_HEAD_BYTES
            if room <= 0:
                yield self._take(self._room)
                continue
            part, body = body[:room], body[room:]
            self._append(kind, part, more=more or bool(body))
            if not body:
                return

    def _append(self, kind: RecordKind, body: memoryview, *, more: bool) -> None:
        _HEAD.pack_into(self._chunk, self._used, kind, _MORE if more else 0, len(body))
        start = self._used + RECORD_HEAD_BYTES
        self._used = start + len(body)
        self._chunk[start : self._used] = body
        self._since_flush += RECORD_HEAD_BYTES + len(body)

    def _take(self, padding_bytes: int) -> bytes:
        end = self._used + padding_bytes
        # The buffer still holds an earlier chunk: padding is written, never left over.
        self._chunk[self._used : end] = bytes(padding_bytes)
        self._since_flush += padding_bytes
        self._used = 0
        return bytes(self._chunk[:end])


def read_records_untrusted(plaintext: bytes) -> Iterator[Record]:
    """The records of one chunk, padding left out.  Raises RemoteProtocolError."""
    view = memoryview(plaintext)
    while view and view[0] != RecordKind.PADDING:
        if len(view) < RECORD_HEAD_BYTES:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "record head")
        kind_byte, flags, length = _HEAD.unpack_from(view)
        kind = _KINDS.get(kind_byte)
        if kind is None or flags & ~_MORE:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "record kind or flags")
        end = RECORD_HEAD_BYTES + length
        if len(view) < end:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "record length")
        yield Record(kind, view[RECORD_HEAD_BYTES:end], bool(flags & _MORE))
        view = view[end:]
