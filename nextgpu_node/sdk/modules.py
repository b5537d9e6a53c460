"""Modules as programs: exported once for each shape of inputs; results as the module gives them.

model(ids, mask=m)  ──►  Program + names of the tensors  ──►  rebuilt like the model's own result
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.calls import output_leaves, replace_tensors, tensor_leaves
from nextgpu_node.graph.export import export
from nextgpu_node.graph.tensors import DTYPE_NAMES, SymbolBinding
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import ProgramSpec

# Programs of one module: more than this many shapes are better one program with dynamic sizes.
_MOST_SHAPES: Final = 32
# torch.export is not made for two threads at once.
_exporting = threading.Lock()


@dataclass(frozen=True, slots=True)
class ExportedModule:
    """One module for one shape of its inputs.  `result` is its result, with tensors to replace."""

    program: Program
    result: Any
    result_names: tuple[str, ...]

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a call by the names of the program's inputs."""
        tensors = [tensor for _, tensor in tensor_leaves((tuple(args), dict(kwargs)))]
        names = [spec.name for spec in self.program.spec.xs]
        return dict(zip(names, tensors, strict=True))

    def rebuild(self, outputs: Mapping[str, torch.Tensor]) -> Any:
        """The result of the call as the module itself would give it."""
        return replace_tensors(self.result, iter([outputs[name] for name in self.result_names]))


class ModuleCache:
    """Thread-safe.  Forgets a module's programs with the module."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[
            torch.nn.Module, dict[tuple[Hashable, ...], ExportedModule]
        ]
        self._found = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def find(
        self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> ExportedModule | None:
        """What was exported for a call of this shape, of the weights as they are now."""
        with self._lock:
            return self._found.get(module, {}).get(_signature(module, args, kwargs))

    def export(
        self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> ExportedModule:
        """The same, exported where it is not there yet.  Seconds.  Raises ProgramError."""
        with _exporting:
            found = self.find(module, args, kwargs)
            if found is not None:
                return found
            exported = _export(module, args, kwargs)
            # After the export: tracing may run buffers' first updates.
            signature = _signature(module, args, kwargs)
            with self._lock:
                programs = self._found.setdefault(module, {})
                for stale in [key for key in programs if key[:1] != signature[:1]]:
                    del programs[stale]
                while len(programs) >= _MOST_SHAPES:
                    del programs[next(iter(programs))]
                programs[signature] = exported
            return exported


def _export(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> ExportedModule:
    results: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, result: results.append(result))
    try:
        program = export(module, args, kwargs)
    finally:
        handle.remove()
    return ExportedModule(program, *_shape_of_result(program.spec, results))


def _shape_of_result(spec: ProgramSpec, results: list[Any]) -> tuple[Any, tuple[str, ...]]:
    """The traced result, and which output of the program stands at each of its tensors."""
    names = [one.name for one in spec.ys]
    leaves = output_leaves(results[-1]) if results else []
    if len(leaves) != len(names):
        raise ProgramError(
            "The module's result can not be rebuilt from the program's outputs. "
            "Export it yourself (nextgpu.export) and submit the program."
        )
    name_of = {id(value): name for (_, value), name in zip(leaves, names, strict=True)}
    return results[-1], tuple(name_of[id(tensor)] for _, tensor in tensor_leaves(results[-1]))


def _signature(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Hashable, ...]:
    """What a program is good for: weights (where they lie, how often written), mode, inputs."""
    weights = tuple((one.data_ptr(), one._version) for one in _state(module))
    modes = tuple(part.training for part in module.modules())
    call = (tuple(args), dict(kwargs))
    inputs = tuple(
        (name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensor_leaves(call)
    )
    # Numbers, texts and None are built into the program: they are part of what it is.
    constants = repr(replace_tensors(call, _placeholders()))
    return ((weights, modes), inputs, constants)


def _state(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _placeholders() -> Iterator[None]:
    while True:
        yield None


def check_inputs(spec: ProgramSpec, xs: Mapping[str, torch.Tensor]) -> None:
    """Before anything is sent: ProgramError where a worker would refuse these inputs."""
    binding = SymbolBinding()
    for one in spec.xs:
        tensor = xs[one.name]
        if not isinstance(tensor, torch.Tensor):
            raise ProgramError(f"The input {one.name} is a {type(tensor).__name__}, not a tensor.")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise ProgramError(f"The input {one.name} is not a dense tensor; pass dense tensors.")
        if DTYPE_NAMES.get(tensor.dtype) != one.dtype:
            raise ProgramError(f"The input {one.name} is {tensor.dtype}; {one.dtype} is declared.")
        try:
            binding.match_untrusted(one, tensor.shape)
        except RemoteProtocolError as exc:
            raise ProgramError(f"The inputs do not fit the program: {exc.detail}.") from exc
    for symbol in spec.symbols:
        size = binding.sizes.get(symbol.name)
        if size is not None and not symbol.minimum <= size <= symbol.maximum:
            raise ProgramError(
                f"{symbol.name} is {size}; the program takes {symbol.minimum} to {symbol.maximum}."
            )
