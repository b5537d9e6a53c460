"""One training step as a program, held against eager torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.local import make_machine
from nextgpu_node.graph.training import train_step

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Trained:
    """Losses and final state of both sides; `carry` is the program's."""

    program: Program
    losses: list[float]
    eager_losses: list[float]
    carry: dict[str, Tensor]
    eager: nn.Module

    def loss_difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.losses, self.eager_losses, strict=True))

    def state_difference(self) -> float:
        """The largest difference in any parameter or buffer that is carried."""
        state = {**dict(self.eager.named_parameters()), **dict(self.eager.named_buffers())}
        return max(
            float((self.carry[f"model/{name}"].double() - value.detach().double()).abs().max())
            for name, value in state.items()
            if f"model/{name}" in self.carry
        )


def train_both(
    module: nn.Module,
    loss_fn: Callable[..., Any] | None,
    batches: Sequence[Batch],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    described: Any = None,
    steps: int = 4,
    **options: Any,
) -> Trained:
    """Train a copy of `module` in eager torch and the module as a program, on the same batches."""
    eager = copy.deepcopy(module)
    inputs, targets = batches[0]
    given = described if described is not None else optimizer(module.parameters())
    program = train_step(module, loss_fn, inputs, targets, optimizer=given, **options)
    machine = make_machine(program)
    eager_optimizer = optimizer(eager.parameters())
    losses, eager_losses = [], []
    for at in range(steps):
        inputs, targets = batches[at % len(batches)]
        xs = dict(zip((x.name for x in program.spec.xs), flat(inputs) + flat(targets), strict=True))
        losses.append(float(machine.step(xs).ys["loss"]))
        eager_losses.append(eager_step(eager, loss_fn, inputs, targets, eager_optimizer, options))
    return Trained(program, losses, eager_losses, machine.carry(), eager)


def eager_step(
    module: nn.Module, loss_fn: Any, inputs: Any, targets: Any, optimizer: Any, options: Any
) -> float:
    optimizer.zero_grad()
    output = module(**inputs) if isinstance(inputs, dict) else module(*flat(inputs))
    loss = output.loss if loss_fn is None else loss_fn(output, *flat(targets))
    loss.backward()
    if options.get("clip_norm"):
        nn.utils.clip_grad_norm_(module.parameters(), options["clip_norm"])
    optimizer.step()
    return float(loss.detach())


def flat(part: Any) -> list[Tensor]:
    if isinstance(part, dict):
        return list(part.values())
    return list(part) if isinstance(part, (tuple, list)) else [part]
