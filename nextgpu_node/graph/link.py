"""A graph's nodes against the operator table.  Spec: 60-program.md#operators

Done once for each program: every node gets its row, every argument is checked against the kind
of its parameter, and the last reader of each value is found, so that it can be freed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from nextgpu_node.graph.optable import TABLE, Kind, Parameter, Row
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
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


@dataclass(frozen=True, slots=True)
class Call:
    """A node that may be called.

    outputs  for each output, the value that it becomes; None where it is unused
    frees    values that nothing reads after this call
    """

    where: str
    row: Row
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    outputs: tuple[int | None, ...]
    kinds: str
    frees: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinkedGraph:
    """Calls in order; `values` counts all values, `inputs` of which are given."""

    role: str
    calls: tuple[Call, ...]
    inputs: int
    values: int
    outputs: tuple[int, ...]


def link_graph_untrusted(role: str, graph: Graph, inputs: int) -> LinkedGraph:
    """Raises RemoteProtocolError: UNKNOWN_OPERATOR, or BAD_PROGRAM naming node and argument."""
    kinds = [TENSOR] * inputs
    rows: list[tuple[str, Row]] = []
    for position, node in enumerate(graph.nodes):
        where = f"graphs.{role}.nodes[{position}] {node.op}"
        row = TABLE.get(node.op)
        if row is None:
            raise RemoteProtocolError(ErrorCode.UNKNOWN_OPERATOR, where)
        _check_call(where, row, node, kinds)
        rows.append((where, row))
        kinds.extend(node.outputs)
    frees = _last_readers(graph, inputs)
    calls = []
    value = inputs
    for (where, row), node, freed in zip(rows, graph.nodes, frees, strict=True):
        outputs = tuple(
            None if kind == UNUSED else value + offset for offset, kind in enumerate(node.outputs)
        )
        value += len(node.outputs)
        calls.append(Call(where, row, node.args, node.kwargs, outputs, node.outputs, freed))
    return LinkedGraph(role, tuple(calls), inputs, value, graph.outputs)


def references(node: Node | Call) -> Iterator[int]:
    """The number of each value that the node reads, in order, with repetitions."""
    for argument in (*node.args, *(argument for _, argument in node.kwargs)):
        yield from _references_in(argument)


def _references_in(argument: Argument) -> Iterator[int]:
    if isinstance(argument, Ref):
        yield argument.index
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _references_in(item)


def _last_readers(graph: Graph, inputs: int) -> list[tuple[int, ...]]:
    """For each node, the values that it is the last to touch (its own unread outputs included)."""
    last: dict[int, int] = {}
    value = inputs
    for position, node in enumerate(graph.nodes):
        for index in references(node):
            last[index] = position
        for kind in node.outputs:
            if kind != UNUSED:
                last[value] = position
            value += 1
    for index in graph.outputs:
        last.pop(index, None)
    frees: list[list[int]] = [[] for _ in graph.nodes]
    for index, position in last.items():
        frees[position].append(index)
    return [tuple(freed) for freed in frees]


# ---------------------------------------------------------------- one call against its row


def _check_call(where: str, row: Row, node: Node, kinds: Sequence[str]) -> None:
    positional = [parameter for parameter in row.parameters if not parameter.keyword_only]
    if len(node.args) > len(positional):
        _bad(where, f"takes {len(positional)} positional arguments")
    given = {parameter.name for parameter, _ in zip(positional, node.args, strict=False)}
    by_name = {parameter.name: parameter for parameter in row.parameters}
    for parameter, argument in zip(positional, node.args, strict=False):
        _check_argument(where, parameter, argument, kinds)
    for name, argument in node.kwargs:
        if name in given or name not in by_name:
            _bad(where, f"has no further argument {name}")
        given.add(name)
        _check_argument(where, by_name[name], argument, kinds)
    missing = [each.name for each in row.parameters if each.required and each.name not in given]
    if missing:
        _bad(where, f"lacks the argument {missing[0]}")
    _check_outputs(where, row, node)


def _check_outputs(where: str, row: Row, node: Node) -> None:
    if row.returns is None:
        if not {TENSOR, UNUSED}.issuperset(node.outputs):
            _bad(where, "gives a list of tensors")
    elif row.symbolic:
        if len(node.outputs) != 1 or node.outputs not in row.returns:
            _bad(where, "gives one number")
    elif len(node.outputs) != len(row.returns) or not {TENSOR, UNUSED}.issuperset(node.outputs):
        _bad(where, f"gives {len(row.returns)} tensors")


def _check_argument(
    where: str, parameter: Parameter, argument: Argument, kinds: Sequence[str]
) -> None:
    if parameter.choices is not None:
        # `type` too: 0 equals False.
        fits = any(type(argument) is type(one) and argument == one for one in parameter.choices)
        fits = fits or (argument is None and parameter.optional)
    elif argument is None:
        fits = parameter.optional
    else:
        fits = _fits(parameter, argument, kinds)
    if not fits:
        _bad(where, f"argument {parameter.name} is not allowed here")


def _fits(parameter: Parameter, argument: Argument, kinds: Sequence[str]) -> bool:
    match parameter.kind:
        case Kind.TENSOR:
            # A number is a tensor without dimensions to torch.
            return _is_tensor(argument, kinds) or _is_number(argument, kinds, "ifb")
        case Kind.TENSORS:
            return type(argument) is tuple and all(_is_tensor(item, kinds) for item in argument)
        case Kind.MAYBE_TENSORS:
            return type(argument) is tuple and all(
                item is None or _is_tensor(item, kinds) for item in argument
            )
        case Kind.INTS:
            return _are_numbers(parameter, argument, kinds, INT)
        case Kind.BOOLS:
            return _are_numbers(parameter, argument, kinds, BOOL)
        case Kind.FLOATS:
            return _are_numbers(parameter, argument, kinds, INT + FLOAT)
        case Kind.DTYPE:
            return isinstance(argument, DType)
        case Kind.MEMORY_FORMAT:
            return isinstance(argument, MemoryFormat)
        case Kind.ABSENT | Kind.TEXT:
            return False
        case _:
            return _is_number(argument, kinds, _NUMBERS[parameter.kind])


_NUMBERS = {
    Kind.INT: INT,
    Kind.FLOAT: INT + FLOAT,
    Kind.BOOL: BOOL,
    Kind.NUMBER: INT + FLOAT + BOOL,
}
_LITERAL_KINDS: dict[type, str] = {int: INT, float: FLOAT, bool: BOOL}


def _is_tensor(argument: Argument, kinds: Sequence[str]) -> bool:
    return isinstance(argument, Ref) and kinds[argument.index] == TENSOR


def _is_number(argument: Argument, kinds: Sequence[str], allowed: str) -> bool:
    if isinstance(argument, Ref):
        return kinds[argument.index] in allowed
    kind = _LITERAL_KINDS.get(type(argument))
    return kind is not None and kind in allowed


def _are_numbers(
    parameter: Parameter, argument: Argument, kinds: Sequence[str], allowed: str
) -> bool:
    return (
        type(argument) is tuple
        and len(argument) <= parameter.max_items
        and all(_is_number(item, kinds, allowed) for item in argument)
    )


def _bad(where: str, why: str) -> NoReturn:
    raise RemoteProtocolError(ErrorCode.BAD_PROGRAM, f"{where}: {why}")
