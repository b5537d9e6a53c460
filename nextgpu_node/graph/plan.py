"""A linked graph and the sizes of its symbols -> instructions.  Spec: 60-program.md#bounds

The graph first runs on shapes alone (torch's meta device: no memory, no values).  That gives the
exact size of every value before anything real is allocated, settles all arithmetic on sizes,
and leaves a list of instructions with little to do for each call.  A plan is kept for each
combination of symbol sizes, so the second step with the same shapes pays nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from nextgpu_node.graph.bounds import WORKSPACE, converted_or_copied
from nextgpu_node.graph.link import Call, LinkedGraph
from nextgpu_node.graph.optable import Row, is_composed
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

# (call number, function, gives its positional arguments from the values, keywords that are values,
#  the one value that it makes, or the values that its results become, values to free)
_Instruction = tuple[
    int,
    Callable[..., Any],
    Callable[[list[Any]], Sequence[Any]],
    tuple[tuple[str, int], ...] | None,
    int | None,
    tuple[int | None, ...],
    tuple[int, ...],
]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run for one combination of sizes.

    slots       the values before a run: literals that calls take, after the graph's own values
    peak_bytes  the most that inputs, values, results and workspace take together at any moment
    results     the shape and dtype of each output of the graph
    """

    graph: LinkedGraph
    instructions: tuple[_Instruction, ...]
    slots: tuple[Any, ...]
    peak_bytes: int
    results: tuple[torch.Tensor, ...]

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for `inputs`, which match the shapes the plan was made for.

        `inputs` is emptied, so that an input that nobody else holds is freed after its last reader.
        Raises RemoteProtocolError: STEP_FAILED or OUT_OF_MEMORY, naming the node, never a value.
        """
        values = list(self.slots)
        values[: len(inputs)] = inputs
        inputs.clear()
        number = 0
        result: Any = None
        try:
            for (
                number,  # noqa: B007  the handler below reads it
                function,
                arguments,
                keywords,
                output,
                outputs,
                frees,
            ) in self.instructions:
                if keywords is None:
                    result = function(*arguments(values))
                else:
                    named = {name: values[value] for name, value in keywords}
                    result = function(*arguments(values), **named)
                if output is not None:
                    values[output] = result
                else:
                    _spread(values, outputs, result)
                for value in frees:
                    values[value] = None
                # Else the last result would outlive its last reader by one call.
                result = None
        except Exception as exc:
            raise failure(self.graph.calls[number].where, exc) from None
        return [values[value] for value in self.graph.outputs]


def _spread(values: list[Any], outputs: Sequence[int | None], result: Sequence[Any]) -> None:
    for value, item in zip(outputs, result, strict=True):
        if value is not None:
            values[value] = item


def failure(where: str, exc: Exception) -> RemoteProtocolError:
    """What may be said of `exc`: its type only, for kernels put values into their messages."""
    out_of_memory = isinstance(exc, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(exc)
    )
    code = ErrorCode.OUT_OF_MEMORY if out_of_memory else ErrorCode.STEP_FAILED
    return RemoteProtocolError(code, f"{where}: {type(exc).__name__}")


def make_plan_untrusted(
    graph: LinkedGraph,
    inputs: Sequence[torch.Tensor],
    *,
    device: torch.device,
    max_live_bytes: int,
    owned: range = range(0),
) -> Plan:
    """Plan `graph` for inputs shaped like `inputs` (tensors on the meta device).

    `owned`: the inputs that are the caller's alone and so die with their last reader.
    Raises RemoteProtocolError: BAD_PROGRAM where shapes or dtypes do not fit together, OVER_LIMIT
    where more than `max_live_bytes` would be alive at once; both name the node.
    """
    return _Planner(graph, inputs, device, max_live_bytes, owned).plan()


class _Planner:
    def __init__(
        self,
        graph: LinkedGraph,
        inputs: Sequence[torch.Tensor],
        device: torch.device,
        max_live_bytes: int,
        owned: range,
    ) -> None:
        self._graph = graph
        self._device = device
        self._owned = owned
        self._ledger = _Ledger(max_live_bytes)
        self._values: list[Any] = [None] * graph.values
        self._values[: len(inputs)] = inputs
        self._instructions: list[_Instruction] = []
        self._pending_frees: list[int] = []
        self._literals: list[Any] = []

    def plan(self) -> Plan:
        for tensor in self._values[: self._graph.inputs]:
            self._ledger.take("inputs", tensor)
        with torch.inference_mode():
            for number, call in enumerate(self._graph.calls):
                self._plan_call(number, call)
        results = tuple(self._values[value] for value in self._graph.outputs)
        self._ledger.check("outputs", sum(_copy_bytes(tensor) for tensor in results))
        slots = (*([None] * self._graph.values), *self._literals)
        peak_bytes = self._ledger.peak_bytes
        return Plan(self._graph, tuple(self._instructions), slots, peak_bytes, results)

    def _plan_call(self, number: int, call: Call) -> None:
        args = [self._resolve(argument) for argument in call.args]
        kwargs = {name: self._resolve(argument) for name, argument in call.kwargs}
        self._check_arguments(call, args, kwargs)
        if call.row.symbolic:
            self._keep_number(call, self._shape_run(call, args, kwargs))
        else:
            results, inner_bytes = self._results(call, args, kwargs)
            self._keep_results(call, results)
            self._check_workspace(call, args, kwargs, results, inner_bytes)
            self._instructions.append(self._instruction(number, call, args, kwargs))
        for value in call.frees:
            if self._may_free(value):
                self._ledger.give_back(self._values[value])
            self._values[value] = None

    def _keep_number(self, call: Call, result: Any) -> None:
        if call.outputs[0] is None:
            raise AssertionError("link refuses an unused number")
        self._values[call.outputs[0]] = _check_number(call, result)
        self._pending_frees += call.frees

    def _keep_results(self, call: Call, results: Sequence[Any]) -> None:
        for value, item in zip(call.outputs, results, strict=True):
            if value is not None:
                self._values[value] = item
            elif type(item) is torch.Tensor:
                # Unused outputs die with the call, but the call makes them.
                self._ledger.give_back(item)

    def _may_free(self, value: int) -> bool:
        return value >= self._graph.inputs or value in self._owned

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

    def _check_arguments(self, call: Call, args: list[Any], kwargs: dict[str, Any]) -> None:
        row = call.row
        if row.count is None and not row.checks:
            return
        try:
            for check in row.checks:
                check(_by_name(row, args, kwargs))
            count = None if row.count is None else row.count(*args, **kwargs)
        except ValueError as exc:
            _bad(call, str(exc))
        except Exception as exc:
            _bad(call, type(exc).__name__)
        if count is not None and count != len(call.outputs):
            _bad(call, f"{len(call.outputs)} outputs are declared, {count} would come")

    def _results(
        self, call: Call, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], int]:
        """The results on shapes alone, and the bytes of what the call makes on the way there."""
        if call.row.workspace is not None:
            return self._check_results(call, self._shape_run(call, args, kwargs)), 0
        with _Composed() as composed:
            results = self._check_results(call, self._shape_run(call, args, kwargs))
        return results, composed.bytes_beside(results, args, list(kwargs.values()))

    def _check_workspace(
        self,
        call: Call,
        args: list[Any],
        kwargs: dict[str, Any],
        results: Sequence[Any],
        inner_bytes: int,
    ) -> None:
        if call.row.workspace is not None:
            try:
                inner_bytes = call.row.workspace(_by_name(call.row, args, kwargs), results)
            except Exception as exc:
                _bad(call, type(exc).__name__)
        self._ledger.check(call.where, inner_bytes)

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
            if type(tensor) is torch.Tensor:
                self._check_tensor(call, tensor)
            elif kind != UNUSED:
                _bad(call, "an output is not a tensor")
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
        literals, tensors = {}, []
        for name, argument in call.kwargs:
            if isinstance(kwargs[name], torch.Tensor):
                tensors.append((name, _index(argument)))
            elif _holds_tensors(kwargs[name]):
                _bad(call, f"{name} takes tensors by position only")
            else:
                literals[name] = kwargs[name]
        if call.row.on_device:
            literals["device"] = self._device
        function = _function(call.row)
        single = call.row.returns == "t"
        return (
            number,
            partial(function, **literals) if literals else function,
            self._arguments(call, args),
            tuple(tensors) or None,
            call.outputs[0] if single else None,
            () if single else call.outputs,
            self._take_frees(call),
        )

    def _arguments(self, call: Call, args: list[Any]) -> Callable[[list[Any]], Sequence[Any]]:
        """What takes the call's positional arguments out of the values, in one step if possible."""
        if any(_holds_tensors(value) for value in args):
            return _list_getter([self._place(*pair) for pair in zip(call.args, args, strict=True)])
        slots = [self._slot(*pair) for pair in zip(call.args, args, strict=True)]
        match slots:
            case []:
                return _no_arguments
            case [slot]:
                return _single_getter(slot)
            case _:
                return itemgetter(*slots)

    def _place(self, argument: Argument, value: Any) -> int | list[int]:
        """A slot, or for a list of tensors the slot of each."""
        if not _holds_tensors(value):
            return self._slot(argument, value)
        assert isinstance(argument, tuple)
        return [self._slot(one, item) for one, item in zip(argument, value, strict=True)]

    def _slot(self, argument: Argument, value: Any) -> int:
        """Where a run finds this argument: a tensor's own slot, or a new one for a literal."""
        if isinstance(value, torch.Tensor):
            return _index(argument)
        self._literals.append(value)
        return self._graph.values + len(self._literals) - 1

    def _take_frees(self, call: Call) -> tuple[int, ...]:
        """The values to let go after `call`, with those of the size calls just before it.

        Inputs too, whoever else holds them: only the ledger counts on nothing of that.
        """
        frees = (*self._pending_frees, *call.frees)
        self._pending_frees = []
        return frees


