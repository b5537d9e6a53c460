"""A torch model -> a Program.  Runs on the submitter, on the submitter's own code.

    tensors of the call (calls)  ->  torch.export  ->  functional graph (lower)
    ->  operators of the table (emit)  ->  ProgramSpec and tensors

Parameters, buffers and tensors written into the code become constants; buffers that the model
changes become the carry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import FrameSummary
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import is_fake
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
from nextgpu_node.graph.calls import (
    bind_call,
    container_keys,
    output_leaves,
    reachable_modules,
    replace_tensors,
    spec_of_leaves,
    tensor_leaves,
)
from nextgpu_node.graph.draws import STATE_NAME
from nextgpu_node.graph.emit import Emitter
from nextgpu_node.graph.explain import Line, tracing_failed
from nextgpu_node.graph.guards import NotArithmeticError, emit_check, guards_of
from nextgpu_node.graph.lower import drop_checks, lower, quiet
from nextgpu_node.graph.random_numbers import make_state
from nextgpu_node.graph.recurrent import StandIns
from nextgpu_node.graph.tensors import DTYPE_NAMES, spec_of
from nextgpu_protocol.program import (
    INT,
    Argument,
    Dimension,
    DType,
    ProgramSpec,
    Ref,
    Symbol,
    TensorSpec,
)
from nextgpu_protocol.program_limits import MAX_DIMENSION

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.\-/]")


def export(
    module_or_function: torch.nn.Module | Callable[..., Any] | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str, Any] | Sequence[Any] | None = None,
    stop: str | None = None,
    seed: int = 0,
) -> Program:
    """The program of one call `module_or_function(*args, **kwargs)`.

    `module_or_function` is a module, a function of tensors, or an exported program of your own.
    The inputs are examples: tensors become inputs of the program, with their dtypes fixed, and
    their shapes too where `dynamic` does not say otherwise.  Everything else (numbers, texts,
    None) is built into the program as it is.

    `dynamic` names sizes that may vary, {"input_ids": {0: "batch", 1: "sequence"}}; the same name
    is the same size everywhere.  torch.export's own `dynamic_shapes` are taken too.

    Inputs keep their names, tensors in containers are called `name.key`; outputs in a dict or a
    dataclass keep their keys, a single output is called `output`, those of a tuple `output_0`, ….
    Writing to an input has no effect outside the program.  `stop` names the boolean output that
    ends a scan over many inputs.

    Where the model draws random numbers (dropout of a model in training, torch.rand, …) they come
    from a state in the carry, `random_state`, made from `seed`: the same seed, the same numbers.

    Raises ProgramError, which names the line of the model and what to do.
    """
    if isinstance(module_or_function, ExportedProgram):
        exported = module_or_function
        names = _names_of_exported(exported)
    else:
        exported, names = _trace(module_or_function, tuple(args), dict(kwargs or {}), dynamic)
    return _Assembly(lower(exported), names).program(stop, seed)


# ---------------------------------------------------------------- tracing


@dataclass(slots=True)
class _Names:
    """What the submitter calls the tensors that go in and come out, and their varying sizes."""

    inputs: list[str]
    outputs: list[str]
    sizes: dict[tuple[str, int], str] = field(default_factory=dict)
    wrapped: bool = False


class _Call(torch.nn.Module):
    """A call as a module of its tensors alone, whatever containers they come in."""

    def __init__(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: _Names
    ) -> None:
        super().__init__()
        if isinstance(target, torch.nn.Module):
            self.model = target
        for name, module in reachable_modules(target).items():
            self.add_module(f"{_USED}{name}", module)
        self._target = (target,)
        self._call = (args, kwargs)
        # torch.export puts attributes back as they were, but leaves what they refer to.
        self._names = names

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        args, kwargs = replace_tensors(self._call, iter(tensors))
        outputs = output_leaves(self._target[0](*args, **kwargs))
        self._names.outputs = [_output_name(path) for path, _ in outputs]
        return tuple(value for _, value in outputs)


# Before the names of the weights of a module, and of modules that a function uses.
_MODEL = "model."
_USED = "used_"


def _trace(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> tuple[ExportedProgram, _Names]:
    if not callable(target):
        raise ProgramError(f"A {type(target).__name__} is neither a module nor a function.")
    forward = target.forward if isinstance(target, torch.nn.Module) else target
    # Without this, torch records the lines of modules only.
    _register_stack_trace_anchor(getattr(forward, "__func__", forward))
    try:
        named = bind_call(forward, args, kwargs)
    except TypeError as exc:
        raise ProgramError(f"The example inputs do not fit the model: {exc}.") from exc
    leaves = [leaf for name, value in named for leaf in tensor_leaves(value, name)]
    names = _Names([path for path, _ in leaves], [], wrapped=True)
    for path, tensor in leaves:
        _check_example(path, tensor)
    marks = _marks(named, leaves, dynamic, names)
    examples = _distinct(_at_least_two(leaves, names))
    call = _Call(target, args, kwargs, names)
    try:
        with quiet(), StandIns(recurrent=bool(names.sizes)):
            exported = torch.export.export(
                call, examples, dynamic_shapes=(tuple(marks),) if leaves else None, strict=False
            )
    except Exception as exc:
        raise tracing_failed(exc) from exc
    _check_sizes(exported, names)
    drop_checks(exported)
    return exported, names


def _distinct(examples: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """torch.export takes one tensor given twice for one input, and both names for the second."""
    seen: set[int] = set()
    found: list[torch.Tensor] = []
    for tensor in examples:
        found.append(tensor.detach().clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return tuple(found)


def _check_example(path: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise ProgramError(f"The input {path} is not a dense tensor; pass dense tensors.")
    if tensor.dtype not in DTYPE_NAMES:
        raise ProgramError(f"The input {path} is {tensor.dtype}, which programs do not carry.")


def _marks(
    named: Sequence[tuple[str, Any]],
    leaves: Sequence[tuple[str, torch.Tensor]],
    dynamic: Any,
    names: _Names,
) -> list[Any]:
    """For each tensor what torch.export is to know of its sizes; named ones go into names.sizes."""
    if dynamic is None:
        return [None] * len(leaves)
    if not isinstance(dynamic, Mapping):
        dynamic = {name: spec for (name, _), spec in zip(named, dynamic, strict=False)}
    _check_keys(dynamic, named, leaves)
    specs = [
        spec
        for name, value in named
        for spec in spec_of_leaves(value, dynamic.get(name, _in_rest(name, dynamic)))
    ]
    return [
        _mark_tensor(path, tensor, dynamic.get(path, spec), names)
        for (path, tensor), spec in zip(leaves, specs, strict=True)
    ]


def _in_rest(name: str, dynamic: Mapping[str, Any]) -> Any:
    """torch.export's way to speak of `*args`: one entry, a sequence."""
    rest, _, at = name.partition(".")
    spec = dynamic.get(rest)
    return spec[int(at)] if at.isdecimal() and isinstance(spec, (tuple, list)) else None


