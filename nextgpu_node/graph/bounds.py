"""What a call may ask for, and what it takes while it runs.  Spec: 60-program.md#bounds

CHECKS     before a call's shape run: arguments that make a kernel run wild although its result is
           small, or that it trusts without looking.  They raise ValueError.
WORKSPACE  after its shape run: the bytes that the call needs beside its arguments and results.

Tensors have no memory here.  For operators that are composed of others the planner counts what they
are composed of (`plan._Composed`); all others without an entry of their own take what `converted`
or `converted_or_copied` says.  A test measures every row (tests/unit/graph/test_rows.py), and
fuzzing runs them in guarded memory (docs/fuzzing.md).  Scratch memory inside BLAS, oneDNN, cuBLAS
and cuDNN is theirs to choose and the sandbox's to limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

# Arguments by name; what was not given is not there.
Arguments = Mapping[str, Any]
Check = Callable[[Arguments], None]
Workspace = Callable[[Arguments, Sequence[torch.Tensor]], int]

# oneDNN lays channels out in blocks of at most this many.
_BLOCK = 16
# Descriptors and tiles of kernels that pack their operands.
_PACKED_BYTES = 1024 * 1024
_DRAWN_AT_A_TIME = 2**16
_MAX_CHAIN = 64
_MAX_ORDER = 64
_MAX_LAYERS = 1024
_MAX_DERIVATIVE = 1024
_MAX_EXPONENT = 2**32
_MAX_STEP = 2**20


# ---------------------------------------------------------------- sizes


def _tensors(given: Arguments) -> Iterator[torch.Tensor]:
    for value in given.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    """As if it were laid out in full: an expanded view counts every element."""
    return math.prod(tensor.shape) * tensor.element_size()


def _blocked_bytes(tensor: torch.Tensor) -> int:
    """With its first two dimensions in full blocks."""
    whole = [-(-size // _BLOCK) * _BLOCK for size in tensor.shape[:2]]
    return math.prod((*whole, *tensor.shape[2:])) * tensor.element_size()


def _common_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    broadcast: Callable[..., torch.Size] = torch.broadcast_shapes
    try:
        return tuple(broadcast(*shapes))
    except RuntimeError as exc:
        raise ValueError("shapes do not fit together") from exc


def _image(given: Arguments) -> torch.Tensor:
    """The first argument, under whichever name."""
    value = given.get("self", given.get("input"))
    if not isinstance(value, torch.Tensor):
        raise ValueError("a tensor is needed here, not a number")
    return value


def _numbers(value: Any) -> list[float]:
    """Of an argument that is absent, a mode, one number or a list of them."""
    if value is None or isinstance(value, str):
        return []
    return list(value) if isinstance(value, list) else [value]


# ---------------------------------------------------------------- checks


def _at_most(bound: int, *names: str) -> Check:
    def check(given: Arguments) -> None:
        for name in names:
            if any(abs(number) > bound for number in _numbers(given.get(name))):
                raise ValueError(f"{name} is more than {bound}")

    return check


def _at_most_items(bound: int, name: str) -> Check:
    def check(given: Arguments) -> None:
        if len(given[name]) > bound:
            raise ValueError(f"{name} has more than {bound} items")

    return check


def _not_given(*names: str) -> Check:
    """For arguments that a kernel trusts without looking."""

    def check(given: Arguments) -> None:
        for name in names:
            if given.get(name) is not None:
                raise ValueError(f"{name} may not be given")

    return check


def _not_empty(name: str) -> Check:
    """torch does not agree with itself about an empty list: every dimension, or none."""

    def check(given: Arguments) -> None:
        if given.get(name) == []:
            raise ValueError(f"{name} may not be empty")

    return check


def _one_dtype(given: Arguments) -> None:
    """The shape run and the kernel disagree about the result of mixed dtypes."""
    if len({one.dtype for one in _tensors(given)}) > 1:
        raise ValueError("the tensors must be of one dtype")


def _dtype_of_input(given: Arguments) -> None:
    if any(one.dtype is not given["input_dtype"] for one in _tensors(given)):
        raise ValueError("input_dtype must be the dtype of the tensors")


def _narrow_padding(given: Arguments) -> None:
    """Kernels walk through the padding of each window."""
    widest = max(_image(given).shape, default=0)
    if any(abs(number) > widest + _MAX_ORDER for number in _numbers(given.get("padding"))):
        raise ValueError("padding is wider than the image")


def _honest_scales(given: Arguments) -> None:
    """Kernels compute positions from the scale; one of another size would lead far outside."""
    sizes = _image(given).shape[2:]
    if "scale_factors" in given:
        scales: list[float | None] = [*_numbers(given["scale_factors"])]
    else:
        scales = [given.get(name) for name in _SCALES if name in given]
    after = given.get("output_size")
    if after is None and len(scales) != len(sizes):
        raise ValueError("each dimension needs a size or a scale")
    for at, scale in enumerate(scales):
        if scale is None:
            continue
        if not 0 < scale < math.inf or at >= len(sizes):
            raise ValueError("a scale is not a positive number")
        if sizes[at] * scale < _LEAST_SIZE:
            raise ValueError("nothing is left at this scale")
        if after is not None and (at >= len(after) or abs(sizes[at] * scale - after[at]) > 1):
            raise ValueError("scale and size disagree")


def _honest_scales_back(given: Arguments) -> None:
    _honest_scales({**given, "self": torch.empty(given["input_size"], device="meta")})


def _fitting_attention(given: Arguments) -> None:
    """The fused kernel reads as many values as there are keys, and trusts the mask's size."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    if not all(isinstance(one, torch.Tensor) and one.dim() >= 2 for one in (query, key, value)):
        raise ValueError("query, key and value are tensors of two dimensions or more")
    if key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError("query, key and value do not fit together")
    if len({one.dtype for one in (query, key, value)}) > 1:
        raise ValueError("query, key and value must be of one dtype")
    mask = given.get("attn_mask")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype not in (torch.bool, query.dtype):
        raise ValueError("attn_mask must be of booleans or of the dtype of the query")
    scores = (*query.shape[:-1], key.shape[-2])
    if len(mask.shape) > len(scores) or any(
        size not in (1, wanted)
        for size, wanted in zip(mask.shape[::-1], scores[::-1], strict=False)
    ):
        raise ValueError("attn_mask does not fit")


