"""Frames and the session that they make.  The first byte says how the bytes are cut into reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameDecoder, FrameKind, encode_frame
from nextgpu_protocol.limits import MAX_FRAME_BYTES
from nextgpu_protocol.session import Session, SessionState

_FRAME_HEAD_BYTES = 5


def framing(data: bytes) -> None:
    if not data:
        return
    body = data[1:]
    whole, failed = _read([body])
    assert _read(_cut(body, data[0])) == (whole, failed)
    joined = b"".join(encode_frame(kind, part) for kind, part in whole)
    assert body.startswith(joined)
    _check_session(kind for kind, _ in whole)


def _cut(body: bytes, step: int) -> Iterator[bytes]:
    size = step + 1
    for start in range(0, len(body), size):
        yield body[start : start + size]


def _read(pieces: Iterable[bytes]) -> tuple[list[Frame], str | None]:
    """The frames before the end or the first fault, and the fault."""
    decoder, frames = FrameDecoder(), []
    for piece in pieces:
        decoder.feed(piece)
        try:
            for frame in decoder:
                frames.append(frame)
        except RemoteProtocolError as exc:
            return frames, str(exc)
        held = decoder._held  # a bound that no public name shows
        assert held < _FRAME_HEAD_BYTES + MAX_FRAME_BYTES
    return frames, None


def _check_session(kinds: Iterable[FrameKind]) -> None:
    """A side that follows the table moves; any other frame leaves it where it was."""
    sender, receiver = Session("S"), Session("P")
    for kind in kinds:
        before = receiver.state
        try:
            receiver.received_untrusted(kind)
        except RemoteProtocolError:
            assert receiver.state is before
            continue
        assert before is not SessionState.CLOSED
        sender.sending(kind)
        assert sender.state is receiver.state
        _answer(sender, receiver)


def _answer(sender: Session, receiver: Session) -> None:
    """The provider's next word where the submitter must wait for it."""
    kind = {
        SessionState.REQUESTED: FrameKind.OFFER,
        SessionState.CANCELLED: FrameKind.RECEIPT,
    }.get(receiver.state)
    if kind is not None:
        receiver.sending(kind)
        sender.received_untrusted(kind)