def _check_keys(dynamic: Mapping[str, Any], named: Any, leaves: Any) -> None:
    inputs = [name for name, _ in named]
    known = {*inputs, *(name.partition(".")[0] for name in inputs), *(path for path, _ in leaves)}
    unknown = sorted(map(str, dynamic.keys() - known))
    if unknown:
        raise ProgramError(f"dynamic names {unknown[0]}, the inputs are: {', '.join(inputs)}.")


def _mark_tensor(path: str, tensor: torch.Tensor, spec: Any, names: _Names) -> Any:
    if isinstance(spec, (tuple, list)):
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping):
        return None
    marks = {}
    for dim, size in spec.items():
        if type(dim) is not int or not -tensor.dim() <= dim < tensor.dim():
            raise ProgramError(
                f"dynamic names the dimension {dim} of {path}, which has {tensor.dim()}."
            )
        marks[dim % tensor.dim()] = _mark(path, dim % tensor.dim(), size, names)
    return marks


def _mark(path: str, dim: int, size: Any, names: _Names) -> Any:
    if isinstance(size, str):
        names.sizes[path, dim] = size
        # AUTO fixes a size where the model needs it so; _check_sizes then tells.
        return Dim.AUTO
    if isinstance(size, Dim):
        names.sizes[path, dim] = size.__name__
    return size


