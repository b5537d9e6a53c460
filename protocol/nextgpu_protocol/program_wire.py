"""Program <-> plain msgpack values.  Spec: 60-program.md#encoding

    program  [version, min_table_version, symbols, constants, carry, xs, ys, finish_ys,
              stop, checkpoint_s, step, init, finish]
    symbol   [name, minimum, maximum]        tensor  [name, dtype, [dimension, …]]
    graph    [[node, …], [value, …]]
    node     [op, [argument, …], [[name, argument], …], kinds of the outputs]
    argument literal | [0, value] | [1, [argument, …]] | [2, dtype] | [3, memory format]

Arrays only: there are no keys to repeat, to sort or to add.  Floats (64 bits, no NaN) are allowed
here and nowhere else in the protocol: they are arguments of operators and are never compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import msgpack

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.program_limits import (
    MAX_LIST_NESTING,
    MAX_PROGRAM_ARRAYS,
    MAX_PROGRAM_BYTES,
    MAX_PROGRAM_DEPTH,
)
from nextgpu_protocol.program_types import (
    Argument,
    Dimension,
    DType,
    Graph,
    MemoryFormat,
    Node,
    ProgramSpec,
    Ref,
    Symbol,
    TensorSpec,
)

T = TypeVar("T")

_REF, _LIST, _DTYPE, _MEMORY_FORMAT = range(4)


# ---------------------------------------------------------------- typed -> plain


def to_plain(spec: ProgramSpec) -> list[Any]:
    """The program as nested lists of msgpack values."""
    return [
        spec.version,
        spec.min_table_version,
        [[symbol.name, symbol.minimum, symbol.maximum] for symbol in spec.symbols],
        *(
            [_plain_tensor(tensor) for tensor in section]
            for section in (spec.constants, spec.carry, spec.xs, spec.ys, spec.finish_ys)
        ),
        spec.stop,
        spec.checkpoint_s,
        _plain_graph(spec.step),
        None if spec.init is None else _plain_graph(spec.init),
        None if spec.finish is None else _plain_graph(spec.finish),
    ]


def _plain_tensor(spec: TensorSpec) -> list[Any]:
    return [spec.name, spec.dtype, list(spec.shape)]


def _plain_graph(graph: Graph) -> list[Any]:
    return [[_plain_node(node) for node in graph.nodes], list(graph.outputs)]


def _plain_node(node: Node) -> list[Any]:
    args = [_plain_argument(argument) for argument in node.args]
    kwargs = [[name, _plain_argument(argument)] for name, argument in node.kwargs]
    return [node.op, args, kwargs, node.outputs]


def _plain_argument(argument: Argument) -> Any:
    match argument:
        case Ref(index):
            return [_REF, index]
        case tuple():
            return [_LIST, [_plain_argument(item) for item in argument]]
        case DType(name):
            return [_DTYPE, name]
        case MemoryFormat(name):
            return [_MEMORY_FORMAT, name]
        case _:
            return argument


# ---------------------------------------------------------------- bytes -> plain -> typed


def unpack_untrusted(data: bytes) -> Any:
    """msgpack to plain values.  What is declared is counted before memory is given for it."""
    if len(data) > MAX_PROGRAM_BYTES:
        raise RemoteProtocolError(ErrorCode.TOO_LARGE, f"program: over {MAX_PROGRAM_BYTES} bytes")
    _scan_untrusted(data)
    try:
        return msgpack.unpackb(data, raw=False, max_map_len=0, max_ext_len=0, max_bin_len=0)
    # Texts that are not UTF-8 raise UnicodeDecodeError, which is a ValueError.
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "program: not msgpack") from exc


def _token_table() -> list[tuple[int, int] | None]:
    """For each first byte (bytes of fixed body, kind), or None where the byte is refused.

    For arrays and texts the fixed body is their length; 0: the length is in the first byte.
    """
    table: list[tuple[int, int] | None] = [None] * 256
    for byte in (*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3):
        table[byte] = (0, _VALUE)
    for byte, size in {0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}.items():
        table[byte] = (size, _VALUE)
    for byte, size in {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}.items():
        table[byte] = (size, _VALUE)
    for byte in range(0x90, 0xA0):
        table[byte] = (0, _ARRAY)
    for byte in range(0xA0, 0xC0):
        table[byte] = (0, _TEXT)
    table[0xDC], table[0xDD] = (2, _ARRAY), (4, _ARRAY)
    table[0xD9], table[0xDA], table[0xDB] = (1, _TEXT), (2, _TEXT), (4, _TEXT)
    return table


_VALUE, _ARRAY, _TEXT = range(3)
_TOKENS = _token_table()


def _scan_untrusted(data: bytes) -> None:
    """Walk the tokens once without building anything.

    A msgpack array reserves its declared length at once, so nested lies could reserve far more
    than the bytes that are there.  Here the items still owed never exceed the bytes still left.
    """
    position, size = 0, len(data)
    owed = [1]
    total_owed = 1
    arrays = 0
    while owed:
        if position >= size or total_owed > size - position:
            _malformed("declares more than it holds")
        token = _TOKENS[data[position]]
        if token is None:
            _malformed("a type that programs do not use")
        width, kind = token
        body = int.from_bytes(data[position + 1 : position + 1 + width])
        count = _length(data[position], width, body)
        position += 1 + width
        owed[-1] -= 1
        total_owed -= 1
        if kind == _TEXT:
            position += count
        elif kind == _ARRAY:
            owed.append(count)
            total_owed += count
            arrays += 1
            if arrays > MAX_PROGRAM_ARRAYS:
                detail = f"program: more than {MAX_PROGRAM_ARRAYS} arrays"
                raise RemoteProtocolError(ErrorCode.TOO_LARGE, detail)
            if len(owed) > MAX_PROGRAM_DEPTH:
                _malformed("nested too deeply")
        while owed and owed[-1] == 0:
            owed.pop()
    if position != size:
        _malformed("bytes follow the program" if position < size else "declares more than it holds")


def _length(byte: int, width: int, body: int) -> int:
    if width:
        return body
    return byte & 0x0F if byte < 0xA0 else byte & 0x1F


def from_plain_untrusted(plain: Any) -> ProgramSpec:
    """Typed program from plain values; types and field counts only, not yet the rules."""
    f = _fields("program", plain, 13)
    return ProgramSpec(
        version=_int("version", f[0]),
        min_table_version=_int("min_table_version", f[1]),
        symbols=_tuple("symbols", f[2], _symbol),
        constants=_tuple("constants", f[3], _tensor),
        carry=_tuple("carry", f[4], _tensor),
        xs=_tuple("xs", f[5], _tensor),
        ys=_tuple("ys", f[6], _tensor),
        finish_ys=_tuple("finish_ys", f[7], _tensor),
        stop=None if f[8] is None else _int("stop", f[8]),
        checkpoint_s=_int("checkpoint_s", f[9]),
        step=_graph("graphs.step", f[10]),
        init=None if f[11] is None else _graph("graphs.init", f[11]),
        finish=None if f[12] is None else _graph("graphs.finish", f[12]),
    )


def _symbol(where: str, plain: Any) -> Symbol:
    name, minimum, maximum = _fields(where, plain, 3)
    return Symbol(_text(where, name), _int(where, minimum), _int(where, maximum))


def _tensor(where: str, plain: Any) -> TensorSpec:
    name, dtype, shape = _fields(where, plain, 3)
    return TensorSpec(_text(where, name), _text(where, dtype), _tuple(where, shape, _dimension))


def _dimension(where: str, plain: Any) -> Dimension:
    if plain is None or type(plain) is str:
        return plain
    return _int(where, plain)


def _graph(where: str, plain: Any) -> Graph:
    nodes, outputs = _fields(where, plain, 2)
    return Graph(_tuple(f"{where}.nodes", nodes, _node), _tuple(f"{where}.outputs", outputs, _int))


def _node(where: str, plain: Any) -> Node:
    op, args, kwargs, outputs = _fields(where, plain, 4)
    return Node(
        _text(where, op),
        _tuple(where, args, _argument),
        _tuple(where, kwargs, _keyword),
        _text(where, outputs),
    )


def _keyword(where: str, plain: Any) -> tuple[str, Argument]:
    name, argument = _fields(where, plain, 2)
    return _text(where, name), _argument(where, argument)


def _argument(where: str, plain: Any, nesting: int = 0) -> Argument:
    if type(plain) is not list:
        if plain is None or type(plain) in (bool, int, float, str):
            literal: Argument = plain
            return literal
        _bad(where, "not a literal")
    tag, body = _fields(where, plain, 2)
    if type(tag) is not int:
        _bad(where, "unknown kind of argument")
    match tag:
        case 0:
            return Ref(_int(where, body))
        case 1:
            if type(body) is not list or nesting == MAX_LIST_NESTING:
                _bad(where, "lists are nested too deeply")
            return tuple(_argument(where, item, nesting + 1) for item in body)
        case 2:
            return DType(_text(where, body))
        case 3:
            return MemoryFormat(_text(where, body))
    return _bad(where, "unknown kind of argument")


def _fields(where: str, plain: Any, count: int) -> list[Any]:
    if type(plain) is not list or len(plain) != count:
        _bad(where, f"{count} fields were expected")
    return plain


def _tuple(where: str, plain: Any, read: Callable[[str, Any], T]) -> tuple[T, ...]:
    if type(plain) is not list:
        _bad(where, "a list was expected")
    return tuple(read(f"{where}[{position}]", item) for position, item in enumerate(plain))


def _int(where: str, plain: Any) -> int:
    if type(plain) is not int:
        _bad(where, "an integer was expected")
    return plain


def _text(where: str, plain: Any) -> str:
    if type(plain) is not str:
        _bad(where, "a text was expected")
    return plain


def _bad(where: str, why: str) -> NoReturn:
    raise RemoteProtocolError(ErrorCode.BAD_PROGRAM, f"{where}: {why}")


def _malformed(why: str) -> NoReturn:
    raise RemoteProtocolError(ErrorCode.MALFORMED, f"program: {why}")
