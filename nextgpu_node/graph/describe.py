"""What a program holds, for people and for --json.  Nothing of it is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.link import link_graph_untrusted
from nextgpu_node.graph.plan import make_plan_untrusted, shape_only
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import ProgramSpec, TensorSpec, encode_program
from nextgpu_protocol.program_limits import TABLE_VERSION

_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class Description:
    """`peak_bytes`: the most that is alive at once in a step of these `sizes`, workspace of the
    operators included; None where this version's operator table can not plan it."""

    spec: ProgramSpec
    sizes: dict[str, int]
    peak_bytes: int | None

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON.  Sizes in bytes; a dimension is a number, a name, or None where
        the program computes it."""
        spec = self.spec
        return {
            "program_version": spec.version,
            "needs_operator_table": spec.min_table_version,
            "has_operator_table": TABLE_VERSION,
            "program_bytes": len(encode_program(spec)),
            "semantics": semantics(spec),
            "stop": None if spec.stop is None else spec.ys[spec.stop].name,
            "checkpoint_s": spec.checkpoint_s,
            "inputs": [_tensor(one) for one in spec.xs],
            "outputs": [_tensor(one) for one in spec.ys],
            "finish_outputs": [_tensor(one) for one in spec.finish_ys],
            "carry": [_tensor(one) for one in spec.carry],
            "carry_bytes": _total(spec.carry, self.sizes),
            "constants": [_tensor(one) for one in spec.constants],
            "constants_bytes": _total(spec.constants, self.sizes),
            "sizes": [
                {"name": one.name, "minimum": one.minimum, "maximum": one.maximum}
                for one in spec.symbols
            ],
            "memory": {"sizes": self.sizes, "peak_bytes": self.peak_bytes},
            "graphs": {
                role: {"nodes": len(graph.nodes), "operators": _operators(graph)}
                for role, graph in spec.graphs.items()
            },
        }

    def lines(self) -> list[str]:
        """The same for people."""
        spec = self.spec
        constants, carry = _total(spec.constants, self.sizes), _total(spec.carry, self.sizes)
        lines = [
            f"program    version {spec.version}, operator table {spec.min_table_version}, "
            f"{len(encode_program(spec)):,} bytes",
            f"steps      {semantics(spec)}",
            f"constants  {_tensors(len(spec.constants))}, {_size(constants)}",
            f"carry      {_tensors(len(spec.carry))}, {_size(carry)}"
            + (", made by the init graph" if spec.init else ""),
        ]
        lines += [f"input      {_describe(one)}" for one in spec.xs]
        lines += [f"output     {_describe(one)}" for one in spec.ys]
        lines += [f"state      {_describe(one)}" for one in spec.carry]
        lines += [f"finish     {_describe(one)}" for one in spec.finish_ys]
        lines += [f"size       {one.name}: {one.minimum} … {one.maximum}" for one in spec.symbols]
        if spec.stop is not None:
            lines.append(f"stop       when {spec.ys[spec.stop].name} is true")
        lines.append(f"memory     {self._memory()}")
        for role, graph in spec.graphs.items():
            operators = _operators(graph)
            lines.append(f"{role:<10} {len(graph.nodes)} nodes, {len(operators)} operators")
            lines += [f"           {count:5} {op}" for op, count in operators.items()]
        return lines

    def _memory(self) -> str:
        if self.peak_bytes is None:
            return f"not known: needs a newer operator table than this version's {TABLE_VERSION}"
        at = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        return f"{_size(self.peak_bytes)} at the peak of a step" + (f" with {at}" if at else "")


def describe(spec: ProgramSpec, sizes: Mapping[str, int] | None = None) -> Description:
    """Sizes that are not given are the smallest that are allowed.

    ProgramError where the program could not run on any worker of this version, or a size is not
    one of its own.
    """
    chosen = _sizes(spec, sizes or {})
    if spec.min_table_version > TABLE_VERSION:
        return Description(spec, chosen, None)
    try:
        return Description(spec, chosen, _peak_bytes(spec, chosen))
    except RemoteProtocolError as exc:
        raise ProgramError(f"No worker would run this program: {exc}") from exc


def semantics(spec: ProgramSpec) -> str:
    """How steps hang together, in one sentence."""
    if not spec.carry:
        return "each is on its own: outputs = step(inputs)"
    parts = [f"outputs, carry = step(inputs, carry): {_tensors(len(spec.carry))} of state go along"]
    if spec.stop is not None:
        parts.append(f"until {spec.ys[spec.stop].name} is true")
    if spec.checkpoint_s:
        parts.append(f"sealed back every {spec.checkpoint_s} s")
    if spec.finish is not None:
        parts.append("then the finish graph")
    return ", ".join(parts)


def _sizes(spec: ProgramSpec, given: Mapping[str, int]) -> dict[str, int]:
    known = {one.name: one for one in spec.symbols}
    for name, size in given.items():
        if name not in known:
            names = ", ".join(known) or "none, all sizes are fixed"
            raise ProgramError(f"There is no size {name}; the sizes are: {names}.")
        if not known[name].minimum <= size <= known[name].maximum:
            low, high = known[name].minimum, known[name].maximum
            raise ProgramError(f"{name} is {size}, the program takes {low} to {high}.")
    return {
        name: given.get(name, max(one.minimum, min(1, one.maximum))) for name, one in known.items()
    }


def _peak_bytes(spec: ProgramSpec, sizes: dict[str, int]) -> int:
    held = (*spec.constants, *spec.carry)
    peak = 0
    for role, graph in spec.graphs.items():
        given = {"step": (*held, *spec.xs), "init": spec.constants, "finish": held}[role]
        plan = make_plan_untrusted(
            link_graph_untrusted(role, graph, len(given)),
            [shape_only(one, sizes) for one in given],
            device=torch.device("cpu"),
            max_live_bytes=_NO_LIMIT,
        )
        peak = max(peak, plan.peak_bytes)
    return peak


def _operators(graph: Any) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes).most_common())


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _describe(spec: TensorSpec) -> str:
    sizes = ", ".join("?" if size is None else str(size) for size in spec.shape)
    return f"{spec.name}: {spec.dtype} [{sizes}]"


def _total(specs: Sequence[TensorSpec], sizes: dict[str, int]) -> int:
    return sum(one.nbytes(sizes) for one in specs)


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
