"""A linked graph and the sizes of its symbols -> instructions.  Spec: 60-program.md#bounds

The graph first runs on shapes alone (torch's meta device: no memory, no values).  That gives the
exact size of every value before anything real is allocated, settles all arithmetic on sizes,
and leaves a list of instructions with little to do for each call.  A plan is kept for each
combination of symbol sizes, so the second step with the same shapes pays nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch._ops import OpOverload

from nextgpu_node.graph.link import Call, LinkedGraph
from nextgpu_node.graph.optable import Row
from nextgpu_node.graph.tensors import DTYPE_NAMES, TORCH_DTYPES
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.program import (
    BOOL,
    FLOAT,
    INT,
    UNUSED,
    Argument,
    DType,
    MemoryFormat,
    Ref,
    TensorSpec,
)
from nextgpu_protocol.program_limits import MAX_RANK

_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_NUMBER_TYPES: dict[str, type] = {INT: int, FLOAT: float, BOOL: bool}
_MAX_INT = 2**63 - 1

# (call number, function, arguments, [(position, value)], [(position, [value or None])], keywords,
#  [(keyword, value)], value or None, [value or None], values to free)
_Instruction = tuple[
    int,
    Callable[..., Any],
    list[Any],
    tuple[tuple[int, int], ...],
    tuple[tuple[int, tuple[int | None, ...]], ...],
    dict[str, Any],
    tuple[tuple[str, int], ...],
    int | None,
    tuple[int | None, ...],
    tuple[int, ...],
]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run for one combination of sizes.

    peak_bytes  the most that inputs, values and results take together at any moment
    results     the shape and dtype of each output of the graph
    """

    graph: LinkedGraph
    instructions: tuple[_Instruction, ...]
    peak_bytes: int
    results: tuple[torch.Tensor, ...]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for `inputs`, which match the shapes the plan was made for.

        Raises RemoteProtocolError: STEP_FAILED or OUT_OF_MEMORY, naming the node, never a value.
        """
        values: list[Any] = [None] * self.graph.values
        values[: len(inputs)] = inputs
        number = 0
        try:
            for (
                number,  # noqa: B007  the handler below reads it
                function,
                template,
                patches,
                lists,
                keywords,
                tensor_keywords,
                output,
                outputs,
                frees,
            ) in self.instructions:
                arguments = template[:]
                for position, value in patches:
                    arguments[position] = values[value]
                for position, items in lists:
                    arguments[position] = [None if at is None else values[at] for at in items]
                if tensor_keywords:
                    given = {key: values[at] for key, at in tensor_keywords}
                    result = function(*arguments, **keywords, **given)
                elif keywords:
                    result = function(*arguments, **keywords)
                else:
                    result = function(*arguments)
                if output is not None:
                    values[output] = result
                else:
                    _spread(values, outputs, result)
                for value in frees:
                    values[value] = None
        except Exception as exc:
            _kernel_failed(self.graph.calls[number], exc)
        return [values[value] for value in self.graph.outputs]


def _spread(values: list[Any], outputs: Sequence[int | None], result: Sequence[Any]) -> None:
    for value, item in zip(outputs, result, strict=True):
        if value is not None:
            values[value] = item


def _kernel_failed(call: Call, exc: Exception) -> NoReturn:
    """Only the exception's type goes on: kernels may put values into their messages."""
    out_of_memory = isinstance(exc, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(exc)
    )
    code = ErrorCode.OUT_OF_MEMORY if out_of_memory else ErrorCode.STEP_FAILED
    raise RemoteProtocolError(code, f"{call.where}: {type(exc).__name__}") from None


def make_plan_untrusted(
    graph: LinkedGraph,
    inputs: Sequence[torch.Tensor],
    *,
    device: torch.device,
    max_live_bytes: int,
) -> Plan:
    """Plan `graph` for inputs shaped like `inputs` (tensors on the meta device).

    Raises RemoteProtocolError: BAD_PROGRAM where shapes or dtypes do not fit together, OVER_LIMIT
    where more than `max_live_bytes` would be alive at once; both name the node.
    """
    planner = _Planner(graph, inputs, device, max_live_bytes)
    return planner.plan()


