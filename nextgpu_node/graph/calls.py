"""The tensors of a call, in whatever containers they come.  Submitter only.

    f(ids, cache={"k": [a, b]})   ->   ids, cache.k.0, cache.k.1

Looked into: mappings, sequences, named tuples, dataclasses, containers registered with torch's
pytree, and plain objects (a transformers cache, say) that hold tensors in their attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree

_MAX_DEPTH = 16
# Nothing to find in these, though they have attributes.
_CLOSED = (
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    torch.nn.Module,
    type,
    ModuleType,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    Enum,
)


@dataclass(frozen=True, slots=True)
class Container:
    """`plain`: its numbers are values of their own, not the inner state of some object."""

    children: list[tuple[str, Any]]
    rebuild: Callable[[list[Any]], Any]
    plain: bool = True


def tensor_leaves(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """Every tensor in `value` with its path, in order."""
    return [(one.path, one.value) for one in _leaves(value, name, ()) if _is_tensor(one.value)]


def output_leaves(value: Any) -> list[tuple[str, Any]]:
    """Tensors and numbers that a call gave.  A single one has no name, a tuple's have numbers.

    Tensors inside objects (a cache) come after those that were returned as such.
    """
    leaves = [one for one in _leaves(value, "", ()) if one.value is not None]
    return [(one.path, one.value) for one in sorted(leaves, key=lambda one: not one.plain)]


def replace_tensors(value: Any, tensors: Iterator[Any]) -> Any:
    """`value` with its tensors, in the order of tensor_leaves, exchanged; containers are copied."""
    return _replaced(value, tensors, ())


def spec_of_leaves(value: Any, spec: Any) -> list[Any]:
    """What a nested `spec` says about each tensor of `value`, in the order of tensor_leaves.

    An entry for a container may be one for all of its tensors.
    """
    return list(_specs(value, spec, ()))


def bind_call(
    target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """The arguments by the names of their parameters: those of *args are numbered.

    TypeError where they do not fit.
    """
    try:
        signature = inspect.signature(target)
    except ValueError:
        return [(f"input_{at}", one) for at, one in enumerate(args)] + list(kwargs.items())
    signature.bind(*args, **kwargs)
    named: list[tuple[str, Any]] = []
    parameters = iter(signature.parameters.values())
    rest = ""
    for at, argument in enumerate(args):
        if not rest:
            parameter = next(parameters)
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                rest, first = parameter.name, at
        named.append((f"{rest}.{at - first}" if rest else parameter.name, argument))
    return [*named, *kwargs.items()]


def open_container(value: Any) -> Container | None:
    """The parts of `value` and how to make it anew from others; None for a leaf."""
    if isinstance(value, Mapping):
        return _open_mapping(value)
    if isinstance(value, (tuple, list)):
        return _open_sequence(value)
    if isinstance(value, (torch.Tensor, *_CLOSED)) or type(value).__module__ == "builtins":
        return None
    if type(value) in pytree.SUPPORTED_NODES:
        return _open_registered(value)
    if dataclasses.is_dataclass(value):
        names = [one.name for one in dataclasses.fields(value) if one.name in _attributes(value)]
        return _open_attributes(value, names, plain=True)
    if _attributes(value):
        return _open_attributes(value, list(_attributes(value)), plain=False)
    return None


def _open_mapping(value: Mapping[Any, Any]) -> Container:
    keys = list(value)

    def rebuild(items: list[Any]) -> Any:
        try:
            made: Any = copy.copy(value)
            for key, item in zip(keys, items, strict=True):
                made[key] = item
        except TypeError:
            return dict(zip(keys, items, strict=True))
        return made

    return Container([(str(key), value[key]) for key in keys], rebuild)


def _open_sequence(value: tuple[Any, ...] | list[Any]) -> Container:
    fields = getattr(value, "_fields", None) or range(len(value))
    children = [(str(key), item) for key, item in zip(fields, value, strict=True)]
    if hasattr(value, "_make"):
        return Container(children, value._make)
    return Container(children, list if isinstance(value, list) else tuple)


def _open_registered(value: Any) -> Container:
    entry = pytree.SUPPORTED_NODES[type(value)]
    children, context = entry.flatten_fn(value)
    names = container_keys(type(value), context, len(children))
    return Container(
        [(str(name), child) for name, child in zip(names, children, strict=True)],
        lambda items: entry.unflatten_fn(items, context),
    )


def _open_attributes(value: Any, names: list[str], *, plain: bool) -> Container:
    def rebuild(items: list[Any]) -> Any:
        made = copy.copy(value)
        for name, item in zip(names, items, strict=True):
            object.__setattr__(made, name, item)
        return made

    held = _attributes(value)
    return Container([(name, held[name]) for name in names], rebuild, plain)


def _attributes(value: Any) -> dict[str, Any]:
    slots = {
        name: getattr(value, name)
        for name in getattr(type(value), "__slots__", ())
        if hasattr(value, name)
    }
    return {**slots, **getattr(value, "__dict__", {})}


def container_keys(kind: Any, context: Any, count: int) -> Sequence[Any]:
    """The keys of a container's children: of a dict, a named tuple, or a registered class."""
    for keys in (getattr(kind, "_fields", None), getattr(context, "_fields", None), context):
        if _are_keys(keys, count):
            return list(keys or ())
    return range(count)


