"""One step of training as a Program.  Submitter only.

    loss module  ->  torch.export, lowered  ->  traced with its gradients and the optimizer's update
    ->  operators of the table  ->  Program

    carry   parameters, buffers that the model changes, the optimizer's state, the random state
    x       one batch: the model's inputs, then the loss function's targets
    y       `loss`, and what `metrics` gives

Frozen parameters and other tensors are constants.  Tied weights are one tensor of the carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.backward import BACKWARD_RULES, grouped_product
from nextgpu_node.graph.calls import bind_call
from nextgpu_node.graph.draws import RECURRENT, STATE_NAME, one_layer_rule
from nextgpu_node.graph.emit import GROUPED_MM, HANDLED
from nextgpu_node.graph.explain import tracing_failed
from nextgpu_node.graph.export import _Assembly, _clean, _Names, _trace
from nextgpu_node.graph.lower import _decomposition, lower, quiet
from nextgpu_node.graph.optable import TABLE
from nextgpu_node.graph.optimizers import (
    Constant,
    Described,
    Optimizer,
    Schedule,
    describe_optimizer,
)
from nextgpu_node.graph.tensors import spec_of
from nextgpu_protocol.program import ProgramSpec, Ref, TensorSpec

MODEL = "model/"
OPTIMIZER = "optimizer/"
STEP_NAME = "optimizer/step"

_MAX_ROUNDS = 8
# Where the submitter's model is inside what torch.export is given.
_INSIDE = "model.module."


def train_step(
    module: nn.Module,
    loss_fn: Callable[..., Any] | None = None,
    inputs: Any = (),
    targets: Any = (),
    *,
    optimizer: Any,
    metrics: Callable[..., Mapping[str, Tensor]] | None = None,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    dynamic: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Program:
    """A program whose every step trains `module` on one batch.

    module     as it is: its weights are where training starts, its mode (`train()`, `eval()`) is
               kept, parameters with requires_grad=False do not change.
    loss_fn    loss_fn(output, *targets) -> a scalar tensor.  None: the module's own output is the
               loss, or has it as `.loss` or ["loss"] (a transformers model that is given labels).
    inputs     an example batch for the module: a tensor, a sequence of positional arguments, or a
               mapping of keyword arguments.
    targets    the same for loss_fn, after the output.
    optimizer  SGD, Adam or AdamW of this package, or an instance of torch.optim's over the
               module's parameters; its groups are kept, and what it has gathered so far.
    metrics    metrics(output, *targets) -> tensors by name, given back beside the loss.
    schedule   Constant(), WarmupCosine(…) or WarmupLinear(…): times the learning rate.
    clip_norm  the gradients' total 2-norm is cut to this, as torch.nn.utils.clip_grad_norm_ does.
    dynamic    sizes that may vary, by input name, as `export` takes it: {"x": {0: "batch"},
               "target": {0: "batch"}}.
    seed       of the random numbers that the model draws (dropout).

    The program's inputs are called like the parameters of `module.forward` and of `loss_fn`.  The
    outputs are `loss` (as the loss function gives it, before the update) and the metrics.
    `load_carry_into` puts a carry back into the module.

    Raises ProgramError, which names the line of the model and what to do.
    """
    described = describe_optimizer(optimizer)
    loss = _Loss(module, loss_fn, metrics, inputs, targets)
    exported, names = _trace(loss, (), loss.example, dynamic)
    exported = lower(exported)
    parts = _Parts.of(exported, module, described)
    update = _Update(parts, described, schedule or Constant(), clip_norm)
    traced = _trace_step(exported, parts, update)
    return _TrainingAssembly(exported, names, parts, traced).training_program(update, seed)


# ---------------------------------------------------------------- the loss as a module


class _Loss(nn.Module):
    """loss_fn(module(*inputs), *targets) of one flat set of named inputs."""

    def __init__(
        self, module: nn.Module, loss_fn: Any, metrics: Any, inputs: Any, targets: Any
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ProgramError(f"A {type(module).__name__} is not a torch.nn.Module.")
        self.module = module
        if isinstance(loss_fn, nn.Module):
            self.loss_module = loss_fn
        self._functions = (loss_fn, metrics)
        self._model_call = _CallShape.of(inputs)
        self._loss_call = _CallShape.of(targets)
        named = _bind("module", module.forward, self._model_call, inputs)
        if loss_fn is None and self._loss_call.count:
            raise ProgramError("targets need a loss_fn that takes them.")
        if loss_fn is not None:
            named += self._bind_targets(loss_fn, targets, {name for name, _ in named})
        self.example = dict(named)
        self.training = module.training

    def _bind_targets(self, loss_fn: Any, targets: Any, taken: set[str]) -> list[tuple[str, Any]]:
        target = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
        shape = self._loss_call
        _, *named = _bind("loss_fn", target, shape, targets, first=(None,))
        return [(name if name not in taken else f"target_{name}", value) for name, value in named]

    def forward(self, **named: Any) -> dict[str, Any]:
        values = list(named.values())
        args, kwargs = self._model_call.restore(values[: self._model_call.count])
        target_args, target_kwargs = self._loss_call.restore(values[self._model_call.count :])
        output = self.module(*args, **kwargs)
        loss_fn, metrics = self._functions
        loss = (
            _own_loss(output) if loss_fn is None else loss_fn(output, *target_args, **target_kwargs)
        )
        results = {"loss": _check_loss(loss)}
        if metrics is not None:
            with torch.no_grad():
                found = metrics(output, *target_args, **target_kwargs)
            results |= {name: torch.as_tensor(value) for name, value in found.items()}
        return results


@dataclass(frozen=True, slots=True)
class _CallShape:
    """How many positional arguments a call has, and the names of the others."""

    positional: int
    keywords: tuple[str, ...]

    @classmethod
    def of(cls, given: Any) -> _CallShape:
        args, kwargs = _call_parts(given)
        return cls(len(args), tuple(kwargs))

    @property
    def count(self) -> int:
        return self.positional + len(self.keywords)

    def restore(self, values: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        rest = values[self.positional :]
        return values[: self.positional], dict(zip(self.keywords, rest, strict=True))


def _call_parts(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    return (given,), {}


def _bind(
    what: str, target: Any, shape: _CallShape, given: Any, first: tuple[Any, ...] = ()
) -> list[tuple[str, Any]]:
    args, kwargs = _call_parts(given)
    try:
        return bind_call(target, (*first, *args), kwargs)
    except TypeError as exc:
        raise ProgramError(f"The example inputs do not fit {what}: {exc}.") from exc


def _own_loss(output: Any) -> Any:
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return getattr(output, "loss", output)


def _check_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ProgramError(f"The loss is {what}; it must be one floating-point number.")
    return loss.reshape(())


# ---------------------------------------------------------------- what the step works on


@dataclass(slots=True)
class _Parameter:
    """A parameter that is trained: its places among the graph's inputs, and its optimizer group."""

    name: str
    tensor: Tensor
    places: list[int]
    group: int


