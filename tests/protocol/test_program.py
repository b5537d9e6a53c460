"""Programs as bytes: the round trip, and every way to break one."""

import contextlib
import dataclasses
import math
import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.program import (
    DTYPE_BYTES,
    MEMORY_FORMATS,
    TEXT_LITERALS,
    DType,
    Graph,
    MemoryFormat,
    Node,
    ProgramSpec,
    Ref,
    Symbol,
    TensorSpec,
    decode_program_untrusted,
    encode_program,
)
from nextgpu_protocol.program_limits import (
    MAX_LIST_ITEMS,
    MAX_NODE_ARGUMENTS,
    MAX_NODE_OUTPUTS,
    MAX_PROGRAM_BYTES,
    MAX_RANK,
    MAX_SYMBOLS,
    MAX_TENSORS,
)

X = TensorSpec("x", "float32", ("batch", 4))
Y = TensorSpec("y", "float32", ("batch", 3))
PROGRAM = ProgramSpec(
    min_table_version=1,
    symbols=(Symbol("batch", 1, 64),),
    constants=(TensorSpec("weight", "float32", (3, 4)),),
    xs=(X,),
    ys=(Y,),
    step=Graph((Node("aten.linear.default", (Ref(1), Ref(0)), (), "t"),), (2,)),
)
# Positions of the fields of a program on the wire.
VERSION, TABLE, SYMBOLS, CONSTANTS, CARRY, XS, YS, FINISH_YS, STOP, CHECKPOINT, STEP = range(11)
INIT, FINISH = 11, 12


def plain() -> list:
    return msgpack.unpackb(encode_program(PROGRAM))


