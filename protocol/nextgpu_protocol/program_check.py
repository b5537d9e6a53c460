"""The rules that a program must keep whatever operators it names.  Spec: 60-program.md#rules

Works on the typed program and knows no operator: references point backwards to values that may
be read, names are unique, literals are from closed sets, sizes are within program_limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from typing import NoReturn

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.program_limits import (
    MAX_CHECKPOINT_S,
    MAX_DIMENSION,
    MAX_LIST_ITEMS,
    MAX_LIST_NESTING,
    MAX_NAME_BYTES,
    MAX_NODE_ARGUMENTS,
    MAX_NODE_OUTPUTS,
    MAX_NODES,
    MAX_OPERATOR_BYTES,
    MAX_RANK,
    MAX_SYMBOLS,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
    MAX_VALUES,
)
from nextgpu_protocol.program_types import (
    DTYPE_BYTES,
    MEMORY_FORMATS,
    OUTPUT_KINDS,
    PROGRAM_VERSION,
    TENSOR,
    TEXT_LITERALS,
    UNUSED,
    Argument,
    DType,
    Graph,
    Literal,
    MemoryFormat,
    Node,
    ProgramSpec,
    Ref,
    Symbol,
    TensorSpec,
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]*")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATOR = re.compile(r"[a-z][a-z0-9]*(\.[A-Za-z0-9_]+){1,2}")
_MAX_INT = 2**63 - 1
_MIN_INT = -(2**63)


def check_program(spec: ProgramSpec) -> None:
    """Raise RemoteProtocolError unless `spec` keeps every structural rule."""
    if spec.version != PROGRAM_VERSION:
        _bad("version", f"this is version {spec.version}, known is {PROGRAM_VERSION}")
    _within("min_table_version", spec.min_table_version, 1, _MAX_INT)
    _within("checkpoint_s", spec.checkpoint_s, 0, MAX_CHECKPOINT_S)
    declared = _check_symbols(spec.symbols)
    bound: set[str] = set()
    _check_specs("constants", spec.constants, frozenset(), bound)
    _check_specs("carry", spec.carry, declared, bound)
    _check_specs("xs", spec.xs, declared, bound)
    if bound != declared:
        _bad("symbols", "a symbol is not the size of any input")
    _check_specs("ys", spec.ys, declared, None)
    _check_specs("finish_ys", spec.finish_ys, declared, None)
    _check_stop(spec)
    _check_graphs(spec)


def _check_symbols(symbols: Sequence[Symbol]) -> frozenset[str]:
    _at_most("symbols", len(symbols), MAX_SYMBOLS)
    for position, symbol in enumerate(symbols):
        where = f"symbols[{position}]"
        if len(symbol.name) > MAX_NAME_BYTES or not _SYMBOL.fullmatch(symbol.name):
            _bad(where, "not a name")
        _within(where, symbol.minimum, 0, MAX_DIMENSION)
        _within(where, symbol.maximum, symbol.minimum, MAX_DIMENSION)
    return _unique("symbols", [symbol.name for symbol in symbols])


def _check_specs(
    section: str, specs: Sequence[TensorSpec], declared: frozenset[str], bound: set[str] | None
) -> None:
    """`bound` collects the symbols that these inputs bind; None: outputs, which bind none."""
    _at_most(section, len(specs), MAX_TENSORS)
    for position, spec in enumerate(specs):
        where = f"{section}[{position}]"
        if len(spec.name) > MAX_NAME_BYTES or not _NAME.fullmatch(spec.name):
            _bad(where, "not a name")
        if spec.dtype not in DTYPE_BYTES:
            _bad(where, "unknown dtype")
        _check_shape(where, spec, declared, computed_allowed=bound is None)
        if bound is not None:
            bound.update(size for size in spec.shape if isinstance(size, str))
    _unique(section, [spec.name for spec in specs])


def _check_shape(
    where: str, spec: TensorSpec, declared: frozenset[str], *, computed_allowed: bool
) -> None:
    _at_most(f"{where}.shape", len(spec.shape), MAX_RANK)
    size = DTYPE_BYTES[spec.dtype]
    for dimension in spec.shape:
        if isinstance(dimension, str):
            if dimension not in declared:
                _bad(where, "a dimension names no declared symbol")
        elif dimension is None:
            if not computed_allowed:
                _bad(where, "only outputs may have computed dimensions")
        else:
            _within(where, dimension, 0, MAX_DIMENSION)
            size *= max(dimension, 1)
    if size > MAX_TENSOR_BYTES:
        _too_large(where, "bytes", MAX_TENSOR_BYTES)


def _check_stop(spec: ProgramSpec) -> None:
    if spec.stop is None:
        return
    if not 0 <= spec.stop < len(spec.ys):
        _bad("stop", "names no output")
    y = spec.ys[spec.stop]
    if y.dtype != "bool" or any(size != 1 for size in y.shape):
        _bad("stop", "must be a boolean of one element")


def _check_graphs(spec: ProgramSpec) -> None:
    constants, carry, ys = len(spec.constants), len(spec.carry), len(spec.ys)
    _check_graph("step", spec.step, constants + carry + len(spec.xs), carry + ys)
    if spec.init is not None:
        if any(isinstance(size, str) for one in spec.carry for size in one.shape):
            _bad("graphs.init", "can not make a carry of symbolic size")
        _check_graph("init", spec.init, constants, carry)
    if spec.finish is not None:
        _check_graph("finish", spec.finish, constants + carry, len(spec.finish_ys))
    elif spec.finish_ys:
        _bad("finish_ys", "without a finish graph")


def _check_graph(role: str, graph: Graph, inputs: int, outputs: int) -> None:
    where = f"graphs.{role}"
    _at_most(f"{where}.nodes", len(graph.nodes), MAX_NODES)
    kinds = [TENSOR] * inputs
    for position, node in enumerate(graph.nodes):
        _check_node(f"{where}.nodes[{position}]", node, kinds)
        kinds.extend(node.outputs)
        _at_most(f"{where} values", len(kinds), MAX_VALUES)
    if len(graph.outputs) != outputs:
        _bad(f"{where}.outputs", f"{outputs} outputs are declared, {len(graph.outputs)} given")
    for index in graph.outputs:
        _check_reference(f"{where}.outputs", index, kinds)
        if kinds[index] != TENSOR:
            _bad(f"{where}.outputs", "an output is not a tensor")


def _check_node(where: str, node: Node, kinds: list[str]) -> None:
    if len(node.op) > MAX_OPERATOR_BYTES or not _OPERATOR.fullmatch(node.op):
        _bad(where, "not an operator id")
    _at_most(f"{where}.outputs", len(node.outputs), MAX_NODE_OUTPUTS)
    if not node.outputs or not OUTPUT_KINDS.issuperset(node.outputs):
        _bad(where, "unknown kind of output")
    _at_most(f"{where} arguments", len(node.args) + len(node.kwargs), MAX_NODE_ARGUMENTS)
    for position, argument in enumerate(node.args):
        _check_argument(f"{where}.args[{position}]", argument, kinds, 0)
    previous = ""
    for name, argument in node.kwargs:
        if len(name) > MAX_NAME_BYTES or not _SYMBOL.fullmatch(name):
            _bad(where, "not an argument name")
        if name <= previous:
            _bad(where, "argument names repeat or are out of order")
        previous = name
        _check_argument(f"{where}.kwargs.{name}", argument, kinds, 0)


def _check_argument(where: str, argument: Argument, kinds: list[str], nesting: int) -> None:
    match argument:
        case None | bool() | int() | float() | str():
            _check_literal(where, argument)
        case Ref(index):
            _check_reference(where, index, kinds)
        case DType(name):
            _one_of(where, "dtypes", name, DTYPE_BYTES)
        case MemoryFormat(name):
            _one_of(where, "memory formats", name, MEMORY_FORMATS)
        case tuple():
            if nesting == MAX_LIST_NESTING:
                _bad(where, "lists are nested too deeply")
            _at_most(where, len(argument), MAX_LIST_ITEMS)
            for item in argument:
                _check_argument(where, item, kinds, nesting + 1)


def _check_literal(where: str, literal: Literal) -> None:
    match literal:
        case None | bool():
            pass
        case int():
            _within(where, literal, _MIN_INT, _MAX_INT)
        case float():
            if math.isnan(literal):
                _bad(where, "not-a-number is not a literal")
        case str():
            _one_of(where, "texts", literal, TEXT_LITERALS)


def _one_of(where: str, what: str, name: str, allowed: Container[str]) -> None:
    if name not in allowed:
        _bad(where, f"not one of the allowed {what}")


def _check_reference(where: str, index: int, kinds: list[str]) -> None:
    if not 0 <= index < len(kinds):
        _bad(where, "a reference to a value that does not exist yet")
    if kinds[index] == UNUSED:
        _bad(where, "a reference to an unused output")


def _unique(where: str, names: list[str]) -> frozenset[str]:
    found = frozenset(names)
    if len(found) != len(names):
        _bad(where, "two have the same name")
    return found


def _within(where: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        _bad(where, f"{value} is not within {low} … {high}")


def _at_most(where: str, count: int, bound: int) -> None:
    if count > bound:
        _too_large(where, "items", bound)


def _bad(where: str, why: str) -> NoReturn:
    raise RemoteProtocolError(ErrorCode.BAD_PROGRAM, f"{where}: {why}")


def _too_large(where: str, unit: str, bound: int) -> NoReturn:
    raise RemoteProtocolError(ErrorCode.TOO_LARGE, f"{where}: more than {bound} {unit}")