def _fitting_layers(gates: int) -> Check:
    """Recurrent layers run step by step, too slowly to find their shapes by running them."""

    def check(given: Arguments) -> None:
        image, states = given["input"], given["hx"]
        states = states if isinstance(states, list) else [states]
        layers = given["num_layers"] * (2 if given["bidirectional"] else 1)
        if not isinstance(image, torch.Tensor) or image.dim() != 3:
            raise ValueError("a sequence of three dimensions is needed")
        if not 0 < layers <= _MAX_LAYERS:
            raise ValueError(f"1 to {_MAX_LAYERS} layers are possible")
        batch = image.shape[0 if given["batch_first"] else 1]
        for state in states:
            if state.dim() != 3 or tuple(state.shape[:2]) != (layers, batch):
                raise ValueError("a state is not of layers, batch and size")
        _check_weights(gates, layers, given, states)

    return check


def _check_weights(
    gates: int, layers: int, given: Arguments, states: Sequence[torch.Tensor]
) -> None:
    weights = given["params"]
    each = 4 if given["has_biases"] else 2
    if len(weights) not in (layers * each, layers * (each + 1)):
        raise ValueError("each layer needs its weights")
    each = len(weights) // layers
    projected = each in (3, 5)
    if projected and len(states) < 2:
        raise ValueError("only an LSTM may be projected")
    out, hidden = states[0].shape[2], states[-1].shape[2]
    if not projected and out != hidden:
        raise ValueError("the states differ in size")
    directions = 2 if given["bidirectional"] else 1
    for layer in range(layers):
        size = given["input"].shape[2] if layer < directions else directions * out
        wanted: list[tuple[int, ...]] = [(gates * hidden, size), (gates * hidden, out)]
        wanted += [(gates * hidden,)] * 2 if given["has_biases"] else []
        wanted += [(out, hidden)] if projected else []
        found = [tuple(one.shape) for one in weights[layer * each : (layer + 1) * each]]
        if found != wanted:
            raise ValueError(f"the weights of layer {layer} do not fit")


# A size of 1, and what rounding may take off it.
_LEAST_SIZE = 0.99
_SCALES = ("scales", "scales_d", "scales_h", "scales_w")


# ---------------------------------------------------------------- workspace


