"""Networks written out here, of the kinds that people write: vision, graphs, sequences, science."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as f
from torch import Tensor, nn

from tests.zoo.case import Case, Model


def conv_bn(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


# ---------------------------------------------------------------- vision


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x))
        out += self.short(x)
        return f.relu(out, inplace=True)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * n), nn.ReLU(), nn.Conv2d(8 + 4 * n, 4, 3, 1, 1))
            for n in range(3)
        )
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(f.adaptive_avg_pool2d(torch.cat(features, 1), 1).flatten(1))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = conv_bn(8, 4, 1)
        self.three = nn.Sequential(conv_bn(8, 4, 1), conv_bn(4, 6, 3))
        self.five = nn.Sequential(conv_bn(8, 2, 1), conv_bn(2, 4, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Fire(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.one, self.three = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.squeeze(x))
        return torch.cat([f.relu(self.one(x)), f.relu(self.three(x))], 1)


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_bn(4, 4, 1), conv_bn(4, 4, 3, groups=4), conv_bn(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, self.branch(changed)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class SqueezeExcite(nn.Module):
    """The inverted residual of MobileNetV3 and EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv2d(24, 24, 5, 1, 2, groups=24), nn.SiLU())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(24, 6, 1),
            nn.ReLU(),
            nn.Conv2d(6, 24, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.depth(self.expand(x))
        return x + self.project(out * self.gate(out))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(self.norms[0](x).mT).mT
        return (x + self.channels(self.norms[1](x))).mean(1)


class TimeEmbedding(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, steps: Tensor) -> Tensor:
        half = self.size // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        angles = steps[:, None].float() * frequencies[None]
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))


class DiffusionBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.scale = nn.Linear(time, 2 * outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out = self.conv(f.silu(self.norm(x)))
        scale, shift = self.scale(f.silu(time))[..., None, None].chunk(2, 1)
        out = self.conv2(f.silu(self.norm2(out) * (1 + scale) + shift))
        return out + self.short(x)


class SpatialAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(flat).view(n, h * w, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        out = f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.out(out).transpose(1, 2).view(n, c, h, w)


class DiffusionUNet(nn.Module):
    """Predicts the noise in an image at a step of a diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimeEmbedding(16)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([DiffusionBlock(8, 16, 16), DiffusionBlock(16, 32, 16)])
        self.middle, self.attention = DiffusionBlock(32, 32, 16), SpatialAttention(32)
        self.up = nn.ModuleList([DiffusionBlock(64, 16, 16), DiffusionBlock(32, 8, 16)])
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        time = self.time(steps)
        x = self.first(x)
        kept = []
        for block in self.down:
            x = block(x, time)
            kept.append(x)
            x = f.avg_pool2d(x, 2)
        x = self.attention(self.middle(x, time))
        for block in self.up:
            x = f.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, kept.pop()], 1), time)
        return self.last(x)


class FeaturePyramid(nn.Module):
    """Multi-scale features with a detection head over anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [conv_bn(3, 8, 3, 2), conv_bn(8, 16, 3, 2), conv_bn(16, 32, 3, 2)]
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (8, 16, 32))
        self.scores, self.boxes = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        top, merged = None, []
        for lateral, feature in zip(reversed(self.lateral), reversed(features), strict=True):
            out = lateral(feature)
            if top is not None:
                out = out + f.interpolate(top, size=out.shape[-2:], mode="bilinear")
            top = out
            merged.append(out)
        scores = torch.cat([self.scores(m).permute(0, 2, 3, 1).flatten(1) for m in merged], 1)
        boxes = torch.cat(
            [self.boxes(m).permute(0, 2, 3, 1).reshape(len(m), -1, 4) for m in merged], 1
        )
        best = scores.sigmoid().topk(5, 1)
        at = (best.indices // 3 % boxes.shape[1])[..., None].expand(-1, -1, 4)
        return {"scores": best.values, "boxes": boxes.gather(1, at).exp()}


class RegionAlign(nn.Module):
    """Crops regions by grid sampling, as two-stage detectors do."""

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        steps = torch.linspace(0, 1, 7)
        x = boxes[:, :1] + steps * (boxes[:, 2:3] - boxes[:, :1])
        y = boxes[:, 1:2] + steps * (boxes[:, 3:] - boxes[:, 1:2])
        grid = torch.stack([x[:, None].expand(-1, 7, 7), y[..., None].expand(-1, 7, 7)], -1)
        return f.grid_sample(features.expand(len(boxes), -1, -1, -1), grid * 2 - 1).amax((2, 3))


class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 6))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.locate(x).view(-1, 2, 3)
        return f.grid_sample(x, f.affine_grid(theta, x.size(), align_corners=False))


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2), nn.PReLU(), nn.Conv2d(16, 12, 3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        up = f.interpolate(x, scale_factor=2, mode="bicubic")
        return (f.pixel_shuffle(self.body(x), 2) + up).clamp(0, 1)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(16, 16, 4),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2, True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])


