"""From logits to the next token, in torch operators that export.

temperature (divide), then top-k (the k largest stay), then top-p (the smallest set of largest
probabilities that reaches p stays; Holtzman et al. 2020), then one draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nextgpu_node.errors import ProgramError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.  temperature 0: always the likeliest one."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """ProgramError where a value is out of its range."""
        if not 0 <= self.temperature < math.inf:
            raise ProgramError("temperature must be 0 (greedy) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ProgramError("top_k must be 1 or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ProgramError("top_p must be above 0 and at most 1.")
        if not self.temperature and (self.top_k or self.top_p):
            raise ProgramError("top_k and top_p need a temperature above 0.")

    def choose(self, logits: Tensor) -> Tensor:
        """The next token, int64 [1], of logits [1, vocabulary]."""
        if not self.temperature:
            return logits.argmax(-1)
        weights = self.probabilities(logits).double()
        cdf = weights.cumsum(-1)
        # Inverse transform: a token of no probability has no width, so it is never chosen.
        at = torch.rand(1, 1, dtype=torch.float64, device=logits.device) * cdf[:, -1:]
        return (cdf <= at).sum(-1).clamp(max=logits.shape[-1] - 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the next token is drawn from: float32 [1, vocabulary], summing to 1."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            kept = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values
            logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
        if self.top_p is not None:
            logits = logits.masked_fill(self._outside(logits, self.top_p), -math.inf)
        return logits.softmax(-1)

    @staticmethod
    def _outside(logits: Tensor, top_p: float) -> Tensor:
        """bool: tokens beyond the smallest set of the likeliest that reaches `top_p`."""
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        # Nothing comes before the likeliest token: it always stays.
        first = torch.zeros_like(before[:, :1])
        before = torch.cat((first, before[:, 1:]), -1)
        return (before >= top_p).scatter(-1, order, before >= top_p)
