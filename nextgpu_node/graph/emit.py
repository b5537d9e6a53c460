"""A traced torch graph -> a graph of the format.  Used by export, on the submitter only.

Values get provisional numbers while the nodes are walked in order.  What nothing reads is then
dropped, and the rest is numbered as the format wants it: constants, carry, xs, node outputs.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.draws import DRAWS, Draws
from nextgpu_node.graph.explain import lines_of_trace, refuse_line
from nextgpu_node.graph.optable import ABSENT_NAMES, TABLE, Kind, Parameter, Row
from nextgpu_node.graph.recurrent import STANDS_FOR
from nextgpu_node.graph.tensors import DTYPE_NAMES
from nextgpu_protocol.program import (
    BOOL,
    FLOAT,
    INT,
    TENSOR,
    UNUSED,
    Argument,
    DType,
    Graph,
    MemoryFormat,
    Node,
    Ref,
)

_aten = torch.ops.aten

# What a value of the traced graph is here: an argument, or a list for calls with many outputs.
Value = Any

# Checks that tracing wrote down; the machine checks shapes and dtypes itself.
CHECKS: frozenset[OpOverload] = frozenset(
    {
        _aten._assert_async.msg,
        _aten._assert_async.default,
        _aten._assert_scalar.default,
        _aten._assert_tensor_metadata.default,
        _aten.sym_constrain_range.default,
        _aten.sym_constrain_range_for_size.default,
    }
)

# Without writes, a copy can not be told from its original.
_COPIES: frozenset[OpOverload] = frozenset(
    {
        _aten.alias.default,
        _aten.clone.default,
        _aten.detach.default,
        _aten.lift_fresh_copy.default,
        _aten.to.device,
        _aten.to.dtype,
        _aten.to.dtype_layout,
        _aten._to_copy.default,
    }
)

# Uninitialised memory is never served: zeros take its place.
_ZEROS: dict[OpOverload, str] = {
    _aten.empty.memory_format: "aten.zeros.default",
    _aten.empty_like.default: "aten.zeros_like.default",
    _aten.new_empty.default: "aten.new_zeros.default",
}

# A view is possible or not by how its input lies in memory, which may differ on the machine that
# runs the program; reshape views where it can and copies where it must.
_VIEWS: dict[OpOverload, str] = {
    _aten.view.default: "aten.reshape.default",
    _aten._unsafe_view.default: "aten.reshape.default",
    _aten._reshape_copy.default: "aten.reshape.default",
}

# Training and inference differ by the dropout between layers only.
_RECURRENT = frozenset(STANDS_FOR.values())

_CASTS: dict[OpOverload, str] = {
    _aten.to.device: "aten._to_copy.default",
    _aten.to.dtype: "aten._to_copy.default",
    _aten.to.dtype_layout: "aten._to_copy.default",
}

# Views that conjugate or negate when they are read; programs do it at once.
_LAZY: dict[OpOverload, str] = {
    _aten._conj.default: "aten.conj_physical.default",
    _aten._neg_view.default: "aten.neg.default",
}

_RENAMED = _LAZY | _ZEROS | _VIEWS | _CASTS | STANDS_FOR

# Functional tracing writes inference batch norm as a kernel that trusts its statistics; the
# table has the layer that checks them.
_INFERENCE_BATCH_NORM = _aten._native_batch_norm_legit_no_training.default

# A product for each expert of a mixture; the kernels trust their offsets, the table's own does not.
GROUPED_MM = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}

# Regions whose bodies are emitted in place.
INLINED: frozenset[HigherOrderOperator] = frozenset(
    {torch.ops.higher_order.wrap_with_set_grad_enabled}
)

# What emission deals with though the table does not have it.
HANDLED: frozenset[OpOverload] = (
    CHECKS | _COPIES | _RENAMED.keys() | {_INFERENCE_BATCH_NORM} | DRAWS
)

SIZE_CALLS: dict[Callable[..., Any], str] = {
    operator.add: "sym.add",
    operator.sub: "sym.sub",
    operator.mul: "sym.mul",
    operator.floordiv: "sym.floordiv",
    operator.truediv: "sym.truediv",
    operator.mod: "sym.mod",
    operator.pow: "sym.pow",
    operator.neg: "sym.neg",
    operator.abs: "sym.abs",
    operator.eq: "sym.eq",
    operator.ne: "sym.ne",
    operator.lt: "sym.lt",
    operator.le: "sym.le",
    operator.gt: "sym.gt",
    operator.ge: "sym.ge",
    operator.and_: "sym.and",
    operator.or_: "sym.or",
    torch.sym_min: "sym.min",
    torch.sym_max: "sym.max",
    torch.sym_not: "sym.not",
    torch.sym_int: "sym.int",
    torch.sym_float: "sym.float",
    torch.sym_ite: "sym.ite",
    math.floor: "sym.floor",
    math.ceil: "sym.ceil",
    math.trunc: "sym.int",
    round: "sym.round",
    math.sqrt: "sym.sqrt",
    torch.sym_sqrt: "sym.sqrt",
}

_MEMORY_FORMATS = {
    torch.contiguous_format: "contiguous_format",
    torch.preserve_format: "preserve_format",
    torch.channels_last: "channels_last",
    torch.channels_last_3d: "channels_last_3d",
}


class _Dropped:
    """An argument that programs do not carry: devices and layouts are the machine's business."""


