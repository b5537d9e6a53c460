"""Typed messages <-> bytes.  The one file that knows how messages look in msgpack.
Spec: 00-conventions.md

A message is a msgpack array of its fields in declaration order.  Arrays, not maps: there are no
keys to repeat, to sort or to add.  What decodes is encoded again and compared, so each message
has exactly one encoding.  Allowed: bool, int (0 … 2^63-1), bytes, text, lists, nested messages.
No float, no nil, no extension types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgpack

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.limits import MAX_LIST_ITEMS, MAX_MESSAGE_BYTES, MAX_TEXT_BYTES

Message = TypeVar("Message")
Converter = Callable[[Any], Any]

_MAX_INT = 2**63 - 1


def encode_message(message: object) -> bytes:
    """The canonical bytes of a message dataclass.

    Raises LocalProtocolError where a value is outside what the type allows.
    """
    plain = _to_plain(message)
    cls: Any = type(message)
    try:
        _reader(cls)(plain)
    except RemoteProtocolError as exc:
        raise LocalProtocolError(f"{type(message).__name__}: {exc.detail}") from exc
    data: bytes = msgpack.packb(plain, use_bin_type=True)
    if len(data) > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(f"{type(message).__name__} is larger than a message may be")
    return data


def decode_message_untrusted(cls: type[Message], data: bytes) -> Message:
    """The message of type `cls` in `data`.  Raises RemoteProtocolError, nothing else."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(ErrorCode.TOO_LARGE, cls.__name__)
    plain = unpack_untrusted(data)
    hint: Any = cls
    message: Message = _reader(hint)(plain)
    if msgpack.packb(plain, use_bin_type=True) != data:
        raise RemoteProtocolError(ErrorCode.NOT_CANONICAL, cls.__name__)
    return message


def unpack_untrusted(data: bytes) -> Any:
    """msgpack to plain values, every length bounded by the bytes that are there."""
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            use_list=True,
            max_array_len=MAX_LIST_ITEMS,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=len(data),
            max_bin_len=len(data),
        )
    # msgpack raises its own errors, ValueError, UnicodeDecodeError and, on nesting, StackError.
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as exc:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "not msgpack") from exc


def _to_plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, IntEnum):
        return int(value)
    return value


@cache
def _reader(hint: Any) -> Converter:
    """The function that turns a plain value into a `hint`, or raises RemoteProtocolError."""
    if hint is bool:
        return _read_bool
    if hint is int:
        return _read_int
    if hint is str:
        return _read_text
    if hint is bytes:
        return _read_bytes
    if get_origin(hint) is tuple:
        return _list_reader(get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        return _dataclass_reader(hint)
    supertype = getattr(hint, "__supertype__", None)
    if supertype is not None:
        return _reader(supertype)
    raise LocalProtocolError(f"a message field can not be a {hint!r}")


def _read_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "a boolean was expected")
    return value


def _read_int(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "an integer from 0 to 2^63-1 was expected")
    return value


def _read_text(value: Any) -> str:
    if type(value) is not str or len(value.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "a short text was expected")
    if not value.isprintable():
        # Texts reach terminals and logs: control characters could rewrite what a user sees.
        raise RemoteProtocolError(ErrorCode.MALFORMED, "a text holds unprintable characters")
    return value


def _read_bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "bytes were expected")
    return value


def _list_reader(item_hint: Any) -> Converter:
    read_item = _reader(item_hint)

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > MAX_LIST_ITEMS:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "a short list was expected")
        return tuple(read_item(item) for item in value)

    return read


def _dataclass_reader(cls: Any) -> Converter:
    hints = get_type_hints(cls)
    fields = [(f.name, _reader(hints[f.name])) for f in dataclasses.fields(cls)]

    def read(value: Any) -> Any:
        if type(value) is not list or len(value) != len(fields):
            raise RemoteProtocolError(ErrorCode.MALFORMED, f"{cls.__name__} has other fields")
        message = cls(
            *(
                _field(cls, name, reader, item)
                for (name, reader), item in zip(fields, value, strict=True)
            )
        )
        validate = getattr(message, "validate", None)
        if validate is not None:
            validate()
        return message

    return read


def _field(cls: Any, name: str, reader: Converter, item: Any) -> Any:
    try:
        return reader(item)
    except RemoteProtocolError as exc:
        detail = f"{cls.__name__}.{name}: {exc.detail}"
        raise RemoteProtocolError(exc.code, detail) from exc