@dataclass(slots=True)
class _Parts:
    """The inputs of the exported graph by what they are to training."""

    parameters: list[_Parameter]
    # Place of each input that the model changes, and of its new value among the graph's outputs.
    buffers: dict[int, int]

    @classmethod
    def of(cls, exported: ExportedProgram, module: nn.Module, described: Described) -> _Parts:
        signature = exported.graph_signature
        groups = _groups_of(module, described)
        parameters: dict[int, _Parameter] = {}
        for place, spec in enumerate(signature.input_specs):
            tensor = exported.state_dict.get(spec.target or "")
            if spec.kind is not InputKind.PARAMETER or not isinstance(tensor, Tensor):
                continue
            group = groups.get(id(tensor))
            if group is None or not tensor.requires_grad:
                continue
            name = _clean((spec.target or "").removeprefix(_INSIDE))
            found = parameters.setdefault(id(tensor), _Parameter(name, tensor, [], group))
            found.places.append(place)
        if not parameters:
            raise ProgramError("Nothing is trained: no parameter has requires_grad in this step.")
        return cls(list(parameters.values()), _buffers_of(exported))


def _groups_of(module: nn.Module, described: Described) -> dict[int, int]:
    groups: dict[int, int] = {}
    for at, group in enumerate(described.groups):
        members = module.parameters() if group.params is None else group.params
        groups |= {id(one): at for one in members}
    return groups


def _buffers_of(exported: ExportedProgram) -> dict[int, int]:
    signature = exported.graph_signature
    places = {spec.target: at for at, spec in enumerate(signature.input_specs) if spec.target}
    changed = {target: at for at, target in enumerate(signature.buffers_to_mutate.values())}
    return {places[target]: at for target, at in changed.items()}


# ---------------------------------------------------------------- the update


