"""Input tensors: read from a file and held against the program before anything is sent.

Without `--steps-axis` a file holds the inputs of one step; with it, each tensor has one leading
axis more, whose length is the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from nextgpu_node.errors import ProgramError, UsageError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.tensors import DTYPE_NAMES, SymbolBinding
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import ProgramSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


def load_program(path: Path) -> Program:
    """The program at `path`.  Raises ProgramError, which names the file."""
    try:
        return Program.load(path)
    except ProgramError as exc:
        if str(path) in str(exc):
            raise
        raise ProgramError(f"{path}: {exc}") from exc


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name.  Raises UsageError, which names the file."""
    try:
        # Asked first: the library takes a directory or a missing file for a broken one.
        with path.open("rb"):
            pass
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as exc:
        raise UsageError(f"{path}: can not be read: {exc.strerror or exc}.") from exc
    except SafetensorError as exc:
        raise UsageError(
            f"{path}: is not a safetensors file ({exc}). "
            "Write it with safetensors.torch.save_file(tensors, path)."
        ) from exc


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of `count` steps.  `tensors` have a leading axis of steps where `sliced`."""

    tensors: Mapping[str, Tensor]
    count: int
    sliced: bool

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if self.sliced:
            return {name: tensor[index] for name, tensor in self.tensors.items()}
        return dict(self.tensors)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(self.count))


def prepare_steps(
    spec: ProgramSpec, source: Path | None, *, steps_axis: bool, steps: int | None
) -> StepInputs:
    """What to send, checked against `spec`: names, dtypes, shapes, sizes of symbols.

    Raises UsageError, which names the file, the tensor and what was expected.
    """
    if steps is not None and steps < 1:
        raise UsageError("--steps takes a whole number from 1 on.")
    if source is None:
        if spec.xs:
            raise UsageError(f"This program takes inputs ({_names(spec)}). Name a file: --input.")
        return StepInputs({}, steps or 1, sliced=False)
    given = read_tensors(source)
    _check_names(spec, given, source)
    tensors = {one.name: given[one.name] for one in spec.xs}
    count = _step_count(tensors, source, steps) if steps_axis else (steps or 1)
    if count > 1 and not steps_axis:
        raise UsageError("Several steps need inputs with an axis of steps: add --steps-axis.")
    inputs = StepInputs(tensors, count, sliced=steps_axis)
    _check_step(spec, next(iter(inputs)), source)
    return inputs


def _names(spec: ProgramSpec) -> str:
    return ", ".join(one.name for one in spec.xs)


def _check_names(spec: ProgramSpec, given: Mapping[str, Tensor], source: Path) -> None:
    expected = {one.name for one in spec.xs}
    missing = sorted(expected - given.keys())
    if missing:
        raise UsageError(f"{source}: has no {missing[0]!r}; the program takes {_names(spec)}.")
    unknown = sorted(given.keys() - expected)
    if unknown:
        takes = _names(spec) or "no inputs"
        raise UsageError(f"{source}: {unknown[0]!r} is not an input; the program takes {takes}.")


def _step_count(tensors: Mapping[str, Tensor], source: Path, wanted: int | None) -> int:
    lengths = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in tensors.items()}
    if not lengths or len(set(lengths.values())) != 1 or not all(lengths.values()):
        found = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "no tensors"
        raise UsageError(f"{source}: the leading axes must have one length from 1 on: {found}.")
    length = next(iter(lengths.values()))
    if wanted is not None and wanted > length:
        raise UsageError(f"{source}: holds {length} steps, --steps asks for {wanted}.")
    return wanted or length


def _check_step(spec: ProgramSpec, xs: Mapping[str, Tensor], source: Path) -> None:
    binding = SymbolBinding()
    for one in spec.xs:
        tensor = xs[one.name]
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        if dtype != one.dtype:
            raise UsageError(
                f"{source}: {one.name} is {dtype}, the program takes {one.dtype}. Convert it."
            )
        try:
            binding.match_untrusted(one, tensor.shape)
        except RemoteProtocolError as exc:
            raise UsageError(f"{source}: {exc.detail} ({_shape(one)}).") from exc
    for symbol in spec.symbols:
        size = binding.sizes.get(symbol.name, symbol.minimum)
        if not symbol.minimum <= size <= symbol.maximum:
            raise UsageError(
                f"{source}: {symbol.name} is {size}, the program takes {symbol.minimum} to "
                f"{symbol.maximum}."
            )


def _shape(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype} [{', '.join(map(str, spec.shape))}]"