class _Planner:
    def __init__(
        self,
        graph: LinkedGraph,
        inputs: Sequence[torch.Tensor],
        device: torch.device,
        max_live_bytes: int,
    ) -> None:
        self._graph = graph
        self._device = device
        self._ledger = _Ledger(max_live_bytes)
        self._values: list[Any] = [None] * graph.values
        self._values[: len(inputs)] = inputs
        self._instructions: list[_Instruction] = []
        self._pending_frees: list[int] = []

    def plan(self) -> Plan:
        for tensor in self._values[: self._graph.inputs]:
            # Inputs belong to the caller, so freeing a value does not free them.
            self._ledger.take("inputs", tensor)
        with torch.inference_mode():
            for number, call in enumerate(self._graph.calls):
                self._plan_call(number, call)
        results = tuple(self._values[value] for value in self._graph.outputs)
        return Plan(self._graph, tuple(self._instructions), self._ledger.peak_bytes, results)

    def _plan_call(self, number: int, call: Call) -> None:
        args = [self._resolve(argument) for argument in call.args]
        kwargs = {name: self._resolve(argument) for name, argument in call.kwargs}
        self._check_count(call, args, kwargs)
        result = self._shape_run(call, args, kwargs)
        if call.row.symbolic:
            self._values[call.outputs[0] or 0] = _check_number(call, result)
            if call.outputs[0] is None:
                raise AssertionError("link refuses an unused number")
            self._pending_frees += call.frees
        else:
            for value, item in zip(call.outputs, self._check_results(call, result), strict=True):
                if value is not None:
                    self._values[value] = item
            self._instructions.append(self._instruction(number, call, args, kwargs))
        for value in call.frees:
            if value >= self._graph.inputs:
                self._ledger.give_back(self._values[value])
            self._values[value] = None

    def _resolve(self, argument: Argument) -> Any:
        match argument:
            case Ref(index):
                return self._values[index]
            case DType(name):
                return TORCH_DTYPES[name]
            case MemoryFormat(name):
                return _MEMORY_FORMATS[name]
            case tuple():
                return [self._resolve(item) for item in argument]
            case _:
                return argument

    def _check_count(self, call: Call, args: list[Any], kwargs: dict[str, Any]) -> None:
        if call.row.count is None:
            return
        try:
            count = call.row.count(*args, **kwargs)
        except (TypeError, IndexError, ZeroDivisionError) as exc:
            _bad(call, type(exc).__name__)
        if count != len(call.outputs):
            _bad(call, f"{len(call.outputs)} outputs are declared, {count} would come")

    def _shape_run(self, call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if call.row.on_device:
            kwargs = kwargs | {"device": "meta"}
        function = call.row.shape_call or call.row.call
        try:
            return function(*args, **kwargs)
        except Exception as exc:
            # Safe to show: on shapes alone a message can hold sizes, never values.
            _bad(call, str(exc).partition("\n")[0][:300])

    def _check_results(self, call: Call, result: Any) -> list[Any]:
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if len(results) != len(call.outputs):
            _bad(call, f"{len(call.outputs)} outputs are declared, {len(results)} would come")
        for tensor, kind in zip(results, call.kinds, strict=True):
            if kind != UNUSED and type(tensor) is not torch.Tensor:
                _bad(call, "an output is not a tensor")
            if type(tensor) is torch.Tensor:
                self._check_tensor(call, tensor)
        for tensor, kind in zip(results, call.kinds, strict=True):
            # Unused outputs die with the call, but the call makes them.
            if kind == UNUSED and type(tensor) is torch.Tensor:
                self._ledger.give_back(tensor)
        return results

    def _check_tensor(self, call: Call, tensor: torch.Tensor) -> None:
        if tensor.dim() > MAX_RANK:
            _bad(call, f"more than {MAX_RANK} dimensions")
        if tensor.dtype not in DTYPE_NAMES:
            _bad(call, "an output's dtype is not in the format")
        self._ledger.take(call.where, tensor)

    def _instruction(
        self, number: int, call: Call, args: list[Any], kwargs: dict[str, Any]
    ) -> _Instruction:
        patches, lists = [], []
        for position, (argument, value) in enumerate(zip(call.args, args, strict=True)):
            if isinstance(value, torch.Tensor):
                patches.append((position, _index(argument)))
                args[position] = None
            elif _holds_tensors(value):
                lists.append((position, _indices(argument)))
                args[position] = None
        tensor_keywords = []
        for name, argument in call.kwargs:
            if isinstance(kwargs[name], torch.Tensor):
                tensor_keywords.append((name, _index(argument)))
                del kwargs[name]
            elif _holds_tensors(kwargs[name]):
                _bad(call, f"{name} takes tensors by position only")
        if call.row.on_device:
            kwargs["device"] = self._device
        single = call.row.returns == "t"
        return (
            number,
            _function(call.row),
            args,
            tuple(patches),
            tuple(lists),
            kwargs,
            tuple(tensor_keywords),
            call.outputs[0] if single else None,
            () if single else call.outputs,
            self._take_frees(call),
        )

    def _take_frees(self, call: Call) -> tuple[int, ...]:
        """The tensors to free after `call`, with those of the size calls just before it."""
        frees = (*self._pending_frees, *call.frees)
        self._pending_frees = []
        return tuple(value for value in frees if self._graph.inputs <= value)


class _Ledger:
    """The bytes that are alive, storage by storage: views of one storage count once."""

    def __init__(self, max_live_bytes: int) -> None:
        self._max = max_live_bytes
        self._live: dict[int, tuple[int, int]] = {}
        self._bytes = 0
        self.peak_bytes = 0

    def take(self, where: str, tensor: torch.Tensor) -> None:
        # The logical size too: an expanded view holds nothing, but kernels may copy it out.
        logical = math.prod(tensor.shape) * tensor.element_size()
        storage = tensor.untyped_storage()
        readers, size = self._live.get(storage._cdata, (0, storage.nbytes()))
        self._live[storage._cdata] = (readers + 1, size)
        if not readers:
            self._bytes += size
        if max(self._bytes, logical) > self._max:
            detail = f"{where}: {max(self._bytes, logical)} bytes, the limit is {self._max}"
            raise RemoteProtocolError(ErrorCode.OVER_LIMIT, detail)
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def give_back(self, tensor: object) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        key = tensor.untyped_storage()._cdata
        readers, size = self._live[key]
        if readers > 1:
            self._live[key] = (readers - 1, size)
            return
        del self._live[key]
        self._bytes -= size


def shape_only(spec: TensorSpec, binding: dict[str, int]) -> torch.Tensor:
    """A tensor like `spec` without memory; its symbols sized as in `binding`."""
    shape = [binding[size] if isinstance(size, str) else int(size or 0) for size in spec.shape]
    return torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")


def _function(row: Row) -> Callable[..., Any]:
    """What to call: the operator itself, without the Python method around it."""
    if isinstance(row.call, OpOverload):
        function: Callable[..., Any] = row.call._op
        return function
    return row.call


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value)


def _index(argument: Argument) -> int:
    assert isinstance(argument, Ref)
    return argument.index


def _indices(argument: Argument) -> tuple[int | None, ...]:
    assert isinstance(argument, tuple)
    return tuple(None if item is None else _index(item) for item in argument)


def _check_number(call: Call, result: Any) -> Any:
    wanted = _NUMBER_TYPES[call.kinds]
    if type(result) is not wanted:
        _bad(call, f"gives {type(result).__name__}, {wanted.__name__} is declared")
    if type(result) is int and abs(result) > _MAX_INT:
        _bad(call, "the number is out of range")
    return result


def _bad(call: Call, why: str) -> NoReturn:
    raise RemoteProtocolError(ErrorCode.BAD_PROGRAM, f"{call.where}: {why}")
