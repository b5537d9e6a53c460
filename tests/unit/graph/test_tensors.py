"""safetensors images, written and read by hand, against the package and against bad headers."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from nextgpu_node.graph.tensors import TensorImageReader, encode_tensors, image_bytes
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.program import TensorSpec

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "half": torch.randn(2, 3).half(),
    "brain": torch.randn(3).bfloat16(),
    "ids": torch.arange(5),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "small": torch.tensor([-1, 2], dtype=torch.int8),
    "short": torch.tensor([-3], dtype=torch.int16),
    "word": torch.tensor([[4]], dtype=torch.int32),
    "wide": torch.randn(2, dtype=torch.float64),
    "complex": torch.randn(2, dtype=torch.complex64),
    "empty": torch.zeros(0, 4),
}


def joined(tensors) -> bytes:
    return b"".join(bytes(piece) for piece in encode_tensors(tensors))


def read(data, expected=None, *, max_bytes=1 << 20, step=1 << 20):
    reader = TensorImageReader(expected, max_bytes=max_bytes)
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
    return reader.finish()


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype is right[name].dtype
        assert torch.equal(tensor, right[name]), name


def test_the_package_reads_our_images():
    assert_same(load(joined(TENSORS)), TENSORS)
    assert len(joined(TENSORS)) == image_bytes(TENSORS)


def test_we_read_the_images_of_the_package():
    assert_same(read(save(TENSORS)), TENSORS)


@pytest.mark.parametrize("step", [1, 3, 8, 1000])
def test_pieces_may_be_cut_anywhere(step):
    assert_same(read(joined(TENSORS), step=step), TENSORS)


def test_strided_tensors_are_written_in_row_major_order():
    tensors = {"t": torch.arange(6).reshape(2, 3).T}
    assert torch.equal(read(joined(tensors))["t"], tensors["t"])


def test_pieces_share_the_memory_of_their_tensors():
    tensor = torch.zeros(4, dtype=torch.uint8)
    _, piece = encode_tensors({"t": tensor})
    tensor[2] = 7
    assert bytes(piece) == b"\0\0\7\0"


def test_symbols_bind_alike_in_all_tensors():
    specs = (
        TensorSpec("ids", "int64", ("batch", "length")),
        TensorSpec("mask", "int64", ("batch", "length")),
    )
    good = {"ids": torch.zeros(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5).long()}
    reader = TensorImageReader(specs, max_bytes=1000)
    reader.feed(joined(good))
    assert_same(reader.finish(), good)
    assert reader.binding == {"batch": 2, "length": 5}
    with pytest.raises(RemoteProtocolError, match="length is 5 elsewhere, here 4"):
        read(joined(good | {"mask": torch.ones(2, 4).long()}), specs)


def image(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="U8", shape=(2,), offsets=(0, 2), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


ONE = (TensorSpec("a", "uint8", (2,)),)
BAD = {
    "not JSON": image(b"{"),
    "not UTF-8": image(b'{"\xff": 1}'),
    "not an object": image([]),
    "depth": image(b"[" * 50_000),
    "digits": image(b'{"a": ' + b"9" * 5000 + b"}"),
    "a float": image(b'{"a": 1.0}'),
    "not-a-number": image(b'{"a": NaN}'),
    "a key twice": image(b'{"a": {}, "a": {}}'),
    "an entry that is no object": image({"a": 1}),
    "a field too many": image({"a": entry(more=1)}, b"ab"),
    "an unknown dtype": image({"a": entry(dtype="F128")}, b"ab"),
    "a dtype that is no text": image({"a": entry(dtype=["U8"])}, b"ab"),
    "a negative size": image({"a": entry(shape=(-2, -1))}, b"ab"),
    "a boolean as a size": image({"a": entry(shape=(True, 2))}, b"ab"),
    "too many dimensions": image({"a": entry(shape=(1,) * 40 + (2,))}, b"ab"),
    "three offsets": image({"a": entry(offsets=(0, 2, 2))}, b"ab"),
    "offsets backwards": image({"a": entry(offsets=(2, 0))}, b"ab"),
    "offsets that lie about the shape": image({"a": entry(shape=(3,))}, b"ab"),
    "a hole before the data": image({"a": entry(offsets=(1, 3))}, b"abc"),
    "another name": image({"b": entry()}, b"ab"),
    "a tensor too many": image({"a": entry(), "b": entry(offsets=(2, 4))}, b"abcd"),
    "overlapping tensors": image({"a": entry(), "b": entry(offsets=(1, 3))}, b"abc"),
    "another dtype": image({"a": entry(dtype="I8")}, b"ab"),
    "another shape": image({"a": entry(shape=(2, 1))}, b"ab"),
    "another size": image({"a": entry(shape=(3,), offsets=(0, 3))}, b"abc"),
    "metadata": image({"a": entry(), "__metadata__": {"x": "y"}}, b"ab"),
    "bytes after the end": image({"a": entry()}, b"abc"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused(name):
    with pytest.raises(RemoteProtocolError) as caught:
        read(BAD[name], ONE)
    assert caught.value.code is ErrorCode.BAD_TENSORS


@pytest.mark.parametrize("cut", [0, 5, 8, 20, -1])
def test_an_image_cut_short_is_refused(cut):
    with pytest.raises(RemoteProtocolError) as caught:
        read(image({"a": entry()}, b"ab")[:cut], ONE)
    assert caught.value.code is ErrorCode.TRUNCATED


def test_sizes_are_bounded_before_anything_is_allocated():
    petabyte = image({"a": entry(shape=(2**50,), offsets=(0, 2**50))})
    header = struct.pack("<Q", 2**60)
    for data in (petabyte, header):
        with pytest.raises(RemoteProtocolError) as caught:
            read(data, None)
        assert caught.value.code in (ErrorCode.TOO_LARGE, ErrorCode.BAD_TENSORS)


@given(st.binary(max_size=120), st.integers(1, 40))
def test_any_header_ends_in_tensors_or_a_protocol_error(header, step):
    try:
        read(image(header), None, max_bytes=4096, step=step)
    except RemoteProtocolError:
        return
