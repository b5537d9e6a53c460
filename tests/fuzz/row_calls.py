"""Hostile calls of single rows: valid calls of the table, mutated, each through link, plan and run.

A call is named by its row and a number, from which it can be made again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nextgpu_node.graph.link import LinkedGraph, link_graph_untrusted
from nextgpu_node.graph.optable import Kind, Parameter
from nextgpu_node.graph.plan import Plan, make_plan_untrusted
from nextgpu_node.graph.tensors import DTYPE_NAMES, TORCH_DTYPES
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import Argument, DType, Graph, MemoryFormat, Node, Ref
from tests.support.rows import Case, cases_of

MAX_LIVE_BYTES = 64 * 1024**2
MAX_TENSOR_BYTES = 4 * 1024**2

_INTS = (
    *(-(2**63), -(2**62), -(2**40), -(2**31) - 1, -(2**31), -65536, -1000, -9, -3, -2, -1),
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64, 127, 255, 1000, 65535, 10**6),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**61, 2**62, 2**63 - 1),
)
_FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.7, 1e-8, 1e-30, 1e-300, -1e-30, 1e30, 1e300, -1e300),
    *(float("inf"), float("-inf"), 2.0**31, 2.0**63, -(2.0**63), 1e-320, 7.0, 0.1),
)
_SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 100, 257)


@dataclass(frozen=True)
class Call:
    """One graph of a row, with views of the inputs made first, and its inputs."""

    graph: Graph
    inputs: tuple[torch.Tensor, ...]

    def describe(self) -> str:
        inputs = [f"{DTYPE_NAMES[one.dtype]}{list(one.shape)}" for one in self.inputs]
        nodes = [f"{node.op}{node.args}{dict(node.kwargs)}" for node in self.graph.nodes]
        return f"{inputs} {nodes}"

    def plan(self) -> Plan:
        linked: LinkedGraph = link_graph_untrusted("step", self.graph, len(self.inputs))
        metas = [torch.empty_like(one, device="meta") for one in self.inputs]
        return make_plan_untrusted(
            linked, metas, device=torch.device("cpu"), max_live_bytes=MAX_LIVE_BYTES
        )


def make_call(op: str, number: int) -> Call:
    """The call of `op` with this number."""
    rng = random.Random(f"{op} {number}")
    case = rng.choice(cases_of(op))
    if rng.random() < 0.15:
        case = _grown(case, rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        case = _mutate(case, rng)
    return _as_call(case, rng)


def valid_calls(op: str) -> list[Call]:
    """The calls of `op` that the others are made from."""
    return [_as_call(case, None) for case in cases_of(op)]


# ---------------------------------------------------------------- mutations


def _grown(case: Case, rng: random.Random) -> Case:
    """One size made larger wherever it occurs, so that what depends on it shows."""
    sizes = sorted({size for leaf in case.leaves for size in leaf.shape if size > 1})
    if not sizes:
        return case
    old, new = rng.choice(sizes), rng.choice((32, 200, 1000, 5000))

    def grow(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return _with_shape(value, [new if size == old else size for size in value.shape])

    return case.replace(grow)


def _mutate(case: Case, rng: random.Random) -> Case:
    names = _parameters(case)
    if rng.random() < 0.25:
        options = [each for each in case.row.parameters if each.name not in names]
        options = [each for each in options if each.kind is not Kind.ABSENT]
        if options:
            added = rng.choice(options)
            value = _fresh(added, rng, case)
            return Case(case.row, case.args, case.kwargs | {added.name: value})
    if not names:
        return case
    name = rng.choice(sorted(names))
    parameter, at = names[name]
    if at is None:
        value = _changed(case.kwargs[name], parameter, rng, case)
        return Case(case.row, case.args, case.kwargs | {name: value})
    value = _changed(case.args[at], parameter, rng, case)
    return Case(case.row, (*case.args[:at], value, *case.args[at + 1 :]), case.kwargs)


def _parameters(case: Case) -> dict[str, tuple[Parameter, int | None]]:
    positional = [each for each in case.row.parameters if not each.keyword_only]
    found: dict[str, tuple[Parameter, int | None]] = {
        each.name: (each, at) for at, each in enumerate(positional[: len(case.args)])
    }
    by_name = {each.name: each for each in case.row.parameters}
    return found | {name: (by_name[name], None) for name in case.kwargs}


def _changed(value: Any, parameter: Parameter, rng: random.Random, case: Case) -> Any:
    if isinstance(value, torch.Tensor):
        return _changed_tensor(value, rng, case)
    if isinstance(value, list):
        return _changed_list(value, parameter, rng, case)
    return _fresh(parameter, rng, case)


def _changed_list(value: list[Any], parameter: Parameter, rng: random.Random, case: Case) -> Any:
    kind = rng.randrange(4)
    if kind == 0 and value:
        return value[:-1]
    if kind == 1 and value:
        return [*value, value[-1]]
    if kind == 2 and rng.random() < 0.2:
        return value * 40
    items = _fresh(parameter, rng, case)
    if not value or not items:
        return items
    at = rng.randrange(len(value))
    item = value[at]
    new = _changed_tensor(item, rng, case) if isinstance(item, torch.Tensor) else items[0]
    return [*value[:at], new, *value[at + 1 :]]


def _fresh(parameter: Parameter, rng: random.Random, case: Case) -> Any:
    if parameter.choices is not None:
        return rng.choice(parameter.choices)
    if parameter.optional and rng.random() < 0.1:
        return None
    return _FRESH[parameter.kind](rng, case)


def _fresh_tensor(rng: random.Random, case: Case) -> torch.Tensor:
    leaves = case.leaves
    base = rng.choice(leaves) if leaves else torch.zeros(3, 4)
    return _changed_tensor(base, rng, case)


_FRESH: dict[Kind, Callable[[random.Random, Case], Any]] = {
    Kind.TENSOR: _fresh_tensor,
    Kind.TENSORS: lambda rng, case: [_fresh_tensor(rng, case) for _ in range(rng.randrange(4))],
    Kind.MAYBE_TENSORS: lambda rng, case: [
        None if rng.random() < 0.3 else _fresh_tensor(rng, case) for _ in range(rng.randrange(4))
    ],
    Kind.INT: lambda rng, case: rng.choice(_INTS),
    Kind.INTS: lambda rng, case: [rng.choice(_INTS) for _ in range(rng.randrange(5))],
    Kind.FLOAT: lambda rng, case: rng.choice(_FLOATS),
    Kind.FLOATS: lambda rng, case: [rng.choice(_FLOATS) for _ in range(rng.randrange(4))],
    Kind.BOOL: lambda rng, case: rng.random() < 0.5,
    Kind.BOOLS: lambda rng, case: [rng.random() < 0.5 for _ in range(rng.randrange(5))],
    Kind.NUMBER: lambda rng, case: rng.choice((*_INTS, *_FLOATS, True, False)),
    Kind.DTYPE: lambda rng, case: rng.choice(list(TORCH_DTYPES.values())),
    Kind.MEMORY_FORMAT: lambda rng, case: rng.choice(
        (torch.contiguous_format, torch.preserve_format, torch.channels_last)
    ),
}


def _changed_tensor(tensor: torch.Tensor, rng: random.Random, case: Case) -> torch.Tensor:
    match rng.randrange(4):
        case 0:
            return _with_shape(tensor, _changed_shape(list(tensor.shape), rng, case))
        case 1:
            plain = tensor.real if tensor.is_complex() else tensor
            return plain.to(rng.choice(list(TORCH_DTYPES.values())))
        case _:
            return _with_values(tensor, rng, case)


def _changed_shape(shape: list[int], rng: random.Random, case: Case) -> list[int]:
    match rng.randrange(6):
        case 0 if shape:
            del shape[rng.randrange(len(shape))]
        case 1 if len(shape) < 6:
            shape.insert(rng.randint(0, len(shape)), rng.choice(_SIZES))
        case 2:
            shape = list(rng.choice(case.leaves).shape) if case.leaves else shape
        case 3 if len(shape) > 1:
            rng.shuffle(shape)
        case _ if shape:
            shape[rng.randrange(len(shape))] = rng.choice(_SIZES)
    return shape


def _with_shape(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    if count * tensor.element_size() > MAX_TENSOR_BYTES:
        return tensor
    if tensor.numel() == 0:
        return torch.zeros(tuple(shape), dtype=tensor.dtype)
    flat = tensor.reshape(-1)
    return flat.repeat(-(-max(count, 1) // flat.numel()))[:count].reshape(tuple(shape))


def _with_values(tensor: torch.Tensor, rng: random.Random, case: Case) -> torch.Tensor:
    """Some, or all, of the values replaced by ones at the edges."""
    result = tensor.clone()
    flat = result.view(-1)
    if not flat.numel() or tensor.dtype is torch.bool:
        return result
    sizes = [size for leaf in case.leaves for size in leaf.shape] or [1]
    for _ in range(rng.choice((1, 1, 3, 10))):
        value = _edge_value(tensor.dtype, rng, sizes)
        if rng.random() < 0.2:
            flat.fill_(value)
        else:
            flat[rng.randrange(flat.numel())] = value
    return result


def _edge_value(dtype: torch.dtype, rng: random.Random, sizes: Sequence[int]) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        value = rng.choice((*_FLOATS, float("nan")))
        most = torch.finfo(dtype).max
        return max(min(value, most), -most) if abs(value) < float("inf") else value
    near = [rng.choice(sizes) + offset for offset in (-1, 0, 1)] + [-rng.choice(sizes) - 1]
    info = torch.iinfo(dtype)
    return max(info.min, min(info.max, rng.choice((*_INTS, *near, *near, *near))))


# ---------------------------------------------------------------- calls as graphs


def _as_call(case: Case, rng: random.Random | None) -> Call:
    leaves = case.leaves[:32]
    inputs: list[torch.Tensor] = []
    views: list[Node | None] = []
    for leaf in leaves:
        tensor, view = _behind_a_view(leaf, rng) if rng and rng.random() < 0.3 else (leaf, None)
        inputs.append(tensor.contiguous())
        views.append(view)
    nodes, references = [], []
    for at, view in enumerate(views):
        if view is None:
            references.append(Ref(at))
        else:
            references.append(Ref(len(inputs) + len(nodes)))
            nodes.append(Node(view.op, (Ref(at), *view.args), (), "t"))
    # Taken in the order of Case.leaves: positional arguments, then keywords as they were given.
    remaining = iter(references)
    args = tuple(_argument(value, remaining) for value in case.args)
    named = {name: _argument(value, remaining) for name, value in case.kwargs.items()}
    kwargs = tuple(sorted(named.items()))
    outputs = "t" * _outputs(case)
    first = len(inputs) + len(nodes)
    nodes.append(Node(case.row.op, args, kwargs, outputs))
    return Call(Graph(tuple(nodes), tuple(range(first, first + len(outputs)))), tuple(inputs))


def _argument(value: Any, references: Any) -> Argument:
    match value:
        case torch.Tensor():
            return next(references, Ref(0))
        case list():
            return tuple(_argument(item, references) for item in value)
        case torch.dtype():
            return DType(DTYPE_NAMES[value])
        case torch.memory_format():
            return MemoryFormat(str(value).removeprefix("torch."))
        case _:
            return value


def _outputs(case: Case) -> int:
    if case.row.returns is not None:
        return len(case.row.returns)
    assert case.row.count is not None
    try:
        meta = case.replace(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v)
        return max(1, min(64, case.row.count(*meta.args, **meta.kwargs)))
    except Exception:
        return 1


def _behind_a_view(leaf: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, Node | None]:
    """A tensor and a node that gives `leaf`, or something of its shape, as a strided view of it."""
    if leaf.dim() == 0:
        return leaf, None
    dim = rng.randrange(leaf.dim())
    match rng.randrange(4):
        case 0 if leaf.dim() > 1:
            other = rng.randrange(leaf.dim())
            return leaf.transpose(dim, other), Node("aten.transpose.int", (dim, other), (), "t")
        case 1 if leaf.shape[dim]:
            size = leaf.shape[dim]
            twice = leaf.repeat_interleave(2, dim)
            return twice, Node("aten.slice.Tensor", (dim, 0, 2 * size, 2), (), "t")
        case 2 if leaf.shape[dim]:
            one = leaf.narrow(dim, 0, 1)
            return one, Node("aten.expand.default", (tuple(leaf.shape),), (), "t")
        case _:
            more = torch.cat([leaf, leaf[:1]]) if leaf.shape[0] else leaf
            if not leaf.shape[0]:
                return leaf, None
            return more, Node("aten.slice.Tensor", (0, 1, leaf.shape[0] + 1), (), "t")


def try_call(call: Call) -> Plan | RemoteProtocolError:
    """The plan, or how it was refused."""
    try:
        return call.plan()
    except RemoteProtocolError as exc:
        return exc
