"""A program in this process, by the same road as in a worker: encoded, decoded, checked, run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.machine import Machine
from nextgpu_node.graph.tensors import TensorImageReader, encode_tensors, image_bytes
from nextgpu_protocol.program import (
    ProgramSpec,
    TensorSpec,
    decode_program_untrusted,
    encode_program,
)

DEFAULT_MAX_LIVE_BYTES = 64 * 1024**3


def run_local(
    program: Program,
    *inputs: Any,
    device: str = "cpu",
    max_live_bytes: int = DEFAULT_MAX_LIVE_BYTES,
    **named: Any,
) -> dict[str, torch.Tensor]:
    """One step of `program` in this process; the outputs by name.

    Tensors in `inputs` (containers are flattened) fill, in order, the program's inputs that
    `named` does not give.  ProgramError for inputs that do not fit; RemoteProtocolError, as on a
    worker, for a program that is refused there.
    """
    xs = match_inputs(program.spec, inputs, named)
    machine = make_machine(program, device=device, max_live_bytes=max_live_bytes)
    return machine.step(_travel(xs, program.spec.xs)).ys


def make_machine(
    program: Program, *, device: str = "cpu", max_live_bytes: int = DEFAULT_MAX_LIVE_BYTES
) -> Machine:
    """A machine loaded with `program`, whose every byte went through the wire format."""
    spec = decode_program_untrusted(encode_program(program.spec))
    machine = Machine(spec, device=device, max_live_bytes=max_live_bytes)
    machine.load_constants(_travel(program.constants, spec.constants))
    if program.carry or spec.init is None:
        machine.load_carry(_travel(program.carry, spec.carry))
    else:
        machine.init_carry()
    return machine


def match_inputs(
    spec: ProgramSpec, inputs: Sequence[Any], named: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of a call by the names of the program's inputs.  ProgramError on a mismatch."""
    given = {
        name: tensor for key, value in named.items() for name, tensor in _named_leaves(key, value)
    }
    known = [one.name for one in spec.xs]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ProgramError(f"There is no input {unknown[0]}; the inputs are: {', '.join(known)}.")
    free = [name for name in known if name not in given]
    leaves = [leaf for leaf in pytree.tree_leaves(tuple(inputs)) if isinstance(leaf, torch.Tensor)]
    if len(leaves) != len(free):
        raise ProgramError(
            f"{len(free)} more inputs are needed ({', '.join(free)}), {len(leaves)} were given."
        )
    given.update(zip(free, leaves, strict=True))
    return {name: given[name] for name in known}


def _named_leaves(key: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    leaves, _ = pytree.tree_flatten_with_path(value)
    return [(join_path(key, path), leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]


def join_path(name: str, path: Sequence[Any]) -> str:
    """The name of a tensor inside containers: `cache`, (key 0, key "k") -> `cache.0.k`."""
    parts = [name] if name else []
    for key in path:
        match key:
            case pytree.MappingKey():
                parts.append(str(key.key))
            case pytree.SequenceKey():
                parts.append(str(key.idx))
            case pytree.GetAttrKey():
                parts.append(key.name)
            case _:
                parts.append(str(key))
    return ".".join(parts)


def _travel(
    tensors: Mapping[str, torch.Tensor], expected: Sequence[TensorSpec]
) -> dict[str, torch.Tensor]:
    reader = TensorImageReader(expected, max_bytes=image_bytes(tensors))
    for piece in encode_tensors(tensors):
        reader.feed(piece)
    return reader.finish()
