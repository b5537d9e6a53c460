"""Records come out as they went in, and sizes on the wire tell only a size class."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.limits import CHUNK_PLAINTEXT_BYTES, KIB, MIB, PADDING_FLOOR_BYTES
from nextgpu_protocol.records import (
    RECORD_HEAD_BYTES,
    RecordKind,
    RecordWriter,
    read_records_untrusted,
)
from nextgpu_protocol.sealing import padded_size

Body = tuple[RecordKind, bytes]
KINDS = [kind for kind in RecordKind if kind is not RecordKind.PADDING]

# Long bodies are made of few numbers: hypothesis need not draw each byte.
pieces = st.builds(
    lambda size, seed: (bytes(range(256)) * (size // 256 + 1))[seed : seed + size],
    st.integers(0, 300) | st.integers(0, 600_000),
    st.integers(0, 255),
)
bodies = st.lists(st.tuples(st.sampled_from(KINDS), st.lists(pieces, max_size=3)), max_size=4)


def written(writer: RecordWriter, items: Iterable[tuple[RecordKind, list[bytes]]]) -> list[bytes]:
    chunks = [chunk for kind, parts in items for chunk in writer.write(kind, parts)]
    return chunks + list(writer.flush())


def joined(chunks: Iterable[bytes]) -> list[Body]:
    """Whole bodies, fragments put together."""
    found: list[Body] = []
    open_body = b""
    for chunk in chunks:
        for record in read_records_untrusted(chunk):
            open_body += bytes(record.body)
            if not record.more:
                found.append((record.kind, open_body))
                open_body = b""
    assert open_body == b""
    return found


def one_body(size: int) -> list[int]:
    """The chunk sizes of a stream that carries one body of `size` bytes."""
    return [len(chunk) for chunk in written(RecordWriter(), [(RecordKind.STEP, [bytes(size)])])]


@settings(max_examples=60, deadline=None)
@given(bodies, bodies)
def test_bodies_come_back_as_they_were(
    first: list[tuple[RecordKind, list[bytes]]], second: list[tuple[RecordKind, list[bytes]]]
) -> None:
    writer = RecordWriter()
    chunks = written(writer, first) + written(writer, second)
    assert joined(chunks) == [(kind, b"".join(parts)) for kind, parts in first + second]
    assert all(len(chunk) <= CHUNK_PLAINTEXT_BYTES for chunk in chunks)


@pytest.mark.parametrize("left", range(-8, 9))
def test_a_body_that_just_fills_a_chunk_comes_back(left: int) -> None:
    body = bytes(range(256)) * 1025
    first = body[: CHUNK_PLAINTEXT_BYTES - RECORD_HEAD_BYTES + left]
    chunks = written(RecordWriter(), [(RecordKind.STEP, [first]), (RecordKind.RESULT, [b"next"])])
    assert joined(chunks) == [(RecordKind.STEP, first), (RecordKind.RESULT, b"next")]


@pytest.mark.parametrize("size", [300 * KIB, 512 * KIB, MIB])
def test_a_long_body_is_cut_into_records_of_one_kind_that_say_more(size: int) -> None:
    chunks = written(RecordWriter(), [(RecordKind.CONSTANTS, [bytes(size)])])
    records = [record for chunk in chunks for record in read_records_untrusted(chunk)]
    assert {record.kind for record in records} == {RecordKind.CONSTANTS}
    assert [record.more for record in records] == [True] * (len(records) - 1) + [False]


def test_a_body_may_be_given_as_any_buffer() -> None:
    numbers = memoryview(struct.pack("<3d", 1, 2, 3)).cast("d")
    items: list[Any] = [bytearray(b"ab"), memoryview(b"cd"), memoryview(b""), numbers]
    writer = RecordWriter()
    chunks = [*writer.write(RecordKind.STEP, items), *writer.flush()]
    assert joined(chunks) == [(RecordKind.STEP, b"abcd" + numbers.tobytes())]


def test_a_flush_with_nothing_written_is_the_smallest_chunk() -> None:
    assert [len(chunk) for chunk in RecordWriter().flush()] == [PADDING_FLOOR_BYTES]


def test_padding_is_zeros_and_never_what_was_there_before() -> None:
    writer = RecordWriter()
    written(writer, [(RecordKind.STEP, [b"\xaa" * 200_000])])
    (chunk,) = written(writer, [(RecordKind.STEP, [b"short"])])
    assert chunk[RECORD_HEAD_BYTES + 5 :] == bytes(len(chunk) - RECORD_HEAD_BYTES - 5)
    # And where the end of a chunk is too short for a record's head.
    tight = b"\xbb" * (CHUNK_PLAINTEXT_BYTES - RECORD_HEAD_BYTES - 3)
    first, *_ = written(writer, [(RecordKind.STEP, [tight]), (RecordKind.STEP, [b"x"])])
    assert first[-3:] == bytes(3)


@given(st.integers(0, 64 * 1024**3), st.integers(0, 64 * 1024**3))
def test_padded_size_grows_with_its_content(a: int, b: int) -> None:
    small, large = sorted((a, b))
    assert padded_size(small) <= padded_size(large)


@given(st.integers(PADDING_FLOOR_BYTES + 1, 64 * 1024**3))
def test_padding_costs_at_most_twelve_percent(size: int) -> None:
    assert size <= padded_size(size) <= size * 1.12
    assert padded_size(padded_size(size)) == padded_size(size)


def test_small_contents_all_look_alike() -> None:
    assert {padded_size(size) for size in range(PADDING_FLOOR_BYTES + 1)} == {PADDING_FLOOR_BYTES}


@pytest.mark.parametrize(
    ("size", "padded"),
    [(0, 4096), (4096, 4096), (4097, 4352), (8192, 8192), (8193, 8704), (10_000, 10_240),
     (262_144, 262_144), (262_145, 270_336), (1_000_000, 1_015_808)],
)  # fmt: skip
def test_padded_sizes_are_those_of_the_spec(size: int, padded: int) -> None:
    assert padded_size(size) == padded


@settings(max_examples=40, deadline=None)
@given(st.integers(0, CHUNK_PLAINTEXT_BYTES - 64), st.data())
def test_two_inputs_of_one_size_class_look_alike(size: int, data: st.DataObject) -> None:
    other = data.draw(st.integers(size // 2, CHUNK_PLAINTEXT_BYTES - 64))
    same_class = padded_size(size + RECORD_HEAD_BYTES) == padded_size(other + RECORD_HEAD_BYTES)
    assert (one_body(size) == one_body(other)) is same_class


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3 * MIB), st.integers(1, 8))
def test_chunk_sizes_follow_from_the_padded_total_alone(size: int, parts: int) -> None:
    cut = [bytes(size // parts)] * parts
    sizes = [len(chunk) for chunk in written(RecordWriter(), [(RecordKind.STEP, cut)])]
    full, rest = divmod(sum(sizes), CHUNK_PLAINTEXT_BYTES)
    assert sizes == [CHUNK_PLAINTEXT_BYTES] * full + ([rest] if rest else [])
    assert padded_size(sum(sizes)) == sum(sizes)


def test_padding_of_a_large_body_goes_on_over_whole_chunks() -> None:
    # From 16 MiB on one step of the size classes is longer than a chunk.
    size = 17 * MIB
    sizes = one_body(size)
    assert sizes == one_body(size + 1000)
    assert sum(sizes) == 35 * 512 * KIB
    assert max(sizes) == CHUNK_PLAINTEXT_BYTES


def refused(chunk: bytes) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        list(read_records_untrusted(chunk))
    return caught.value.code


@given(st.binary(max_size=200))
def test_any_plaintext_is_records_or_raises_the_one_error(plaintext: bytes) -> None:
    try:
        records = list(read_records_untrusted(plaintext))
    except RemoteProtocolError:
        return
    again = b"".join(
        struct.pack(">BBI", r.kind, r.more, len(r.body)) + bytes(r.body) for r in records
    )
    assert plaintext.startswith(again)
    assert plaintext[len(again) : len(again) + 1] in (b"", b"\0")


@pytest.mark.parametrize("length", [1, 4, 2**31, 2**32 - 1])
def test_a_length_past_the_chunk_is_malformed(length: int) -> None:
    assert refused(struct.pack(">BBI", RecordKind.STEP, 0, length)) is ErrorCode.MALFORMED


def test_an_unknown_record_kind_is_malformed() -> None:
    for kind in set(range(1, 256)) - {int(k) for k in RecordKind}:
        assert refused(struct.pack(">BBI", kind, 0, 0)) is ErrorCode.MALFORMED


def test_an_unknown_flag_is_malformed() -> None:
    for flags in range(2, 256):
        assert refused(struct.pack(">BBI", RecordKind.STEP, flags, 0)) is ErrorCode.MALFORMED


@pytest.mark.parametrize("size", range(1, RECORD_HEAD_BYTES))
def test_a_cut_record_head_is_malformed(size: int) -> None:
    assert refused(struct.pack(">BBI", RecordKind.STEP, 0, 0)[:size]) is ErrorCode.MALFORMED


def test_what_follows_padding_is_not_read() -> None:
    assert list(read_records_untrusted(b"\0" + b"\xff" * 100)) == []
