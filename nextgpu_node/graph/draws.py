"""Random operators of a traced model -> draws from the carried state.  Submitter's side.

    aten.dropout, rand, randn, randint, bernoulli, multinomial, …   ->   nextgpu_draw.*
    nextgpu_draw.*                                                  ->   rows random.* of the table

The first step is a set of decompositions for torch's own tracing, the second is emission: each
draw gets the next site number, and the state becomes one more tensor of the carry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._export.utils import _get_decomp_for_cia
from torch._ops import OpOverload

from nextgpu_node.graph import recurrent  # noqa: F401  defines nextgpu_trace
from nextgpu_protocol.program import TENSOR, Argument, DType, Ref

STATE_NAME = "random_state"

_aten = torch.ops.aten

# ---------------------------------------------------------------- draws, as torch traces them

_library: Any = torch.library.Library("nextgpu_draw", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "uniform(SymInt[] size, *, ScalarType dtype, Device device) -> Tensor",
    "normal(SymInt[] size, *, ScalarType dtype, Device device) -> Tensor",
    "bits(SymInt[] size, *, Device device) -> Tensor",
    "bernoulli(SymInt[] size, float p, *, Device device) -> Tensor",
):
    # The tag keeps passes from merging two draws of the same shape.
    _library.define(_schema, tags=(torch.Tag.nondeterministic_seeded,))

_draw: Any = torch.ops.nextgpu_draw


def _fake_float(size: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


def _fake_bits(size: Any, *, device: Any) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device=device)


def _fake_bernoulli(size: Any, p: float, *, device: Any) -> Tensor:
    return torch.empty(size, dtype=torch.bool, device=device)


for _name, _fake in (
    ("uniform", _fake_float),
    ("normal", _fake_float),
    ("bits", _fake_bits),
    ("bernoulli", _fake_bernoulli),
):
    torch.library.register_fake(f"nextgpu_draw::{_name}", _fake, lib=_library)


def _uniform(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or like.dtype
    result: Tensor = _draw.uniform(like.shape, dtype=dtype, device=like.device)
    return result


def _normal(like: Tensor) -> Tensor:
    result: Tensor = _draw.normal(like.shape, dtype=like.dtype, device=like.device)
    return result


def _fraction(like: Tensor) -> Tensor:
    """Numbers in (0, 1), neither end included, to transform: float32 at least."""
    dtype, kept = (torch.float64, 53) if like.dtype is torch.float64 else (torch.float32, 24)
    return (_uniform(like, dtype) + 2.0 ** -(kept + 1)).clamp(max=1 - 2.0**-kept)


# ---------------------------------------------------------------- torch's operators from draws

_RULES: dict[OpOverload, Callable[..., Any]] = {}
_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def _rule(*ops: OpOverload) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def _keep(like: Tensor, p: float, size: Sequence[Any] | None = None) -> Tensor:
    shape = like.shape if size is None else size
    mask: Tensor = _draw.bernoulli(shape, 1.0 - p, device=like.device)
    return mask


@_rule(_aten.dropout.default)
def _dropout(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002  torch's name
    if not train or p == 0:
        return input.clone()
    if p == 1:
        return input * 0
    return input * _keep(input, p) * (1.0 / (1.0 - p))


@_rule(_aten.native_dropout.default)
def _native_dropout(input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:  # noqa: A002
    if train is False or p == 0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    mask = _keep(input, p)
    return input * mask * (0.0 if p == 1 else 1.0 / (1.0 - p)), mask


def _features(input: Tensor) -> list[Any]:  # noqa: A002
    """Whole channels live or die: [N, C, 1, …]."""
    return [*input.shape[:2], *([1] * (input.dim() - 2))]


@_rule(_aten.feature_dropout.default)
def _feature_dropout(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002
    if not train or p == 0:
        return input.clone()
    if p == 1:
        return input * 0
    return input * _keep(input, p, _features(input)) * (1.0 / (1.0 - p))


def _alpha(input: Tensor, p: float, size: Sequence[Any]) -> Tensor:  # noqa: A002
    # Klambauer et al. 2017: dropped units take the value at which SELU saturates.
    saturated = -1.7580993408473766
    scale = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * saturated**2))
    mask = _keep(input, p, size)
    return torch.where(mask, input, saturated) * scale - scale * saturated * p


@_rule(_aten.alpha_dropout.default)
def _alpha_dropout(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002
    if not train or p == 0:
        return input.clone()
    return input * 0 if p == 1 else _alpha(input, p, input.shape)


@_rule(_aten.feature_alpha_dropout.default)
def _feature_alpha_dropout(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002
    if not train or p == 0:
        return input.clone()
    return input * 0 if p == 1 else _alpha(input, p, _features(input))


@_rule(_aten.rand.default, _aten.rand.generator)
def _rand(size: Any, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
    result: Tensor = _draw.uniform(
        size, dtype=dtype or torch.get_default_dtype(), device=_device(rest)
    )
    return result


@_rule(_aten.randn.default, _aten.randn.generator)
def _randn(size: Any, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
    result: Tensor = _draw.normal(
        size, dtype=dtype or torch.get_default_dtype(), device=_device(rest)
    )
    return result


@_rule(_aten.rand_like.default, _aten.rand_like.generator)
def _rand_like(self: Tensor, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
    return _rand(self.shape, dtype=dtype or self.dtype, device=self.device)


@_rule(_aten.randn_like.default, _aten.randn_like.generator)
def _randn_like(self: Tensor, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
    return _randn(self.shape, dtype=dtype or self.dtype, device=self.device)


def _integers(low: Any, high: Any, size: Any, dtype: torch.dtype | None, device: Any) -> Tensor:
    # The bias of the remainder is below (high - low) / 2^63.
    drawn = _draw.bits(size, device=device)
    result: Tensor = (drawn % (high - low) + low).to(dtype or torch.int64)
    return result


@_rule(_aten.randint.default, _aten.randint.generator)
def _randint(
    high: int, size: Any, *, dtype: torch.dtype | None = torch.int64, **rest: Any
) -> Tensor:
    return _integers(0, high, size, dtype, _device(rest))


@_rule(_aten.randint.low, _aten.randint.low_generator)
def _randint_low(
    low: int, high: int, size: Any, *, dtype: torch.dtype | None = torch.int64, **rest: Any
) -> Tensor:
    return _integers(low, high, size, dtype, _device(rest))


@_rule(_aten.randint_like.default, _aten.randint_like.generator)
def _randint_like(
    self: Tensor, high: int, *, dtype: torch.dtype | None = None, **rest: Any
) -> Tensor:
    return _integers(0, high, self.shape, dtype or self.dtype, self.device)


@_rule(_aten.randint_like.low_dtype, _aten.randint_like.low_generator_dtype)
def _randint_like_low(
    self: Tensor, low: int, high: int, *, dtype: torch.dtype | None = None, **rest: Any
) -> Tensor:
    return _integers(low, high, self.shape, dtype or self.dtype, self.device)


@_rule(_aten.random.default)
def _random(self: Tensor, *, generator: Any = None) -> Tensor:
    # As torch: up to the largest integer that the dtype holds exactly.
    high: int
    if self.dtype.is_floating_point:
        high = 2 ** (1 - round(math.log2(torch.finfo(self.dtype).eps)))
    else:
        high = torch.iinfo(self.dtype).max if self.dtype is not torch.bool else 2
    return _integers(0, high, self.shape, self.dtype, self.device)


@_rule(_aten.random.to)
def _random_to(self: Tensor, to: int, *, generator: Any = None) -> Tensor:
    return _integers(0, to, self.shape, self.dtype, self.device)


@_rule(getattr(_aten.random, "from"))
def _random_from(self: Tensor, low: int, to: int | None, *, generator: Any = None) -> Tensor:
    high = torch.iinfo(self.dtype).max if to is None else to
    return _integers(low, high, self.shape, self.dtype, self.device)


@_rule(_aten.randperm.default, _aten.randperm.generator)
def _randperm(n: int, *, dtype: torch.dtype | None = torch.int64, **rest: Any) -> Tensor:
    keys: Tensor = _draw.bits([n], device=_device(rest))
    return keys.argsort().to(dtype or torch.int64)


@_rule(_aten.bernoulli.default)
def _bernoulli(self: Tensor, *, generator: Any = None) -> Tensor:
    drawn: Tensor = _uniform(self, torch.float32) < self
    return drawn.to(self.dtype)


@_rule(_aten.bernoulli.Tensor)
def _bernoulli_tensor(self: Tensor, p: Tensor, *, generator: Any = None) -> Tensor:
    drawn: Tensor = _uniform(self, torch.float32) < p
    return drawn.to(self.dtype)


@_rule(_aten.bernoulli.p)
def _bernoulli_p(self: Tensor, p: float, *, generator: Any = None) -> Tensor:
    drawn: Tensor = _draw.bernoulli(self.shape, p, device=self.device)
    return drawn.to(self.dtype)


@_rule(_aten.uniform.default)
def _uniform_between(self: Tensor, *bounds: float, generator: Any = None, **named: float) -> Tensor:
    low = bounds[0] if bounds else named.get("from", 0.0)
    high = bounds[1] if len(bounds) > 1 else named.get("to", 1.0)
    return _uniform(self) * (high - low) + low


@_rule(_aten.normal_functional.default)
def _normal_functional(
    self: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None
) -> Tensor:
    return _normal(self) * std + mean


@_rule(_aten.normal.Tensor_Tensor)
def _normal_tensors(mean: Tensor, std: Tensor, *, generator: Any = None) -> Tensor:
    return _normal(mean + std) * std + mean


@_rule(_aten.normal.Tensor_float)
def _normal_mean(mean: Tensor, std: float = 1.0, *, generator: Any = None) -> Tensor:
    return _normal(mean) * std + mean


@_rule(_aten.normal.float_Tensor)
def _normal_std(mean: float, std: Tensor, *, generator: Any = None) -> Tensor:
    return _normal(std) * std + mean


@_rule(_aten.normal.float_float)
def _normal_size(
    mean: float, std: float, size: Any, *, dtype: torch.dtype | None = None, **rest: Any
) -> Tensor:
    return _randn(size, dtype=dtype, **rest) * std + mean


@_rule(_aten.exponential.default)
def _exponential(self: Tensor, lambd: float = 1.0, *, generator: Any = None) -> Tensor:
    return (_fraction(self).log() / -lambd).to(self.dtype)


@_rule(_aten.geometric.default)
def _geometric(self: Tensor, p: float, *, generator: Any = None) -> Tensor:
    trials = (_fraction(self).log() / math.log1p(-p)).ceil() if p < 1 else torch.ones_like(self)
    return trials.to(self.dtype)


@_rule(_aten.cauchy.default)
def _cauchy(
    self: Tensor, median: float = 0.0, sigma: float = 1.0, *, generator: Any = None
) -> Tensor:
    return (((_fraction(self) - 0.5) * math.pi).tan() * sigma + median).to(self.dtype)


@_rule(_aten.log_normal.default)
def _log_normal(
    self: Tensor, mean: float = 1.0, std: float = 2.0, *, generator: Any = None
) -> Tensor:
    return (_normal(self) * std + mean).exp()


@_rule(_aten.multinomial.default)
def _multinomial(
    self: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    weights = self if self.dtype is torch.float64 else self.to(torch.float32)
    if replacement and num_samples > 1:
        return _inverse_cdf(weights, num_samples)
    # Exponential races (Efraimidis & Spirakis 2006): the first to arrive were drawn.
    race = weights / -_fraction(weights).log()
    return race.topk(num_samples, dim=-1).indices


def _inverse_cdf(weights: Tensor, count: int) -> Tensor:
    cdf = weights.double().cumsum(-1)
    size = [*weights.shape[:-1], count]
    at = _draw.uniform(size, dtype=torch.float64, device=weights.device) * cdf[..., -1:]
    return torch.searchsorted(cdf, at, right=True).clamp(max=weights.shape[-1] - 1)


@_rule(_aten.rrelu_with_noise_functional.default)
def _rrelu_with_noise(
    self: Tensor,
    noise: Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> tuple[Tensor, Tensor]:
    if not training:
        slope = torch.full_like(self, (lower + upper) / 2)
    else:
        slope = _uniform(self) * (upper - lower) + lower
    used = torch.where(self <= 0, slope, 1.0).to(self.dtype)
    return self * used, used


@_rule(_aten.rrelu.default)
def _rrelu(
    self: Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Tensor:
    return _rrelu_with_noise(self, self, lower, upper, training)[0]


@_rule(_aten.scaled_dot_product_attention.default)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention written out (torch's own documentation of it), with dropout from a draw."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(~seen.tril(), -math.inf)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        # A row that may look at nothing gives zeros, as torch's kernels do.
        weights = torch.where(attn_mask.any(-1, keepdim=True), weights, 0.0)
    return _dropout(weights, dropout_p, True) @ value


def _device(options: dict[str, Any]) -> Any:
    return options.get("device") or torch.get_default_device()


# ---------------------------------------------------------------- before lowering

# What export traces for recurrent layers, and the operator that it is.
RECURRENT: dict[Any, OpOverload] = {
    _aten.lstm.input: _aten.lstm.input,
    _aten.gru.input: _aten.gru.input,
    _aten.rnn_tanh.input: _aten.rnn_tanh.input,
    _aten.rnn_relu.input: _aten.rnn_relu.input,
    torch.ops.nextgpu_trace.lstm.default: _aten.lstm.input,
    torch.ops.nextgpu_trace.gru.default: _aten.gru.input,
    torch.ops.nextgpu_trace.rnn_tanh.default: _aten.rnn_tanh.input,
    torch.ops.nextgpu_trace.rnn_relu.default: _aten.rnn_relu.input,
}
# Position of `dropout` and `train` in the arguments of those.
_LAYERS, _DROPOUT, _TRAIN = 4, 5, 6


def rules_for(graph: torch.fx.Graph) -> dict[OpOverload, Callable[..., Any]]:
    """The decompositions that this graph needs so that every number is drawn from the state.

    Also marks recurrent layers that draw nothing (one layer, or dropout 0) as not training.
    """
    rules: dict[OpOverload, Callable[..., Any]] = {}
    for node in graph.nodes:
        target = node.target
        if target in RECURRENT:
            if _settle_recurrent(node):
                rules |= {**_RULES, target: _layer_by_layer(RECURRENT[target])}
        elif isinstance(target, OpOverload) and _draws(target) and _is_live(node):
            rules |= _RULES
    return rules


def one_layer_rule(op: Any) -> Callable[..., Any]:
    """torch's decomposition of a recurrent layer, good for one that draws nothing."""
    rule: Callable[..., Any] = _get_decomp_for_cia(op)

    def run(*args: Any) -> Any:
        # With oneDNN it would give one whole layer for CPUs only.
        with torch.backends.mkldnn.flags(enabled=False):
            return rule(*args)

    return run