def _are_keys(keys: Any, count: int) -> bool:
    if not isinstance(keys, (tuple, list)) or len(keys) != count:
        return False
    return all(isinstance(key, (str, int)) for key in keys)


def _open(value: Any, above: tuple[int, ...]) -> Container | None:
    """As open_container, but not into a container that is inside itself."""
    if id(value) in above or len(above) > _MAX_DEPTH:
        return None
    return open_container(value)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """`plain`: reached through containers only, not through some object's attributes."""

    path: str
    value: Any
    plain: bool


def _leaves(
    value: Any, path: str, above: tuple[int, ...], *, plain: bool = True
) -> Iterator[_Leaf]:
    opened = _open(value, above)
    if opened is None:
        if plain or _is_tensor(value):
            yield _Leaf(path, value, plain)
        return
    inside = (*above, id(value))
    for key, child in opened.children:
        yield from _leaves(child, join_path(path, key), inside, plain=plain and opened.plain)


def _replaced(value: Any, tensors: Iterator[Any], above: tuple[int, ...]) -> Any:
    if _is_tensor(value):
        return next(tensors)
    opened = _open(value, above)
    if opened is None:
        return value
    inside = (*above, id(value))
    return opened.rebuild([_replaced(child, tensors, inside) for _, child in opened.children])


def _specs(value: Any, spec: Any, above: tuple[int, ...]) -> Iterator[Any]:
    if _is_tensor(value):
        yield spec
        return
    opened = _open(value, above)
    if opened is None:
        return
    of_child = _split_spec(spec, opened)
    for key, child in opened.children:
        yield from _specs(child, of_child(key), (*above, id(value)))


def _split_spec(spec: Any, opened: Container) -> Callable[[str], Any]:
    """The spec of each child.  One that holds no further specs is about sizes: of all tensors."""
    keys = [key for key, _ in opened.children]
    if isinstance(spec, (tuple, list)) and len(spec) == len(keys):
        spec = dict(zip(keys, spec, strict=True))
    if isinstance(spec, Mapping) and any(isinstance(one, _NESTED) for one in spec.values()):
        return {str(key): one for key, one in spec.items()}.get
    return lambda key: spec


_NESTED = (Mapping, tuple, list)


def join_path(name: str, key: str) -> str:
    """`cache`, `0` -> `cache.0`."""
    return f"{name}.{key}" if name else key


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def reachable_modules(function: Callable[..., Any]) -> dict[str, torch.nn.Module]:
    """The modules that a function uses without getting them as arguments, by variable name."""
    found: dict[str, torch.nn.Module] = {}
    for name, value in _names_used(function):
        if isinstance(value, torch.nn.Module) and value not in found.values():
            found[name] = value
    return found


def _names_used(function: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(function, "func") and hasattr(function, "keywords"):  # functools.partial
        yield from _names_used(function.func)
        yield from ((f"argument_{at}", one) for at, one in enumerate(function.args))
        yield from function.keywords.items()
        return
    yield "self", getattr(function, "__self__", None)
    function = inspect.unwrap(getattr(function, "__func__", function))
    if isinstance(function, FunctionType):
        variables = inspect.getclosurevars(function)
        yield from variables.nonlocals.items()
        yield from variables.globals.items()
