"""The bulk lane: what is not sealed from end to end is sealed there, in its place, for two ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.lane import (
    HELLO_BYTES,
    LaneCipher,
    LaneEnds,
    hello,
    lane_id,
    lane_id_untrusted,
)

K = FrameKind
TICKET = b"t" * 32
ENDS = LaneEnds(b"u" * 16, b"s" * 32, b"p" * 32)
FRAMES: list[Frame] = [
    (K.RESUMED, b"\x91\x03"),
    (K.DATA, b"sealed"),
    (K.DATA, b"more"),
    (K.END, b""),
]


def sealed(frames: Sequence[Frame] = FRAMES) -> list[Frame]:
    return LaneCipher(TICKET, ENDS, "S").seal(frames)


def opened(
    frames: Sequence[Frame], ticket: bytes = TICKET, ends: LaneEnds = ENDS, sender: str = "S"
) -> list[Frame]:
    return list(LaneCipher(ticket, ends, sender).open_untrusted(frames))  # type: ignore[arg-type]


def refused(frames: Sequence[Frame], **changes: object) -> bool:
    with pytest.raises(RemoteProtocolError) as caught:
        opened(frames, **changes)  # type: ignore[arg-type]
    return caught.value.code is ErrorCode.BAD_SEAL


def test_what_goes_in_comes_out_and_data_is_not_touched() -> None:
    out = sealed()
    assert out[1:3] == FRAMES[1:3]
    assert opened(out) == FRAMES


def test_no_word_but_data_is_seen_or_changed_on_a_lane() -> None:
    receipt = (K.RECEIPT, b"status: done, unit 1234")
    (frame,) = sealed([receipt])
    assert receipt[1] not in frame[1]
    for bit in range(8 * len(frame[1])):
        body = bytearray(frame[1])
        body[bit // 8] ^= 1 << (bit % 8)
        assert refused([(K.RECEIPT, bytes(body))])
    assert refused([(K.CANCEL, frame[1])])
    assert refused([(K.RECEIPT, b"")])


@pytest.mark.parametrize("index", range(3))
def test_a_frame_left_out_or_repeated_on_a_lane_is_seen_at_the_end(index: int) -> None:
    out = sealed()
    assert refused(out[:index] + out[index + 1 :])
    assert refused([*out[: index + 1], *out[index:]])


def test_a_ticket_opens_one_lane_of_one_unit_between_two_nodes() -> None:
    out = sealed()
    assert refused(out, ticket=b"T" * 32)
    assert refused(out, ends=replace(ENDS, unit_id=bytes(16)))
    assert refused(out, ends=replace(ENDS, submitter_peer=bytes(32)))
    assert refused(out, ends=replace(ENDS, provider_peer=bytes(32)))


def test_what_one_end_of_a_lane_said_can_not_be_played_back_to_it() -> None:
    assert refused(sealed(), sender="P")


def test_a_hello_names_the_lane_and_not_the_ticket() -> None:
    assert len(hello(TICKET)) == HELLO_BYTES
    assert lane_id_untrusted(hello(TICKET)) == lane_id(TICKET) != TICKET[:16]
    assert TICKET not in hello(TICKET)


@pytest.mark.parametrize(
    "data", [b"", hello(TICKET)[:-1], hello(TICKET) + b"x", b"GET / HTTP/1.1\r\nHost: xxxxxxxx"]
)
def test_other_words_are_no_hello(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        lane_id_untrusted(data)
    assert caught.value.code is ErrorCode.MALFORMED
