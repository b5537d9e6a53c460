"""Frames come out the same however the bytes come in, and a bad one is refused by its head."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.framing import (
    HEAD_BYTES,
    Frame,
    FrameDecoder,
    FrameKind,
    encode_frame,
    frame_header,
)
from nextgpu_protocol.limits import CHUNK_OVERHEAD_BYTES, CHUNK_PLAINTEXT_BYTES, MAX_FRAME_BYTES

frames = st.lists(st.tuples(st.sampled_from(FrameKind), st.binary(max_size=40)), max_size=8)


def encoded(items: Iterable[Frame]) -> bytes:
    return b"".join(encode_frame(kind, body) for kind, body in items)


def refused(data: bytes) -> ErrorCode:
    decoder = FrameDecoder()
    decoder.feed(data)
    with pytest.raises(RemoteProtocolError) as caught:
        list(decoder)
    return caught.value.code


@given(frames, st.data())
def test_any_split_of_the_bytes_gives_the_same_frames(
    items: list[Frame], data: st.DataObject
) -> None:
    whole = encoded(items)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    decoder, got = FrameDecoder(), []
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        decoder.feed(whole[start:end])
        got += list(decoder)
    assert got == items
    assert not decoder.mid_frame


@given(frames, st.data())
def test_a_reader_that_stops_early_loses_and_repeats_nothing(
    items: list[Frame], data: st.DataObject
) -> None:
    decoder = FrameDecoder()
    decoder.feed(encoded(items))
    got: list[Frame] = []
    while len(got) < len(items):
        wanted = data.draw(st.integers(1, len(items) - len(got)))
        reader = iter(decoder)
        got += [next(reader) for _ in range(wanted)]
        del reader
    assert got == items
    assert list(decoder) == []
    assert not decoder.mid_frame


@given(frames, st.integers(1, 300))
def test_bytes_may_be_fed_while_frames_are_read(items: list[Frame], size: int) -> None:
    whole = encoded(items)
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    decoder, got = FrameDecoder(), []
    while pieces:
        decoder.feed(memoryview(pieces.pop(0)))
        for frame in decoder:
            got.append(frame)
            if pieces:
                decoder.feed(bytearray(pieces.pop(0)))
    got += list(decoder)
    assert got == items


@given(st.binary(max_size=400))
def test_any_bytes_are_frames_or_raise_the_one_error(data: bytes) -> None:
    decoder = FrameDecoder()
    decoder.feed(data)
    try:
        got = list(decoder)
    except RemoteProtocolError:
        return
    assert data.startswith(encoded(got))


@pytest.mark.parametrize("kind", FrameKind)
def test_a_frame_is_length_kind_and_body(kind: FrameKind) -> None:
    assert encode_frame(kind, b"abc") == struct.pack(">IB", 4, kind) + b"abc"
    assert frame_header(kind, 3) == encode_frame(kind, b"abc")[:HEAD_BYTES]


def test_the_largest_frame_passes_and_a_byte_more_does_not() -> None:
    body = bytes(MAX_FRAME_BYTES - 1)
    decoder = FrameDecoder()
    decoder.feed(encode_frame(FrameKind.DATA, body))
    assert list(decoder) == [(FrameKind.DATA, body)]
    with pytest.raises(LocalProtocolError):
        encode_frame(FrameKind.DATA, body + b"\0")
    assert refused(struct.pack(">IB", MAX_FRAME_BYTES + 1, FrameKind.DATA)) is ErrorCode.TOO_LARGE


def test_the_largest_chunk_fits_a_frame() -> None:
    assert 1 + CHUNK_PLAINTEXT_BYTES + CHUNK_OVERHEAD_BYTES <= MAX_FRAME_BYTES


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_from_the_head_alone(length: int) -> None:
    assert refused(struct.pack(">IB", length, FrameKind.DATA)) is ErrorCode.TOO_LARGE


def test_an_unknown_kind_is_refused_before_its_body_comes() -> None:
    for kind in set(range(256)) - {int(k) for k in FrameKind}:
        assert refused(struct.pack(">IB", 1000, kind)) is ErrorCode.MALFORMED


def test_what_came_before_a_bad_frame_is_given_once_and_the_bad_one_stays_refused() -> None:
    decoder = FrameDecoder()
    decoder.feed(encode_frame(FrameKind.DATA, b"good") + b"\xff" * 8)
    reader = iter(decoder)
    assert next(reader) == (FrameKind.DATA, b"good")
    for attempt in (reader, decoder):
        with pytest.raises(RemoteProtocolError):
            next(iter(attempt))


def test_an_end_inside_a_frame_shows() -> None:
    whole = encode_frame(FrameKind.DATA, b"abc")
    for size in range(1, len(whole)):
        decoder = FrameDecoder()
        decoder.feed(whole[:size])
        assert list(decoder) == []
        assert decoder.mid_frame


def test_a_decoder_holds_no_more_than_one_frame_behind() -> None:
    decoder = FrameDecoder()
    frame = encode_frame(FrameKind.DATA, bytes(100_000))
    for _ in range(50):
        decoder.feed(frame)
        assert len(list(decoder)) == 1
        assert not decoder.mid_frame