_DROPPED = _Dropped()


@dataclass(slots=True)
class _Draft:
    op: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    kinds: str
    first: int


@dataclass(slots=True)
class Emitter:
    """Collects nodes; `add_input` and `walk` first, then `finish` once."""

    inputs: int = 0
    draws: Draws = field(default_factory=Draws)
    _drafts: list[_Draft] = field(default_factory=list)
    _count: int = 0
    _checks: list[Ref] = field(default_factory=list)

    def add_input(self) -> Ref:
        """A new input value."""
        self.inputs += 1
        self._count += 1
        return Ref(self._count - 1)

    def walk(self, module: torch.fx.GraphModule, given: Sequence[Value]) -> list[Value]:
        """Emit the calls of `module` on `given` (one for each placeholder); its outputs."""
        values: dict[torch.fx.Node, Value] = {}
        waiting = iter(given)
        for node in module.graph.nodes:
            match node.op:
                case "placeholder":
                    values[node] = next(waiting)
                case "get_attr":
                    values[node] = operator.attrgetter(str(node.target))(module)
                case "call_function":
                    values[node] = self._call(node, values)
                case "output":
                    outputs = node.args[0]
                    flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
                    return [_read(item, values) for item in flat]
        raise ProgramError("The traced graph has no outputs.")

    def append(self, op: str, args: tuple[Argument, ...], kinds: str, **kwargs: Argument) -> Ref:
        """Emit one call; the first of its outputs."""
        first = self._count
        self._count += len(kinds)
        self._drafts.append(_Draft(op, args, tuple(sorted(kwargs.items())), kinds, first))
        return Ref(first)

    def append_check(self, condition: Argument) -> None:
        """A condition on sizes without which no step runs; nothing reads it, and it stays."""
        self._checks.append(self.append("sym.check", (condition,), BOOL))

    def finish(self, order: Sequence[Sequence[Ref]], outputs: Sequence[Ref]) -> tuple[Graph, int]:
        """The graph that computes `outputs`, and the newest table version that it needs.

        `order`: the inputs in the order of the format, those left out being read by nothing.
        """
        live = self._live(outputs)
        numbers: dict[int, int] = {}
        for ref in (ref for section in order for ref in section):
            numbers[ref.index] = len(numbers)
        nodes, version = [], 1
        for draft in self._drafts:
            span = range(draft.first, draft.first + len(draft.kinds))
            if live.isdisjoint(span):
                continue
            kinds = "".join(
                kind if index in live else UNUSED
                for index, kind in zip(span, draft.kinds, strict=True)
            )
            args = tuple(_renumber(one, numbers) for one in draft.args)
            kwargs = tuple((name, _renumber(one, numbers)) for name, one in draft.kwargs)
            nodes.append(Node(draft.op, args, kwargs, kinds))
            version = max(version, TABLE[draft.op].since)
            base = len(numbers)
            numbers.update({index: base + at for at, index in enumerate(span)})
        return Graph(tuple(nodes), tuple(numbers[ref.index] for ref in outputs)), version

    def is_read(self, outputs: Sequence[Ref]) -> Callable[[Ref], bool]:
        """Tells which values `outputs` depend on."""
        live = self._live(outputs)
        return lambda ref: ref.index in live

    def _live(self, outputs: Sequence[Ref]) -> set[int]:
        live = {ref.index for ref in (*outputs, *self._checks)}
        for draft in reversed(self._drafts):
            if not live.isdisjoint(range(draft.first, draft.first + len(draft.kinds))):
                for argument in (*draft.args, *(one for _, one in draft.kwargs)):
                    live.update(ref.index for ref in _refs(argument))
        return live

    # ------------------------------------------------------------ one traced call

    def _call(self, node: torch.fx.Node, values: dict[torch.fx.Node, Value]) -> Value:
        target: Any = node.target
        if target is operator.getitem:
            return _read(node.args[0], values)[node.args[1]]
        if target in CHECKS:
            return None
        args = [_read(argument, values) for argument in node.args]
        kwargs = {name: _read(argument, values) for name, argument in node.kwargs.items()}
        if isinstance(target, HigherOrderOperator):
            return self._inline(node, target, args)
        if target in SIZE_CALLS:
            return self._size_call(node, SIZE_CALLS[target], args)
        if not isinstance(target, OpOverload):
            _refuse(node, str(target))
        return self._operator(node, target, args, kwargs)

    def _operator(
        self, node: torch.fx.Node, target: OpOverload, args: list[Value], kwargs: dict[str, Value]
    ) -> Value:
        if _is_inert_dropout(target, args):
            return args[0]
        if target in DRAWS:
            return self.draws.emit(self, target, args, kwargs)
        if target is _INFERENCE_BATCH_NORM:
            return self._batch_norm(args)
        if str(target) in GROUPED_MM and _is_plain_product(args, kwargs):
            ends = args[2] if len(args) > 2 else kwargs["offs"]
            return self.append("nextgpu.grouped_mm", (args[0], args[1], ends), TENSOR)
        if _has_unknown_sizes(node.meta["val"]):
            _fail(
                node,
                f"the shape of {target} depends on values",
                "use torch.where or a mask of fixed shape instead",
            )
        op = _RENAMED.get(target) or str(target)
        row = TABLE.get(op)
        if row is None:
            _refuse(node, op)
        given = _bind(target, args, kwargs)
        if target is _aten.repeat_interleave.self_int:
            # It follows from the rest, and a kernel that is told trusts it.
            given.pop("output_size", None)
        if op in _RECURRENT and (given["dropout"] == 0 or given["num_layers"] == 1):
            given["train"] = False
        if target in _VIEWS:
            given["shape"] = given.pop("size")
        if target in _COPIES and _changes_nothing(node, given):
            return args[0]
        positional, named = _arrange(node, row, given)
        result = node.meta["val"]
        first = self.append(op, positional, _kinds(node, result), **named)
        if isinstance(result, (tuple, list)):
            return [Ref(first.index + at) for at in range(len(result))]
        return first

    def _batch_norm(self, args: list[Value]) -> Value:
        *tensors, momentum, epsilon = args
        rest = (False, momentum, epsilon, True)
        # The other two outputs are empty outside training.
        return [self.append("aten.batch_norm.default", (*tensors, *rest), TENSOR), None, None]

    def _size_call(self, node: torch.fx.Node, op: str, args: list[Value]) -> Value:
        if not any(isinstance(argument, Ref) for argument in args):
            # Tracing left arithmetic on plain numbers behind: settle it here.
            return TABLE[op].call(*args)
        return self.append(op, tuple(args), _kinds(node, node.meta["val"]))

    def _inline(self, node: torch.fx.Node, target: HigherOrderOperator, args: list[Value]) -> Value:
        """Gradient modes mean nothing to a program: their bodies are emitted in place."""
        if target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            return self.walk(args[1], args[2:])
        if target is torch.ops.higher_order.wrap_with_autocast and args[2] is False:
            return self.walk(args[4], args[5:])
        return _refuse(node, str(target))


