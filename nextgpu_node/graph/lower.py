"""A traced graph made functional and taken apart into operators of the table.  Submitter only."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._export.utils import _get_decomp_for_cia
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

from nextgpu_node.graph.draws import rules_for
from nextgpu_node.graph.emit import CHECKS, GROUPED_MM, HANDLED, INLINED, SIZE_CALLS
from nextgpu_node.graph.explain import tracing_failed
from nextgpu_node.graph.optable import TABLE
from nextgpu_node.graph.rules import RULES, RULES_BY_NAME, RULES_OUTSIDE_THE_TABLE

_MAX_ROUNDS = 8


def lower(exported: ExportedProgram) -> ExportedProgram:
    """Make the graph functional, and take apart what the table does not have but torch can.

    ProgramError where torch can not; an operator that stays unknown is left for emission to name.
    """
    drawn = rules_for(exported.graph)
    if not drawn and _is_lowered(exported):
        return exported
    table = RULES | _rules_outside_the_table(exported) | _decompositions(exported) | drawn
    for _ in range(_MAX_ROUNDS):
        try:
            with quiet():
                exported = exported.run_decompositions(dict(table))
        except Exception as exc:
            raise tracing_failed(exc) from exc
        found = _decompositions(exported)
        if not found.keys() - table.keys():
            break
        table |= found
    return exported


def drop_checks(exported: ExportedProgram) -> None:
    """Take out, in place, what only asserts something about values, and what only that reads.

    Tracing a second time would want the values.
    """
    for module in _graphs(exported):
        for node in reversed(module.graph.nodes):
            if node.op != "call_function" or node.users:
                continue
            if node.target in CHECKS or _has_no_effect(node.target):
                module.graph.erase_node(node)
        module.recompile()


def _has_no_effect(target: Any) -> bool:
    is_operator = isinstance(target, OpOverload) and not is_mutable(target)
    return is_operator or target in SIZE_CALLS


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch prints graphs and stacks when it can not follow a model; ours is one error.

    What the model itself prints appears once the tracing has worked.
    """
    out, err, before = io.StringIO(), io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
    sys.stdout.write(out.getvalue())
    sys.stderr.write(err.getvalue())


def _is_lowered(exported: ExportedProgram) -> bool:
    """Nothing to do, which saves tracing the model a second time: every operator is in the table,
    none writes to its arguments, and the regions inside the graph are of those that emission
    writes out in place."""
    targets = {node.target for node in _calls(exported)}
    regions = {one for one in targets if isinstance(one, HigherOrderOperator)}
    # Of torch.func: they act on the tracing itself, which a second one settles.
    others = {one for one in targets if not isinstance(one, (OpOverload, HigherOrderOperator))}
    return (
        not exported.graph_signature.buffers_to_mutate
        and not exported.graph_signature.parameters_to_mutate
        and not any(is_mutable(one) for one in targets)
        and regions <= INLINED
        and others <= {operator.getitem, *SIZE_CALLS}
        and not _unknown(exported)
        and not _rules_outside_the_table(exported)
    )


def is_mutable(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _calls(exported: ExportedProgram) -> Iterator[torch.fx.Node]:
    for module in _graphs(exported):
        yield from (node for node in module.graph.nodes if node.op == "call_function")


def _graphs(exported: ExportedProgram) -> Iterator[torch.fx.GraphModule]:
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield module


def _unknown(exported: ExportedProgram) -> set[OpOverload]:
    return {
        node.target
        for node in _calls(exported)
        if isinstance(node.target, OpOverload)
        and not is_mutable(node.target)
        and node.target not in HANDLED
        and str(node.target) not in TABLE
        and str(node.target) not in GROUPED_MM
    }


def _decompositions(exported: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    return {op: rule for op in _unknown(exported) if (rule := _decomposition(op))}


def _decomposition(op: OpOverload) -> Callable[..., Any] | None:
    for rules in (RULES, decomposition_table, _core_decompositions()):
        if op in rules:
            rule: Callable[..., Any] = rules[op]
            return rule
    if str(op) in RULES_BY_NAME:
        return RULES_BY_NAME[str(op)]
    if op.namespace == "prims":
        in_aten: Callable[..., Any] | None = getattr(op, "impl_aten", None)
        return in_aten
    if op._name in OPDEFS:
        # An operator of the submitter's own: its body, if that is made of torch operators.
        body: Callable[..., Any] = OPDEFS[op._name]._init_fn
        return body
    if torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "CompositeImplicitAutograd"):
        composite: Callable[..., Any] = _get_decomp_for_cia(op)
        return composite
    return None


def _rules_outside_the_table(exported: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    used = {node.target for node in _calls(exported)}
    return {op: rule for op, rule in RULES_OUTSIDE_THE_TABLE.items() if op in used}


def _core_decompositions() -> dict[Any, Callable[..., Any]]:
    rules: dict[Any, Callable[..., Any]] = core_aten_decompositions()
    return rules
