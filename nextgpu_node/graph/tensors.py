"""One safetensors image as a stream.  Spec: 60-program.md#tensors

    u64 little-endian header length ‖ JSON header, padded with spaces to 8 bytes ‖ data

Written and read here by hand, so that images stream in both directions without a joined copy and
a hostile header costs nothing.  Data goes straight into the buffers of the tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.program import DTYPE_BYTES, TensorSpec
from nextgpu_protocol.program_limits import (
    MAX_DIMENSION,
    MAX_NAME_BYTES,
    MAX_RANK,
    MAX_TENSOR_HEADER_BYTES,
    MAX_TENSORS,
)

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_IMAGE_CODES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_NAMES_OF_CODES = {code: name for name, code in _IMAGE_CODES.items()}

_LENGTH = struct.Struct("<Q")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The pieces of one image: the header, then each tensor's bytes in row-major order.

    A piece is a view of its tensor where that is contiguous and in main memory; it is valid only
    until the next piece is asked for.  KeyError where a dtype is not in the format.
    """
    yield _encode_header(tensors)
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor_bytes(tensor.detach().cpu().contiguous())


def image_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """The length in bytes of the image of `tensors`."""
    return len(_encode_header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor with elements, writable, shared."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec that only tensors like `tensor` match.  KeyError for a dtype not in the format."""
    return TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def _encode_header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": _IMAGE_CODES[DTYPE_NAMES[tensor.dtype]],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


@dataclass(frozen=True, slots=True)
class _Slot:
    """A tensor that is being filled: `target` is None where it has no elements."""

    tensor: torch.Tensor
    target: memoryview | None


class SymbolBinding:
    """Sizes of symbols, fixed by the first tensor that shows one."""

    def __init__(self, sizes: Mapping[str, int] | None = None) -> None:
        self.sizes: dict[str, int] = dict(sizes or {})

    def match_untrusted(self, spec: TensorSpec, shape: Sequence[int]) -> None:
        """Raise BAD_TENSORS unless `shape` fits `spec` and all that was bound before."""
        if len(shape) != len(spec.shape):
            _bad(f"{spec.name}: {len(spec.shape)} dimensions are declared, {len(shape)} came")
        for declared, size in zip(spec.shape, shape, strict=True):
            if isinstance(declared, str):
                if self.sizes.setdefault(declared, size) != size:
                    _bad(
                        f"{spec.name}: {declared} is {self.sizes[declared]} elsewhere, here {size}"
                    )
            elif declared is not None and declared != size:
                _bad(f"{spec.name}: a dimension of {declared} is declared, {size} came")


class TensorImageReader:
    """Reads one image piece by piece, as they arrive, into tensors that it allocates.

    `expected`: exactly these names, dtypes and shapes, symbols bound consistently; None: any.
    `max_bytes` bounds the whole image and so what is allocated.  Raises RemoteProtocolError
    (BAD_TENSORS, TOO_LARGE, TRUNCATED), nothing else.
    """

    def __init__(self, expected: Sequence[TensorSpec] | None, *, max_bytes: int) -> None:
        self._expected = None if expected is None else {spec.name: spec for spec in expected}
        self._max_bytes = max_bytes
        self._head = bytearray()
        self._head_bytes: int | None = None
        self._slots: dict[str, _Slot] | None = None
        self._targets: list[memoryview] = []
        self._filled = 0
        self._binding = SymbolBinding()

    @property
    def binding(self) -> dict[str, int]:
        """The sizes of the symbols of `expected`, known once the header was read."""
        return self._binding.sizes

    def feed_untrusted(self, piece: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the image.  `piece` is copied and may be reused after."""
        rest = memoryview(piece)
        if self._slots is None:
            rest = self._feed_head(rest)
        while rest.nbytes:
            if not self._targets:
                _bad("bytes follow the last tensor")
            target = self._targets[-1]
            count = min(rest.nbytes, target.nbytes - self._filled)
            target[self._filled : self._filled + count] = rest[:count]
            rest = rest[count:]
            self._filled += count
            if self._filled == target.nbytes:
                self._targets.pop()
                self._filled = 0

    feed = feed_untrusted

    def finish_untrusted(self) -> dict[str, torch.Tensor]:
        """The tensors, in the order of `expected`.  TRUNCATED unless every byte has come."""
        if self._slots is None or self._targets:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, "tensor image")
        order = self._slots if self._expected is None else self._expected
        return {name: self._slots[name].tensor for name in order}

    finish = finish_untrusted

    def _feed_head(self, rest: memoryview) -> memoryview:
        """Collect length and header; what follows them is returned."""
        if self._head_bytes is None:
            rest = self._collect(rest, _LENGTH.size)
            if len(self._head) < _LENGTH.size:
                return rest
            (length,) = _LENGTH.unpack(self._head)
            if length > min(MAX_TENSOR_HEADER_BYTES, self._max_bytes):
                raise RemoteProtocolError(ErrorCode.TOO_LARGE, "tensor header")
            self._head_bytes = _LENGTH.size + int(length)
        rest = self._collect(rest, self._head_bytes)
        if len(self._head) == self._head_bytes:
            self._open(bytes(self._head[_LENGTH.size :]))
            self._head.clear()
        return rest

    def _collect(self, rest: memoryview, until: int) -> memoryview:
        count = min(rest.nbytes, until - len(self._head))
        self._head += rest[:count]
        return rest[count:]

    def _open(self, header: bytes) -> None:
        layout = sorted(_parse_header(header), key=lambda entry: (entry.begin, entry.end))
        end = 0
        for entry in layout:
            if entry.begin != end:
                _bad(f"{entry.spec.name}: data is not contiguous")
            end = entry.end
        if _LENGTH.size + len(header) + end > self._max_bytes:
            raise RemoteProtocolError(ErrorCode.TOO_LARGE, "tensor image")
        self._match([entry.spec for entry in layout])
        # Only now is anything allocated: the sizes are bounded and as declared.
        self._slots = {entry.spec.name: _allocate(entry.spec) for entry in layout}
        targets = [slot.target for slot in self._slots.values() if slot.target is not None]
        self._targets = targets[::-1]

    def _match(self, found: Sequence[TensorSpec]) -> None:
        if self._expected is None:
            return
        by_name = {spec.name: spec for spec in found}
        if by_name.keys() != self._expected.keys():
            missing = sorted(self._expected.keys() - by_name.keys())
            _bad(f"missing: {missing[:3]}" if missing else "a tensor was not asked for")
        # In declared order, so that errors do not depend on how the image was laid out.
        for name, spec in self._expected.items():
            if by_name[name].dtype != spec.dtype:
                _bad(f"{name}: {spec.dtype} is declared, {by_name[name].dtype} came")
            self._binding.match_untrusted(spec, [int(size or 0) for size in by_name[name].shape])


@dataclass(frozen=True, slots=True)
class _Entry:
    spec: TensorSpec
    begin: int
    end: int


def _allocate(spec: TensorSpec) -> _Slot:
    shape = [int(size or 0) for size in spec.shape]
    # Never read before it is filled: finish() hands out nothing unless every byte has come.
    tensor = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype])
    return _Slot(tensor, tensor_bytes(tensor) if tensor.numel() else None)


def _parse_header(header: bytes) -> list[_Entry]:
    try:
        plain = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    # Text that is not UTF-8, numbers of thousands of digits and bad JSON are all ValueErrors.
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError(ErrorCode.BAD_TENSORS, "the header is not JSON") from exc
    if type(plain) is not dict:
        _bad("the header is not an object")
    if len(plain) > MAX_TENSORS:
        raise RemoteProtocolError(ErrorCode.TOO_LARGE, f"more than {MAX_TENSORS} tensors")
    return [_parse_entry(name, entry) for name, entry in plain.items()]


def _parse_entry(name: str, entry: Any) -> _Entry:
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES or not name.isprintable():
        _bad("a name is too long or unprintable")
    if type(entry) is not dict or entry.keys() != _ENTRY_KEYS:
        _bad(f"{name}: not the fields of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _NAMES_OF_CODES:
        _bad(f"{name}: unknown dtype")
    if not _are_sizes(shape, MAX_DIMENSION) or len(shape) > MAX_RANK:
        _bad(f"{name}: not a shape")
    if not _are_sizes(offsets, 2**62) or len(offsets) != 2:
        _bad(f"{name}: not data offsets")
    spec = TensorSpec(name, _NAMES_OF_CODES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes():
        _bad(f"{name}: offsets and shape disagree")
    return _Entry(spec, offsets[0], offsets[1])


def _are_sizes(plain: Any, bound: int) -> bool:
    return type(plain) is list and all(type(item) is int and 0 <= item <= bound for item in plain)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key repeats")
    return found


def _no_float(text: str) -> NoReturn:
    raise ValueError("a number is not an integer")


def _bad(detail: str) -> NoReturn:
    raise RemoteProtocolError(ErrorCode.BAD_TENSORS, detail)


assert DTYPE_BYTES.keys() == TORCH_DTYPES.keys() == _IMAGE_CODES.keys()
