"""Programs that nobody writes by accident, as bytes, each with how it must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import torch

from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.program_limits import (
    MAX_LIST_ITEMS,
    MAX_NODE_ARGUMENTS,
    MAX_NODE_OUTPUTS,
    MAX_NODES,
    MAX_PROGRAM_ARRAYS,
    MAX_PROGRAM_BYTES,
    MAX_RANK,
    MAX_SYMBOLS,
    MAX_TENSORS,
)

BAD, LARGE, LIMIT = ErrorCode.BAD_PROGRAM, ErrorCode.TOO_LARGE, ErrorCode.OVER_LIMIT
MALFORMED, UNKNOWN = ErrorCode.MALFORMED, ErrorCode.UNKNOWN_OPERATOR
# What the machine that meets them may use.
MAX_LIVE_BYTES = 1_000_000

VERSION, TABLE, SYMBOLS, CONSTANTS, CARRY, XS, YS, FINISH_YS, STOP, CHECKPOINT, STEP = range(11)
INIT, FINISH = 11, 12
X: list[Any] = ["x", "float32", [4, 6]]


@dataclass(frozen=True)
class Malice:
    """A program, the code that refuses it, and words of the detail that say where it is bad."""

    data: bytes
    code: ErrorCode
    place: str
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: {"x": torch.ones(4, 6)})


def ref(index: int) -> list[Any]:
    return [0, index]


def many(*items: Any) -> list[Any]:
    return [1, list(items)]


def dtype(name: str) -> list[Any]:
    return [2, name]


def node(op: str, *args: Any, outputs: str = "t", **kwargs: Any) -> list[Any]:
    return [op, list(args), [[name, value] for name, value in kwargs.items()], outputs]


x = ref(0)


def plain(*nodes: list[Any], outputs: list[int] | None = None, **fields: Any) -> list[Any]:
    """A program of `nodes` on x that gives the last value, with `fields` by their names."""
    xs = fields.get("xs", [X])
    values = len(xs) + sum(len(each[3]) for each in nodes)
    graph = [list(nodes), [values - 1] if outputs is None else outputs]
    return [
        fields.get("version", 1),
        fields.get("table", 1),
        fields.get("symbols", []),
        fields.get("constants", []),
        fields.get("carry", []),
        xs,
        fields.get("ys", [["y", "float32", [None, None]]]),
        fields.get("finish_ys", []),
        fields.get("stop"),
        fields.get("checkpoint_s", 0),
        graph,
        fields.get("init"),
        fields.get("finish"),
    ]


def program(*nodes: list[Any], outputs: list[int] | None = None, **fields: Any) -> bytes:
    return msgpack.packb(plain(*nodes, outputs=outputs, **fields))


RELU = node("aten.relu.default", x)


def call(op: str, *args: Any, **kwargs: Any) -> bytes:
    return program(node(op, *args, **kwargs))


def _scan(nodes: list[Any], outputs: list[int], carry: list[Any], **fields: Any) -> bytes:
    """A program with a carry of x's kind: values 0 … are the carry, then x."""
    return msgpack.packb([1, 1, [], [], carry, [X], fields.get("ys", []), [], None, 0,
                          [nodes, outputs], fields.get("init"), None])  # fmt: skip


def _loss(rows: int) -> bytes:
    return program(
        node("aten.ones.default", many(rows, 1)),
        node("aten.ones.default", many(1, rows)),
        node("aten.mse_loss.default", ref(1), ref(2)),
        ys=[["y", "float32", []]],
    )


def _products(op: str, left: list[int], right: list[int]) -> bytes:
    return program(
        node("aten.ones.default", many(*left)),
        node("aten.ones.default", many(*right)),
        node(op, ref(1), ref(2)),
        ys=[["y", "float32", [None] * 4]],
    )


def _doubled(times: int) -> bytes:
    return program(
        *(node("aten.cat.default", many(ref(at), ref(at))) for at in range(times)),
    )


def _number(*nodes: list[Any]) -> bytes:
    return program(*nodes, outputs=[0])


IMAGE = ["x", "float32", [1, 2, 8, 8]]
IMAGE_INPUT = {"x": torch.ones(1, 2, 8, 8)}


def _on_image(op: str, *args: Any, **kwargs: Any) -> bytes:
    ys = [["y", "float32", [None] * 4]]
    return program(node(op, x, *args, **kwargs), xs=[IMAGE], ys=ys)