class StyleBlock(nn.Module):
    """Modulated convolution with demodulation, as in StyleGAN2: a group for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8, 4, 3, 3))
        self.style = nn.Linear(16, 4)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        n, c, h, width = x.shape
        weight = self.weight * self.style(w).view(n, 1, c, 1, 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
        out = f.conv2d(x.reshape(1, n * c, h, width), weight.flatten(0, 1), padding=1, groups=n)
        return out.view(n, 8, h, width)


class VariationalAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(32, 16), nn.Linear(8, 32)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + noise * (0.5 * log_variance).exp()
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)
        return self.decoder(z).sigmoid(), divergence.mean()


class VectorQuantiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(12, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nearest = torch.cdist(x, self.codes.weight).argmin(-1)
        chosen = self.codes(nearest)
        return x + (chosen - x).detach(), nearest


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.encoder(left), self.encoder(right)
        return f.cosine_similarity(a, b) - f.pairwise_distance(a, b)


# ---------------------------------------------------------------- sets and graphs


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Linear(3, 9)
        self.features = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, points: Tensor) -> Tensor:
        align = self.transform(points.mean(1)).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.features((points @ align).mT).max(2).values)


class GraphConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = torch.ones(x.shape[0]).index_add(0, target, torch.ones(edges.shape[1]))
        weight = (degree[source] * degree[target]).rsqrt()[:, None]
        for layer in (self.first, self.second):
            x = layer(x)
            x = torch.relu(x + torch.zeros_like(x).index_add(0, target, x[source] * weight))
        return x


class GraphAttention(nn.Module):
    """Softmax over the neighbours of each node, by scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.score = nn.Linear(8, 12), nn.Linear(24, 1)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        source, target = edges
        h = self.value(x)
        score = f.leaky_relu(self.score(torch.cat([h[source], h[target]], -1)), 0.2).squeeze(-1)
        top = torch.full((x.shape[0],), -1e9).scatter_reduce(0, target, score, "amax")
        share = (score - top[target]).exp()
        total = torch.zeros(x.shape[0]).scatter_add_(0, target, share)
        messages = h[source] * (share / total[target])[:, None]
        h = torch.zeros_like(h).scatter_add_(0, target[:, None].expand_as(messages), messages)
        pooled = torch.zeros(3, 12).index_reduce(0, graph, h, "mean", include_self=False)
        return pooled.log_softmax(-1)


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.outer((self.inner(x).relu() * mask[..., None]).sum(1) / mask.sum(1, True))


# ---------------------------------------------------------------- sequences


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


