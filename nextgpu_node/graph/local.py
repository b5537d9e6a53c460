"""A program in this process, by the same road as in a worker: encoded, decoded, checked, run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.calls import tensor_leaves
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
        path: tensor for key, value in named.items() for path, tensor in tensor_leaves(value, key)
    }
    known = [one.name for one in spec.xs]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ProgramError(f"There is no input {unknown[0]}; the inputs are: {', '.join(known)}.")
    free = [name for name in known if name not in given]
    leaves = [tensor for _, tensor in tensor_leaves(tuple(inputs))]
    if len(leaves) != len(free):
        raise ProgramError(
            f"{len(free)} more inputs are needed ({', '.join(free)}), {len(leaves)} were given."
        )
    given.update(zip(free, leaves, strict=True))
    return {name: given[name] for name in known}


def _travel(
    tensors: Mapping[str, torch.Tensor], expected: Sequence[TensorSpec]
) -> dict[str, torch.Tensor]:
    reader = TensorImageReader(expected, max_bytes=image_bytes(tensors))
    for piece in encode_tensors(tensors):
        reader.feed(piece)
    return reader.finish()