DECODED: dict[str, Malice] = {
    # --- references
    "two nodes that read each other": Malice(
        program(
            node("aten.add.Tensor", x, ref(2)), node("aten.add.Tensor", x, ref(1)), outputs=[2]
        ),
        BAD,
        "graphs.step.nodes[0].args[1]: a reference to a value that does not exist yet",
    ),
    "a node that reads itself": Malice(call("aten.relu.default", ref(1)), BAD, "nodes[0].args[0]"),
    "a dangling reference": Malice(call("aten.relu.default", ref(10**6)), BAD, "nodes[0].args[0]"),
    "a reference of 2^63": Malice(call("aten.relu.default", ref(2**63)), BAD, "nodes[0].args[0]"),
    "a reference before the start": Malice(
        call("aten.relu.default", ref(-1)), BAD, "nodes[0].args[0]"
    ),
    "a reference that is a boolean": Malice(
        call("aten.relu.default", ref(True)), BAD, "nodes[0][0]: an integer"
    ),
    "a forward reference inside a list": Malice(
        call("aten.cat.default", many(x, ref(9))), BAD, "nodes[0].args[0]"
    ),
    "a forward reference in a keyword": Malice(
        call("aten.linear.default", x, x, bias=ref(7)), BAD, "nodes[0].kwargs.bias"
    ),
    "an unused output that is read": Malice(
        program(node("aten.topk.default", x, 1, outputs="t-"), node("aten.relu.default", ref(2))),
        BAD,
        "nodes[1].args[0]: a reference to an unused output",
    ),
    "a graph output that does not exist": Malice(program(RELU, outputs=[5]), BAD, "step.outputs"),
    "a graph output that is a number": Malice(
        program(node("sym.add", 1, 1, outputs="i")), BAD, "graphs.step.outputs: an output is not"
    ),
    "a finish graph that reads the inputs": Malice(
        program(RELU, finish=[[], [0]], finish_ys=[["f", "float32", [4, 6]]]),
        BAD,
        "graphs.finish.outputs",
    ),
    "an init graph that reads the carry": Malice(
        _scan([RELU], [0], [["c", "float32", [4, 6]]], init=[[], [0]]), BAD, "graphs.init.outputs"
    ),
    # --- sizes
    "a negative dimension": Malice(program(RELU, xs=[["x", "int8", [-1]]]), BAD, "xs[0]"),
    "a dimension of 2^62": Malice(program(RELU, xs=[["x", "int8", [2**62]]]), BAD, "xs[0]"),
    "a dimension of 2^64-1": Malice(program(RELU, xs=[["x", "int8", [2**64 - 1]]]), BAD, "xs[0]"),
    "a product of dimensions that overflows": Malice(
        program(RELU, xs=[["x", "int8", [2**40] * 8]]), LARGE, "xs[0]: more than"
    ),
    "a zero that hides an overflow": Malice(
        program(RELU, xs=[["x", "int8", [2**40, 2**40, 0]]]), LARGE, "xs[0]: more than"
    ),
    "a tensor of too many dimensions": Malice(
        program(RELU, xs=[["x", "int8", [1] * (MAX_RANK + 1)]]), LARGE, "xs[0].shape"
    ),
    "a boolean dimension": Malice(program(RELU, xs=[["x", "int8", [True]]]), BAD, "xs[0]"),
    "a float dimension": Malice(program(RELU, xs=[["x", "int8", [1.0]]]), BAD, "xs[0]"),
    "a dimension that nobody computes": Malice(
        program(RELU, xs=[["x", "int8", [None]]]), BAD, "xs[0]: only outputs"
    ),
    # --- literals and texts
    "an integer of 64 bits and one": Malice(
        call("aten.add.Scalar", x, 2**63), BAD, "nodes[0].args[1]"
    ),
    "not-a-number": Malice(call("aten.add.Scalar", x, math.nan), BAD, "not-a-number"),
    "a path as a text": Malice(
        call("aten.gelu.default", x, approximate="/etc/passwd"), BAD, "kwargs.approximate"
    ),
    "a format string as a text": Malice(
        call("aten.gelu.default", x, approximate="{0.__class__}"), BAD, "kwargs.approximate"
    ),
    "a dtype that does not exist": Malice(
        call("aten.sum.default", x, dtype=dtype("object")), BAD, "kwargs.dtype"
    ),
    "a quantised dtype": Malice(program(RELU, xs=[["x", "quint8", [4]]]), BAD, "xs[0]"),
    "a sparse memory format": Malice(
        call("aten.clone.default", x, memory_format=[3, "sparse"]), BAD, "kwargs.memory_format"
    ),
    "a tag that does not exist": Malice(call("aten.relu.default", [4, 0]), BAD, "kind of argument"),
    "a list as a tag": Malice(call("aten.relu.default", [[0], 0]), BAD, "kind of argument"),
    # --- names
    "an operator with a Cyrillic letter": Malice(
        call("\u0430ten.relu.default", x), BAD, "nodes[0]: not an operator id"
    ),
    "an operator in full-width letters": Malice(
        call("\uff41ten.relu.default", x), BAD, "nodes[0]: not an operator id"
    ),
    "an operator with a right-to-left override": Malice(
        call("aten.\u202erelu.default", x), BAD, "nodes[0]: not an operator id"
    ),
    "an operator with a zero byte": Malice(
        call("aten.relu.default\0", x), BAD, "nodes[0]: not an operator id"
    ),
    "an operator with a newline": Malice(
        call("aten.relu.default\n", x), BAD, "nodes[0]: not an operator id"
    ),
    "an operator that is a path into Python": Malice(
        call("aten.__class__.__init__.__globals__", x), BAD, "nodes[0]: not an operator id"
    ),
    "an operator of 4,000 letters": Malice(
        call("aten." + "a" * 4000, x), BAD, "nodes[0]: not an operator id"
    ),
    "an input named like a path": Malice(
        program(RELU, xs=[["../../x", "int8", [4]]]), BAD, "xs[0]: not a name"
    ),
    "an input named with an escape sequence": Malice(
        program(RELU, xs=[["x\x1b[2J", "int8", [4]]]), BAD, "xs[0]: not a name"
    ),
    "two inputs of one name": Malice(program(RELU, xs=[X, X], outputs=[2]), BAD, "xs: two have"),
    "two outputs of one name": Malice(
        program(RELU, ys=[["y", "int8", [1]]] * 2, outputs=[1, 1]), BAD, "ys: two have"
    ),
    "one keyword twice": Malice(
        program(["aten.relu.default", [], [["self", x], ["self", x]], "t"]), BAD, "nodes[0]"
    ),
    "keywords out of order": Malice(
        program(["aten.relu.default", [], [["z", 0], ["self", x]], "t"]), BAD, "nodes[0]"
    ),
    # --- symbols, stop, headers
    "one symbol twice": Malice(
        program(RELU, symbols=[["n", 1, 2]] * 2, xs=[["x", "float32", ["n", 6]]]), BAD, "symbols"
    ),
    "a symbol that no input has": Malice(
        program(RELU, symbols=[["n", 1, 2]]), BAD, "symbols: a symbol is not"
    ),
    "a symbol that was not declared": Malice(
        program(RELU, xs=[["x", "float32", ["n", 6]]]), BAD, "xs[0]: a dimension names no"
    ),
    "a symbol whose most is less than its least": Malice(
        program(RELU, symbols=[["n", 5, 4]], xs=[["x", "float32", ["n", 6]]]), BAD, "symbols[0]"
    ),
    "a symbol from below zero": Malice(
        program(RELU, symbols=[["n", -5, 4]], xs=[["x", "float32", ["n", 6]]]), BAD, "symbols[0]"
    ),
    "a constant of symbolic size": Malice(
        program(RELU, symbols=[["n", 1, 4]], constants=[["c", "int8", ["n"]]], xs=[]),
        BAD,
        "constants[0]",
    ),
    "a stop beyond the outputs": Malice(program(RELU, stop=1), BAD, "stop: names no output"),
    "a stop before the outputs": Malice(program(RELU, stop=-1), BAD, "stop: names no output"),
    "a stop that is not one boolean": Malice(program(RELU, stop=0), BAD, "stop: must be"),
    "a checkpoint in ten thousand years": Malice(
        program(RELU, checkpoint_s=2**40), BAD, "checkpoint_s"
    ),
    "a version to come": Malice(program(RELU, version=2), BAD, "version"),
    "finish outputs without a finish graph": Malice(
        program(RELU, finish_ys=[X]), BAD, "finish_ys: without"
    ),
    # --- bombs
    "a node too many": Malice(
        program(*([node("sym.neg", 1, outputs="i")] * (MAX_NODES + 1)), outputs=[0]),
        LARGE,
        "graphs.step.nodes",
    ),
    "too many values": Malice(
        program(*([node("sym.neg", 1, outputs="i" * MAX_NODE_OUTPUTS)] * 65), outputs=[0]),
        LARGE,
        "graphs.step values",
    ),
    "too many outputs of a node": Malice(
        program(node("aten.unbind.int", x, outputs="t" * (MAX_NODE_OUTPUTS + 1))),
        LARGE,
        "nodes[0].outputs",
    ),
    "too many arguments": Malice(
        call("aten.relu.default", *[x] * (MAX_NODE_ARGUMENTS + 1)), LARGE, "nodes[0] arguments"
    ),
    "too long a list": Malice(
        call("aten.cat.default", many(*[x] * (MAX_LIST_ITEMS + 1))), LARGE, "nodes[0].args[0]"
    ),
    "too many symbols": Malice(
        program(RELU, symbols=[[f"n{at}", 1, 2] for at in range(MAX_SYMBOLS + 1)]),
        LARGE,
        "symbols",
    ),
    "too many inputs": Malice(
        program(RELU, xs=[[f"x{at}", "int8", []] for at in range(MAX_TENSORS + 1)], outputs=[0]),
        LARGE,
        "xs",
    ),
    "lists in lists in lists": Malice(
        call("aten.cat.default", many(many(many()))), BAD, "nested too deeply"
    ),
    "a hundred thousand arrays in each other": Malice(
        b"\x91" * 100_000 + b"\xc0", MALFORMED, "program: nested too deeply"
    ),
    "four million empty arrays": Malice(
        b"\xdd" + (MAX_PROGRAM_BYTES - 5).to_bytes(4) + b"\x90" * (MAX_PROGRAM_BYTES - 5),
        LARGE,
        f"program: more than {MAX_PROGRAM_ARRAYS} arrays",
    ),
    "an array that promises four billion items": Malice(
        b"\xdd\xff\xff\xff\xff" + b"\xc0" * 100, MALFORMED, "declares more than it holds"
    ),
    "a text that promises four billion bytes": Malice(
        b"\x9d\xdb\xff\xff\xff\xff" + b"a" * 100, MALFORMED, "declares more than it holds"
    ),
    "more bytes than a program may have": Malice(
        b"\xc0" * (MAX_PROGRAM_BYTES + 1), LARGE, "program: over"
    ),
    "a map": Malice(b"\x81\x01\x02", MALFORMED, "a type that programs do not use"),
    "an extension type": Malice(b"\xc7\x01\x00\x00", MALFORMED, "a type that programs do not use"),
    "text that is no text": Malice(b"\x91\xa4\xff\xfe\xed\xa0", MALFORMED, "program: not msgpack"),
    "a second program behind the first": Malice(
        program(RELU) * 2, MALFORMED, "program: bytes follow"
    ),
    "a second way to write the same": Malice(
        program(RELU)[:1] + b"\xcd\x00\x01" + program(RELU)[2:], ErrorCode.NOT_CANONICAL, "program"
    ),
}


