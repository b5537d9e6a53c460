"""How operators that are not in the table are written with those that are.  Submitter only.

For operators that torch itself does not take apart, or whose kernels trust their arguments (an
embedding bag its offsets, a repetition its counts), so that the table can not have them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2


def _tensor(value: Any) -> Tensor:
    """`value`, which is a tensor though torch's annotations do not say so."""
    made: Tensor = value
    return made


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bags; the other three outputs matter to the backward pass only and are zeros."""
    if include_last_offset:
        offsets = offsets[:-1]
    bags = offsets.shape[0]
    places = torch.arange(indices.shape[0], device=indices.device, dtype=offsets.dtype)
    bag_of = torch.searchsorted(offsets, places, right=True) - 1
    rows = torch.nn.functional.embedding(indices, weight)
    kept = (indices != padding_idx).to(weight.dtype)
    count = weight.new_zeros(bags).index_add(0, bag_of, kept)
    if mode == _MAX:
        lowest = torch.finfo(weight.dtype).min
        rows = torch.where(kept[:, None] > 0, rows, lowest)
        into = bag_of[:, None].expand_as(rows)
        bag = weight.new_full((bags, weight.shape[1]), lowest)
        bag = bag.scatter_reduce(0, into, rows, "amax")
        bag = torch.where(count[:, None] > 0, bag, 0.0)
    else:
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[:, None]
        rows = rows * kept[:, None]
        bag = weight.new_zeros(bags, weight.shape[1]).index_add(0, bag_of, rows)
        if mode == _MEAN:
            bag = bag / count.clamp(min=1)[:, None]
    return bag, torch.zeros_like(bag_of), torch.zeros_like(offsets), torch.zeros_like(offsets)


def _embedding_renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    used = weight.new_zeros(weight.shape[0]).index_fill(0, indices.reshape(-1), 1.0) > 0
    norms = torch.linalg.vector_norm(weight, norm_type, 1)
    scale = torch.where(used & (norms > max_norm), max_norm / (norms + 1e-7), 1.0)
    return weight * scale[:, None]


def _repeat_interleave(repeats: Tensor, *, output_size: int | None = None) -> Tensor:
    if output_size is None:
        raise ValueError(
            "repeat_interleave by a tensor of counts has a length that depends on values: "
            "give it output_size"
        )
    places = torch.arange(output_size, device=repeats.device)
    return torch.searchsorted(repeats.cumsum(0), places, right=True).to(repeats.dtype)


def _combinations(tensor: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    choose: Any = (
        itertools.combinations_with_replacement if with_replacement else itertools.combinations
    )
    rows = list(choose(range(tensor.shape[0]), r))
    return tensor[torch.tensor(rows, device=tensor.device).reshape(len(rows), r)]


def _leaky_rrelu(
    tensor: Tensor,
    noise: Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: None = None,
) -> tuple[Tensor, Tensor]:
    if training:
        raise ValueError("rrelu draws random numbers in training: call .eval() on the model")
    return torch.nn.functional.leaky_relu(tensor, (float(lower) + float(upper)) / 2), noise


def _batch_norm(
    tensor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """By the statistics of the batch, where there are no others to update."""
    if not training or running_mean is not None:
        return NotImplemented
    dims = [dim for dim in range(tensor.dim()) if dim != 1]
    shape = [1, -1] + [1] * (tensor.dim() - 2)
    variance, mean = torch.var_mean(tensor, dims, correction=0, keepdim=True)
    out = (tensor - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        out = out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _as_strided(
    tensor: Tensor, size: list[int], stride: list[int], storage_offset: int | None = None
) -> Tensor:
    """By an index, where the tensor has its memory for itself."""
    order = sorted(range(tensor.dim()), key=lambda dim: tensor.stride()[dim], reverse=True)
    flat = tensor.permute(order)
    if not flat.is_contiguous() or tensor.storage_offset() != 0:
        raise ValueError("as_strided on a part of a tensor: slice it with other operators")
    index: Tensor | int = storage_offset or 0
    for dim, (count, step) in enumerate(zip(size, stride, strict=True)):
        places = torch.arange(count, device=tensor.device) * step
        index = index + places.reshape([-1 if at == dim else 1 for at in range(len(size))])
    return _tensor(flat.reshape(-1)[torch.as_tensor(index, device=tensor.device)])


def _convolution(*args: Any) -> Tensor:
    return _tensor(_aten.convolution.default(*args[:9]))


# The scaling of a transform: none, by the square root of its length, by its length.
_FORWARD_SCALES = ("backward", "ortho", "forward")
_INVERSE_SCALES = ("forward", "ortho", "backward")


def _fft_c2c(tensor: Tensor, dim: list[int], normalization: int, forward: bool) -> Tensor:
    if forward:
        return _tensor(torch.fft.fftn(tensor, dim=dim, norm=_FORWARD_SCALES[normalization]))
    return _tensor(torch.fft.ifftn(tensor, dim=dim, norm=_INVERSE_SCALES[normalization]))


def _fft_r2c(tensor: Tensor, dim: list[int], normalization: int, onesided: bool) -> Tensor:
    transform = torch.fft.rfftn if onesided else torch.fft.fftn
    return _tensor(transform(tensor, dim=dim, norm=_FORWARD_SCALES[normalization]))


def _fft_c2r(tensor: Tensor, dim: list[int], normalization: int, last_dim_size: int) -> Tensor:
    sizes = [tensor.shape[one] for one in dim[:-1]] + [last_dim_size]
    scale = _INVERSE_SCALES[normalization]
    return _tensor(torch.fft.irfftn(tensor, s=sizes, dim=dim, norm=scale))


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One device's kernel, in a graph that was taken apart for it: the operator for any device."""
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale
    )
    return attended, query.new_zeros(query.shape[:-1])


