"""The layers of torch.nn, in inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo.case import Case, Model


def signal(*shape: int) -> tuple[torch.Tensor]:
    return (torch.randn(*shape),)


def layer(make: Callable[[], nn.Module], *args: Any) -> Callable[[], Model]:
    """A layer on `args`; with a dynamic first dimension where all arguments share its size."""

    def build() -> Model:
        return Model(make().eval(), args)

    return build


def batched(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Callable[[], Model]:
    """A layer on random inputs, the size of the first dimension varying."""

    def build() -> Model:
        args = tuple(torch.randn(shape) for shape in shapes)
        other = tuple(torch.randn(shape[0] + 3, *shape[1:]) for shape in shapes)
        dynamic = [{0: "batch"} for _ in shapes]
        return Model(make().eval(), args, {}, dynamic, other)

    return build


class LastState(nn.Module):
    """A recurrent layer on given first states."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: torch.Tensor, *state: torch.Tensor) -> Any:
        return self.recurrent(x, state if len(state) > 1 else state[0])


class Loss(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.loss(*args)


_IMAGE = (2, 8, 12, 12)
_ROW = (2, 8, 12)
_VOLUME = (2, 8, 6, 6, 6)

_CONVOLUTIONS = {
    "Conv1d": batched(lambda: nn.Conv1d(8, 4, 3, padding=1), _ROW),
    "Conv1d same": batched(lambda: nn.Conv1d(8, 4, 4, padding="same"), _ROW),
    "Conv1d circular": batched(
        lambda: nn.Conv1d(8, 4, 3, padding=1, padding_mode="circular"), _ROW
    ),
    "Conv2d": batched(lambda: nn.Conv2d(8, 4, 3, stride=2, dilation=2), _IMAGE),
    "Conv2d depthwise": batched(lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), _IMAGE),
    "Conv2d reflect": batched(
        lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), _IMAGE
    ),
    "Conv2d without a batch": layer(lambda: nn.Conv2d(8, 4, 3), torch.randn(8, 9, 9)),
    "Conv3d": batched(lambda: nn.Conv3d(8, 4, 3), _VOLUME),
    "ConvTranspose1d": batched(lambda: nn.ConvTranspose1d(8, 4, 3, stride=2), _ROW),
    "ConvTranspose2d": batched(lambda: nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1), _IMAGE),
    "ConvTranspose3d": batched(lambda: nn.ConvTranspose3d(8, 4, 3), _VOLUME),
}
_POOLS = {
    "MaxPool1d": batched(lambda: nn.MaxPool1d(2), _ROW),
    "MaxPool2d": batched(lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), _IMAGE),
    "MaxPool2d with indices": batched(lambda: nn.MaxPool2d(2, return_indices=True), _IMAGE),
    "MaxPool3d": batched(lambda: nn.MaxPool3d(2), _VOLUME),
    "AvgPool1d": batched(lambda: nn.AvgPool1d(2), _ROW),
    "AvgPool2d": batched(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), _IMAGE),
    "AvgPool3d": batched(lambda: nn.AvgPool3d(2), _VOLUME),
    "LPPool1d": batched(lambda: nn.LPPool1d(2, 3), _ROW),
    "LPPool2d": batched(lambda: nn.LPPool2d(2, 3), _IMAGE),
    "LPPool3d": batched(lambda: nn.LPPool3d(2, 2), _VOLUME),
    "AdaptiveMaxPool1d": batched(lambda: nn.AdaptiveMaxPool1d(5), _ROW),
    "AdaptiveMaxPool2d": batched(lambda: nn.AdaptiveMaxPool2d((5, 3)), _IMAGE),
    "AdaptiveMaxPool3d": batched(lambda: nn.AdaptiveMaxPool3d(2), _VOLUME),
    "AdaptiveAvgPool1d": batched(lambda: nn.AdaptiveAvgPool1d(5), _ROW),
    "AdaptiveAvgPool2d": batched(lambda: nn.AdaptiveAvgPool2d((5, 3)), _IMAGE),
    "AdaptiveAvgPool3d": batched(lambda: nn.AdaptiveAvgPool3d(2), _VOLUME),
    "MaxUnpool1d": lambda: Model(Unpool(nn.MaxPool1d, nn.MaxUnpool1d), signal(2, 8, 12)),
    "MaxUnpool2d": lambda: Model(Unpool(nn.MaxPool2d, nn.MaxUnpool2d), signal(2, 8, 12, 12)),
    "MaxUnpool3d": lambda: Model(Unpool(nn.MaxPool3d, nn.MaxUnpool3d), signal(2, 8, 6, 6, 6)),
    "FractionalMaxPool2d": lambda: Model(
        nn.FractionalMaxPool2d(2, output_size=5, _random_samples=torch.rand(2, 8, 2)),
        signal(2, 8, 12, 12),
    ),
}