LINKED: dict[str, Malice] = {
    "a newer table": Malice(program(RELU, table=10**6), ErrorCode.OLD_TABLE, "table 1000000"),
    "an operator that reads files": Malice(
        call("aten.from_file.default"), UNKNOWN, "nodes[0] aten.from_file.default"
    ),
    "a view of foreign memory": Malice(
        call("aten.as_strided.default", x, many(10**6), many(1)), UNKNOWN, "aten.as_strided"
    ),
    "memory that was never written": Malice(
        call("aten.empty.memory_format", many(4)), UNKNOWN, "aten.empty.memory_format"
    ),
    "a write into an input": Malice(call("aten.mul_.Tensor", x, x), UNKNOWN, "aten.mul_.Tensor"),
    "a write into a view": Malice(
        program(node("aten.expand.default", x, many(9, 4, 6)), node("aten.add_.Tensor", ref(1), x)),
        UNKNOWN,
        "nodes[1] aten.add_.Tensor",
    ),
    "another storage": Malice(call("aten.set_.source_Tensor", x, x), UNKNOWN, "aten.set_"),
    "an output argument": Malice(call("aten.add.out", x, x, out=x), UNKNOWN, "aten.add.out"),
    "a size from values": Malice(call("aten.nonzero.default", x), UNKNOWN, "aten.nonzero"),
    "a value as a number": Malice(call("aten.item.default", x), UNKNOWN, "aten.item.default"),
    "another library": Malice(call("prims.device_put.default", x), UNKNOWN, "prims.device_put"),
    "a Python function": Malice(call("builtins.eval", x), UNKNOWN, "builtins.eval"),
    "an argument too many": Malice(call("aten.relu.default", x, 1), BAD, "takes 1 positional"),
    "an argument too few": Malice(call("aten.linear.default", x), BAD, "lacks the argument weight"),
    "an argument twice": Malice(call("aten.relu.default", x, self=x), BAD, "no further argument"),
    "a keyword of another operator": Malice(
        call("aten.relu.default", x, inplace=True), BAD, "no further argument inplace"
    ),
    "a device": Malice(call("aten.zeros.default", many(2), device=0), BAD, "argument device"),
    "pinned memory": Malice(
        call("aten.zeros.default", many(2), pin_memory=True), BAD, "argument pin_memory"
    ),
    "a dtype for a number": Malice(
        call("aten.add.Scalar", x, dtype("int8")), BAD, "argument other"
    ),
    "a number for a dtype": Malice(call("aten.sum.default", x, dtype=6), BAD, "argument dtype"),
    "infinity for an integer": Malice(
        call("aten.select.int", x, 0, math.inf), BAD, "argument index"
    ),
    "a boolean for an integer": Malice(call("aten.select.int", x, True, 0), BAD, "argument dim"),
    "a list for a number": Malice(call("aten.select.int", x, many(0), 0), BAD, "argument dim"),
    "a tensor for a size": Malice(call("aten.zeros.default", many(x)), BAD, "argument size"),
    "a size for a tensor in a list": Malice(
        call("aten.cat.default", many(x, 1)), BAD, "argument tensors"
    ),
    "nothing for a tensor": Malice(call("aten.relu.default", None), BAD, "argument self"),
    "a mode of another operator": Malice(
        call("aten.gelu.default", x, approximate="sum"), BAD, "argument approximate"
    ),
    "a reduction that does not exist": Malice(
        call("aten.mse_loss.default", x, x, 7), BAD, "argument reduction"
    ),
    "a hundred dimensions to roll": Malice(
        call("aten.roll.default", x, many(*[1] * 100), many(*[0] * 100)), BAD, "argument shifts"
    ),
    "training": Malice(call("aten.dropout.default", x, 0.5, True), BAD, "argument train"),
    "random attention": Malice(
        call("aten.scaled_dot_product_attention.default", x, x, x, None, 0.5),
        BAD,
        "argument dropout_p",
    ),
    "two outputs of one": Malice(
        program(node("aten.relu.default", x, outputs="tt")), BAD, "gives 1 tensors"
    ),
    "one output of two": Malice(call("aten.topk.default", x, 1), BAD, "gives 2 tensors"),
    "a tensor that calls itself a number": Malice(
        program(node("aten.relu.default", x, outputs="i"), outputs=[0]), BAD, "gives 1 tensors"
    ),
}