class _Composed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators that an operator is composed of, and the memory that they would take."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # They live as long as this, so that no address occurs twice.
        self._made: list[torch.Tensor] = []
        self._workspace_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_composed(func):
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        tensors = list(_tensors_in(result))
        self._made += tensors
        names = (argument.name for argument in func._schema.arguments)
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        workspace = WORKSPACE.get(str(func), converted_or_copied)
        self._workspace_bytes = max(self._workspace_bytes, workspace(given, tensors))
        return result

    def bytes_beside(self, *known: Any) -> int:
        """All that was made and is no part of `known`: the call's arguments and results."""
        left_out = {one.untyped_storage()._cdata for one in _tensors_in(known)}
        made = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in self._made}
        made_bytes = sum(size for storage, size in made.items() if storage not in left_out)
        return made_bytes + self._workspace_bytes


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
        self._check(where, max(self._bytes, logical))
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def check(self, where: str, more_bytes: int) -> None:
        """Room for `more_bytes` for a moment, beside all that is alive."""
        self._check(where, self._bytes + more_bytes)
        self.peak_bytes = max(self.peak_bytes, self._bytes + more_bytes)

    def _check(self, where: str, wanted: int) -> None:
        if wanted > self._max:
            detail = f"{where}: {wanted} bytes, the limit is {self._max}"
            raise RemoteProtocolError(ErrorCode.OVER_LIMIT, detail)

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