def _at_least_two(
    leaves: Sequence[tuple[str, torch.Tensor]], names: _Names
) -> tuple[torch.Tensor, ...]:
    """The examples, with named sizes of 1 made 2: to torch a size of 1 is special and fixed."""
    small = {
        name
        for path, tensor in leaves
        for dim in range(tensor.dim())
        if (name := names.sizes.get((path, dim))) and tensor.shape[dim] == 1
    }
    return tuple(_widened(path, tensor, small, names) for path, tensor in leaves)


def _widened(path: str, tensor: torch.Tensor, small: set[str], names: _Names) -> torch.Tensor:
    for dim in range(tensor.dim()):
        if names.sizes.get((path, dim)) in small:
            tensor = torch.cat([tensor, tensor], dim)
    return tensor


def _check_sizes(exported: ExportedProgram, names: _Names) -> None:
    """Every size that the submitter named did stay open."""
    placeholders = {one.name: one for one in exported.graph.nodes if one.op == "placeholder"}
    for path, name in zip(names.inputs, exported.graph_signature.user_inputs, strict=True):
        shape = placeholders[str(name)].meta["val"].shape
        for dim, size in enumerate(shape):
            symbol, fixed = names.sizes.get((path, dim)), _fixed_size(size)
            if symbol is not None and fixed is not None:
                where = _fixed_where(placeholders.values(), fixed)
                raise ProgramError(
                    f"{symbol}, dimension {dim} of {path}, can not vary: the model fixes it to "
                    f"{fixed}{where}.  Leave it out of dynamic, or change the model to work at any "
                    "size: no Python loop over it, no int() of it, no numbers of the example."
                )


def _fixed_size(size: Any) -> int | None:
    """The number that a traced size is, or became later in the trace."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_number else None
    return int(size)


def _fixed_where(placeholders: Any, size: int) -> str:
    """The line at which a size became a number, if torch noted it down."""
    for node in placeholders:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is None or mode.shape_env is None:
            continue
        for symbol, place in mode.shape_env.replacements_slocs.items():
            if mode.shape_env.replacements.get(symbol) == size:
                return _place(place.maybe_user_loc or place.framework_loc)
    return ""


def _place(found: Any) -> str:
    """` at FILE:LINE: CODE` of a line that is not torch's."""
    if found is None:
        return ""
    if not isinstance(found, FrameSummary):
        return f" at {found}"
    line = Line(found.filename, found.lineno or 0, found.name, found.line or "")
    return "" if line.is_machinery else f" at {line}"


def _names_of_exported(exported: ExportedProgram) -> _Names:
    return _Names(_input_paths(exported), _output_paths(exported))


def _output_name(path: str) -> str:
    if not path:
        return "output"
    return f"output_{path}" if path[0].isdecimal() else path


# ---------------------------------------------------------------- assembling