class PackedLSTM(nn.Module):
    """Sequences of several lengths without packing: padding keeps the last true state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return states.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, 8)).squeeze(1)


class Temporal(nn.Module):
    """Dilated causal convolutions (TCN)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, dilation=2**n))
            for n in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for level, conv in enumerate(self.convs):
            x = x + conv(f.pad(x, (2 * 2**level, 0))).relu()
        return x


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ModuleList(
            nn.Conv1d(8, 16, 2, dilation=2**n, padding=2**n) for n in range(3)
        )
        self.outs = nn.ModuleList(nn.Conv1d(8, 16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        skipped = 0
        for conv, out in zip(self.filters, self.outs, strict=True):
            filtered, gate = conv(x)[..., : x.shape[-1]].chunk(2, 1)
            more, skip = out(filtered.tanh() * gate.sigmoid()).chunk(2, 1)
            x, skipped = x + more, skipped + skip
        return skipped.relu()


class AttentionDecoder(nn.Module):
    """A recurrent decoder that looks back at its encoder (Tacotron, seq2seq)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(6, 8, batch_first=True)
        self.cell, self.query, self.out = nn.GRUCell(14, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory, state = self.encoder(x)
        state, frame, frames, looks = state[0], x.new_zeros(x.shape[0], 6), [], []
        for _ in range(4):
            look = (memory @ self.query(state)[..., None]).squeeze(-1).softmax(-1)
            context = torch.bmm(look[:, None], memory).squeeze(1)
            state = self.cell(torch.cat([frame, context], -1), state)
            frame = self.out(state)
            frames.append(frame)
            looks.append(look)
        return torch.stack(frames, 1), torch.stack(looks, 1)


class StateSpace(nn.Module):
    """A diagonal state space, scanned step by step and by convolution (S4D)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.rand(8, 4))
        self.b, self.c = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decay = torch.exp(-self.log_decay)
        state, ys = torch.zeros(x.shape[0], 8, 4), []
        for step in x.unbind(2):
            state = decay * state + self.b * step[..., None]
            ys.append((state * self.c).sum(-1))
        length = x.shape[2]
        powers = decay[..., None] ** torch.arange(length)
        kernel = (self.c[..., None] * self.b[..., None] * powers).sum(1)
        spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(kernel, 2 * length)
        return torch.stack(ys, 2), torch.fft.irfft(spectrum, 2 * length)[..., :length]


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = f.elu(q) + 1, f.elu(k) + 1
        context = torch.einsum("btd,bte->btde", k, v).cumsum(1)
        return torch.einsum("btd,btde->bte", q, context) / (q * k.cumsum(1)).sum(-1, True)


class Rotary(nn.Module):
    """A decoder layer with rotary positions as complex numbers, RMS norm and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        angles = torch.outer(torch.arange(64).float(), 1e4 ** -(torch.arange(0, 4, 2) / 4))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def rotate(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], 2, 2))
        turned = turned * self.turns[: x.shape[1], None]
        return torch.view_as_real(turned).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 4, 4).unbind(2)
        q, k = self.rotate(q), self.rotate(k)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        mask = torch.full((t, t), float("-inf")).triu(1)
        weights = (q @ k.mT / 2 + mask).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(f.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A mixture of experts, dense: every expert sees every token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(4, 16, 32)),
            nn.Parameter(torch.randn(4, 32, 16)),
        )

    def forward(self, x: Tensor) -> Tensor:
        best = self.router(x).softmax(-1).topk(2, -1)
        share = torch.zeros(*x.shape[:-1], 4).scatter(-1, best.indices, best.values)
        out = torch.einsum("btd,edh->bteh", x, self.w1).relu()
        return torch.einsum("bteh,ehd,bte->btd", out, self.w2, share / share.sum(-1, True))


class SparseExperts(nn.Module):
    """A mixture of experts that gathers the weights of those chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).topk(2, -1)
        return torch.einsum("bk,bkde,bd->be", share, self.experts[chosen], x)


class Hopfield(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.randn(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = f.softmax(4 * x @ self.stored.T, -1) @ self.stored
        return x


# ---------------------------------------------------------------- science, control, recommendation


class Radiance(nn.Module):
    """A radiance field with positional encoding, composited along rays (NeRF)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(27, 32), nn.ReLU(), nn.Linear(32, 4))
        self.register_buffer("scales", 2.0 ** torch.arange(4))

    def forward(self, points: Tensor, distances: Tensor) -> Tensor:
        angles = (points[..., None] * self.scales).flatten(-2)
        out = self.layers(torch.cat([points, angles.sin(), angles.cos()], -1))
        alpha = 1 - torch.exp(-out[..., 3].relu() * distances)
        passed = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], 1), 1)[:, :-1]
        return ((alpha * passed)[..., None] * out[..., :3].sigmoid()).sum(1)


class FourierOperator(nn.Module):
    """A Fourier neural operator: complex weights on the low frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 4, 5, dtype=torch.cfloat))
        self.local = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        out[:, :, :5] = torch.einsum("bix,iox->box", spectrum[:, :, :5], self.weights)
        return f.gelu(torch.fft.irfft(out, n=x.shape[-1]) + self.local(x))


class NeuralODE(nn.Module):
    """An ordinary differential equation, unrolled by Runge-Kutta."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = 0.1
        for _ in range(4):
            a = self.rate(x)
            b = self.rate(x + h / 2 * a)
            c = self.rate(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + self.rate(x + h * c))
        return x


class Physics(nn.Module):
    """A physics-informed network: the output and its derivative by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value, derivative = torch.func.jvp(self.net, (t,), (torch.ones_like(t),))
        return value, derivative + value


