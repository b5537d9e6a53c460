"""Runs a program step by step.  Spec: 60-program.md#semantics

    carry, y_k = step(constants, carry, x_k)

Everything that can be refused is refused before the first allocation: operators and arguments
when the machine is made, shapes and memory when the first step of each shape arrives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nextgpu_node.graph.link import LinkedGraph, link_graph_untrusted
from nextgpu_node.graph.optable import TABLE_VERSION
from nextgpu_node.graph.plan import Plan, failure, make_plan_untrusted, shape_only
from nextgpu_node.graph.tensors import DTYPE_NAMES, TORCH_DTYPES, SymbolBinding
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.program import Graph, ProgramSpec, TensorSpec

# Plans kept at a time: one for each combination of sizes that was used last.
_MAX_PLANS = 64


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step gave: its outputs by name, and whether the scan ends with it."""

    ys: dict[str, torch.Tensor]
    stop: bool


class Machine:
    """One program on one device.

    `max_live_bytes` bounds constants, carry, inputs, values and results together, before each
    allocation; workspace inside a kernel is the sandbox's to bound.  `max_steps`: None, no bound.
    Every method raises RemoteProtocolError, naming the node: OLD_TABLE, UNKNOWN_OPERATOR,
    BAD_PROGRAM, BAD_TENSORS, OVER_LIMIT, STEP_FAILED or OUT_OF_MEMORY.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        *,
        device: str,
        max_live_bytes: int,
        max_steps: int | None = None,
    ) -> None:
        if spec.min_table_version > TABLE_VERSION:
            detail = f"needs operator table {spec.min_table_version}, this is {TABLE_VERSION}"
            raise RemoteProtocolError(ErrorCode.OLD_TABLE, detail)
        self.spec = spec
        self._device = torch.device(device)
        self._max_live_bytes = max_live_bytes
        self._max_steps = max_steps
        self._steps = 0
        self._constants: list[torch.Tensor] | None = None if spec.constants else []
        self._carry: list[torch.Tensor] | None = None if spec.carry else []
        # Sizes of symbols that the carry fixes for the whole scan.
        self._carry_sizes: dict[str, int] = {}
        self._plans: OrderedDict[tuple[int, ...], Plan] = OrderedDict()
        constants, carry = len(spec.constants), len(spec.carry)
        self._step = link_graph_untrusted("step", spec.step, constants + carry + len(spec.xs))
        self._init = _link_optional("init", spec.init, constants)
        self._finish = _link_optional("finish", spec.finish, constants + carry)

    @property
    def peak_bytes(self) -> int:
        """The most memory that any plan made so far needs, in bytes; 0 before the first."""
        return max((plan.peak_bytes for plan in self._plans.values()), default=0)

    def load_constants(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the constants.  They are never written to."""
        self._constants = self._accept(self.spec.constants, tensors, SymbolBinding())

    def load_carry(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the state before the next step.  It fixes the sizes of the carry's symbols."""
        binding = SymbolBinding()
        self._carry = self._accept(self.spec.carry, tensors, binding)
        self._check_ranges(binding.sizes)
        self._carry_sizes = binding.sizes

    def init_carry(self) -> None:
        """Make the state before the first step with the program's init graph."""
        if self._init is None:
            raise RemoteProtocolError(ErrorCode.BAD_PROGRAM, "graphs.init: the program has none")
        plan = self._plan_once(self._init, self._base()[: len(self.spec.constants)])
        _check_results("init", self.spec.carry, plan.results, {})
        outputs = self._run(plan, [*self._loaded_constants()])
        with _failing_as("graphs.init.outputs"):
            self._carry = [_own(tensor) for tensor in outputs]

    def step(self, xs: Mapping[str, torch.Tensor]) -> StepOutcome:
        """One step on `xs`, which holds exactly the program's inputs.

        The carry before it is let go as it is read: after a step that failed there is none.
        """
        return self.step_and_release({**xs})

    def step_and_release(self, xs: dict[str, torch.Tensor]) -> StepOutcome:
        """As `step`, but empties `xs`: inputs that nobody else holds go with their last reader."""
        if self._max_steps is not None and self._steps >= self._max_steps:
            raise RemoteProtocolError(ErrorCode.OVER_LIMIT, f"more than {self._max_steps} steps")
        binding = SymbolBinding(self._carry_sizes)
        tensors = self._accept(self.spec.xs, xs, binding)
        plan = self._plan(binding.sizes)
        inputs = [*self._loaded_constants(), *self._loaded_carry(), *tensors]
        # What is freed inside the run must not live on here.
        xs.clear()
        self._carry = None if self.spec.carry else []
        del tensors
        outputs = self._run(plan, inputs)
        self._steps += 1
        count = len(self.spec.carry)
        with _failing_as("graphs.step.outputs"):
            self._carry = [_own(tensor) for tensor in outputs[:count]]
            stop = self.spec.stop is not None and bool(outputs[count + self.spec.stop].item())
        names = (spec.name for spec in self.spec.ys)
        return StepOutcome(dict(zip(names, outputs[count:], strict=True)), stop)

    def carry(self) -> dict[str, torch.Tensor]:
        """The state after the last step, by name."""
        names = (spec.name for spec in self.spec.carry)
        return dict(zip(names, self._loaded_carry(), strict=True))

    def finish(self) -> dict[str, torch.Tensor]:
        """The outputs of the finish graph on the state after the last step; {} without one."""
        if self._finish is None:
            return {}
        inputs = [*self._loaded_constants(), *self._loaded_carry()]
        plan = self._plan_once(self._finish, self._base())
        _check_results("finish", self.spec.finish_ys, plan.results, self._carry_sizes)
        names = (spec.name for spec in self.spec.finish_ys)
        return dict(zip(names, self._run(plan, inputs), strict=True))

    # ------------------------------------------------------------ tensors from outside

    def _accept(
        self,
        specs: Sequence[TensorSpec],
        tensors: Mapping[str, torch.Tensor],
        binding: SymbolBinding,
    ) -> list[torch.Tensor]:
        if len(tensors) != len(specs):
            detail = f"{len(specs)} tensors are declared, {len(tensors)} came"
            raise RemoteProtocolError(ErrorCode.BAD_TENSORS, detail)
        accepted = []
        for spec in specs:
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise RemoteProtocolError(ErrorCode.BAD_TENSORS, f"{spec.name} is missing")
            if tensor.dtype is not TORCH_DTYPES[spec.dtype]:
                detail = f"{spec.name}: {spec.dtype} is declared, {tensor.dtype} came"
                raise RemoteProtocolError(ErrorCode.BAD_TENSORS, detail)
            binding.match_untrusted(spec, tensor.shape)
            with _failing_as(spec.name):
                accepted.append(tensor.detach().to(self._device).contiguous())
        return accepted

    def _check_ranges(self, sizes: Mapping[str, int]) -> None:
        for symbol in self.spec.symbols:
            size = sizes.get(symbol.name, symbol.minimum)
            if not symbol.minimum <= size <= symbol.maximum:
                detail = f"{symbol.name} is {size}, not {symbol.minimum} … {symbol.maximum}"
                raise RemoteProtocolError(ErrorCode.BAD_TENSORS, detail)

    def _loaded_constants(self) -> list[torch.Tensor]:
        if self._constants is None:
            raise LocalProtocolError("the constants were not loaded")
        return self._constants

    def _loaded_carry(self) -> list[torch.Tensor]:
        if self._carry is None:
            raise LocalProtocolError("the carry was not loaded")
        return self._carry

    # ------------------------------------------------------------ plans

    def _plan(self, sizes: dict[str, int]) -> Plan:
        key = tuple(sizes.values())
        plan = self._plans.get(key)
        if plan is not None:
            self._plans.move_to_end(key)
            return plan
        self._check_ranges(sizes)
        inputs = self._base() + [shape_only(spec, sizes) for spec in self.spec.xs]
        first = len(self.spec.constants)
        plan = self._plan_once(self._step, inputs, range(first, first + len(self.spec.carry)))
        _check_results("step", (*self.spec.carry, *self.spec.ys), plan.results, sizes)
        self._plans[key] = plan
        if len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)
        return plan

    def _base(self) -> list[torch.Tensor]:
        """Constants and carry without their memory."""
        specs = (*self.spec.constants, *self.spec.carry)
        return [shape_only(spec, self._carry_sizes) for spec in specs]

    def _plan_once(
        self, graph: LinkedGraph, inputs: Sequence[torch.Tensor], owned: range = range(0)
    ) -> Plan:
        return make_plan_untrusted(
            graph,
            inputs,
            device=self._device,
            max_live_bytes=self._max_live_bytes,
            owned=owned,
        )

    def _run(self, plan: Plan, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            outputs = plan.run(inputs)
            if self._device.type == "cuda":
                # Kernels fail when they run, not when they are called: no later than here.
                with _failing_as(f"graphs.{plan.graph.role}"):
                    torch.cuda.synchronize(self._device)
            return outputs


@contextmanager
def _failing_as(where: str) -> Iterator[None]:
    """Any error of torch inside ends as the unit's own, without what torch says of it."""
    try:
        yield
    except Exception as exc:
        raise failure(where, exc) from None


def _link_optional(role: str, graph: Graph | None, inputs: int) -> LinkedGraph | None:
    return None if graph is None else link_graph_untrusted(role, graph, inputs)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, row-major, and not keeping a larger buffer alive from step to step."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _check_results(
    role: str, specs: Sequence[TensorSpec], results: Sequence[torch.Tensor], sizes: dict[str, int]
) -> None:
    """The outputs of a plan are as declared, so every later run's are too."""
    binding = SymbolBinding(sizes)
    for spec, result in zip(specs, results, strict=True):
        where = f"graphs.{role}.outputs {spec.name}"
        if DTYPE_NAMES[result.dtype] != spec.dtype:
            detail = f"{where}: {spec.dtype} is declared, {DTYPE_NAMES[result.dtype]} would come"
            raise RemoteProtocolError(ErrorCode.BAD_PROGRAM, detail)
        try:
            binding.match_untrusted(spec, result.shape)
        except RemoteProtocolError as exc:
            detail = f"graphs.{role}.outputs {exc.detail}"
            raise RemoteProtocolError(ErrorCode.BAD_PROGRAM, detail) from exc