def _by_name(row: Row, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = (parameter.name for parameter in row.parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def _tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors_in(value)


def _copy_bytes(tensor: torch.Tensor) -> int:
    """What a contiguous copy of a result takes, where its storage is not its own alone."""
    logical = math.prod(tensor.shape) * tensor.element_size()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == logical
    return 0 if whole else logical


def _no_arguments(values: list[Any]) -> Sequence[Any]:
    return ()


def _single_getter(slot: int) -> Callable[[list[Any]], Sequence[Any]]:
    # A slice: itemgetter of one index would give the item itself.
    return itemgetter(slice(slot, slot + 1))


def _list_getter(places: list[int | list[int]]) -> Callable[[list[Any]], Sequence[Any]]:
    def arguments(values: list[Any]) -> Sequence[Any]:
        return [
            values[place] if isinstance(place, int) else [values[slot] for slot in place]
            for place in places
        ]

    return arguments


def _check_number(call: Call, result: Any) -> Any:
    wanted = _NUMBER_TYPES[call.kinds]
    if type(result) is not wanted:
        _bad(call, f"gives {type(result).__name__}, {wanted.__name__} is declared")
    if type(result) is int and abs(result) > _MAX_INT:
        _bad(call, "the number is out of range")
    return result


def _bad(call: Call, why: str) -> NoReturn:
    raise RemoteProtocolError(ErrorCode.BAD_PROGRAM, f"{call.where}: {why}")