class Splines(nn.Module):
    """A Kolmogorov-Arnold layer: B-splines on every edge."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-2, 2, 12))
        self.weights = nn.Parameter(torch.randn(5, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None]
        bases = ((x >= self.knots[:-1]) & (x < self.knots[1:])).to(x.dtype)
        for order in range(1, 4):
            left = (x - self.knots[: -order - 1]) / (
                self.knots[order:-1] - self.knots[: -order - 1]
            )
            right = (self.knots[order + 1 :] - x) / (self.knots[order + 1 :] - self.knots[1:-order])
            bases = left * bases[..., :-1] + right * bases[..., 1:]
        return torch.einsum("bik,oik->bo", bases, self.weights)


class ActorCritic(nn.Module):
    class Output(NamedTuple):
        policy: Tensor
        value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, seen: Tensor, allowed: Tensor) -> Output:
        h = self.body(seen).tanh()
        logits = self.policy(h).masked_fill(~allowed, torch.finfo(h.dtype).min)
        return self.Output(logits.log_softmax(-1), self.value(h).squeeze(-1))


class Recommender(nn.Module):
    """Factorisation machine with embeddings of categories (DLRM, DeepFM)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(20, 8, mode="sum") for _ in range(3))
        self.dense, self.out = nn.Linear(4, 8), nn.Linear(14, 1)

    def forward(self, dense: Tensor, categories: list[Tensor]) -> Tensor:
        parts = [self.dense(dense).relu()]
        parts += [table(ids) for table, ids in zip(self.tables, categories, strict=True)]
        stacked = torch.stack(parts, 1)
        products = stacked @ stacked.mT
        rows, columns = torch.tril_indices(4, 4, -1)
        return self.out(torch.cat([parts[0], products[:, rows, columns]], 1)).sigmoid()


@dataclass
class Detections:
    boxes: Tensor
    scores: list[Tensor]
    count: int
    extra: Tensor | None = None


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Detections:
        return Detections(self.head(x) * scale, [x.sum(), x.mean()], 3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids).mean(1))


class Quantised(nn.Module):
    """Weights of eight bits with a scale for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 127, (8, 16), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(8, 1) / 100)

    def forward(self, x: Tensor) -> Tensor:
        return f.linear(x, self.weight.to(x.dtype) * self.scale)


class LowRank(nn.Module):
    """A frozen layer with a low-rank update (LoRA) and a gated skip."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(16, 2)), nn.Parameter(torch.randn(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            kept = self.base(x)
        return kept + x @ self.a @ self.b


def model(module: nn.Module, *args: Any, **more: Any) -> Callable[[], Model]:
    return lambda: Model(_settled(module), args, **more)


