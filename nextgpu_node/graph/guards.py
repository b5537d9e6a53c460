"""What a trace took for granted about sizes, as checks in the program.  Submitter only.

    if x.shape[0] % 2 == 0: …        the example went this way, so the program is for even sizes

Bounds of single sizes are ranges of the program's symbols; everything else becomes arithmetic on
sizes that ends in `sym.check`, which refuses a step before anything of it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

from nextgpu_node.graph.emit import Emitter
from nextgpu_protocol.program import BOOL, INT, Argument, Ref

Sizes = Mapping[Any, Argument]

_CHAINED: dict[Any, tuple[str, str]] = {
    sympy.Add: ("sym.add", INT),
    sympy.Mul: ("sym.mul", INT),
    Max: ("sym.max", INT),
    Min: ("sym.min", INT),
    sympy.And: ("sym.and", BOOL),
    sympy.Or: ("sym.or", BOOL),
}
_PAIRS: dict[Any, tuple[str, str]] = {
    FloorDiv: ("sym.floordiv", INT),
    CleanDiv: ("sym.floordiv", INT),
    Mod: ("sym.mod", INT),
    PythonMod: ("sym.mod", INT),
    sympy.Pow: ("sym.pow", INT),
    sympy.Eq: ("sym.eq", BOOL),
    sympy.Ne: ("sym.ne", BOOL),
    sympy.Lt: ("sym.lt", BOOL),
    sympy.Le: ("sym.le", BOOL),
    sympy.Gt: ("sym.gt", BOOL),
    sympy.Ge: ("sym.ge", BOOL),
}


class NotArithmeticError(Exception):
    """An expression that `sym.*` operators can not compute."""


def guards_of(values: list[Any]) -> list[Any]:
    """The conditions on more than the range of one size, under which these traced values hold."""
    environments = {
        id(mode.shape_env): mode.shape_env
        for value in values
        if (mode := getattr(value, "fake_mode", None)) is not None and mode.shape_env is not None
    }
    found: dict[Any, None] = {}
    for environment in environments.values():
        for guard in environment.guards:
            expression = environment.simplify(guard.expr)
            if not _is_range(expression):
                found[expression] = None
    return list(found)


def _is_range(expression: Any) -> bool:
    """True already, or a bound of one size, which the program states as a range."""
    if expression in (True, sympy.true):
        return True
    if not isinstance(expression, (sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le, sympy.Ne)):
        return False
    if not all(side.is_Symbol or side.is_Integer for side in expression.args):
        return False
    numbers = [side for side in expression.args if side.is_Integer]
    # To torch 0 and 1 are special sizes; a program takes 1 like any other.
    return bool(numbers) and (not isinstance(expression, sympy.Ne) or numbers[0] <= 1)


def emit_check(emitter: Emitter, condition: Any, sizes: Sizes) -> None:
    """NotArithmeticError where `condition` can not be computed from `sizes`."""
    emitter.append_check(_emit(emitter, condition, sizes))


def _emit(emitter: Emitter, expression: Any, sizes: Sizes) -> Argument:
    if expression in sizes:
        return sizes[expression]
    if expression.is_Integer:
        return int(expression)
    if isinstance(expression, (sympy.logic.boolalg.BooleanTrue, sympy.logic.boolalg.BooleanFalse)):
        return bool(expression)
    parts = [_emit(emitter, part, sizes) for part in expression.args]
    kind = type(expression)
    if kind in _CHAINED and parts:
        op, letter = _CHAINED[kind]
        return reduce(_joiner(emitter, op, letter), parts)
    if kind in _PAIRS:
        op, letter = _PAIRS[kind]
        return _joiner(emitter, op, letter)(parts[0], parts[1])
    if isinstance(expression, sympy.Not):
        return emitter.append("sym.not", (parts[0],), BOOL)
    raise NotArithmeticError(str(expression))


def _joiner(emitter: Emitter, op: str, kind: str) -> Callable[[Argument, Argument], Argument]:
    def join(left: Argument, right: Argument) -> Argument:
        if isinstance(left, Ref) or isinstance(right, Ref):
            return emitter.append(op, (left, right), kind)
        settled: Argument = _SETTLED[op](left, right)
        return settled

    return join


_SETTLED: dict[str, Callable[[Any, Any], Any]] = {
    "sym.add": operator.add,
    "sym.mul": operator.mul,
    "sym.max": max,
    "sym.min": min,
    "sym.and": operator.and_,
    "sym.or": operator.or_,
    "sym.floordiv": operator.floordiv,
    "sym.mod": operator.mod,
    "sym.pow": operator.pow,
    "sym.eq": operator.eq,
    "sym.ne": operator.ne,
    "sym.lt": operator.lt,
    "sym.le": operator.le,
    "sym.gt": operator.gt,
    "sym.ge": operator.ge,
}
