"""Plain values as data: what a Python unit gives back.  Spec: 65-python.md#values

    value  = None | bool | int | float | text | bytes      as msgpack has them
           | ["I", decimal text]                           an integer of more than 64 bits
           | ["C", real, imaginary]                        a complex number
           | ["l" | "u" | "s" | "f", [value …]]            list, tuple, set, frozenset
           | ["d", [[key, value] …]]                       dict, in its order
           | ["t" | "a" | "z", index]                      tensor, array, array scalar: of the image

Decoding builds these kinds and nothing else: no class is named or looked up, nothing is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError

MAX_VALUE_DEPTH: Final = 64
MAX_VALUE_NODES: Final = 1_000_000
_MAX_DIGITS: Final = 4000
_INT64: Final = range(-(2**63), 2**64)
_CONTAINERS: Final[dict[str, Callable[[list[Any]], Any]]] = {
    "l": list,
    "u": tuple,
    "s": set,
    "f": frozenset,
}
_TAG_OF: Final[dict[type, str]] = {list: "l", tuple: "u", set: "s", frozenset: "f"}
_SCALARS: Final = (type(None), bool, float, str, bytes)


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor ("t"), an array ("a") or an array's scalar ("z"): number `index` of the image."""

    kind: str
    index: int


def encode_value(value: Any, as_buffer: Callable[[Any], Buffer | None]) -> bytes:
    """The tree of `value`; `as_buffer` takes what belongs into the image and says where.

    Raises LocalProtocolError, naming the type, for what is not plain.
    """
    data: bytes = msgpack.packb(_to_tree(value, as_buffer, 0), use_bin_type=True)
    return data


def _to_tree(value: Any, as_buffer: Callable[[Any], Buffer | None], depth: int) -> Any:
    if depth > MAX_VALUE_DEPTH:
        raise LocalProtocolError("the value is nested too deeply")
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is int:
        return value if value in _INT64 else ["I", _decimal(value)]
    if kind is complex:
        return ["C", value.real, value.imag]
    if kind in _TAG_OF:
        return [_TAG_OF[kind], [_to_tree(item, as_buffer, depth + 1) for item in value]]
    if kind is dict:
        pairs = [[_to_tree(part, as_buffer, depth + 1) for part in pair] for pair in value.items()]
        return ["d", pairs]
    buffer = as_buffer(value)
    if buffer is None:
        raise LocalProtocolError(f"a {kind.__module__}.{kind.__qualname__} is not plain data")
    return [buffer.kind, buffer.index]


def _decimal(value: int) -> str:
    if value.bit_length() > 3 * _MAX_DIGITS:
        raise LocalProtocolError("an integer has too many digits")
    return str(value)


def decode_value_untrusted(data: bytes, take_buffer: Callable[[Buffer], Any]) -> Any:
    """The value of a tree; `take_buffer` gives what stands in the image.

    Raises RemoteProtocolError, nothing else, as long as `take_buffer` does.
    """
    try:
        tree = msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            max_array_len=len(data),
            max_map_len=0,
            max_ext_len=0,
            max_str_len=len(data),
            max_bin_len=len(data),
        )
        return _Decoder(take_buffer).value(tree, 0)
    # Of msgpack; a key that can not be hashed, too; and deep nesting inside msgpack.
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException, RecursionError) as exc:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "not a value") from exc


class _Decoder:
    def __init__(self, take_buffer: Callable[[Buffer], Any]) -> None:
        self._take_buffer = take_buffer
        self._nodes = 0

    def value(self, tree: Any, depth: int) -> Any:
        self._nodes += 1
        if depth > MAX_VALUE_DEPTH or self._nodes > MAX_VALUE_NODES:
            raise RemoteProtocolError(ErrorCode.TOO_LARGE, "value")
        if type(tree) is not list:
            if type(tree) is int or type(tree) in _SCALARS:
                return tree
            raise RemoteProtocolError(ErrorCode.MALFORMED, "value")
        if len(tree) < 2 or type(tree[0]) is not str:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "value")
        return self._tagged(tree[0], tree[1:], depth)

    def _tagged(self, tag: str, rest: list[Any], depth: int) -> Any:
        match tag, rest:
            case "l" | "u" | "s" | "f", [list(items)]:
                return _CONTAINERS[tag]([self.value(item, depth + 1) for item in items])
            case "d", [list(pairs)]:
                return dict(self._pair(pair, depth) for pair in pairs)
            case "I", [str(text)] if len(text) <= _MAX_DIGITS + 1 and _is_decimal(text):
                return int(text)
            case "C", [float(real), float(imaginary)]:
                return complex(real, imaginary)
            case "t" | "a" | "z", [int(index)] if type(index) is int and index >= 0:
                return self._take_buffer(Buffer(tag, index))
        raise RemoteProtocolError(ErrorCode.MALFORMED, "value")

    def _pair(self, pair: Any, depth: int) -> tuple[Any, Any]:
        if type(pair) is not list or len(pair) != 2:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "value")
        return self.value(pair[0], depth + 1), self.value(pair[1], depth + 1)


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()