def _settled(module: nn.Module) -> nn.Module:
    """In inference, with statistics of normalisation other than their defaults."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return module.eval()


def batch(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Callable[[], Model]:
    """Random inputs whose first dimension varies."""

    def build() -> Model:
        return Model(
            _settled(make()),
            tuple(torch.randn(shape) for shape in shapes),
            {},
            [{0: "batch"}] * len(shapes),
            tuple(torch.randn(shape[0] + 1, *shape[1:]) for shape in shapes),
        )

    return build


def _graph(nodes: int, edges: int) -> tuple[Tensor, Tensor]:
    return torch.randn(nodes, 8), torch.randint(0, nodes, (2, edges))


def unet() -> Model:
    return Model(
        DiffusionUNet().eval(),
        (torch.randn(2, 3, 16, 16), torch.tensor([3, 800])),
        {},
        [{0: "batch"}, {0: "batch"}],
        (torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 999])),
    )


def tagger() -> Model:
    return Model(
        Tagger().eval(),
        (torch.randint(0, 50, (2, 7)),),
        {},
        {"ids": {0: "batch", 1: "time"}},
        (torch.randint(0, 50, (3, 11)),),
    )


def graph_convolution() -> Model:
    return Model(
        GraphConvolution().eval(),
        _graph(6, 10),
        {},
        {"x": {0: "nodes"}, "edges": {1: "edges"}},
        _graph(9, 30),
    )


def graph_attention() -> Model:
    return Model(
        GraphAttention().eval(),
        (*_graph(6, 10), torch.tensor([0, 0, 1, 1, 2, 2])),
        {},
        {"x": {0: "nodes"}, "edges": {1: "edges"}, "graph": {0: "nodes"}},
        (*_graph(9, 30), torch.randint(0, 3, (9,))),
    )


_VISION = {
    "ResNet block": batch(lambda: BasicBlock(3, 8, 2), (2, 3, 16, 16)),
    "DenseNet": batch(DenseNet, (2, 8, 8, 8)),
    "Inception": batch(Inception, (2, 8, 8, 8)),
    "SqueezeNet": batch(Fire, (2, 8, 8, 8)),
    "ShuffleNet": batch(Shuffle, (2, 8, 8, 8)),
    "MobileNetV3, EfficientNet": batch(SqueezeExcite, (2, 8, 8, 8)),
    "MLP-Mixer": batch(Mixer, (2, 3, 16, 16)),
    "diffusion UNet": unet,
    "feature pyramid detector": lambda: Model(
        _settled(FeaturePyramid()), (torch.randn(2, 3, 32, 32),)
    ),
    "region align": model(RegionAlign(), torch.randn(1, 4, 16, 16), torch.rand(3, 4)),
    "spatial transformer": batch(SpatialTransformer, (2, 3, 16, 16)),
    "super-resolution": batch(SuperResolution, (2, 3, 8, 8)),
    "GAN generator": batch(Generator, (2, 16)),
    "StyleGAN2 modulation": model(StyleBlock(), torch.randn(2, 4, 8, 8), torch.randn(2, 16)),
    "variational autoencoder": batch(VariationalAutoencoder, (2, 32), (2, 8)),
    "vector quantiser": batch(VectorQuantiser, (2, 5, 8)),
    "siamese": batch(Siamese, (2, 16), (2, 16)),
}
_GRAPHS = {
    "PointNet": batch(PointNet, (2, 20, 3)),
    "graph convolution": graph_convolution,
    "graph attention": graph_attention,
    "deep sets": lambda: Model(DeepSets(), (torch.randn(2, 5, 4), torch.ones(2, 5))),
}
_SEQUENCES = {
    "BiLSTM tagger": tagger,
    "padded LSTM": lambda: Model(PackedLSTM(), (torch.randn(3, 6, 4), torch.tensor([6, 2, 4]))),
    "TCN": batch(Temporal, (2, 8, 20)),
    "WaveNet": batch(WaveNet, (2, 8, 20)),
    "attention RNN": batch(AttentionDecoder, (2, 7, 6)),
    "S4 state space": batch(StateSpace, (2, 8, 12)),
    "linear attention": batch(LinearAttention, (2, 7, 16)),
    "rotary decoder": lambda: Model(
        Rotary(),
        (torch.randn(2, 7, 16),),
        {},
        {"x": {0: "batch", 1: "time"}},
        (torch.randn(3, 11, 16),),
    ),
    "dense experts": batch(Experts, (2, 7, 16)),
    "sparse experts": batch(SparseExperts, (3, 16)),
    "Hopfield": batch(Hopfield, (3, 16)),
}
_SCIENCE = {
    "NeRF": batch(Radiance, (4, 8, 3), (4, 8)),
    "Fourier neural operator": batch(FourierOperator, (2, 4, 16)),
    "neural ODE": batch(NeuralODE, (3, 4)),
    "physics-informed": lambda: Model(Physics().eval(), (torch.randn(5, 1),)),
    "Kolmogorov-Arnold": batch(Splines, (3, 6)),
    "actor-critic": lambda: Model(
        ActorCritic(), (torch.randn(2, 8), torch.tensor([[True, True, False]] * 2))
    ),
    "recommender": lambda: Model(
        Recommender(), (torch.randn(2, 4), [torch.randint(0, 20, (2, 3)) for _ in range(3)])
    ),
    "dataclass output": lambda: Model(DataclassOutput(), (torch.randn(2, 6),), {"scale": 3.0}),
    "tied weights": lambda: Model(Tied(), (torch.randint(0, 20, (2, 5)),)),
    "int8 weights": batch(Quantised, (2, 16)),
    "LoRA": batch(LowRank, (2, 16)),
    "bfloat16": lambda: Model(
        StyleBlock().bfloat16(), (torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 16).bfloat16())
    ),
    "float16": lambda: Model(Mixer().eval().half(), (torch.randn(2, 3, 16, 16).half(),)),
}

CASES: list[Case] = [
    Case(name, family, build)
    for family, builders in (
        ("vision network", _VISION),
        ("graph network", _GRAPHS),
        ("sequence network", _SEQUENCES),
        ("science and control", _SCIENCE),
    )
    for name, build in builders.items()
]
