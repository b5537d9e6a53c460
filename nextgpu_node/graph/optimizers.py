"""Optimizers as data: what they are, what they carry, and their update in torch operators.

Each update is the one of torch.optim without its writes in place, so that a traced step computes
what `optimizer.step()` does.  SGD: Sutskever et al. 2013; Adam: Kingma & Ba 2015; AdamW:
Loshchilov & Hutter 2019; AMSGrad: Reddi et al. 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nextgpu_node.errors import ProgramError


@dataclass(frozen=True, slots=True)
class Constant:
    """The learning rate stays as it is."""

    def factor(self, step: Tensor) -> Tensor | None:
        """What multiplies the learning rate in step `step` (float64, from 0); None for 1."""
        return None


@dataclass(frozen=True, slots=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine down to `final` times the learning rate.

    In step k, from 0, the factor is (k+1) / (warmup_steps+1) while k < warmup_steps; then
    final + (1-final) · (1 + cos(π · t)) / 2, t running from 0 to 1 until step `total_steps`.
    """

    warmup_steps: int
    total_steps: int
    final: float = 0.0

    def factor(self, step: Tensor) -> Tensor | None:
        length = max(self.total_steps - self.warmup_steps, 1)
        progress = ((step - self.warmup_steps) / length).clamp(0, 1)
        cosine = self.final + (1 - self.final) * (1 + (progress * math.pi).cos()) / 2
        warmup = (step + 1) / (self.warmup_steps + 1)
        return torch.where(step < self.warmup_steps, warmup, cosine)


@dataclass(frozen=True, slots=True)
class WarmupLinear:
    """Linear warm-up as in WarmupCosine, then a straight line down to `final` at `total_steps`."""

    warmup_steps: int
    total_steps: int
    final: float = 0.0

    def factor(self, step: Tensor) -> Tensor | None:
        length = max(self.total_steps - self.warmup_steps, 1)
        progress = ((step - self.warmup_steps) / length).clamp(0, 1)
        warmup = (step + 1) / (self.warmup_steps + 1)
        return torch.where(step < self.warmup_steps, warmup, 1 - (1 - self.final) * progress)


Schedule: TypeAlias = Constant | WarmupCosine | WarmupLinear


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent, as torch.optim.SGD."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def slots(self) -> tuple[str, ...]:
        """The tensors that each parameter has in the carry, shaped like it."""
        return ("momentum_buffer",) if self.momentum else ()

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: Tensor, lr: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and its state after step number `step` (float64, from 1)."""
        if self.maximize:
            grad = -grad
        if self.weight_decay:
            grad = grad.add(param, alpha=self.weight_decay)
        if not self.momentum:
            return _descend(param, grad, lr), {}
        buffer = state["momentum_buffer"] * self.momentum
        if self.dampening:
            # torch starts the buffer with the whole first gradient.
            weight = torch.where(step == 1, 1.0, 1 - self.dampening).to(grad.dtype)
            buffer = buffer + grad * weight
        else:
            buffer = buffer + grad
        direction = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return _descend(param, direction, lr), {"momentum_buffer": buffer}


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam, as torch.optim.Adam: `weight_decay` is added to the gradient."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def slots(self) -> tuple[str, ...]:
        """The tensors that each parameter has in the carry, shaped like it."""
        return _adam_slots(self.amsgrad)

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: Tensor, lr: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and its state after step number `step` (float64, from 1)."""
        if self.maximize:
            grad = -grad
        if self.weight_decay:
            grad = grad.add(param, alpha=self.weight_decay)
        return _adam(self, param, grad, state, step, lr)


@dataclass(frozen=True, slots=True)
class AdamW:
    """AdamW, as torch.optim.AdamW: parameters decay by lr · weight_decay in each step."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False

    def slots(self) -> tuple[str, ...]:
        """The tensors that each parameter has in the carry, shaped like it."""
        return _adam_slots(self.amsgrad)

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: Tensor, lr: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and its state after step number `step` (float64, from 1)."""
        if self.maximize:
            grad = -grad
        if self.weight_decay:
            decay = 1 - lr * self.weight_decay
            param = param * (decay.to(param.dtype) if isinstance(decay, Tensor) else decay)
        return _adam(self, param, grad, state, step, lr)


