"""Values with tensors and arrays in them <-> the body of a VALUE record.  Spec: 65-python.md#values

u32 tree bytes (big-endian) ‖ tree (nextgpu_protocol.values) ‖ safetensors image
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from nextgpu_node.graph.tensors import DTYPE_NAMES, TensorImageReader, encode_tensors
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.values import Buffer, decode_value_untrusted, encode_value

_LENGTH: Final = struct.Struct(">I")


def encode_with_tensors(value: Any) -> Iterator[bytes | memoryview]:
    """The pieces of the body.  LocalProtocolError names the type of what is not plain data."""
    tensors: dict[str, torch.Tensor] = {}

    def as_buffer(one: Any) -> Buffer | None:
        found = _as_tensor(one)
        if found is None:
            return None
        kind, tensor = found
        tensors[str(len(tensors))] = tensor
        return Buffer(kind, len(tensors) - 1)

    tree = encode_value(value, as_buffer)
    yield _LENGTH.pack(len(tree)) + tree
    yield from encode_tensors(tensors)


def _as_tensor(one: Any) -> tuple[str, torch.Tensor] | None:
    if isinstance(one, torch.Tensor):
        kind, tensor = "t", one
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise LocalProtocolError("a tensor is not dense")
    elif isinstance(one, np.ndarray | np.generic) and one.dtype.kind in "biufc":
        kind = "a" if isinstance(one, np.ndarray) else "z"
        try:
            tensor = torch.from_numpy(np.array(one, order="C", ndmin=0))
        except TypeError as exc:
            raise LocalProtocolError(f"an array of {one.dtype} is not plain data") from exc
    else:
        return None
    if tensor.dtype not in DTYPE_NAMES:
        raise LocalProtocolError(f"a tensor or array of {tensor.dtype} is not plain data")
    return kind, tensor.detach()


def decode_with_tensors_untrusted(body: bytes | bytearray) -> Any:
    """The value in `body`.  Raises RemoteProtocolError, nothing else; runs and imports nothing."""
    if len(body) < _LENGTH.size:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "value")
    (length,) = _LENGTH.unpack_from(body)
    end = _LENGTH.size + length
    if end > len(body):
        raise RemoteProtocolError(ErrorCode.MALFORMED, "value")
    reader = TensorImageReader(None, max_bytes=len(body) - end)
    reader.feed_untrusted(memoryview(body)[end:])
    tensors = reader.finish_untrusted()

    def take_buffer(buffer: Buffer) -> Any:
        tensor = tensors.get(str(buffer.index))
        if tensor is None:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "value: no such buffer")
        match buffer.kind:
            case "t":
                return tensor
            case "a":
                return _array(tensor)
            case _:
                if tensor.dim():
                    raise RemoteProtocolError(ErrorCode.MALFORMED, "value: not a scalar")
                return _array(tensor)[()]

    return decode_value_untrusted(bytes(body[_LENGTH.size : end]), take_buffer)


def _array(tensor: torch.Tensor) -> Any:
    if tensor.dtype is torch.bfloat16:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "value: no array has bfloat16")
    return tensor.numpy()