def _nothing(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """Composed operators whose one new value is their result."""
    return 0


def converted(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """For elementwise kernels: where dtypes are mixed, each argument in the widest of them."""
    arguments = list(_tensors(given))
    dtypes = {one.dtype for one in (*arguments, *results)}
    if len(dtypes) < 2:
        return 0
    widest = max(dtype.itemsize for dtype in dtypes)
    return sum(math.prod(one.shape) for one in arguments) * widest


def converted_or_copied(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """For other kernels also: a copy of each argument that is not contiguous."""
    return converted(given, results) + sum(
        _bytes(one) for one in _tensors(given) if not one.is_contiguous()
    )


def _times(factor: float) -> Workspace:
    """`factor` times the bytes of arguments and results."""

    def workspace(given: Arguments, results: Sequence[torch.Tensor]) -> int:
        all_bytes = sum(_bytes(one) for one in (*_tensors(given), *results))
        return math.ceil(factor * all_bytes) + converted_or_copied(given, results)

    return workspace


def _broadcast(factor: float) -> Workspace:
    """`factor` times the common shape of the arguments: what is reduced is made first."""

    def workspace(given: Arguments, results: Sequence[torch.Tensor]) -> int:
        tensors = list(_tensors(given))
        shape = _common_shape([one.shape for one in tensors])
        return math.ceil(factor * math.prod(shape) * max(one.element_size() for one in tensors))

    return workspace


def _rolled(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """One dimension after the other, each from the one before."""
    return len(_numbers(given.get("dims", given.get("dim"))) or results[0].shape) * _bytes(
        results[0]
    )


def _packed(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    return _PACKED_BYTES + _times(1)(given, results)


def _products_of_chain(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """The order is chosen at run time, so the largest product that could occur, twice."""
    matrices = list(_tensors(given))
    rows = max((one.shape[0] for one in matrices if one.dim()), default=1)
    columns = max((one.shape[-1] for one in matrices if one.dim()), default=1)
    largest: int = rows * columns
    return 2 * largest * max((one.element_size() for one in matrices), default=1)


def _multigamma(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    order: int = max(given["p"], 0)
    return (order + 2) * 8 * math.prod(results[0].shape)


def _resized(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """Dimension by dimension, so the larger size of each may occur together."""
    image, result = _image(given), results[0]
    between = math.prod(max(pair) for pair in zip(image.shape, result.shape, strict=True))
    tables = 64 * (sum(image.shape[2:]) + sum(result.shape[2:]))
    return (2 * between + math.prod(image.shape)) * max(image.element_size(), 4) + tables


def _convolved(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """Packed copies of everything, and the columns of the matrix product that may stand in."""
    image, weight, result = _image(given), given["weight"], results[0]
    transposed = bool(given.get("transposed", "output_padding" in given))
    positions = image if transposed or image.dim() <= 2 else result
    channels = weight.shape[1] * given.get("groups", 1)
    batched = image.dim() == weight.dim()
    spatial = positions.shape[2:] if batched else positions.shape[1:]
    batch = positions.shape[0] if batched else 1
    columns: int = batch * channels * math.prod(weight.shape[2:]) * math.prod(spatial)
    packed = sum(_blocked_bytes(one) for one in (image, weight, result))
    return 2 * packed + columns * image.element_size() + _PACKED_BYTES


def _transposed_convolved(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    return _convolved({**given, "transposed": True}, results)


def _convolved_back(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """One pass for the input's gradient, one for the weight's."""
    return 2 * _convolved(given, [given["grad_output"]])


def _drawn(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """Words and what they turn into, one block at a time (random_numbers)."""
    return 64 * min(math.prod(results[0].shape), _DRAWN_AT_A_TIME)


def _recurrent(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """The gates of every step and layer, and packed weights."""
    weights = [one for one in given["params"] if isinstance(one, torch.Tensor)]
    layers = max(1, given["num_layers"]) * (2 if given["bidirectional"] else 1)
    widest = max((one.shape[0] for one in weights if one.dim()), default=1) + _BLOCK
    rows = math.prod(given["input"].shape[:-1])
    gates: int = 4 * layers * rows * widest * 4
    packed = 2 * sum(_blocked_bytes(one) for one in weights)
    return gates + packed + 4 * sum(_bytes(one) for one in results) + _PACKED_BYTES


def _attention(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """Copies in single precision; without the fused kernel also all scores."""
    query, key, value = given["query"], given["key"], given["value"]
    heads = math.prod(results[0].shape[:-2])
    longest: int = query.shape[-2] * query.shape[-1] + key.shape[-2] * (
        key.shape[-1] + value.shape[-1]
    )
    copies = 4 * heads * longest
    if _is_fused(query, key, value):
        return copies + 4 * _PACKED_BYTES
    scores: int = 4 * heads * query.shape[-2] * key.shape[-2]
    return 2 * copies + 3 * scores


def _is_fused(*tensors: torch.Tensor) -> bool:
    return (
        all(one.dim() == 4 and one.stride(-1) == 1 and math.prod(one.shape) for one in tensors)
        and len({one.shape[-1] for one in tensors}) == 1
        and tensors[0].is_floating_point()
    )


def _sorted_or_compared(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """Few elements are compared one by one, many are joined and sorted."""
    return 40 * sum(math.prod(one.shape) + 1 for one in _tensors(given))


def _transformed(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """Complex copies, cut or padded to the lengths asked for, of arguments and results."""
    image = _image(given)
    elements = math.prod(image.shape)
    grown = math.prod(max(pair) for pair in zip(image.shape, results[0].shape, strict=True))
    return 16 * (2 * max(elements, 2 * grown) + elements)


def _expanded_matrix(given: Arguments, results: Sequence[torch.Tensor]) -> int:
    """matrix_exp: powers, norms and index lists for each matrix."""
    return 24 * _bytes(_image(given)) + 64 * math.prod(_image(given).shape[:-2])


# ---------------------------------------------------------------- which row has which


def _family(names: Sequence[str], *overloads: str) -> list[str]:
    return [f"aten.{name}.{overload}" for name in names for overload in overloads]


_RESIZING = [
    *_family(["upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"], "default", "vec"),
    *_family([f"_upsample_nearest_exact{dims}d" for dims in (1, 2, 3)], "default", "vec"),
    *_family(["upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d"], "default", "vec"),
    *_family(["upsample_trilinear3d", "_upsample_bilinear2d_aa"], "default", "vec"),
    *_family(["_upsample_bicubic2d_aa"], "default", "vec"),
]
_CONVOLUTIONS = [
    *_family(["conv1d", "conv2d", "conv3d"], "default", "padding"),
    *_family(["convolution", "conv_tbc"], "default"),
]
_TRANSPOSED = [
    "aten.conv_transpose1d.default",
    *_family(["conv_transpose2d", "conv_transpose3d"], "input"),
]
_POOLS = [
    *_family([f"avg_pool{dims}d" for dims in (1, 2, 3)], "default"),
    *_family([f"max_pool{dims}d" for dims in (1, 2, 3)], "default"),
    *_family([f"max_pool{dims}d_with_indices" for dims in (1, 2, 3)], "default"),
]
_RECURRENT = _family(["lstm", "gru", "rnn_tanh", "rnn_relu"], "input")
_TRANSFORMS = _family(
    [f"fft_{kind}fft{dims}" for kind in ("", "i", "r", "ir") for dims in ("", "2", "n")], "default"
)
_WINDOWS = _family(
    [f"{kind}_window" for kind in ("bartlett", "blackman", "hamming", "hann")],
    "default",
    "periodic",
)
_PAIR_LOSSES = _family(
    ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"], "default"
)

_RESIZING_BACK = _family(
    (
        "upsample_nearest1d_backward",
        "upsample_nearest2d_backward",
        "upsample_nearest3d_backward",
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward",
    ),
    "default",
)
_BACKWARD = _RESIZING_BACK + _family(
    (
        "native_layer_norm_backward",
        "_adaptive_avg_pool2d_backward",
        "_adaptive_avg_pool3d_backward",
        "avg_pool2d_backward",
        "avg_pool3d_backward",
        "grid_sampler_2d_backward",
        "grid_sampler_3d_backward",
    ),
    "default",
)
_DRAWS = ("random.uniform", "random.normal", "random.bits", "random.bernoulli")

_CHECKS: dict[str, tuple[Check, ...]] = {
    "aten.scaled_dot_product_attention.default": (_fitting_attention,),
    **dict.fromkeys(_RESIZING, (_honest_scales,)),
    **dict.fromkeys(_RESIZING_BACK, (_honest_scales_back,)),
    **dict.fromkeys(
        _CONVOLUTIONS + _TRANSPOSED,
        (_at_most(_MAX_STEP, "stride", "padding", "dilation", "output_padding"),),
    ),
    **dict.fromkeys(
        _POOLS, (_at_most(_MAX_STEP, "kernel_size", "stride", "dilation"), _narrow_padding)
    ),
    **dict.fromkeys(
        _family(["im2col", "col2im"], "default"),
        (_at_most(_MAX_STEP, "kernel_size", "stride", "dilation", "padding"),),
    ),
    "aten.lstm.input": (_fitting_layers(4), _one_dtype),
    "aten.gru.input": (_fitting_layers(3), _one_dtype),
    "aten.rnn_tanh.input": (_fitting_layers(1), _one_dtype),
    "aten.rnn_relu.input": (_fitting_layers(1), _one_dtype),
    **dict.fromkeys(_family(["nansum", "nanmean"], "default"), (_not_empty("dim"),)),
    **dict.fromkeys(_PAIR_LOSSES, (_one_dtype,)),
    "aten.threshold_backward.default": (_one_dtype,),
    "aten.binary_cross_entropy.default": (_one_dtype,),
    "aten._softmax_backward_data.default": (_dtype_of_input,),
    "aten._log_softmax_backward_data.default": (_dtype_of_input,),
    "aten.chain_matmul.default": (_at_most_items(_MAX_CHAIN, "matrices"),),
    "aten.linalg_multi_dot.default": (_at_most_items(_MAX_CHAIN, "tensors"),),
    "aten.mvlgamma.default": (_at_most(_MAX_ORDER, "p"),),
    "aten.diff.default": (_at_most(_MAX_ORDER, "n"),),
    "aten.polygamma.default": (_at_most(_MAX_DERIVATIVE, "n"),),
    "aten.linalg_matrix_power.default": (_at_most(_MAX_EXPONENT, "n"),),
    "aten.cov.default": (_not_given("fweights", "aweights"),),
    "aten.searchsorted.Tensor": (_not_given("sorter"),),
    "aten.searchsorted.Scalar": (_not_given("sorter"),),
    "aten.repeat_interleave.self_int": (_not_given("output_size"),),
}

# Among the composed ones these are in every model, and known to be simple: no need to look inside.
_SIMPLE = [
    *_family(["reshape", "contiguous", "expand_as", "view_as", "dropout", "chunk"], "default"),
    *("aten.flatten.using_ints", "aten.unflatten.int", "aten.to.dtype", "aten.type_as.default"),
    *_family(["adjoint", "mT", "mH", "matrix_H", "numpy_T", "broadcast_to", "narrow"], "default"),
    *("aten.movedim.int", "aten.movedim.intlist", "aten.split.sizes"),
]

_WORKSPACE: dict[str, Workspace] = {
    **dict.fromkeys(_SIMPLE, _nothing),
    "aten.softmax.int": converted_or_copied,
    "aten.log_softmax.int": converted_or_copied,
    **dict.fromkeys(_RESIZING, _resized),
    **dict.fromkeys(_CONVOLUTIONS, _convolved),
    **dict.fromkeys(_TRANSPOSED, _transposed_convolved),
    **dict.fromkeys(_POOLS, _times(1)),
    **dict.fromkeys(_RECURRENT, _recurrent),
    **dict.fromkeys(_TRANSFORMS, _transformed),
    **dict.fromkeys(_PAIR_LOSSES, _broadcast(3)),
    **dict.fromkeys(_BACKWARD, _times(3)),
    **dict.fromkeys(_DRAWS, _drawn),
    "aten.convolution_backward.default": _convolved_back,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.linear.default": converted_or_copied,
    "aten.isin.Tensor_Tensor": _sorted_or_compared,
    "aten.isin.Scalar_Tensor": _sorted_or_compared,
    "aten.isin.Tensor_Scalar": _sorted_or_compared,
    "aten.linalg_matrix_exp.default": _expanded_matrix,
    "aten.matrix_exp.default": _expanded_matrix,
    "aten.chain_matmul.default": _products_of_chain,
    "aten.linalg_multi_dot.default": _products_of_chain,
    "aten.mvlgamma.default": _multigamma,
    **dict.fromkeys(_WINDOWS, _times(6)),
    **dict.fromkeys(_family(["roll", "fft_fftshift", "fft_ifftshift"], "default"), _rolled),
    **dict.fromkeys(
        _family([f"adaptive_avg_pool{dims}d" for dims in (1, 2, 3)], "default"), _times(4)
    ),
    "aten.im2col.default": _times(1),
    "aten.col2im.default": _times(1),
    "aten.bilinear.default": _times(3),
    "aten.gelu_backward.default": _packed,
    "aten._linalg_svd.default": _times(4),
    "aten.cov.default": _times(4),
    "aten.corrcoef.default": _times(4),
}

CHECKS: Mapping[str, tuple[Check, ...]] = MappingProxyType(_CHECKS)
WORKSPACE: Mapping[str, Workspace] = MappingProxyType(_WORKSPACE)
