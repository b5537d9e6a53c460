"""The real worker, but wrong: every result is off by one part in a hundred, under a valid seal.

The daemon around it is the real one, so offer, transcript and receipt are all in order; only a
second run can tell.
"""

from __future__ import annotations

import torch

from nextgpu_node.graph.machine import Machine, StepOutcome
from nextgpu_node.worker.main import preload, reseed, serve

__all__ = ["preload", "reseed", "serve"]

_honest_step = Machine.step_and_release


def _lying_step(self: Machine, xs: dict[str, torch.Tensor]) -> StepOutcome:
    outcome = _honest_step(self, xs)
    ys = {name: y * 1.01 + 0.01 if y.is_floating_point() else y for name, y in outcome.ys.items()}
    return StepOutcome(ys, outcome.stop)


Machine.step_and_release = _lying_step  # type: ignore[method-assign]