class _Update:
    """New parameters and optimizer state from gradients; the state's tensors in carry order."""

    def __init__(
        self, parts: _Parts, described: Described, schedule: Schedule, clip_norm: float | None
    ) -> None:
        self._parts = parts
        self._rules = [group.rule for group in described.groups]
        self._schedule = schedule
        self._clip_norm = clip_norm
        self.first_step = described.steps
        self._gathered = described.state

    def _rule(self, parameter: _Parameter) -> Optimizer:
        return self._rules[parameter.group]

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state before the first step, by its name in the carry."""
        tensors = {STEP_NAME: torch.tensor(self.first_step)}
        for one in self._parts.parameters:
            gathered = self._gathered.get(id(one.tensor), {})
            for slot in self._rule(one).slots():
                before = gathered.get(slot)
                fresh = torch.zeros_like(one.tensor, requires_grad=False)
                name = f"{OPTIMIZER}{slot}/{one.name}"
                tensors[name] = fresh if before is None else before.clone()
        return tensors

    def apply(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(new parameters, new state)."""
        if self._clip_norm is not None:
            gradients = _clip(gradients, self._clip_norm)
        step, *rest = state
        before = step.to(torch.float64)
        factor = self._schedule.factor(before)
        values = iter(rest)
        new_parameters, new_state = [], [step + 1]
        for one, value, gradient in zip(self._parts.parameters, parameters, gradients, strict=True):
            rule = self._rule(one)
            held = {slot: next(values) for slot in rule.slots()}
            rate = rule.lr if factor is None else factor * rule.lr
            updated, kept = rule.update(value, gradient, held, before + 1, rate)
            new_parameters.append(updated)
            new_state += [kept[slot] for slot in rule.slots()]
        return new_parameters, new_state


