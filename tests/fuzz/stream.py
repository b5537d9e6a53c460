"""The sealed stream, from DATA bodies to records and results.

The input is a list of steps for a hostile end that holds the right key, and for a node on the way
that does not:

    u8 step ‖ u16 length ‖ bytes        step mod 8 as named below
"""

from __future__ import annotations

from collections.abc import Iterator

from nacl import bindings as sodium

from nextgpu_node.sdk.inbox import Inbox
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import TENSOR, Graph, Node, ProgramSpec, Ref, TensorSpec
from nextgpu_protocol.records import read_records_untrusted
from nextgpu_protocol.sealing import PREAMBLE_BYTES, KeyPair, Opener, Sealer, transcript_hash

_TAG_MESSAGE, _TAG_PUSH, _TAG_REKEY, _TAG_FINAL = range(4)
SEAL, FINAL, OTHER_TAG, RAW, FLIP, AGAIN, DROP, END = range(8)

_TRANSCRIPT = transcript_hash(b"offer", b"header")
_SUBMITTER, _WORKER = KeyPair(b"e" * 32), KeyPair(b"o" * 32)
_KEY = _SUBMITTER.submitter_keys(_WORKER.public, _TRANSCRIPT).outbound

_X = TensorSpec("x", "float32", (2,))
_SPEC = ProgramSpec(
    min_table_version=1,
    step=Graph((Node("aten.add.Tensor", (Ref(0), Ref(0)), (), TENSOR),), (1,)),
    xs=(_X,),
    ys=(TensorSpec("y", "float32", (2,)),),
)


def stream(data: bytes) -> None:
    sealer, model = _Hostile(), _Receiver()
    for step, body in _steps(data):
        frame = sealer.make(step, body)
        if step == END:
            model.end()
        elif frame is not None:
            model.data(frame, genuine=sealer.genuine)
        if model.refused:
            return


def _steps(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 3 <= len(data):
        length = int.from_bytes(data[at + 1 : at + 3])
        yield data[at] % 8, data[at + 3 : at + 3 + length]
        at += 3 + length


class _Hostile:
    """Makes DATA bodies; `genuine` says whether the last one is what an honest end would send."""

    def __init__(self) -> None:
        self._sealer = Sealer(_KEY)
        self._state = self._sealer._state  # tags that `Sealer` never gives need the state itself
        self._next: bytes | None = self._sealer.preamble
        self._last = b""
        self._behind = False  # a chunk was left out or put in: nothing after it can open
        self.genuine = False

    def make(self, step: int, body: bytes) -> bytes | None:
        if step == END:
            return None
        if step == AGAIN:
            self.genuine = False
            return self._last
        if step == RAW:
            self.genuine = False
            return body
        made, tag = self._advance(step, body)
        if step == DROP:
            self._behind = True
            return None
        self._last = made
        self.genuine = not self._behind and tag in (_TAG_MESSAGE, _TAG_FINAL) and step != FLIP
        return _flipped(made, body) if step == FLIP else made

    def _advance(self, step: int, body: bytes) -> tuple[bytes, int]:
        """The next body in order: the preamble, then chunks."""
        if self._next is not None:
            made, self._next = self._next, None
            return made, _TAG_MESSAGE
        tag = {FINAL: _TAG_FINAL, OTHER_TAG: 1 + len(body) % 2}.get(step, _TAG_MESSAGE)
        associated, self._sealer._associated = self._sealer._associated, None
        made = sodium.crypto_secretstream_xchacha20poly1305_push(self._state, body, associated, tag)
        return made, tag


def _flipped(frame: bytes, body: bytes) -> bytes:
    at = int.from_bytes(body[:2]) % len(frame)
    bit = 1 << (body[2] % 8 if len(body) > 2 else 0)
    return frame[:at] + bytes([frame[at] ^ bit]) + frame[at + 1 :]


class _Receiver:
    """The submitter's end; knows what must not be taken."""

    def __init__(self) -> None:
        self._opener = Opener(_KEY)
        self._inbox = Inbox(_SPEC, max_bytes=1024)
        self._began = False
        self.refused = False

    def data(self, frame: bytes, *, genuine: bool) -> None:
        was_finished = self._opener.finished
        try:
            plaintext = self._opener.open_untrusted(frame)
        except RemoteProtocolError:
            self.refused = True
            return
        # The header of a preamble is bound by its first chunk, not by itself.
        first, self._began = not self._began, True
        assert not was_finished
        assert genuine or (first and len(frame) == PREAMBLE_BYTES)
        self._take(plaintext)

    def _take(self, plaintext: bytes) -> None:
        try:
            for record in read_records_untrusted(plaintext):
                list(self._inbox.take_untrusted(record))
        except RemoteProtocolError:
            self.refused = True

    def end(self) -> None:
        try:
            self._opener.check_end_untrusted()
        except RemoteProtocolError:
            self.refused = True
            return
        assert self._opener.finished
