"""A torch model -> a Program.  Runs on the submitter, on the submitter's own code.

    torch.export  ->  functional graph  ->  operators of the table  ->  ProgramSpec and tensors

Parameters, buffers and tensors written into the code become constants; buffers that the model
changes become the carry.
"""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._export.utils import _get_decomp_for_cia
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)
from torch.fx.proxy import _register_stack_trace_anchor
from torch.utils import _pytree as pytree

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.emit import HANDLED, Emitter
from nextgpu_node.graph.optable import TABLE
from nextgpu_node.graph.tensors import DTYPE_NAMES, spec_of
from nextgpu_protocol.program import Dimension, DType, ProgramSpec, Ref, Symbol, TensorSpec
from nextgpu_protocol.program_limits import MAX_DIMENSION

_MAX_ROUNDS = 8
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.\-/]")


def export(
    module: torch.nn.Module | Callable[..., Any] | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str, Any] | Sequence[Any] | None = None,
    stop: str | None = None,
) -> Program:
    """The program of one call `module(*args, **kwargs)`.

    `module` is a module, a function of tensors, or an exported program of your own.  The inputs
    are examples: their dtypes, and their shapes where `dynamic` does not say otherwise, are
    fixed.  `dynamic` names sizes that may vary, {"input_ids": {0: "batch", 1: "sequence"}}; the
    same name is the same size everywhere.  torch.export's own `dynamic_shapes` are taken too.

    Inputs keep their names, tensors in containers are called `name.key`; outputs in a dict or a
    dataclass keep their keys, a single output is called `output`, those of a tuple `output_0`, ….
    Writing to an input has no effect outside the program.  `stop` names the boolean output that
    ends a scan over many inputs.

    Raises ProgramError, which names the line of the model and what to do.
    """
    names = _InputNames()
    if isinstance(module, ExportedProgram):
        exported = module
    else:
        exported = _trace(module, tuple(args), dict(kwargs or {}), dynamic, names)
    exported = _lower(exported)
    return _Assembly(exported, names).program(stop)


# ---------------------------------------------------------------- tracing


@dataclass(slots=True)
class _InputNames:
    """How the submitter calls the inputs, and the sizes of theirs that may vary."""

    positional: list[str] = field(default_factory=list)
    sizes: dict[tuple[str, int], str] = field(default_factory=dict)


