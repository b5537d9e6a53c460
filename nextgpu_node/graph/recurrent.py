"""Recurrent layers over sequences of varying length.  Submitter only.

torch traces an LSTM by unrolling it, which fixes the number of steps to that of the example.
While tracing with sizes that vary, the layers are stand-ins that know their shapes only; they
are written to the program as what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nextgpu_node.graph.rules import RULES_WHILE_TRACING

_SEQUENCE = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)
_library: Any = torch.library.Library("nextgpu_trace", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"lstm(Tensor input, Tensor[] hx, {_SEQUENCE}) -> (Tensor, Tensor, Tensor)")
for _name in ("gru", "rnn_tanh", "rnn_relu"):
    _library.define(f"{_name}(Tensor input, Tensor hx, {_SEQUENCE}) -> (Tensor, Tensor)")


def _outputs(
    tensor: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    directions = 2 if bidirectional else 1
    size = states[0].shape[-1] * directions
    return (tensor.new_empty(*tensor.shape[:-1], size), *(torch.empty_like(one) for one in states))


def _lstm(
    tensor: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    return _outputs(tensor, hx, params, has_biases, bidirectional)


def _simple(
    tensor: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    return _outputs(tensor, [hx], params, has_biases, bidirectional)


torch.library.register_fake("nextgpu_trace::lstm", _lstm, lib=_library)
for _name in ("gru", "rnn_tanh", "rnn_relu"):
    torch.library.register_fake(f"nextgpu_trace::{_name}", _simple, lib=_library)

_ops = torch.ops.nextgpu_trace
STANDS_FOR: dict[Any, str] = {
    _ops.lstm.default: "aten.lstm.input",
    _ops.gru.default: "aten.gru.input",
    _ops.rnn_tanh.default: "aten.rnn_tanh.input",
    _ops.rnn_relu.default: "aten.rnn_relu.input",
}
_STAND_INS: dict[Any, Callable[..., Any]] = {
    torch._VF.lstm: _ops.lstm.default,
    torch._VF.gru: _ops.gru.default,
    torch._VF.rnn_tanh: _ops.rnn_tanh.default,
    torch._VF.rnn_relu: _ops.rnn_relu.default,
}


class StandIns(TorchFunctionMode):
    """While active, what torch can not trace well is done in another way.

    `recurrent`: recurrent layers over one padded batch are stand-ins.
    """

    def __init__(self, *, recurrent: bool) -> None:
        super().__init__()
        self._instead = RULES_WHILE_TRACING | (_STAND_INS if recurrent else {})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        instead = self._instead.get(func)
        # Packed sequences have a batch size for each step in third place.
        packed = func in _STAND_INS and not isinstance(args[2], (list, tuple))
        if instead is not None and not packed:
            return instead(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