PLANNED: dict[str, Malice] = {
    "a lie about an output's shape": Malice(
        program(RELU, ys=[["y", "float32", [4, 7]]]), BAD, "graphs.step.outputs y"
    ),
    "a lie about an output's dtype": Malice(
        program(RELU, ys=[["y", "float16", [4, 6]]]), BAD, "graphs.step.outputs y"
    ),
    "shapes that do not fit": Malice(call("aten.mm.default", x, x), BAD, "aten.mm.default"),
    "100 GB of zeros": Malice(
        call("aten.zeros.default", many(25 * 10**9)), LIMIT, "aten.zeros.default: 100000000096"
    ),
    "a size that overflows": Malice(
        call("aten.zeros.default", many(2**40, 2**40)), BAD, "aten.zeros.default"
    ),
    "a negative size": Malice(call("aten.zeros.default", many(-(2**62))), BAD, "aten.zeros"),
    "a view of a billion rows": Malice(
        call("aten.expand.default", x, many(10**9, 4, 6)), LIMIT, "aten.expand.default"
    ),
    "a repetition": Malice(
        call("aten.repeat.default", x, many(10**5, 10**5)), LIMIT, "aten.repeat.default"
    ),
    "padding by 2^40": Malice(
        call("aten.constant_pad_nd.default", x, many(0, 2**40)), LIMIT, "constant_pad_nd"
    ),
    "padding that overflows": Malice(
        call("aten.constant_pad_nd.default", x, many(2**62, 2**62)), BAD, "constant_pad_nd"
    ),
    "a trillion numbers": Malice(call("aten.arange.default", 10**12), LIMIT, "aten.arange.default"),
    "a range of tiny steps": Malice(
        call("aten.arange.start_step", 0, 1, 1e-300), BAD, "aten.arange.start_step"
    ),
    "a transform of 2^40 points": Malice(
        call("aten.fft_fft.default", x, 2**40), LIMIT, "aten.fft_fft.default"
    ),
    "a triangle of 2^40 rows": Malice(
        call("aten.tril_indices.default", 2**40, 1), LIMIT, "aten.tril_indices.default"
    ),
    "a product of Kronecker": Malice(
        _products("aten.kron.default", [100, 100], [100, 100]), LIMIT, "aten.kron.default"
    ),
    "40 doublings": Malice(_doubled(40), LIMIT, "aten.cat.default"),
    "an image a billion times its size": Malice(
        _on_image("aten.upsample_nearest2d.vec", None, many(1e5, 1e5)), LIMIT, "upsample_nearest2d",
        IMAGE_INPUT,
    ),
    "a scale that leads out of the image": Malice(
        _on_image("aten.upsample_nearest2d.default", many(8, 8), 1e-30, 1e-30), BAD, "scale",
        IMAGE_INPUT,
    ),
    "a negative scale": Malice(
        _on_image("aten.upsample_bilinear2d.vec", None, False, many(-2.0, -2.0)), BAD, "scale",
        IMAGE_INPUT,
    ),
    "an infinite scale": Malice(
        _on_image("aten.upsample_bicubic2d.vec", None, False, many(math.inf, 1.0)), BAD, "scale",
        IMAGE_INPUT,
    ),
    "a scale that makes its tables large": Malice(
        _on_image("aten._upsample_bicubic2d_aa.default", many(1, 1), False, 1e-8, 1e-8), BAD,
        "scale", IMAGE_INPUT,
    ),
    "a window beyond its image": Malice(
        _on_image("aten.max_pool2d.default", many(2**40), many(1), many(2**39)), BAD,
        "kernel_size", IMAGE_INPUT,
    ),
    "more values than keys": Malice(
        program(
            node("aten.ones.default", many(1, 1, 4, 8)),
            node("aten.ones.default", many(1, 1, 900, 8)),
            node("aten.scaled_dot_product_attention.default", ref(1), ref(1), ref(2)),
            ys=[["y", "float32", [None] * 4]],
        ),
        BAD,
        "query, key and value do not fit together",
    ),
    "a mask that is too short": Malice(
        program(
            node("aten.ones.default", many(1, 1, 4, 8)),
            node("aten.ones.default", many(2, 4)),
            node("aten.scaled_dot_product_attention.default", ref(1), ref(1), ref(1), ref(2)),
            ys=[["y", "float32", [None] * 4]],
        ),
        BAD,
        "attn_mask",
    ),
    "a power without end": Malice(
        program(
            node("aten.ones.default", many(4, 4)),
            node("aten.linalg_matrix_power.default", ref(1), -(2**63)),
        ),
        BAD,
        "n is more than",
    ),
    "differences without end": Malice(
        call("aten.diff.default", x, 2**62), BAD, "n is more than"
    ),
    "a gamma function of a million": Malice(
        call("aten.mvlgamma.default", x, 10**6), BAD, "p is more than"
    ),
    "a chain of 4,000 matrices": Malice(
        call("aten.linalg_multi_dot.default", many(*[x] * 4000)), BAD, "tensors has more than"
    ),
    "a loss that makes a table first": Malice(_loss(10_000), LIMIT, "aten.mse_loss.default"),
    "a product that copies its operands": Malice(
        _products("aten.matmul.default", [100, 1, 1, 100], [1, 100, 100, 1]), LIMIT, "aten.matmul"
    ),
    "columns of a convolution": Malice(
        program(
            node("aten.ones.default", many(1, 1, 100, 100), dtype=dtype("float64")),
            node("aten.ones.default", many(1, 1, 50, 50), dtype=dtype("float64")),
            node("aten.conv2d.default", ref(1), ref(2)),
            ys=[["y", "float64", [None] * 4]],
        ),
        LIMIT,
        "aten.conv2d.default",
    ),
    "billions of pieces": Malice(
        program(node("aten.tensor_split.sections", x, 2**40, outputs="tt")),
        BAD,
        "2 outputs are declared",
    ),
    "a number in place of what is cut": Malice(
        program(node("aten.chunk.default", 1.5, 2, outputs="tt")), BAD, "aten.chunk.default"
    ),
    "a boolean mask as an index": Malice(
        program(node("aten.gt.Scalar", x, 0), node("aten.index.Tensor", x, many(ref(1)))),
        BAD,
        "a boolean index",
    ),
    "a dimension that is not there": Malice(
        call("aten.select.int", x, 2**62, 0), BAD, "aten.select.int"
    ),
    "a tower of powers": Malice(
        _number(
            node("sym.pow", 10**9, 2, outputs="i"),
            node("sym.mul", ref(1), ref(1), outputs="i"),
            node("sym.mul", ref(2), ref(2), outputs="i"),
        ),
        BAD,
        "nodes[1] sym.mul: the number is out of range",
    ),
    "a shift by a billion": Malice(
        _number(node("sym.pow", 2, 10**9, outputs="i")), BAD, "sym.pow: exponent"
    ),
    "a division by zero": Malice(
        _number(node("sym.floordiv", 1, 0, outputs="i")), BAD, "nodes[0] sym.floordiv"
    ),
    "infinity as an integer": Malice(
        _number(node("sym.int", math.inf, outputs="i")), BAD, "nodes[0] sym.int"
    ),
    "the root of a negative number": Malice(
        _number(node("sym.sqrt", -1.0, outputs="f")), BAD, "nodes[0] sym.sqrt"
    ),
    "a float that calls itself an integer": Malice(
        _number(node("sym.add", 1, 0.5, outputs="i")), BAD, "gives float"
    ),
    "a carry that grows": Malice(
        _scan(
            [node("aten.cat.default", many(ref(0), ref(0)))], [2], [["c", "float32", [4, 6]]]
        ),
        BAD,
        "graphs.step.outputs c",
    ),
    "a carry of views that become copies": Malice(
        _scan(
            [node("aten.ones.default", many(1)), node("aten.expand.default", ref(3), many(100000))],
            [4, 4],
            [[name, "float32", [100000]] for name in "cd"],
        ),
        LIMIT,
        "outputs: 1600100 bytes",
    ),
    "an output flood of views": Malice(
        program(
            node("aten.ones.default", many(1)),
            node("aten.expand.default", ref(1), many(200_000)),
            outputs=[2] * 50,
            ys=[[f"y{at}", "float32", [None]] for at in range(50)],
        ),
        LIMIT,
        "outputs: ",
    ),
    "two sizes of one symbol": Malice(
        program(
            node("aten.relu.default", x),
            symbols=[["n", 1, 9]],
            xs=[["x", "float32", ["n", 6]], ["z", "float32", ["n"]]],
        ),
        ErrorCode.BAD_TENSORS,
        "z: n is 4 elsewhere, here 5",
        {"x": torch.ones(4, 6), "z": torch.ones(5)},
    ),
    "a size beyond its symbol": Malice(
        program(RELU, symbols=[["n", 1, 3]], xs=[["x", "float32", ["n", 6]]]),
        ErrorCode.BAD_TENSORS,
        "n is 4, not 1 … 3",
    ),
    "an input of another dtype": Malice(
        program(RELU), ErrorCode.BAD_TENSORS, "x: float32 is declared",
        {"x": torch.ones(4, 6, dtype=torch.complex64)},
    ),
    "an input nobody declared": Malice(
        program(RELU), ErrorCode.BAD_TENSORS, "1 tensors are declared, 2 came",
        {"x": torch.ones(4, 6), "z": torch.ones(1)},
    ),
    "no input": Malice(program(RELU), ErrorCode.BAD_TENSORS, "1 tensors are declared", {}),
}  # fmt: skip

ALL: dict[str, Malice] = DECODED | LINKED | PLANNED
Refuser = Callable[[Malice], None]