class Unpool(nn.Module):
    def __init__(self, pool: Any, unpool: Any) -> None:
        super().__init__()
        self.pool, self.unpool = pool(2, return_indices=True), unpool(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unpool(*self.pool(x))


def _pad(kind: str, dims: int) -> Callable[[], Model]:
    values = (1, 0.5) if kind == "Constant" else (1,)
    return batched(lambda: getattr(nn, f"{kind}Pad{dims}d")(*values), (2, 8, *[6] * dims))


_PADS = {
    f"{kind}Pad{dims}d": _pad(kind, dims)
    for kind in ("Reflection", "Replication", "Zero", "Constant", "Circular")
    for dims in (1, 2, 3)
}
_ACTIVATIONS = {
    name: batched(getattr(nn, name), (4, 6))
    for name in (
        "ELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardtanh",
        "Hardswish",
        "LeakyReLU",
        "LogSigmoid",
        "PReLU",
        "ReLU",
        "ReLU6",
        "RReLU",
        "SELU",
        "CELU",
        "GELU",
        "Sigmoid",
        "SiLU",
        "Mish",
        "Softplus",
        "Softshrink",
        "Softsign",
        "Tanh",
        "Tanhshrink",
        "GLU",
    )
} | {
    "Threshold": batched(lambda: nn.Threshold(0.1, 2.0), (4, 6)),
    "GELU tanh": batched(lambda: nn.GELU("tanh"), (4, 6)),
    "Softmin": batched(lambda: nn.Softmin(1), (4, 6)),
    "Softmax": batched(lambda: nn.Softmax(1), (4, 6)),
    "Softmax2d": batched(nn.Softmax2d, _IMAGE),
    "LogSoftmax": batched(lambda: nn.LogSoftmax(1), (4, 6)),
    "AdaptiveLogSoftmaxWithLoss log_prob": lambda: Model(
        nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10]).log_prob, signal(3, 16)
    ),
    "MultiheadAttention": lambda: Model(
        nn.MultiheadAttention(16, 4, batch_first=True).eval(),
        (torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)),
    ),
    "MultiheadAttention masks": lambda: Model(
        nn.MultiheadAttention(16, 4, kdim=8, vdim=8, add_bias_kv=True).eval(),
        (torch.randn(5, 2, 16), torch.randn(7, 2, 8), torch.randn(7, 2, 8)),
        {"key_padding_mask": torch.zeros(2, 7, dtype=torch.bool), "need_weights": False},
    ),
}
_NORMS = {
    "BatchNorm1d": batched(lambda: nn.BatchNorm1d(8), _ROW),
    "BatchNorm2d": batched(lambda: nn.BatchNorm2d(8), _IMAGE),
    "BatchNorm3d": batched(lambda: nn.BatchNorm3d(8), _VOLUME),
    "BatchNorm2d without statistics": batched(
        lambda: nn.BatchNorm2d(8, track_running_stats=False), _IMAGE
    ),
    "GroupNorm": batched(lambda: nn.GroupNorm(2, 8), _IMAGE),
    "SyncBatchNorm": batched(lambda: nn.SyncBatchNorm(8), _IMAGE),
    "InstanceNorm1d": batched(lambda: nn.InstanceNorm1d(8), _ROW),
    "InstanceNorm2d": batched(lambda: nn.InstanceNorm2d(8, affine=True), _IMAGE),
    "InstanceNorm3d": batched(lambda: nn.InstanceNorm3d(8), _VOLUME),
    "InstanceNorm2d statistics": batched(
        lambda: nn.InstanceNorm2d(8, track_running_stats=True), _IMAGE
    ),
    "LayerNorm": batched(lambda: nn.LayerNorm(12), _ROW),
    "LocalResponseNorm": batched(lambda: nn.LocalResponseNorm(2), _IMAGE),
    "RMSNorm": batched(lambda: nn.RMSNorm(12), _ROW),
    "weight_norm": batched(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 4)), _ROW),
    "spectral_norm": batched(
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(12, 4)), _ROW
    ),
    "orthogonal": batched(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(12, 4)), _ROW),
}
_RECURRENT = {
    "RNN": layer(lambda: nn.RNN(6, 5), torch.randn(4, 3, 6)),
    "RNN relu": layer(lambda: nn.RNN(6, 5, 2, nonlinearity="relu"), torch.randn(4, 3, 6)),
    "LSTM": layer(lambda: nn.LSTM(6, 5, 2), torch.randn(4, 3, 6)),
    "LSTM dynamic": lambda: Model(
        nn.LSTM(6, 5, batch_first=True).eval(),
        signal(3, 4, 6),
        {},
        {"input": {0: "batch", 1: "time"}},
        signal(5, 9, 6),
    ),
    "LSTM bidirectional": layer(
        lambda: nn.LSTM(6, 5, bidirectional=True, batch_first=True), torch.randn(3, 4, 6)
    ),
    "LSTM projected": layer(lambda: nn.LSTM(6, 5, proj_size=3), torch.randn(4, 3, 6)),
    "LSTM without a batch": layer(lambda: nn.LSTM(6, 5), torch.randn(4, 6)),
    "LSTM with states": layer(
        lambda: LastState(nn.LSTM(6, 5)),
        torch.randn(4, 3, 6),
        torch.randn(1, 3, 5),
        torch.randn(1, 3, 5),
    ),
    "GRU": layer(lambda: nn.GRU(6, 5, 2, bidirectional=True), torch.randn(4, 3, 6)),
    "GRU with state": layer(
        lambda: LastState(nn.GRU(6, 5)), torch.randn(4, 3, 6), torch.randn(1, 3, 5)
    ),
    "RNNCell": batched(lambda: nn.RNNCell(6, 5), (3, 6), (3, 5)),
    "LSTMCell": batched(lambda: nn.LSTMCell(6, 5), (3, 6)),
    "GRUCell": batched(lambda: nn.GRUCell(6, 5), (3, 6), (3, 5)),
}
_TRANSFORMERS = {
    "TransformerEncoderLayer": batched(
        lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 5, 16)
    ),
    "TransformerEncoder": batched(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, norm_first=True), 2),
        (5, 2, 16),
    ),
    "TransformerDecoderLayer": batched(
        lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), (2, 5, 16), (2, 7, 16)
    ),
    "Transformer": batched(
        lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True), (2, 5, 16), (2, 7, 16)
    ),
    "Transformer causal": lambda: Model(
        nn.Transformer(16, 4, 1, 1, 32, batch_first=True).eval(),
        (torch.randn(2, 5, 16), torch.randn(2, 7, 16)),
        {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(7), "tgt_is_causal": True},
    ),
}
_LINEAR = {
    "Identity": batched(nn.Identity, (3, 6)),
    "Linear": batched(lambda: nn.Linear(6, 5), (3, 6)),
    "Bilinear": batched(lambda: nn.Bilinear(6, 5, 4), (3, 6), (3, 5)),
    "LazyLinear": lambda: Model(lazy(nn.LazyLinear(5), torch.randn(3, 6)), signal(3, 6)),
    "Embedding": layer(lambda: nn.Embedding(9, 4, padding_idx=0), torch.tensor([[1, 2], [0, 8]])),
    "Embedding max_norm": layer(lambda: nn.Embedding(9, 4, max_norm=1.0), torch.tensor([1, 2])),
    "EmbeddingBag sum": layer(
        lambda: nn.EmbeddingBag(9, 4, mode="sum"), torch.tensor([[1, 2], [0, 8]])
    ),
    "EmbeddingBag mean offsets": layer(
        lambda: nn.EmbeddingBag(9, 4), torch.tensor([1, 2, 0, 8]), torch.tensor([0, 3])
    ),
    "EmbeddingBag max": layer(
        lambda: nn.EmbeddingBag(9, 4, mode="max"), torch.tensor([[1, 2], [0, 8]])
    ),
    "Dropout": batched(nn.Dropout, (3, 6)),
    "Dropout1d": batched(nn.Dropout1d, _ROW),
    "Dropout2d": batched(nn.Dropout2d, _IMAGE),
    "Dropout3d": batched(nn.Dropout3d, _VOLUME),
    "AlphaDropout": batched(nn.AlphaDropout, (3, 6)),
    "FeatureAlphaDropout": batched(nn.FeatureAlphaDropout, _IMAGE),
    "CosineSimilarity": batched(nn.CosineSimilarity, (3, 6), (3, 6)),
    "PairwiseDistance": batched(nn.PairwiseDistance, (3, 6), (3, 6)),
    "PixelShuffle": batched(lambda: nn.PixelShuffle(2), _IMAGE),
    "PixelUnshuffle": batched(lambda: nn.PixelUnshuffle(2), _IMAGE),
    "ChannelShuffle": batched(lambda: nn.ChannelShuffle(2), _IMAGE),
    "Unfold": batched(lambda: nn.Unfold(3, padding=1), _IMAGE),
    "Fold": batched(lambda: nn.Fold((6, 6), 2, stride=2), (2, 8, 9)),
    "Flatten": batched(nn.Flatten, _IMAGE),
    "Unflatten": batched(lambda: nn.Unflatten(1, (2, 4)), _IMAGE),
    "ParameterList": batched(lambda: Powers(), (3, 6)),
}


