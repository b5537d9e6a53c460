"""What `scripts/bench submit` has each system call.

In a module of its own, so that the workers of Dask and Ray import torch and nothing else, and get
names instead of pickled functions.
"""

from __future__ import annotations

import torch

BIG = 64 * 2**20


class NoOp(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0


class First(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1] + 0


class Grow(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(BIG)


def make_real() -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A call in a worker of Dask or Ray."""
    with torch.no_grad():
        result: torch.Tensor = module(x)
    return result
