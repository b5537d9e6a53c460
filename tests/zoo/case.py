"""A model of the zoo: exported, sent through the wire format, run, and compared with eager."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.calls import output_leaves
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import make_machine, match_inputs


@dataclass(frozen=True, slots=True)
class Model:
    """What to export, with example inputs; `other` are inputs of other sizes for `dynamic`."""

    module: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Any] | None = None
    other: tuple[Any, ...] | dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """`tolerance`: the largest difference allowed, relative to the largest value expected."""

    name: str
    family: str
    build: Callable[[], Model]
    tolerance: float = 1e-5


@dataclass(frozen=True, slots=True)
class Outcome:
    """`difference`: the largest, relative to the largest value expected; 0 is bit-equal."""

    nodes: int
    operators: int
    difference: float
    dynamic: bool
    export_s: float
    program: Program


def run_case(case: Case) -> Outcome:
    """Raises AssertionError where the program's outputs are not those of eager."""
    torch.manual_seed(0)
    model = case.build()
    started = time.perf_counter()
    program = export(model.module, model.args, model.kwargs, dynamic=model.dynamic)
    export_s = time.perf_counter() - started
    # One machine for all sizes, as a worker has.
    machine = make_machine(program)
    differences = [
        _compare(case, model.module, machine, program, args, kwargs)
        for args, kwargs in _calls(model)
    ]
    ops = [node.op for node in program.spec.step.nodes]
    return Outcome(
        len(ops), len(set(ops)), max(differences), model.other is not None, export_s, program
    )


def _calls(model: Model) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    calls = [(model.args, model.kwargs)]
    if isinstance(model.other, dict):
        calls.append(((), model.other))
    elif model.other is not None:
        calls.append((model.other, {}))
    return calls


def _compare(
    case: Case,
    module: Callable[..., Any],
    machine: Any,
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> float:
    results = machine.step(match_inputs(program.spec, args, kwargs)).ys
    with torch.no_grad():
        expected = tensors_in(module(*args, **kwargs))
    assert len(results) == len(expected), f"{list(results)} for {len(expected)} outputs"
    worst = 0.0
    for (name, result), wanted in zip(results.items(), expected, strict=True):
        assert result.shape == wanted.shape, f"{name}: {result.shape}, not {wanted.shape}"
        assert result.dtype == wanted.dtype, f"{name}: {result.dtype}, not {wanted.dtype}"
        difference = relative_difference(result, wanted)
        assert difference <= case.tolerance, f"{name} differs by {difference:.1e}"
        worst = max(worst, difference)
    return worst


def tensors_in(value: Any) -> list[torch.Tensor]:
    """What a model returned, as tensors: containers, dataclasses and caches are looked into."""
    return [
        leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf, dtype=_DTYPES[type(leaf)])
        for _, leaf in output_leaves(value)
    ]


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


def relative_difference(result: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |result - wanted| / max(1, max |wanted|); infinite where one is not finite alone."""
    if torch.equal(result, wanted):
        return 0.0
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    left, right = result.to(wide), wanted.to(wide)
    same = (left == right) | (left.isnan() & right.isnan())
    if bool(same.all()):
        return 0.0
    finite = right[right.isfinite()].abs()
    scale = max(1.0, float(finite.max()) if finite.numel() else 1.0)
    difference = float((left - right)[~same].abs().max()) / scale
    return difference if difference == difference else float("inf")


def cases_of(family: str, builders: Mapping[str, Callable[[], Model]]) -> Sequence[Case]:
    """Cases of one family from builders by name."""
    return [Case(name, family, build) for name, build in builders.items()]