Optimizer: TypeAlias = SGD | Adam | AdamW


def _adam_slots(amsgrad: bool) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))


def _adam(
    rule: Adam | AdamW,
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: Tensor,
    lr: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    first, second = rule.betas
    new = {
        "exp_avg": torch.lerp(state["exp_avg"], grad, 1 - first),
        "exp_avg_sq": (state["exp_avg_sq"] * second).addcmul(grad, grad, value=1 - second),
    }
    norm = new["exp_avg_sq"]
    if rule.amsgrad:
        norm = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], norm)
    # Corrections in float64, as torch computes them from a Python number.
    size = (lr / (1 - first**step)).to(param.dtype)
    root = (1 - second**step).sqrt().to(param.dtype)
    denominator = (norm.sqrt() / root).add(rule.eps)
    return param - (new["exp_avg"] * size) / denominator, new


def _descend(param: Tensor, direction: Tensor, lr: Any) -> Tensor:
    if isinstance(lr, Tensor):
        return param - direction * lr.to(param.dtype)
    return param.add(direction, alpha=-lr)


# ---------------------------------------------------------------- from torch.optim


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share an optimizer's settings.  `params`: None for all that are left."""

    rule: Optimizer
    params: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class Described:
    """An optimizer read from what the submitter gave.

    `state`: for each parameter (by id) what it had gathered already; `steps`: how many steps that
    took.
    """

    groups: tuple[Group, ...]
    state: Mapping[int, Mapping[str, Tensor]]
    steps: int


_RULES: dict[type, type[SGD] | type[Adam] | type[AdamW]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}


def describe_optimizer(optimizer: Any) -> Described:
    """The description of an SGD, Adam or AdamW: ours, or torch.optim's with its groups and state.

    ProgramError for anything else.
    """
    if isinstance(optimizer, (SGD, Adam, AdamW)):
        _check_rule(optimizer)
        return Described((Group(optimizer),), {}, 0)
    kind = _RULES.get(type(optimizer))
    if kind is None:
        name = type(optimizer).__name__
        raise ProgramError(
            f"The optimizer is a {name}; give SGD, Adam or AdamW, "
            "of nextgpu_node.sdk or of torch.optim."
        )
    groups = tuple(
        Group(_rule_of(kind, group), tuple(group["params"])) for group in optimizer.param_groups
    )
    steps = {int(one["step"]) for one in optimizer.state.values() if "step" in one}
    if len(steps) > 1:
        raise ProgramError("The optimizer's parameters have done different numbers of steps.")
    return Described(
        groups,
        {id(param): _tensors_of(state) for param, state in optimizer.state.items()},
        # SGD keeps no count; its first buffer only matters before it exists.
        next(iter(steps), 1 if optimizer.state else 0),
    )


def _rule_of(kind: Any, group: Mapping[str, Any]) -> Optimizer:
    given = {one.name: group[one.name] for one in fields(kind) if one.name in group}
    given = {name: _plain(value) for name, value in given.items()}
    if kind is Adam and group.get("decoupled_weight_decay"):
        kind = AdamW
    rule: Optimizer = kind(**given)
    _check_rule(rule)
    return rule


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value.detach()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    }


def _check_rule(rule: Optimizer) -> None:
    if rule.lr < 0 or rule.weight_decay < 0:
        raise ProgramError("The optimizer's lr and weight_decay must not be negative.")
    if isinstance(rule, SGD):
        if rule.nesterov and (rule.momentum <= 0 or rule.dampening):
            raise ProgramError("Nesterov momentum needs a momentum and no dampening.")
    elif not all(0 <= beta < 1 for beta in rule.betas) or rule.eps < 0:
        raise ProgramError("The optimizer's betas must be within 0 … 1, eps not negative.")
