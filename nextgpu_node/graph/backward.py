"""Backward passes that torch writes as kernels which trust their arguments, in safe operators.

A kernel that scatters to positions given in a tensor, without looking at them, is replaced by
`scatter_add` or `index_put`, which check every position.  Kernels that only trust shapes are rows
of the table instead, with a check on shapes (checked_kernels).  Submitter only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _pool_backward(grad: Tensor, like: Tensor, indices: Tensor, dims: int) -> Tensor:
    """Each gradient back to where its maximum came from: `indices` count in the last `dims`."""
    lead, size = like.shape[: like.dim() - dims], like.shape[like.dim() - dims :]
    flat = grad.new_zeros([*lead, math.prod(size)])
    at = indices.reshape([*lead, -1])
    return flat.scatter_add(-1, at, grad.reshape(at.shape)).reshape(like.shape)


def _max_pool2d_backward(grad_output: Tensor, self: Tensor, *rest: Any) -> Tensor:
    return _pool_backward(grad_output, self, rest[-1], 2)


def _max_pool3d_backward(grad_output: Tensor, self: Tensor, *rest: Any) -> Tensor:
    return _pool_backward(grad_output, self, rest[-1], 3)


def _index_put(
    self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    return _aten.index_put.default(self, indices, values, accumulate)  # type: ignore[no-any-return]


def _as_view(self: Tensor, size: Sequence[int], stride: Sequence[int], offset: Any = None) -> Any:
    """as_strided where it only gives a row-major tensor another shape."""
    expected = torch.empty(size, device="meta").stride()
    if offset or not self.is_contiguous() or tuple(stride) != expected:
        return NotImplemented
    return _aten.view.default(self, size)


def grouped_product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:  # noqa: A002
    """A product for each expert of a mixture, which has a gradient that is safe.

    input [N, K], weight [G, K, M], offs [G]: where the rows of each group end.  Every expert sees
    every row, so it is G times the work of the kernel that it stands for.
    """
    row = torch.arange(input.shape[0], device=input.device)[:, None]
    begin = torch.zeros_like(offs[0])
    total = torch.zeros((), dtype=input.dtype, device=input.device)
    for group in range(weight.shape[0]):
        own = (row >= begin) & (row < offs[group])
        total = total + torch.where(own, input @ weight[group], 0)
        begin = offs[group]
    return total


BACKWARD_RULES: dict[Any, Callable[..., Any]] = {
    _aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
    _aten.max_pool3d_with_indices_backward.default: _max_pool3d_backward,
    _aten.adaptive_max_pool2d_backward.default: _max_pool2d_backward,
    _aten.adaptive_max_pool3d_backward.default: _max_pool3d_backward,
    _aten._unsafe_index_put.default: _index_put,
    _aten._reshape_alias.default: _as_view,
    _aten.as_strided.default: _as_view,
}