class _FunctionModule(torch.nn.Module):
    """A function as a module, with the function's own signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def _trace(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Any,
    names: _InputNames,
) -> ExportedProgram:
    if not isinstance(module, torch.nn.Module):
        if not callable(module):
            raise ProgramError(f"A {type(module).__name__} is neither a module nor a function.")
        # Without this, torch records the lines of modules only.
        _register_stack_trace_anchor(module)
        module = _FunctionModule(module)
    inputs = _bind_inputs(module.forward, args, kwargs, names)
    shapes = None if dynamic is None else _dynamic_shapes(inputs, dynamic, names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as exc:
        raise ProgramError(_explain(exc)) from exc


def _bind_inputs(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: _InputNames,
) -> dict[str, Any]:
    """The example inputs by parameter name; also fills names.positional."""
    signature = inspect.signature(forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as exc:
        raise ProgramError(f"The example inputs do not fit the model: {exc}.") from exc
    inputs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(value)
        else:
            inputs[name] = value
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            extra = len(args) - len(names.positional)
            names.positional += [f"{parameter.name}.{at}" for at in range(extra)]
            break
        names.positional.append(parameter.name)
    return inputs


def _dynamic_shapes(inputs: dict[str, Any], dynamic: Any, names: _InputNames) -> dict[str, Any]:
    """`dynamic` as torch.export wants it: an entry for each input, names turned into marks."""
    if not isinstance(dynamic, Mapping):
        dynamic = dict(zip(inputs, dynamic, strict=False))
    unknown = sorted(dynamic.keys() - inputs.keys())
    if unknown:
        raise ProgramError(
            f"dynamic names {unknown[0]}, the inputs are: {', '.join(map(str, inputs))}."
        )
    return {name: _marks(name, dynamic.get(name), names) for name in inputs}


def _marks(path: str, spec: Any, names: _InputNames) -> Any:
    """One entry of `dynamic`, each named size recorded in names.sizes."""
    if isinstance(spec, Mapping):
        if all(isinstance(key, int) for key in spec):
            return {dim: _mark(path, dim, size, names) for dim, size in spec.items()}
        return {key: _marks(f"{path}.{key}", one, names) for key, one in spec.items()}
    if isinstance(spec, (tuple, list)):
        # torch.export lets a sequence be a shape or a container; a shape has no containers in it.
        if all(one is None or isinstance(one, (int, str, Dim)) for one in spec):
            return [_mark(path, dim, size, names) for dim, size in enumerate(spec)]
        return type(spec)(_marks(f"{path}.{at}", one, names) for at, one in enumerate(spec))
    return spec


def _mark(path: str, dim: int, size: Any, names: _InputNames) -> Any:
    if isinstance(size, str):
        names.sizes[path, dim] = size
        return Dim.DYNAMIC
    if isinstance(size, Dim):
        names.sizes[path, dim] = size.__name__
    return size


def _explain(exc: Exception) -> str:
    """The first line of torch's message, under the last line of code that is not torch's."""
    reason = str(exc).strip().partition("\n")[0] or type(exc).__name__
    own = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    where = (
        f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}: {own[-1].line}\n  " if own else ""
    )
    return f"{where}torch.export could not follow the model: {reason}"


# ---------------------------------------------------------------- lowering


def _lower(exported: ExportedProgram) -> ExportedProgram:
    """Make the graph functional, and take apart what the table does not have but torch can."""
    if _is_lowered(exported):
        return exported
    table: dict[Any, Callable[..., Any]] = {}
    for _ in range(_MAX_ROUNDS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = exported.run_decompositions(dict(table))
        except Exception as exc:
            raise ProgramError(_explain(exc)) from exc
        found = {op: rule for op in _unknown(exported) if (rule := _decomposition(op))}
        if not found.keys() - table.keys():
            break
        table |= found
    return exported


def _is_lowered(exported: ExportedProgram) -> bool:
    """Nothing to do, which saves tracing the model a second time: every operator is in the table,
    none writes to its arguments, and there is no region inside the graph."""
    targets = {
        node.target for node in exported.graph_module.graph.nodes if node.op == "call_function"
    }
    operators = {target for target in targets if isinstance(target, torch._ops.OpOverload)}
    return (
        not exported.graph_signature.buffers_to_mutate
        and not any(isinstance(t, torch._ops.HigherOrderOperator) for t in targets)
        and not any(op._schema.is_mutable for op in operators)
        and not _unknown(exported)
    )


def _unknown(exported: ExportedProgram) -> set[torch._ops.OpOverload]:
    return {
        node.target
        for module in exported.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target not in HANDLED
        and str(node.target) not in TABLE
    }


def _decomposition(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    if op in decomposition_table:
        rule: Callable[..., Any] = decomposition_table[op]
        return rule
    if torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "CompositeImplicitAutograd"):
        composite: Callable[..., Any] = _get_decomp_for_cia(op)
        return composite
    return None


# ---------------------------------------------------------------- assembling


class _Assembly:
    """Puts a functional exported program together as a Program."""

    def __init__(self, exported: ExportedProgram, names: _InputNames) -> None:
        self._exported = exported
        self._names = names
        self._emitter = Emitter()
        self._constants: dict[str, tuple[Ref, torch.Tensor]] = {}
        self._shared: dict[tuple[Any, ...], Ref] = {}
        self._carry: dict[str, tuple[Ref, torch.Tensor]] = {}
        self._xs: list[tuple[Ref, TensorSpec]] = []
        self._symbols: dict[Any, str] = {}
        self._mutated = set(exported.graph_signature.buffers_to_mutate.values())

    def program(self, stop: str | None) -> Program:
        given = self._inputs()
        outputs = self._emitter.walk(self._exported.graph_module, given)
        carry_refs, ys = self._outputs(outputs)
        results = [*carry_refs, *(ref for ref, _ in ys)]
        is_read = self._emitter.is_read(results)
        constants = {name: one for name, one in self._constants.items() if is_read(one[0])}
        order = [
            [ref for ref, _ in constants.values()],
            [ref for ref, _ in self._carry.values()],
            [ref for ref, _ in self._xs],
        ]
        step, version = self._emitter.finish(order, results)
        spec = ProgramSpec(
            min_table_version=version,
            step=step,
            constants=tuple(spec_of(name, tensor) for name, (_, tensor) in constants.items()),
            carry=tuple(spec_of(name, tensor) for name, (_, tensor) in self._carry.items()),
            xs=tuple(spec for _, spec in self._xs),
            ys=tuple(spec for _, spec in ys),
            symbols=tuple(self._ranges()),
            stop=None if stop is None else _position(stop, [spec.name for _, spec in ys]),
        )
        return Program.from_parts(
            spec,
            {name: tensor for name, (_, tensor) in constants.items()},
            {name: tensor for name, (_, tensor) in self._carry.items()},
        )

    # ------------------------------------------------------------ inputs

    def _inputs(self) -> list[Any]:
        placeholders = [one for one in self._exported.graph.nodes if one.op == "placeholder"]
        specs = self._exported.graph_signature.input_specs
        paths = iter(_input_paths(self._exported, self._names.positional))
        return [
            self._input(node, spec, next(paths) if spec.kind is InputKind.USER_INPUT else None)
            for node, spec in zip(placeholders, specs, strict=True)
        ]

    def _input(self, node: torch.fx.Node, spec: InputSpec, path: str | None) -> Any:
        match spec.kind:
            case InputKind.PARAMETER | InputKind.BUFFER | InputKind.CONSTANT_TENSOR:
                return self._tensor_input(spec)
            case InputKind.USER_INPUT:
                return self._user_input(node, spec, path or node.name)
        raise ProgramError(f"The model holds an object that is not a tensor: {spec.target}.")

    def _tensor_input(self, spec: InputSpec) -> Ref:
        target = spec.target or ""
        tensor = self._exported.state_dict.get(target)
        if tensor is None:
            tensor = self._exported.constants[target]
        tensor = tensor.detach()
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise ProgramError(f"{target} holds no dense data: load the model's weights first.")
        if tensor.dtype not in DTYPE_NAMES:
            raise ProgramError(f"{target} is {tensor.dtype}, which programs do not carry.")
        if target in self._mutated:
            ref = self._emitter.add_input()
            self._carry[_clean(target)] = (ref, tensor.clone())
            return ref
        # Tied weights are one tensor under several names: send it once.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and key in self._shared:
            return self._shared[key]
        ref = self._shared[key] = self._emitter.add_input()
        self._constants[_unique(_clean(target), self._constants)] = (ref, tensor)
        return ref

    def _user_input(self, node: torch.fx.Node, spec: InputSpec, path: str) -> Any:
        if isinstance(spec.arg, ConstantArgument):
            return spec.arg.value
        if not isinstance(spec.arg, TensorArgument):
            raise ProgramError(f"The input {path} is not a tensor; pass numbers as tensors.")
        fake = node.meta["val"]
        if fake.dtype not in DTYPE_NAMES:
            raise ProgramError(f"The input {path} is {fake.dtype}, which programs do not carry.")
        shape = tuple(self._name_size(path, dim, size) for dim, size in enumerate(fake.shape))
        ref = self._emitter.add_input()
        name = _unique(_clean(path), {one.name for _, one in self._xs})
        self._xs.append((ref, TensorSpec(name, DTYPE_NAMES[fake.dtype], shape)))
        return ref

    def _name_size(self, path: str, dim: int, size: Any) -> Dimension:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._symbols:
            name = self._names.sizes.get((path, dim), str(expression))
            if not name.isidentifier():
                name = f"size_{len(self._symbols)}"
            self._symbols[expression] = name
        return self._symbols[expression]

    def _ranges(self) -> Iterator[Symbol]:
        """Each symbol once; where several traced sizes share its name, the range of all."""
        ranges: dict[str, tuple[int, int]] = {}
        for expression, name in self._symbols.items():
            low, high = ranges.get(name, (1, MAX_DIMENSION))
            known = self._exported.range_constraints.get(expression)
            if known is not None:
                # torch.export states 2 where it only means "not special-cased".
                low = max(low, int(known.lower) if known.lower > 2 else 1)
                if known.upper < high:
                    high = int(known.upper)
            ranges[name] = (low, high)
        return (Symbol(name, low, high) for name, (low, high) in ranges.items())

    # ------------------------------------------------------------ outputs

    def _outputs(self, outputs: list[Any]) -> tuple[list[Ref], list[tuple[Ref, TensorSpec]]]:
        nodes = self._exported.graph.output_node().args[0]
        assert isinstance(nodes, (tuple, list))
        names = iter(_output_names(self._exported))
        carried: dict[str, Ref] = {}
        ys: list[tuple[Ref, TensorSpec]] = []
        specs = self._exported.graph_signature.output_specs
        for spec, value, node in zip(specs, outputs, nodes, strict=True):
            if spec.kind is OutputKind.BUFFER_MUTATION:
                carried[_clean(spec.target or "")] = value
            elif spec.kind is OutputKind.USER_OUTPUT:
                name = _unique(_clean(next(names)), {one.name for _, one in ys})
                ys += self._output(name, value, node)
        return [carried[name] for name in self._carry], ys

    def _output(self, name: str, value: Any, node: Any) -> list[tuple[Ref, TensorSpec]]:
        if value is None:
            return []
        fake = node.meta["val"] if isinstance(node, torch.fx.Node) else value
        if not isinstance(fake, torch.Tensor):
            dtype = _number_dtype(name, fake)
            ref = self._emitter.append("aten.scalar_tensor.default", (value,), "t", dtype=dtype)
            return [(ref, TensorSpec(name, dtype.name, ()))]
        shape = tuple(
            size if isinstance(size, int) else self._symbols.get(size.node.expr)
            for size in fake.shape
        )
        return [(value, TensorSpec(name, DTYPE_NAMES[fake.dtype], shape))]


def _position(stop: str, names: list[str]) -> int:
    if stop not in names:
        raise ProgramError(f"There is no output {stop}; the outputs are: {', '.join(names)}.")
    return names.index(stop)


def _number_dtype(name: str, number: Any) -> DType:
    if isinstance(number, (bool, torch.SymBool)):
        return DType("bool")
    if isinstance(number, (int, torch.SymInt)):
        return DType("int64")
    if isinstance(number, (float, torch.SymFloat)):
        return DType("float64")
    raise ProgramError(f"The output {name} is a {type(number).__name__}; return tensors.")


# ---------------------------------------------------------------- names


def _input_paths(exported: ExportedProgram, positional: Sequence[str]) -> list[str]:
    """A name for each leaf of the inputs, in order."""
    args_spec, kwargs_spec = exported.call_spec.in_spec.children()
    paths: list[str] = []
    for at, child in enumerate(args_spec.children()):
        name = positional[at] if at < len(positional) else f"input_{at}"
        paths += _leaf_paths(child, name)
    for key, child in zip(kwargs_spec.context, kwargs_spec.children(), strict=True):
        paths += _leaf_paths(child, str(key))
    return paths


def _output_names(exported: ExportedProgram) -> list[str]:
    spec = exported.call_spec.out_spec
    if spec.is_leaf():
        return ["output"]
    numbered = spec.type in (tuple, list)
    return [f"output_{path}" if numbered else path for path in _leaf_paths(spec, "")]


def _leaf_paths(spec: pytree.TreeSpec, path: str) -> list[str]:
    if spec.is_leaf():
        return [path]
    keys = _keys(spec)
    return [
        leaf
        for key, child in zip(keys, spec.children(), strict=True)
        for leaf in _leaf_paths(child, f"{path}.{key}" if path else str(key))
    ]


def _keys(spec: pytree.TreeSpec) -> Sequence[Any]:
    """The keys of a container's children: of a dict, a named tuple, or a registered class."""
    context = spec.context
    for keys in (getattr(spec.type, "_fields", None), getattr(context, "_fields", None), context):
        if _are_keys(keys, spec.num_children):
            return list(keys or ())
    return range(spec.num_children)


def _are_keys(keys: Any, count: int) -> bool:
    if not isinstance(keys, (tuple, list)) or len(keys) != count:
        return False
    return all(isinstance(key, (str, int)) for key in keys)


def _clean(name: str) -> str:
    name = _NOT_IN_A_NAME.sub("_", name) or "tensor"
    return name if name[0].isalnum() or name[0] == "_" else f"_{name}"


def _unique(name: str, taken: Mapping[str, Any] | set[str]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