def _layer_by_layer(op: Any) -> Callable[..., Any]:
    """Stacked recurrent layers with dropout between them.

    torch's own decomposition forgets the dropout (2.13: `num_layers < i - 1` is never true), so it
    only serves for one layer at a time here.
    """
    one_layer = one_layer_rule(op)

    def run(
        input: Tensor,  # noqa: A002  torch's name
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        rest = (has_biases, 1, 0.0, False, bidirectional, batch_first)
        directions = 2 if bidirectional else 1
        count = len(params) // num_layers
        output, states = input, []
        for layer in range(num_layers):
            first = layer * directions
            state = _map_state(hx, lambda one, at=first: one[at : at + directions])
            own = list(params[layer * count : (layer + 1) * count])
            output, *last = one_layer(output, state, own, *rest)
            states.append(last)
            if layer + 1 < num_layers:
                output = _dropout(output, dropout, train)
        return output, *(torch.cat(parts) for parts in zip(*states, strict=True))

    return run


def _map_state(hx: Any, function: Callable[..., Tensor]) -> Any:
    """An LSTM's state is two tensors, that of others one."""
    return function(hx) if isinstance(hx, Tensor) else [function(one) for one in hx]


def _draws(op: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


def _settle_recurrent(node: torch.fx.Node) -> bool:
    args = list(node.args)
    if args[_TRAIN] and not (args[_DROPOUT] and int(str(args[_LAYERS])) > 1):
        args[_TRAIN] = False
        node.args = tuple(args)
    return bool(args[_TRAIN])


def _is_live(node: torch.fx.Node) -> bool:
    """Whether the call draws at all: dropout in a model that is not training does not."""
    target: Any = node.target
    given = dict(zip((one.name for one in target._schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    if target is _aten.scaled_dot_product_attention.default:
        return bool(given.get("dropout_p"))
    if "train" in given:
        return given["train"] is not False and given.get("p") != 0
    return given.get("training") is not False if "training" in given else True


# ---------------------------------------------------------------- emission


class _Emits(Protocol):
    def add_input(self) -> Ref: ...

    def append(
        self, op: str, args: tuple[Argument, ...], kinds: str, **kwargs: Argument
    ) -> Ref: ...


_ROWS: dict[OpOverload, str] = {
    _draw.uniform.default: "random.uniform",
    _draw.normal.default: "random.normal",
    _draw.bits.default: "random.bits",
    _draw.bernoulli.default: "random.bernoulli",
}
DRAWS = frozenset(_ROWS)


@dataclass(slots=True)
class Draws:
    """The draws of one graph: their sites, and the state that they read."""

    state: Ref | None = None
    _read: Ref | None = None
    _sites: int = field(default=0)

    def emit(self, emitter: _Emits, target: OpOverload, args: Sequence[Any], kwargs: Any) -> Ref:
        """One draw as a row of the table."""
        if self.state is None or self._read is None:
            self.state = emitter.add_input()
            self._read = emitter.append("random.read", (self.state,), TENSOR)
        site, self._sites = self._sites, self._sites + 1
        size, *rest = args
        dtype = (kwargs["dtype"],) if isinstance(kwargs.get("dtype"), DType) else ()
        return emitter.append(_ROWS[target], (self._read, site, tuple(size), *rest, *dtype), TENSOR)

    def next_state(self, emitter: _Emits) -> Ref:
        """The state after the step.  Only where something was drawn."""
        assert self.state is not None
        return emitter.append("random.advance", (self.state,), TENSOR)