def _clip(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """As torch.nn.utils.clip_grad_norm_."""
    norms = torch.stack([torch.linalg.vector_norm(one.float()) for one in gradients])
    scale = (limit / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0)
    return [one * scale.to(one.dtype) for one in gradients]


# ---------------------------------------------------------------- tracing


class _Differentiable(torch.fx.Interpreter):
    """Runs a lowered graph as the model would run, gradient modes and autocast included."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            enabled, body, *rest = args
            with torch.set_grad_enabled(enabled):
                return _Differentiable(body).run(*rest)
        if target is torch.ops.higher_order.wrap_with_autocast:
            device, dtype, enabled, cache, body, *rest = args
            with torch.autocast(device, dtype, enabled, cache):
                return _Differentiable(body).run(*rest)
        if target in RECURRENT:
            return one_layer_rule(RECURRENT[target])(*args, **kwargs)
        if str(target) in GROUPED_MM:
            return grouped_product(*args, **kwargs)
        if target is torch.ops.aten.view.default:
            # The math backend lays attention out differently than the kernel that was traced.
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


def _trace_step(exported: ExportedProgram, parts: _Parts, update: _Update) -> torch.fx.GraphModule:
    """A graph of (inputs of the exported graph, optimizer state) ->
    (new parameters, new buffers, new state, loss and metrics)."""
    examples = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(examples)
    assert mode is not None
    state = [mode.from_tensor(tensor, static_shapes=True) for tensor in update.state().values()]
    changed = len(exported.graph_signature.buffers_to_mutate)

    def step(*given: Any) -> list[Any]:
        values = list(given[: len(examples)])
        with torch.enable_grad():
            leaves = [values[one.places[0]].detach().requires_grad_() for one in parts.parameters]
            for one, leaf in zip(parts.parameters, leaves, strict=True):
                for place in one.places:
                    values[place] = leaf
            results = _Differentiable(exported.graph_module).run(*values)
            gradients = _gradients(results[changed], leaves)
        new_parameters, new_state = update.apply(
            [leaf.detach() for leaf in leaves], gradients, given[len(examples) :]
        )
        return [*new_parameters, *(one.detach() for one in results[:changed]), *new_state,
                *(_detached(one) for one in results[changed:])]  # fmt: skip

    rules: dict[Any, Callable[..., Any]] = dict(BACKWARD_RULES)
    for _ in range(_MAX_ROUNDS):
        traced = _traced(step, [*examples, *state], mode, rules)
        found = {op: rule for op in _unknown(traced) if (rule := _decomposition(op))}
        if not found.keys() - rules.keys():
            break
        rules |= found
    return traced


def _traced(step: Any, examples: Sequence[Any], mode: Any, rules: Any) -> torch.fx.GraphModule:
    # The math backend: the others are made for one kind of device.
    try:
        with (
            quiet(),
            mode,
            enable_python_dispatcher(),
            sdpa_kernel(SDPBackend.MATH),
            torch.fx.traceback.preserve_node_meta(),
        ):
            traced: torch.fx.GraphModule = make_fx(step, decomposition_table=rules)(*examples)
    except ProgramError:
        raise
    except Exception as exc:
        raise tracing_failed(exc) from exc
    if _writes(traced):
        # Some backward formulas write to values of their own.
        functional = torch.func.functionalize(traced, remove="mutations")
        with quiet(), mode, enable_python_dispatcher():
            traced = make_fx(functional, decomposition_table=rules)(*examples)
    traced.graph.eliminate_dead_code()
    return traced


def _writes(traced: torch.fx.GraphModule) -> bool:
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in traced.graph.nodes
    )


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        raise ProgramError("The loss does not depend on any parameter that is trained.")
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if one is None else one
        for leaf, one in zip(leaves, found, strict=True)
    ]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _unknown(traced: torch.fx.GraphModule) -> set[Any]:
    return {
        node.target
        for node in traced.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target not in HANDLED
        and str(node.target) not in TABLE
    }


# ---------------------------------------------------------------- assembling


class _TrainingAssembly(_Assembly):
    """Puts a traced training step together as a Program."""

    def __init__(
        self, exported: ExportedProgram, names: _Names, parts: _Parts, traced: torch.fx.GraphModule
    ) -> None:
        super().__init__(exported, names)
        self._parts = parts
        self._traced = traced

    def training_program(self, update: _Update, seed: int) -> Program:
        given, carried = self._training_inputs(update)
        values = self._emitter.walk(self._traced, given)
        new_carry, results = values[: len(carried)], values[len(carried) :]
        ys = self._results(results)
        carry = {name: tensor for name, (_, tensor) in carried.items()}
        carry_refs = [ref for ref, _ in carried.values()]
        if self._emitter.draws.state is not None:
            new_carry = [*new_carry, *self._random_state(seed)]
            ref, carry[STATE_NAME] = self._carry[STATE_NAME]
            carry_refs.append(ref)
        outputs = [*new_carry, *(ref for ref, _ in ys)]
        is_read = self._emitter.is_read(outputs)
        constants = {name: one for name, one in self._constants.items() if is_read(one[0])}
        order = [
            [ref for ref, _ in constants.values()],
            carry_refs,
            [ref for ref, _ in self._xs],
        ]
        graph, version = self._emitter.finish(order, outputs)
        tensors = {name: tensor for name, (_, tensor) in constants.items()}
        spec = ProgramSpec(
            min_table_version=version,
            step=graph,
            constants=_specs(tensors),
            carry=_specs(carry),
            xs=tuple(one for _, one in self._xs),
            ys=tuple(one for _, one in ys),
            symbols=tuple(self._ranges()),
        )
        return Program.from_parts(spec, tensors, carry)

    def _training_inputs(self, update: _Update) -> tuple[list[Any], dict[str, tuple[Ref, Tensor]]]:
        """(one value for each input of the traced graph, the carry by name in its order)."""
        carried: dict[str, tuple[Ref, Tensor]] = {}
        refs: dict[int, Ref] = {}
        for one in self._parts.parameters:
            ref = self._emitter.add_input()
            carried[f"{MODEL}{one.name}"] = (ref, one.tensor.detach().clone())
            refs |= dict.fromkeys(one.places, ref)
        given = self._other_inputs(refs)
        for place in self._parts.buffers:
            target = self._exported.graph_signature.input_specs[place].target or ""
            name = f"{MODEL}{_clean(target.removeprefix(_INSIDE))}"
            carried[name] = (given[place], self._exported.state_dict[target].detach().clone())
        for name, tensor in update.state().items():
            ref = self._emitter.add_input()
            carried[name] = (ref, tensor)
            given.append(ref)
        return given, carried

    def _other_inputs(self, refs: Mapping[int, Ref]) -> list[Any]:
        """The graph's inputs in order: parameters as in `refs`, the rest as export does it."""
        placeholders = [one for one in self._exported.graph.nodes if one.op == "placeholder"]
        specs = self._exported.graph_signature.input_specs
        paths = iter(self._names.inputs)
        given: list[Any] = []
        for place, (node, spec) in enumerate(zip(placeholders, specs, strict=True)):
            path = next(paths) if spec.kind is InputKind.USER_INPUT else None
            given.append(refs[place] if place in refs else self._input(node, spec, path))
        self._carry.clear()
        return given

    def _results(self, results: Sequence[Any]) -> list[tuple[Ref, TensorSpec]]:
        nodes = self._traced.graph.output_node().args[0]
        assert isinstance(nodes, (tuple, list))
        ys: list[tuple[Ref, TensorSpec]] = []
        own = nodes[len(nodes) - len(results) :]
        for name, value, node in zip(self._names.outputs, results, own, strict=True):
            ys += self._output(_clean(name), value, node)
        return ys


def _specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(spec_of(name, tensor) for name, tensor in tensors.items())
