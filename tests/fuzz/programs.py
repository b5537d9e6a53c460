"""Programs and tensor images as a stranger could send them, from the decoder to the kernels."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
import torch

from nextgpu_node.graph.machine import Machine
from nextgpu_node.graph.optable import TABLE
from nextgpu_node.graph.tensors import TORCH_DTYPES, TensorImageReader
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import (
    DTYPE_BYTES,
    ProgramSpec,
    TensorSpec,
    decode_program_untrusted,
    encode_program,
)
from nextgpu_protocol.program_types import TEXT_LITERALS

MAX_LIVE_BYTES = 16 * 1024**2
_INPUT_BYTES = 2 * 1024**2


def program(data: bytes) -> None:
    """The decoder and the linker: what is taken is written back to the same bytes."""
    try:
        spec = decode_program_untrusted(data)
    except RemoteProtocolError:
        return
    assert encode_program(spec) == data
    _machine(data)


def plan(data: bytes) -> None:
    """As far as shapes go: everything but the kernels."""
    _drive(data, run=False)


def run(data: bytes) -> None:
    """All the way: two steps on inputs that hold edge values."""
    _drive(data, run=True)


def tensors(data: bytes) -> None:
    """The reader of tensor images, fed in pieces."""
    reader = TensorImageReader(None, max_bytes=_INPUT_BYTES)
    try:
        for at in range(0, len(data), 7):
            reader.feed_untrusted(data[at : at + 7])
        found = reader.finish_untrusted()
    except RemoteProtocolError:
        return
    assert sum(one.nbytes for one in found.values()) <= len(data)


def _machine(data: bytes) -> Machine | None:
    try:
        return Machine(
            decode_program_untrusted(data), device="cpu", max_live_bytes=MAX_LIVE_BYTES, max_steps=2
        )
    except RemoteProtocolError:
        return None


def _drive(data: bytes, *, run: bool) -> None:
    machine = _machine(data)
    if machine is None:
        return
    inputs = _inputs(machine.spec)
    if inputs is None:
        return
    if not run:
        machine._run = _results_without_memory  # type: ignore[method-assign]
    constants, carry, xs = inputs
    try:
        machine.load_constants(constants)
        if machine.spec.init is not None:
            machine.init_carry()
        else:
            machine.load_carry(carry)
        for _ in range(2):
            machine.step(xs)
        machine.finish()
    except RemoteProtocolError:
        return


def _results_without_memory(plan: Any, inputs: Any) -> list[torch.Tensor]:
    return [torch.zeros(one.shape, dtype=one.dtype) for one in plan.results]


def _inputs(spec: ProgramSpec) -> tuple[dict[str, torch.Tensor], ...] | None:
    """Tensors as the program declares them, or None where that would be too much."""
    sizes = {symbol.name: max(symbol.minimum, min(3, symbol.maximum)) for symbol in spec.symbols}
    sections = (spec.constants, spec.carry, spec.xs)
    if sum(one.nbytes(sizes) for section in sections for one in section) > _INPUT_BYTES:
        return None
    return tuple({one.name: _tensor(one, sizes) for one in section} for section in sections)


def _tensor(spec: TensorSpec, sizes: dict[str, int]) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else int(size or 0) for size in spec.shape]
    count = math.prod(shape)
    dtype = TORCH_DTYPES[spec.dtype]
    if dtype.is_floating_point or dtype.is_complex:
        edges = (0.5, 1.0, -1.0, float("nan"), float("inf"), 1e30, 0.0)
        plain = torch.tensor([edges[at % 7 if at % 5 == 4 else 0] for at in range(count)])
    else:
        whole = (0, 1, 2, -1, 1, 0, 3, -(2**62), 2, 1, 2**62, 1)
        plain = torch.tensor([whole[at % 12] for at in range(count)], dtype=torch.int64)
    return plain.reshape(shape).to(dtype)


# ---------------------------------------------------------------- changing programs

_WHOLE = (
    *(-(2**63), -(2**40), -9, -2, -1, 0, 1, 2, 3, 4, 5, 8, 16, 64, 1000, 65535),
    *(2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1),
)
_REAL = (0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, float("inf"), float("-inf"))


def change_values(data: bytes, seed: int) -> bytes | None:
    """`data` with a few of its msgpack values changed; None where it is not msgpack."""
    try:
        plain = msgpack.unpackb(data, raw=False)
    except (ValueError, msgpack.UnpackException):
        return None
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        places = list(_places(plain))
        if not places:
            return None
        _change(places, rng)
    try:
        packed: bytes = msgpack.packb(plain, use_bin_type=True)
    except (ValueError, OverflowError, RecursionError):
        return None
    return packed


def _places(plain: Any) -> Iterator[tuple[list[Any], int]]:
    if isinstance(plain, list):
        for at, item in enumerate(plain):
            yield plain, at
            yield from _places(item)


def _change(places: Sequence[tuple[list[Any], int]], rng: random.Random) -> None:
    holder, at = rng.choice(places)
    match rng.randrange(10):
        case 0:
            del holder[at]
        case 1:
            holder.insert(at, holder[at])
        case 2:
            other, there = rng.choice(places)
            if there < len(other):
                holder[at] = msgpack.unpackb(msgpack.packb(other[there]))
        case _:
            holder[at] = _another(holder[at], rng)


def _another(value: Any, rng: random.Random) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return rng.choice((*_WHOLE, value + 1, value - 1, value * 2, None, True, 0.5))
        case float():
            return rng.choice((*_REAL, *_WHOLE))
        case str() if "." in value:
            return rng.choice(_OPERATORS)
        case str():
            return rng.choice((*sorted(TEXT_LITERALS), *DTYPE_BYTES, "t", "tt", "-t", "i", "b"))
        case list():
            return rng.choice((value[::-1], value[:-1], value * 2, [0, rng.choice(_WHOLE)], []))
        case _:
            return rng.choice((0, 1, 0.5, False, [1, [1, 1]], [0, 0], None))


_OPERATORS = tuple(TABLE)
