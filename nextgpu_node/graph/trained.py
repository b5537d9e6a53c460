"""The state of a trained program, back in the submitter's own module and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.export import _clean as clean_name
from nextgpu_node.graph.training import MODEL, OPTIMIZER, STEP_NAME


def load_carry_into(
    module: nn.Module, carry: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Copy parameters and buffers of a train_step program's carry into `module`; gives it back.

    With `optimizer`, a torch.optim.SGD, Adam or AdamW over the module's parameters, its state too:
    training can go on here.  What the program did not train is left as it is.

    ProgramError, before anything is changed, where the carry is of another model.
    """
    held = _by_name({**dict(module.named_parameters()), **dict(module.named_buffers())})
    given = {
        name.removeprefix(MODEL): tensor for name, tensor in carry.items() if name.startswith(MODEL)
    }
    if not given:
        raise ProgramError("This carry holds no model: it is not of a train_step program.")
    for name, tensor in given.items():
        target = held.get(name)
        if target is None or target.shape != tensor.shape:
            raise ProgramError(f"The carry is of another model: {name} does not fit this one.")
    with torch.no_grad():
        for name, tensor in given.items():
            held[name].copy_(tensor)
        if optimizer is not None:
            _load_optimizer(_by_name(dict(module.named_parameters())), carry, optimizer)
    return module


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names in a carry."""
    return {clean_name(name): tensor for name, tensor in tensors.items()}


def _load_optimizer(
    parameters: Mapping[str, Tensor], carry: Mapping[str, Tensor], optimizer: Any
) -> None:
    steps = float(carry[STEP_NAME])
    for name, tensor in carry.items():
        slot, slash, parameter = name.removeprefix(OPTIMIZER).partition("/")
        if not name.startswith(OPTIMIZER) or not slash:
            continue
        state = optimizer.state[parameters[parameter]]
        state[slot] = tensor.detach().to(parameters[parameter].device, copy=True)
        if slot != "momentum_buffer":
            state["step"] = torch.tensor(steps)
