"""What a side keeps of what it sent: enough for a connection that breaks, and no more."""

from __future__ import annotations

import pytest

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.limits import MIB, RESUME_BYTES
from nextgpu_protocol.resumption import SentFrames


def frame(size: int, fill: int = 0) -> Frame:
    return FrameKind.DATA, bytes([fill]) * size


def test_the_other_side_gets_just_what_it_lacks() -> None:
    sent = SentFrames()
    frames = [frame(10, i) for i in range(5)]
    sent.add(frames[:2])
    sent.add(frames[2:])
    assert [sent.after_untrusted(n) for n in (0, 3, 5)] == [frames, frames[3:], []]


@pytest.mark.parametrize("received", [6, 2**63 - 1])
def test_frames_that_were_never_sent_are_not_believed(received: int) -> None:
    sent = SentFrames()
    sent.add([frame(1)] * 5)
    with pytest.raises(RemoteProtocolError) as caught:
        sent.after_untrusted(received)
    assert caught.value.code is ErrorCode.WRONG_OFFSET


def test_what_is_held_is_bounded_and_more_than_can_be_on_its_way() -> None:
    sent = SentFrames()
    for _ in range(200):
        sent.add([frame(256 * 1024)])
    held = sent.after_untrusted(sent.kept_from)
    assert RESUME_BYTES - MIB < sum(len(body) for _, body in held) <= RESUME_BYTES
    with pytest.raises(RemoteProtocolError):
        sent.after_untrusted(sent.kept_from - 1)


def test_many_small_frames_do_not_weigh_more_than_large_ones() -> None:
    sent = SentFrames()
    for _ in range(200_000):
        sent.add([frame(1)])
    assert sent.count - sent.kept_from < RESUME_BYTES / 100


def test_one_frame_above_the_bound_is_held_all_the_same() -> None:
    sent = SentFrames(limit_bytes=100)
    sent.add([frame(1000)])
    assert len(sent.after_untrusted(0)) == 1


def test_nothing_added_is_nothing_held() -> None:
    sent = SentFrames()
    sent.add([])
    assert sent.after_untrusted(0) == []