def _quantize(
    tensor: Tensor, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    return _tensor((torch.round(tensor / scale) + zero_point).clamp(low, high).to(dtype))


def _dequantize(
    tensor: Tensor,
    scale: Any,
    zero_point: Any,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return _tensor((tensor.to(out_dtype or torch.float32) - zero_point) * scale)


def _per_channel(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(
        tensor: Tensor, scales: Tensor, zeros: Tensor | None, axis: int, *rest: Any, **named: Any
    ) -> Tensor:
        shape = [-1 if dim == axis % tensor.dim() else 1 for dim in range(tensor.dim())]
        shift = 0 if zeros is None else zeros.reshape(shape)
        return rule(tensor, scales.reshape(shape), shift, *rest, **named)

    return apply


def _fake_quantize(
    tensor: Tensor, scale: Any, zero_point: Any, low: int, high: int
) -> tuple[Tensor, Tensor]:
    shifted = torch.round(tensor * (1 / scale)) + zero_point
    return (shifted.clamp(low, high) - zero_point) * scale, (shifted >= low) & (shifted <= high)


def _fake_quantize_per_channel(
    tensor: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    shape = [-1 if dim == axis % tensor.dim() else 1 for dim in range(tensor.dim())]
    return _fake_quantize(tensor, scale.reshape(shape), zero_point.reshape(shape), low, high)


def _fake_quantize_by_tensors(
    tensor: Tensor, scale: Tensor, zero_point: Tensor, enabled: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    quantised, mask = _fake_quantize(tensor, scale, zero_point, low, high)
    on = enabled.to(torch.bool)
    return torch.where(on, quantised, tensor), mask | ~on


def _multilabel_margin_loss(
    tensor: Tensor, target: Tensor, reduction: int
) -> tuple[Tensor, Tensor]:
    """torch's own rule is not what its kernel does (2.13)."""
    rows, labels = tensor.reshape(-1, tensor.shape[-1]), target.reshape(-1, tensor.shape[-1])
    count = rows.shape[1]
    # Labels count up to the first -1.
    named = (labels < 0).to(torch.int64).cumsum(1) == 0
    places = torch.arange(count, device=tensor.device)
    hits = (labels[..., None] == places) & named[..., None]
    is_target = hits.any(1)
    own = rows.gather(1, labels.clamp(min=0))
    margins = (1 - own[..., None] + rows[:, None]).clamp(min=0)
    counted = named[..., None] & ~is_target[:, None]
    losses = torch.where(counted, margins, 0.0).sum((1, 2)) / count
    if reduction == 0:
        losses = losses.reshape(tensor.shape[:-1])
    else:
        losses = losses.mean() if reduction == 1 else losses.sum()
    return losses, is_target.to(tensor.dtype).reshape(target.shape)


def _gaussian_nll_loss(
    input: Tensor,  # noqa: A002  torch's name
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Without the check of the variance, which is a branch on its values."""
    variance = torch.as_tensor(var, dtype=input.dtype, device=input.device)
    if variance.shape != input.shape and variance.dim() == input.dim() - 1:
        variance = variance.unsqueeze(-1)
    variance = variance.clamp(min=eps)
    loss = 0.5 * (torch.log(variance) + (input - target) ** 2 / variance)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


# Of torch's quantisation, by name: importing it only to name its operators takes a second.
RULES_BY_NAME: dict[str, Callable[..., Any]] = {
    "quantized_decomposed.quantize_per_tensor.default": _quantize,
    "quantized_decomposed.quantize_per_tensor.tensor": _quantize,
    "quantized_decomposed.dequantize_per_tensor.default": _dequantize,
    "quantized_decomposed.dequantize_per_tensor.tensor": _dequantize,
    "quantized_decomposed.quantize_per_channel.default": _per_channel(_quantize),
    "quantized_decomposed.dequantize_per_channel.default": _per_channel(_dequantize),
}

RULES: dict[Any, Callable[..., Any]] = {
    _aten.as_strided.default: _as_strided,
    _aten._convolution.default: _convolution,
    _aten.fake_quantize_per_tensor_affine_cachemask.default: _fake_quantize,
    _aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: (
        _fake_quantize_by_tensors
    ),
    _aten.fake_quantize_per_channel_affine_cachemask.default: _fake_quantize_per_channel,
    _aten.multilabel_margin_loss_forward.default: _multilabel_margin_loss,
    _aten._fft_c2c.default: _fft_c2c,
    _aten._fft_r2c.default: _fft_r2c,
    _aten._fft_c2r.default: _fft_c2r,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_attention,
    _aten._embedding_bag.default: _embedding_bag,
    _aten._embedding_bag_forward_only.default: _embedding_bag,
    _aten.embedding_renorm.default: _embedding_renorm,
    _aten.repeat_interleave.Tensor: _repeat_interleave,
    _aten.rrelu_with_noise_functional.default: _leaky_rrelu,
}
# For functions whose result torch can not even trace the shape of.
RULES_WHILE_TRACING: dict[Any, Callable[..., Any]] = {
    torch.combinations: _combinations,
    torch.nn.functional.gaussian_nll_loss: _gaussian_nll_loss,
}

# For operators of the table, where their arguments are not those that it allows.
RULES_OUTSIDE_THE_TABLE: dict[Any, Callable[..., Any]] = {
    _aten.batch_norm.default: _batch_norm,
}
