"""Programs: work as data.  Spec: 60-program.md

    carry, y_k = step(constants, carry, x_k)

`encode_program` and `decode_program_untrusted` are each other's inverse: what decodes encodes to
the same bytes.  Nothing here knows torch; the operator table is in `nextgpu_node.graph.optable`.
"""

from __future__ import annotations

import msgpack

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.program_check import check_program
from nextgpu_protocol.program_limits import MAX_PROGRAM_BYTES
from nextgpu_protocol.program_types import (
    BOOL,
    DTYPE_BYTES,
    FLOAT,
    INT,
    MEMORY_FORMATS,
    OUTPUT_KINDS,
    PROGRAM_VERSION,
    TENSOR,
    TEXT_LITERALS,
    UNUSED,
    Argument,
    Dimension,
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
from nextgpu_protocol.program_wire import from_plain_untrusted, to_plain, unpack_untrusted

__all__ = [
    "encode_program",
    "decode_program_untrusted",
    "ProgramSpec",
    "Graph",
    "Node",
    "TensorSpec",
    "Symbol",
    "Argument",
    "Literal",
    "Dimension",
    "Ref",
    "DType",
    "MemoryFormat",
    "PROGRAM_VERSION",
    "DTYPE_BYTES",
    "MEMORY_FORMATS",
    "TEXT_LITERALS",
    "OUTPUT_KINDS",
    "TENSOR",
    "INT",
    "FLOAT",
    "BOOL",
    "UNUSED",
]


def encode_program(spec: ProgramSpec) -> bytes:
    """The one encoding of `spec`.  LocalProtocolError where it breaks a rule of the format."""
    try:
        check_program(spec)
    except RemoteProtocolError as exc:
        raise LocalProtocolError(exc.detail) from exc
    data: bytes = msgpack.packb(to_plain(spec), use_bin_type=True)
    if len(data) > MAX_PROGRAM_BYTES:
        raise LocalProtocolError(f"the program is larger than {MAX_PROGRAM_BYTES} bytes")
    return data


def decode_program_untrusted(data: bytes) -> ProgramSpec:
    """The program in `data`, every structural rule checked.

    Raises RemoteProtocolError, nothing else: MALFORMED (not msgpack), NOT_CANONICAL, TOO_LARGE,
    BAD_PROGRAM (a rule is broken; the detail names the field).
    """
    plain = unpack_untrusted(data)
    spec = from_plain_untrusted(plain)
    check_program(spec)
    if msgpack.packb(to_plain(spec), use_bin_type=True) != data:
        raise RemoteProtocolError(ErrorCode.NOT_CANONICAL, "program")
    return spec
