"""Kernels that trust the shapes of their arguments, with the check that they lack.

    operator -> (what is called, what stands in for it on shapes)

torch calls the backward passes below only after their forward passes, so some of them do not look
whether gradient, input and statistics belong together.  A program may call them with anything:
here the run on shapes, which comes before every first call, compares each with what the forward
pass would give for these arguments.  Shapes and dtypes are fixed from there on, so calls pay
nothing.  Kernels that trust *values* (positions in a tensor) are not here: see backward.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_aten = torch.ops.aten


def _match(what: str, given: Tensor, wanted: Tensor) -> None:
    if given.shape != wanted.shape or given.dtype is not wanted.dtype:
        raise ValueError(
            f"{what} is {given.dtype} {list(given.shape)}, "
            f"{wanted.dtype} {list(wanted.shape)} belongs here"
        )


def _one_dtype(*tensors: Tensor) -> None:
    """The forward passes' shape functions let mixed dtypes pass; kernels read them as one."""
    if len({one.dtype for one in tensors}) > 1:
        raise ValueError("the tensors must be of one dtype")


def _convolution_backward_shape(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002  torch's name
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    _one_dtype(grad_output, input, weight)
    window = (stride, padding, dilation, transposed, output_padding, groups)
    result = _aten.convolution.default(input, weight, None, *window)
    _match("grad_output", grad_output, result)
    if len(output_mask) != 3:
        raise ValueError("output_mask has not three items")
    channels = result.shape[-weight.dim() + 1]
    # torch says [0] for a convolution without bias, whose gradient nobody asks for.
    if list(bias_sizes or [0]) != [channels] and (output_mask[2] or list(bias_sizes or [0]) != [0]):
        raise ValueError("bias_sizes is not the number of channels")
    made = (torch.empty_like(input), torch.empty_like(weight), input.new_empty([channels]))
    return tuple(one if wanted else None for one, wanted in zip(made, output_mask, strict=True))


def _layer_norm_backward(
    grad_out: Tensor,
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    *rest: Any,
) -> Any:
    # The kernel reads these row by row without looking at their strides.
    return _aten.native_layer_norm_backward.default(
        grad_out.contiguous(), input, normalized_shape, mean.contiguous(), rstd.contiguous(), *rest
    )


def _layer_norm_backward_shape(
    grad_out: Tensor,
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> Any:
    for scale in (weight, bias):
        if scale is not None and list(scale.shape) != list(normalized_shape):
            raise ValueError("weight and bias have the normalized shape")
    _one_dtype(input, *(one for one in (weight, bias) if one is not None))
    result, wanted_mean, wanted_rstd = _aten.native_layer_norm.default(
        input, normalized_shape, weight, bias, 1e-5
    )
    _match("grad_out", grad_out, result)
    _match("mean", mean, wanted_mean)
    _match("rstd", rstd, wanted_rstd)
    if len(output_mask) != 3:
        raise ValueError("output_mask has not three items")
    made = (torch.empty_like(input), weight, bias)
    return tuple(
        torch.empty_like(one) if wanted and one is not None else None
        for one, wanted in zip(made, output_mask, strict=True)
    )


def _pooled(forward: OpOverload, backward: OpOverload) -> Callable[..., Any]:
    """For backward(grad_output, self, window …) of forward(self, window …)."""

    def shape_of(grad_output: Tensor, self: Tensor, *window: Any, **rest: Any) -> Any:
        _match("grad_output", grad_output, forward(self, *window, **rest))
        return backward(grad_output, self, *window, **rest)

    return shape_of


def _adaptively_pooled(dims: int) -> Callable[..., Any]:
    def shape_of(grad_output: Tensor, self: Tensor) -> Tensor:
        if (
            self.dim() not in (dims + 1, dims + 2)
            or grad_output.dtype is not self.dtype
            or grad_output.shape[:-dims] != self.shape[:-dims]
            or not all(grad_output.shape)
            or not all(self.shape)
        ):
            raise ValueError("grad_output does not belong to this input")
        return torch.empty_like(self)

    return shape_of


def _resized(forward: OpOverload, backward: OpOverload) -> Callable[..., Any]:
    """For backward(grad, output_size, input_size, …) of forward(input, output_size, …)."""

    def shape_of(
        grad_output: Tensor,
        output_size: Sequence[int],
        input_size: Sequence[int],
        *rest: Any,
        **scales: Any,
    ) -> Any:
        source = torch.empty(input_size, dtype=grad_output.dtype, device="meta")
        _match("grad_output", grad_output, forward(source, output_size, *rest, **scales))
        return backward(grad_output, output_size, input_size, *rest, **scales)

    return shape_of


def _sampled(forward: OpOverload, backward: OpOverload) -> Callable[..., Any]:
    def shape_of(
        grad_output: Tensor,
        input: Tensor,  # noqa: A002
        grid: Tensor,
        interpolation_mode: int,
        padding_mode: int,
        align_corners: bool,
        output_mask: Sequence[bool],
    ) -> Any:
        _one_dtype(grad_output, input, grid)
        if grid.dim() != input.dim() or grid.shape[-1] != input.dim() - 2:
            raise ValueError("grid does not hold positions in this input")
        modes = (interpolation_mode, padding_mode, align_corners)
        _match("grad_output", grad_output, forward(input, grid, *modes))
        if len(output_mask) != 2:
            raise ValueError("output_mask has not two items")
        return torch.empty_like(input), torch.empty_like(grid)

    return shape_of


_POOLS = (
    (_aten.avg_pool2d.default, _aten.avg_pool2d_backward.default),
    (_aten.avg_pool3d.default, _aten.avg_pool3d_backward.default),
)
_RESIZES = (
    (_aten.upsample_nearest1d.default, _aten.upsample_nearest1d_backward.default),
    (_aten.upsample_nearest2d.default, _aten.upsample_nearest2d_backward.default),
    (_aten.upsample_nearest3d.default, _aten.upsample_nearest3d_backward.default),
    (_aten.upsample_linear1d.default, _aten.upsample_linear1d_backward.default),
    (_aten.upsample_bilinear2d.default, _aten.upsample_bilinear2d_backward.default),
    (_aten.upsample_bicubic2d.default, _aten.upsample_bicubic2d_backward.default),
    (_aten.upsample_trilinear3d.default, _aten.upsample_trilinear3d_backward.default),
)
_SAMPLES = (
    (_aten.grid_sampler_2d.default, _aten.grid_sampler_2d_backward.default),
    (_aten.grid_sampler_3d.default, _aten.grid_sampler_3d_backward.default),
)

CHECKED_KERNELS: dict[OpOverload, tuple[Callable[..., Any], Callable[..., Any]]] = {
    _aten.convolution_backward.default: (
        _aten.convolution_backward.default,
        _convolution_backward_shape,
    ),
    _aten.native_layer_norm_backward.default: (_layer_norm_backward, _layer_norm_backward_shape),
    _aten._adaptive_avg_pool2d_backward.default: (
        _aten._adaptive_avg_pool2d_backward.default,
        _adaptively_pooled(2),
    ),
    _aten._adaptive_avg_pool3d_backward.default: (
        _aten._adaptive_avg_pool3d_backward.default,
        _adaptively_pooled(3),
    ),
    **{backward: (backward, _pooled(forward, backward)) for forward, backward in _POOLS},
    **{backward: (backward, _resized(forward, backward)) for forward, backward in _RESIZES},
    **{backward: (backward, _sampled(forward, backward)) for forward, backward in _SAMPLES},
}