def _read(argument: Any, values: dict[torch.fx.Node, Value]) -> Value:
    match argument:
        case torch.fx.Node():
            return values[argument]
        case tuple() | list():
            return tuple(_read(item, values) for item in argument)
        case torch.dtype():
            return DType(DTYPE_NAMES.get(argument, str(argument)))
        case torch.memory_format():
            return MemoryFormat(_MEMORY_FORMATS[argument])
        case torch.device() | torch.layout():
            return _DROPPED
        case _:
            return argument


def _is_inert_dropout(target: OpOverload, args: Sequence[Value]) -> bool:
    dropouts = (_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default)
    return target in dropouts and (args[2] is False or args[1] == 0)


def _is_plain_product(args: Sequence[Value], kwargs: dict[str, Value]) -> bool:
    extra = [*args[3:], kwargs.get("bias"), kwargs.get("out_dtype")]
    return all(one is None for one in extra) and (len(args) > 2 or kwargs.get("offs") is not None)


def _has_unknown_sizes(result: Any) -> bool:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return any(isinstance(one, torch.Tensor) and free_unbacked_symbols(one) for one in results)


def _bind(target: OpOverload, args: Sequence[Value], kwargs: dict[str, Value]) -> dict[str, Value]:
    """The arguments by name, without those that only repeat the default."""
    given: dict[str, Value] = {}
    schema = target._schema.arguments
    for argument, value in zip(schema, args, strict=False):
        given[argument.name] = value
    given.update(kwargs)
    defaults = {one.name: one.default_value for one in schema if one.has_default_value()}
    return {
        name: value
        for name, value in given.items()
        if name not in defaults
        or type(value) is not type(defaults[name])
        or value != defaults[name]
    }


