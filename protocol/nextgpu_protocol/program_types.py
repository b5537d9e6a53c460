"""The graph as data.  Spec: 60-program.md

    Program   symbols, constants, carry, xs, ys, graphs {step, init?, finish?}
    Graph     nodes, outputs                  values are numbered: inputs first, then node outputs
    Node      op id, args, kwargs, outputs    one letter for each output

Knows no torch: an operator is a text, a dtype is a name with an element size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

PROGRAM_VERSION = 1

# Element sizes in bytes.  The names are torch's.
DTYPE_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
}

MEMORY_FORMATS = frozenset(
    {"contiguous_format", "preserve_format", "channels_last", "channels_last_3d"}
)

# Every text an argument may be.  Texts select a mode of an operator; none is ever parsed.
TEXT_LITERALS = frozenset(
    {
        "L",
        "U",
        "add",
        "amax",
        "amin",
        "backward",
        "circular",
        "constant",
        "floor",
        "forward",
        "ij",
        "left",
        "mean",
        "multiply",
        "none",
        "ortho",
        "prod",
        "reduced",
        "reflect",
        "replicate",
        "right",
        "same",
        "sum",
        "tanh",
        "trunc",
        "valid",
        "xy",
    }
)

# What an output of a node is; UNUSED outputs exist but nothing may read them.
TENSOR = "t"
INT = "i"
FLOAT = "f"
BOOL = "b"
UNUSED = "-"
OUTPUT_KINDS = frozenset({TENSOR, INT, FLOAT, BOOL, UNUSED})


@dataclass(frozen=True, slots=True)
class Ref:
    """The value number `index`, made before the node that names it."""

    index: int


@dataclass(frozen=True, slots=True)
class DType:
    """An element type as an argument; `name` is a key of DTYPE_BYTES."""

    name: str


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """A memory format as an argument; `name` is in MEMORY_FORMATS."""

    name: str


Literal: TypeAlias = "bool | int | float | str | None"
Argument: TypeAlias = "Literal | Ref | DType | MemoryFormat | tuple[Argument, ...]"

# An int, the name of a symbol, or (ys only) None: computed by the graph.
Dimension: TypeAlias = "int | str | None"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dimension that is known only when tensors arrive: minimum <= size <= maximum."""

    name: str
    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor must look like: row-major, `dtype` elements, `shape` dimensions."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]

    def nbytes(self, binding: dict[str, int] | None = None) -> int:
        """Size in bytes with each symbol as in `binding`.  KeyError where one is missing."""
        size = DTYPE_BYTES[self.dtype]
        for dimension in self.shape:
            if isinstance(dimension, int):
                size *= dimension
            elif dimension is not None:
                size *= (binding or {})[dimension]
        return size


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call.  `kwargs` in ascending order of name; `outputs` has a letter for each."""

    op: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    outputs: str


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in the order in which they run, then the numbers of the values that are returned."""

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A scan: carry, y_k = step(constants, carry, x_k).

    step    inputs: constants, carry, xs   outputs: carry, ys
    init    inputs: constants              outputs: carry            instead of a sent carry
    finish  inputs: constants, carry       outputs: finish_ys        after the last step
    stop    index into ys of a boolean of one element that ends the scan
    checkpoint_s  the carry is sent back each so many seconds; 0: never
    """

    min_table_version: int
    step: Graph
    xs: tuple[TensorSpec, ...] = ()
    ys: tuple[TensorSpec, ...] = ()
    constants: tuple[TensorSpec, ...] = ()
    carry: tuple[TensorSpec, ...] = ()
    symbols: tuple[Symbol, ...] = ()
    stop: int | None = None
    checkpoint_s: int = 0
    init: Graph | None = None
    finish: Graph | None = None
    finish_ys: tuple[TensorSpec, ...] = ()
    version: int = PROGRAM_VERSION

    @property
    def graphs(self) -> dict[str, Graph]:
        """The graphs that this program has, by role."""
        named = {"step": self.step, "init": self.init, "finish": self.finish}
        return {role: graph for role, graph in named.items() if graph is not None}