def refusal(data: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_program_untrusted(data)
    return caught.value


def test_a_program_survives_the_wire():
    assert decode_program_untrusted(encode_program(PROGRAM)) == PROGRAM


def _set(*path_and_value):
    *path, last, value = path_and_value

    def edit(program: list) -> None:
        for key in path:
            program = program[key]
        program[last] = value

    return edit


NODE = (STEP, 0, 0)
NESTED: list = [1, [[1, [[1, []]]]]]
BROKEN = {
    "another version": (_set(VERSION, 2), "version"),
    "no table version": (_set(TABLE, 0), "min_table_version"),
    "a negative checkpoint time": (_set(CHECKPOINT, -1), "checkpoint_s"),
    "a symbol twice": (_set(SYMBOLS, [["batch", 1, 2]] * 2), "same name"),
    "a symbol that is no name": (_set(SYMBOLS, 0, 0, "a b"), "not a name"),
    "a symbol with an empty range": (_set(SYMBOLS, 0, 2, 0), "within"),
    "a symbol that no input binds": (
        _set(SYMBOLS, [["batch", 1, 64], ["free", 1, 2]]),
        "not the size of any input",
    ),
    "an undeclared symbol": (_set(XS, 0, 2, ["other", 4]), "no declared symbol"),
    "a symbolic constant": (_set(CONSTANTS, 0, 2, ["batch", 4]), "no declared symbol"),
    "a computed input size": (_set(XS, 0, 2, ["batch", None]), "computed"),
    "a negative size": (_set(XS, 0, 2, ["batch", -4]), "within"),
    "a boolean as a size": (_set(XS, 0, 2, ["batch", True]), "integer"),
    "an unknown dtype": (_set(XS, 0, 1, "float31"), "dtype"),
    "an empty name": (_set(XS, 0, 0, ""), "not a name"),
    "a name with a control character": (_set(XS, 0, 0, "a\x1b[2J"), "not a name"),
    "a name that ends in a newline": (_set(XS, 0, 0, "a\n"), "not a name"),
    "two inputs of one name": (_set(XS, [["x", "int8", ["batch"]]] * 2), "same name"),
    "a stop beyond the outputs": (_set(STOP, 1), "names no output"),
    "a negative stop": (_set(STOP, -1), "names no output"),
    "a stop that is no boolean": (_set(STOP, 0), "boolean of one element"),
    "finish outputs without its graph": (_set(FINISH_YS, [["f", "int8", []]]), "finish"),
    "an init graph without its outputs": (_set(INIT, [[], [0]]), "outputs are declared"),
    "a graph output too many": (_set(STEP, 1, [2, 2]), "1 outputs are declared"),
    "a graph output that does not exist": (_set(STEP, 1, [3]), "does not exist"),
    "a negative graph output": (_set(STEP, 1, [-1]), "does not exist"),
    "a number as a graph output": (_set(*NODE, 3, "i"), "not a tensor"),
    "an unused output that is read": (_set(*NODE, 3, "-"), "unused output"),
    "a node that reads itself": (_set(*NODE, 1, [[0, 2], [0, 0]]), "does not exist"),
    "a reference forward": (_set(*NODE, 1, [[0, 99], [0, 0]]), "does not exist"),
    "a reference before the start": (_set(*NODE, 1, [[0, -1], [0, 0]]), "does not exist"),
    "a boolean as a reference": (_set(*NODE, 1, [[0, True]]), "integer"),
    "an operator with a path": (_set(*NODE, 0, "os/system"), "operator id"),
    "a dunder chain": (_set(*NODE, 0, "aten.__class__.__init__.x"), "operator id"),
    "no outputs": (_set(*NODE, 3, ""), "kind of output"),
    "an unknown kind of output": (_set(*NODE, 3, "x"), "kind of output"),
    "an unknown kind of argument": (_set(*NODE, 1, [[9, 0]]), "kind of argument"),
    "a float as a kind of argument": (_set(*NODE, 1, [[0.0, 0]]), "kind of argument"),
    "a free text": (_set(*NODE, 1, ["/etc/passwd"]), "texts"),
    "an unknown dtype argument": (_set(*NODE, 1, [[2, "qint8"]]), "dtypes"),
    "an unknown memory format": (_set(*NODE, 1, [[3, "sparse"]]), "memory formats"),
    "not-a-number": (_set(*NODE, 1, [math.nan]), "not-a-number"),
    "a huge integer": (_set(*NODE, 1, [2**63]), "within"),
    "lists in lists in lists": (_set(*NODE, 1, [NESTED]), "too deeply"),
    "a keyword twice": (_set(*NODE, 2, [["a", 1], ["a", 2]]), "repeat"),
    "keywords out of order": (_set(*NODE, 2, [["b", 1], ["a", 2]]), "repeat"),
    "a keyword that is no name": (_set(*NODE, 2, [["*", 1]]), "argument name"),
    "a node without outputs field": (_set(*NODE, ["aten.relu.default", [], []]), "4 fields"),
    "a field too many in a tensor": (_set(XS, 0, ["x", "int8", [], 0]), "3 fields"),
    "a list in place of a text": (_set(*NODE, 0, []), "text"),
    "a text in place of a list": (_set(XS, "x"), "list"),
    "a float in place of an integer": (_set(TABLE, 1.0), "integer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_refused(name):
    edit, words = BROKEN[name]
    program = plain()
    edit(program)
    error = refusal(msgpack.packb(program))
    assert error.code is ErrorCode.BAD_PROGRAM
    assert words in error.detail


OVERSIZED = {
    "too many symbols": _set(SYMBOLS, [[f"s{at}", 1, 1] for at in range(MAX_SYMBOLS + 1)]),
    "too many tensors": _set(XS, [[f"x{at}", "int8", []] for at in range(MAX_TENSORS + 1)]),
    "too many dimensions": _set(XS, 0, 2, [1] * (MAX_RANK + 1)),
    "a tensor of petabytes": _set(XS, 0, 2, [2**30, 2**30]),
    "too many arguments": _set(*NODE, 1, [0] * (MAX_NODE_ARGUMENTS + 1)),
    "too long a list": _set(*NODE, 1, [[1, [0] * (MAX_LIST_ITEMS + 1)]]),
    "too many outputs": _set(*NODE, 3, "t" * (MAX_NODE_OUTPUTS + 1)),
    "too many values": _set(
        STEP, 0, [["sym.add", [1, 1], [], "t" * MAX_NODE_OUTPUTS] for _ in range(65)]
    ),
}


@pytest.mark.parametrize("name", OVERSIZED)
def test_an_oversized_part_is_refused(name):
    program = plain()
    OVERSIZED[name](program)
    assert refusal(msgpack.packb(program)).code is ErrorCode.TOO_LARGE


MALFORMED = {
    "nothing": b"",
    "one byte": b"\xc1",
    "cut short": encode_program(PROGRAM)[:-1],
    "bytes after the end": encode_program(PROGRAM) + b"\x00",
    "a map": b"\x81\x01\x02",
    "bytes": b"\xc4\x01a",
    "an extension": b"\xd4\x00\x00",
    "a 32-bit float": b"\xca\x00\x00\x00\x00",
    "an array that lies about its length": b"\xdd\xff\xff\xff\xff",
    "a text that lies about its length": b"\x91\xdb\xff\xff\xff\xffa",
    "text that is not UTF-8": b"\x91\xa2\xff\xfe",
    "depth": b"\x91" * 100_000 + b"\xc0",
    "nested lies": (b"\xdd\x00\x0f\xff\xff" * 10) + b"\xc0" * 100,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bytes_are_refused(name):
    assert refusal(MALFORMED[name]).code is ErrorCode.MALFORMED


def test_an_oversized_program_is_refused_unread():
    assert refusal(bytes(MAX_PROGRAM_BYTES + 1)).code is ErrorCode.TOO_LARGE


def test_a_second_encoding_of_the_same_program_is_refused():
    data = encode_program(PROGRAM)
    # The version, 1, once more as a 16-bit integer.
    wide = data[:1] + b"\xcd\x00\x01" + data[2:]
    assert msgpack.unpackb(wide) == msgpack.unpackb(data)
    assert refusal(wide).code is ErrorCode.NOT_CANONICAL


def test_lengths_are_counted_before_memory_is_given():
    # Ten arrays, one in the other, that each promise a million items.
    data = b"\xdd\x00\x0f\xff\xff" * 10 + b"\xc0" * 1_100_000
    tracemalloc.start()
    refusal(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_our_own_broken_program_is_our_own_error():
    with pytest.raises(LocalProtocolError, match="version"):
        encode_program(dataclasses.replace(PROGRAM, version=7))


def test_all_three_graphs_travel():
    carry = (TensorSpec("total", "int64", (2,)),)
    spec = ProgramSpec(
        min_table_version=1,
        carry=carry,
        xs=(TensorSpec("x", "int64", (2,)),),
        ys=(TensorSpec("done", "bool", ()),),
        stop=0,
        checkpoint_s=30,
        step=Graph(
            (
                Node("aten.add.Tensor", (Ref(0), Ref(1)), (), "t"),
                Node("aten.all.default", (Ref(2),), (), "t"),
            ),
            (2, 3),
        ),
        init=Graph((Node("aten.zeros.default", ((2,),), (("dtype", DType("int64")),), "t"),), (0,)),
        finish=Graph((), (0,)),
        finish_ys=carry,
    )
    assert decode_program_untrusted(encode_program(spec)) == spec
    assert list(spec.graphs) == ["step", "init", "finish"]


LITERALS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.sampled_from(sorted(TEXT_LITERALS))
    | st.builds(DType, st.sampled_from(sorted(DTYPE_BYTES)))
    | st.builds(MemoryFormat, st.sampled_from(sorted(MEMORY_FORMATS)))
)
ARGUMENTS = LITERALS | st.lists(LITERALS, max_size=4).map(tuple)


@st.composite
def programs(draw) -> ProgramSpec:
    inputs = draw(st.integers(1, 3))
    nodes, values = [], inputs
    for _ in range(draw(st.integers(0, 5))):
        references = st.integers(0, values - 1).map(Ref)
        args = draw(st.lists(ARGUMENTS | references, max_size=4))
        names = draw(st.lists(st.sampled_from("abcde"), unique=True, max_size=3))
        kwargs = tuple((name, draw(ARGUMENTS | references)) for name in sorted(names))
        kinds = draw(st.sampled_from(["t", "i", "f", "b", "tt", "ti"]))
        nodes.append(Node("aten.any.thing", tuple(args), kwargs, kinds))
        values += len(kinds)
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    xs = tuple(TensorSpec(f"x{at}", "int8", draw(shapes)) for at in range(inputs))
    return ProgramSpec(
        min_table_version=draw(st.integers(1, 9)),
        xs=xs,
        ys=(TensorSpec("y", "int8", (None,)),),
        step=Graph(tuple(nodes), (0,)),
        checkpoint_s=draw(st.integers(0, 60)),
    )


@given(programs())
def test_what_encodes_decodes_to_the_same(spec):
    assert decode_program_untrusted(encode_program(spec)) == spec


@given(st.data())
def test_what_decodes_encodes_to_the_same_bytes(data):
    mutated = bytearray(encode_program(PROGRAM))
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        spec = decode_program_untrusted(bytes(mutated))
    except RemoteProtocolError:
        return
    assert encode_program(spec) == bytes(mutated)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_program_or_a_protocol_error(data):
    with contextlib.suppress(RemoteProtocolError):
        decode_program_untrusted(data)