class _Assembly:
    """Puts a functional exported program together as a Program."""

    def __init__(self, exported: ExportedProgram, names: _Names) -> None:
        self._exported = exported
        self._names = names
        self._emitter = Emitter()
        self._constants: dict[str, tuple[Ref, torch.Tensor]] = {}
        self._shared: dict[tuple[Any, ...], Ref] = {}
        self._carry: dict[str, tuple[Ref, torch.Tensor]] = {}
        self._xs: list[tuple[Ref, TensorSpec]] = []
        self._symbols: dict[Any, str] = {}
        self._sized: list[tuple[Ref, int, Any]] = []
        signature = exported.graph_signature
        self._mutated = {
            *signature.buffers_to_mutate.values(),
            *signature.parameters_to_mutate.values(),
        }

    def program(self, stop: str | None, seed: int) -> Program:
        given = self._inputs()
        self._check_guards()
        outputs = self._emitter.walk(self._exported.graph_module, given)
        carry_refs, ys = self._outputs(outputs)
        carry_refs += self._random_state(seed)
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

    def _random_state(self, seed: int) -> list[Ref]:
        """The state after the step, and the one before it in the carry, if anything is drawn."""
        state = self._emitter.draws.state
        if state is None:
            return []
        self._carry[_unique(STATE_NAME, self._carry)] = (state, make_state(seed))
        return [self._emitter.draws.next_state(self._emitter)]

    # ------------------------------------------------------------ inputs

    def _inputs(self) -> list[Any]:
        placeholders = [one for one in self._exported.graph.nodes if one.op == "placeholder"]
        specs = self._exported.graph_signature.input_specs
        paths = iter(self._names.inputs)
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
        if is_fake(tensor):
            raise ProgramError(
                f"{target} is made while the model is traced (by torch.func, say), so its values "
                "are not known; make it before, as a buffer or an input."
            )
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise ProgramError(f"{target} holds no dense data: load the model's weights first.")
        if tensor.dtype not in DTYPE_NAMES:
            raise ProgramError(f"{target} is {tensor.dtype}, which programs do not carry.")
        if target in self._mutated:
            ref = self._emitter.add_input()
            self._carry[self._name_of(target)] = (ref, tensor.clone())
            return ref
        # Tied weights are one tensor under several names: send it once.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and key in self._shared:
            return self._shared[key]
        ref = self._shared[key] = self._emitter.add_input()
        self._constants[_unique(self._name_of(target), self._constants)] = (ref, tensor)
        return ref

    def _name_of(self, target: str) -> str:
        """A weight's name in the submitter's model, without the module that we put around it."""
        if self._names.wrapped:
            target = target.removeprefix(_MODEL).removeprefix(_USED)
        return _clean(target)

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
        self._sized += [
            (ref, dim, size.node.expr)
            for dim, size in enumerate(fake.shape)
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number
        ]
        name = _unique(_clean(path), {one.name for _, one in self._xs})
        self._xs.append((ref, TensorSpec(name, DTYPE_NAMES[fake.dtype], shape)))
        return ref

    def _check_guards(self) -> None:
        """What the trace took for granted about sizes is checked before each step."""
        placeholders = [one for one in self._exported.graph.nodes if one.op == "placeholder"]
        sizes: dict[Any, Argument] = {}
        conditions: list[Any] = guards_of([one.meta.get("val") for one in placeholders])
        for ref, dim, expression in self._sized:
            size = self._emitter.append("aten.sym_size.int", (ref, dim), INT)
            if expression.is_Symbol:
                sizes.setdefault(expression, size)
            else:
                # A size that is a multiple, say, of another's: known under a name of its own.
                known = sympy.Symbol(f"size_{len(sizes)}")
                sizes[known] = size
                conditions.append(sympy.Eq(known, expression))
        for condition in conditions:
            try:
                emit_check(self._emitter, condition, sizes)
            except NotArithmeticError as exc:
                raise ProgramError(
                    f"The model works only where {condition}, which a program can not check. "
                    "Leave one of these sizes out of dynamic."
                ) from exc

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
        names = iter(self._names.outputs)
        carried: dict[str, Ref] = {}
        ys: list[tuple[Ref, TensorSpec]] = []
        specs = self._exported.graph_signature.output_specs
        for spec, value, node in zip(specs, outputs, nodes, strict=True):
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
                carried[self._name_of(spec.target or "")] = value
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


def _input_paths(exported: ExportedProgram) -> list[str]:
    """A name for each leaf of the inputs, in order; positional ones are called as in the graph."""
    args_spec, kwargs_spec = exported.call_spec.in_spec.children()
    arguments = iter(
        spec.arg.name
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    )
    paths: list[str] = []
    for at, child in enumerate(args_spec.children()):
        own = [next(arguments) for _ in range(child.num_leaves)]
        paths += own if child.is_leaf() else _leaf_paths(child, f"input_{at}")
    for key, child in zip(kwargs_spec.context, kwargs_spec.children(), strict=True):
        paths += _leaf_paths(child, str(key))
    return paths


def _output_paths(exported: ExportedProgram) -> list[str]:
    return [_output_name(path) for path in _leaf_paths(exported.call_spec.out_spec, "")]


def _leaf_paths(spec: pytree.TreeSpec, path: str) -> list[str]:
    if spec.is_leaf():
        return [path]
    keys = container_keys(spec.type, spec.context, spec.num_children)
    return [
        leaf
        for key, child in zip(keys, spec.children(), strict=True)
        for leaf in _leaf_paths(child, f"{path}.{key}" if path else str(key))
    ]


def _clean(name: str) -> str:
    name = _NOT_IN_A_NAME.sub("_", name) or "tensor"
    return name if name[0].isalnum() or name[0] == "_" else f"_{name}"


def _unique(name: str, taken: Mapping[str, Any] | set[str]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
