"""Checkpoints in files: a program's carry after so many steps.

A safetensors file: the carry by name, and in its metadata the number of steps done and a hash of
the program, so that a checkpoint of another program is refused before anything is sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save

from nextgpu_node.cli.files import check_writable, write_whole
from nextgpu_node.cli.inputs import StepInputs, read_tensors
from nextgpu_node.errors import UsageError
from nextgpu_node.graph.tensors import DTYPE_NAMES, SymbolBinding
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import ProgramSpec, encode_program

if TYPE_CHECKING:
    from torch import Tensor

_EVERY = re.compile(r"(\d+)\s*(ms|s|m|h|steps?)")
_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}


@dataclass(frozen=True, slots=True)
class Interval:
    """How often the carry comes back: each `ms`, or after each `steps`; 0 for never."""

    ms: int = 0
    steps: int = 0


def parse_interval(text: str) -> Interval:
    """`30s`, `5m`, `1h` or `100steps`.  UsageError otherwise."""
    match = _EVERY.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise UsageError(
            f"--checkpoint-every takes a time or steps (30s, 5m, 100steps), not {text!r}."
        )
    number, unit = int(match[1]), match[2]
    return Interval(ms=number * _MS[unit]) if unit in _MS else Interval(steps=number)


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run begins: after `steps` steps, with `carry`; None for the program's own start."""

    steps: int = 0
    carry: Mapping[str, Tensor] | None = None

    def rest_of(self, inputs: StepInputs) -> StepInputs:
        """What is left to do.  UsageError where nothing is."""
        left = inputs.count - self.steps
        if left < 1:
            raise UsageError(
                f"The checkpoint is from after step {self.steps}, there are {inputs.count}: "
                "nothing is left to do."
            )
        tensors = inputs.tensors
        if inputs.sliced:
            tensors = {name: tensor[self.steps :] for name, tensor in tensors.items()}
        return replace(inputs, tensors=tensors, count=left)


class CheckpointFile:
    """The file that always holds the latest checkpoint, whole."""

    def __init__(self, path: Path, spec: ProgramSpec, since: Resumed) -> None:
        self.path = path
        self._hash = program_hash(spec)
        self._since = since
        self.steps: int | None = None

    def write(self, steps: int, carry: Mapping[str, Tensor]) -> None:
        """Replace what the file holds; `steps` counts from where this run began."""
        done = self._since.steps + steps
        metadata = {"nextgpu": "checkpoint", "steps": str(done), "program": self._hash}
        write_whole(self.path, [save(dict(carry), metadata)], force=True)
        self.steps = done


def check_checkpoint_out(path: Path, resume_from: Path | None, *, force: bool) -> None:
    """Raise UsageError where checkpoints could not be written there later."""
    # To go on in the same file is what one wants.
    same = resume_from is not None and path.resolve() == resume_from.resolve()
    check_writable(path, force=force or same)


def program_hash(spec: ProgramSpec) -> str:
    """Tells programs apart, whatever their weights."""
    return blake2b(encode_program(spec), digest_size=16).hexdigest()


def load_checkpoint(path: Path, spec: ProgramSpec) -> Resumed:
    """The checkpoint at `path`, which must be one of the program.  UsageError says why not."""
    carry = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    steps = metadata.get("steps", "")
    if metadata.get("nextgpu") != "checkpoint" or not steps.isdecimal():
        raise UsageError(f"{path}: is not a checkpoint of `nextgpu run --checkpoint-out`.")
    if metadata.get("program") != program_hash(spec):
        raise UsageError(f"{path}: is a checkpoint of another program.")
    _check_carry(path, spec, carry)
    return Resumed(int(steps), {one.name: carry[one.name] for one in spec.carry})


def _check_carry(path: Path, spec: ProgramSpec, carry: Mapping[str, Tensor]) -> None:
    binding = SymbolBinding()
    for one in spec.carry:
        tensor = carry.get(one.name)
        if tensor is None or DTYPE_NAMES.get(tensor.dtype) != one.dtype:
            raise UsageError(
                f"{path}: has no {one.name} of {one.dtype}, which the program carries."
            )
        try:
            binding.match_untrusted(one, tensor.shape)
        except RemoteProtocolError as exc:
            raise UsageError(f"{path}: {exc.detail}.") from exc