def lazy(module: nn.Module, x: torch.Tensor) -> nn.Module:
    module(x)
    return module.eval()


class Powers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(3)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(6))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((w * x**n for n, w in enumerate(self.weights)), self.named["bias"])


def _upsample(mode: str, shape: tuple[int, ...], options: dict[str, Any]) -> Callable[[], Model]:
    return batched(lambda: nn.Upsample(mode=mode, **options), shape)


_UPSAMPLES = {
    f"Upsample {mode} {options}": _upsample(mode, shape, options)
    for mode, shape, options in (
        ("nearest", _ROW, {"scale_factor": 2}),
        ("nearest", _IMAGE, {"size": (20, 7)}),
        ("nearest", _VOLUME, {"scale_factor": 2}),
        ("linear", _ROW, {"scale_factor": 1.5, "align_corners": True}),
        ("bilinear", _IMAGE, {"scale_factor": 2.0}),
        ("bilinear", _IMAGE, {"size": (20, 7), "align_corners": True}),
        ("bicubic", _IMAGE, {"scale_factor": 2}),
        ("trilinear", _VOLUME, {"scale_factor": 2}),
        ("area", _IMAGE, {"size": (6, 6)}),
        ("nearest-exact", _IMAGE, {"scale_factor": 2}),
    )
}
_CLASSES = torch.tensor([1, 0, 3])
_LOSSES = {
    "L1Loss": batched(nn.L1Loss, (3, 6), (3, 6)),
    "MSELoss": batched(nn.MSELoss, (3, 6), (3, 6)),
    "CrossEntropyLoss": layer(nn.CrossEntropyLoss, torch.randn(3, 6), _CLASSES),
    "CrossEntropyLoss options": layer(
        lambda: nn.CrossEntropyLoss(torch.rand(6), ignore_index=1, label_smoothing=0.1),
        torch.randn(3, 6),
        _CLASSES,
    ),
    "CrossEntropyLoss probabilities": layer(
        nn.CrossEntropyLoss, torch.randn(3, 6), torch.rand(3, 6).softmax(1)
    ),
    "CrossEntropyLoss of images": layer(
        nn.CrossEntropyLoss, torch.randn(2, 6, 4, 4), torch.randint(0, 6, (2, 4, 4))
    ),
    "CTCLoss": layer(
        lambda: Loss(nn.CTCLoss()),
        torch.randn(10, 2, 6).log_softmax(2),
        torch.randint(1, 6, (2, 4)),
        torch.tensor([10, 9]),
        torch.tensor([4, 3]),
    ),
    "NLLLoss": layer(nn.NLLLoss, torch.randn(3, 6).log_softmax(1), _CLASSES),
    "PoissonNLLLoss": batched(nn.PoissonNLLLoss, (3, 6), (3, 6)),
    "GaussianNLLLoss": layer(nn.GaussianNLLLoss, torch.randn(3), torch.randn(3), torch.rand(3)),
    "KLDivLoss": layer(
        lambda: nn.KLDivLoss(reduction="batchmean"),
        torch.randn(3, 6).log_softmax(1),
        torch.rand(3, 6).softmax(1),
    ),
    "BCELoss": layer(nn.BCELoss, torch.rand(3, 6), torch.rand(3, 6)),
    "BCEWithLogitsLoss": batched(nn.BCEWithLogitsLoss, (3, 6), (3, 6)),
    "MarginRankingLoss": layer(
        nn.MarginRankingLoss, torch.randn(3), torch.randn(3), torch.randn(3).sign()
    ),
    "HingeEmbeddingLoss": layer(nn.HingeEmbeddingLoss, torch.randn(3), torch.randn(3).sign()),
    "MultiLabelMarginLoss": layer(
        nn.MultiLabelMarginLoss, torch.randn(2, 4), torch.tensor([[3, 0, -1, 1], [1, -1, 0, 0]])
    ),
    "HuberLoss": batched(nn.HuberLoss, (3, 6), (3, 6)),
    "SmoothL1Loss": batched(nn.SmoothL1Loss, (3, 6), (3, 6)),
    "SoftMarginLoss": layer(nn.SoftMarginLoss, torch.randn(3), torch.randn(3).sign()),
    "MultiLabelSoftMarginLoss": layer(
        nn.MultiLabelSoftMarginLoss, torch.randn(3, 6), torch.rand(3, 6).round()
    ),
    "CosineEmbeddingLoss": layer(
        nn.CosineEmbeddingLoss, torch.randn(3, 6), torch.randn(3, 6), torch.randn(3).sign()
    ),
    "MultiMarginLoss": layer(nn.MultiMarginLoss, torch.randn(3, 6), _CLASSES),
    "TripletMarginLoss": batched(nn.TripletMarginLoss, (3, 6), (3, 6), (3, 6)),
    "TripletMarginWithDistanceLoss": batched(
        nn.TripletMarginWithDistanceLoss, (3, 6), (3, 6), (3, 6)
    ),
}

CASES: list[Case] = [
    Case(name, family, build)
    for family, builders in (
        ("convolution", _CONVOLUTIONS),
        ("pooling", _POOLS),
        ("padding", _PADS),
        ("activation", _ACTIVATIONS),
        ("normalisation", _NORMS),
        ("recurrent", _RECURRENT),
        ("transformer layer", _TRANSFORMERS),
        ("linear and shape", _LINEAR),
        ("upsampling", _UPSAMPLES),
        ("loss", _LOSSES),
    )
    for name, build in builders.items()
]