def _changes_nothing(node: torch.fx.Node, given: dict[str, Value]) -> bool:
    layout = given.get("memory_format", MemoryFormat("preserve_format"))
    if layout != MemoryFormat("preserve_format"):
        return False
    source: Any = node.args[0]
    return bool(source.meta["val"].dtype == node.meta["val"].dtype)


def _arrange(
    node: torch.fx.Node, row: Row, given: dict[str, Value]
) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
    """Positional arguments up to the first one left out, the rest by name."""
    positional: list[Argument] = []
    named: dict[str, Argument] = {}
    gap = False
    lost = given.keys() - {parameter.name for parameter in row.parameters}
    if lost:
        _fail(node, f"{row.op} is traced with {min(lost)}", "report this model to us")
    for parameter in row.parameters:
        if parameter.name not in given or parameter.name in ABSENT_NAMES:
            gap = True
            continue
        value = given[parameter.name]
        if parameter.kind in (Kind.INTS, Kind.FLOATS) and not isinstance(
            value, (tuple, type(None))
        ):
            value = (value,)
        _check_literals(node, value)
        _check_choice(node, row, parameter, value)
        if gap or parameter.keyword_only:
            named[parameter.name] = value
        else:
            positional.append(value)
    return tuple(positional), named


def _check_choice(node: torch.fx.Node, row: Row, parameter: Parameter, value: Value) -> None:
    allowed = parameter.choices
    if parameter.kind is Kind.ABSENT and allowed is None:
        allowed = ()
    if allowed is not None and value is not None and value not in allowed:
        what = f"{row.op} with {parameter.name}={value!r} is not in the operator table"
        _fail(node, what, "call .eval() on the model" if parameter.name in _TRAINING else _REWRITE)


def _check_literals(node: torch.fx.Node, value: Value) -> None:
    if isinstance(value, tuple):
        for item in value:
            _check_literals(node, item)
    elif isinstance(value, float) and math.isnan(value):
        _fail(node, "not-a-number can not be an argument", "pass it in as a tensor")
    elif not isinstance(value, (bool, int, float, str, Ref, DType, MemoryFormat, type(None))):
        _fail(node, f"an argument is a {type(value).__name__}", "use tensors and plain numbers")


def _kinds(node: torch.fx.Node, result: Any) -> str:
    if isinstance(result, (tuple, list)):
        return "".join(_kinds(node, item) for item in result)
    match result:
        case torch.Tensor():
            return TENSOR
        case bool() | torch.SymBool():
            return BOOL
        case int() | torch.SymInt():
            return INT
        case float() | torch.SymFloat():
            return FLOAT
        case None:
            return UNUSED
    return _fail(node, f"a result is a {type(result).__name__}", "return tensors")


def _refs(argument: Argument) -> list[Ref]:
    if isinstance(argument, Ref):
        return [argument]
    if isinstance(argument, tuple):
        return [ref for item in argument for ref in _refs(item)]
    return []


def _renumber(argument: Argument, numbers: dict[int, int]) -> Argument:
    if isinstance(argument, Ref):
        return Ref(numbers[argument.index])
    if isinstance(argument, tuple):
        return tuple(_renumber(item, numbers) for item in argument)
    return argument


# ---------------------------------------------------------------- messages

_TRAINING = frozenset({"train", "training", "use_input_stats", "dropout_p"})
_REWRITE = "write this line with other operators"
_RANDOM = re.compile(
    r"aten\.(.*rand|.*dropout|bernoulli|multinomial|normal|exponential|poisson|binomial)"
)


def _refuse(node: torch.fx.Node, op: str) -> NoReturn:
    remedy = "draw the numbers first and pass them in" if _RANDOM.match(op) else _REWRITE
    _fail(node, f"the operator {op} is not in the operator table", remedy)


def _fail(node: torch.fx.Node, what: str, remedy: str) -> NoReturn:
    refuse_line(lines_of_trace(node.meta.get("stack_trace")), what, remedy, _layer(node))


def _layer(node: torch.fx.Node) -> str:
    """The innermost module that was running, for lines that only torch's own layers have."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    path = str(path).removeprefix("L['self'].").removeprefix("model").lstrip(".")
    return f"the layer {path} ({kind})" if path else f"a {kind}"
