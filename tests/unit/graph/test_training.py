"""Training steps as programs: many kinds of layers, each against eager torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import nn

from nextgpu_node.graph.optimizers import SGD, Adam, AdamW, describe_optimizer
from tests.support.training import train_both

IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 10
IDS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


class TiedTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.layer(self.embed(ids))).flatten(0, 1)


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.layers = kind(4, 8, batch_first=True, bidirectional=True)
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        return self.out(self.layers(x)[0][:, -1])


class Indexed(nn.Module):
    """Reads and writes at positions: each has a scatter or an index as its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 4))
        self.out = nn.Linear(4, 1)

    def forward(self, at):
        columns = at[:, None].expand(-1, 4)
        rows = self.table[at] + self.table.index_select(0, at) + self.table.gather(0, columns)
        summed = torch.zeros(10, 4).index_add(0, at, rows).scatter_add(0, columns, rows)
        ordered = summed.sort(0).values.cumsum(0).amax(1, keepdim=True).expand(-1, 4)
        return self.out(ordered + summed.topk(4, 1).values + summed.norm(dim=1, keepdim=True))


def flat_loss(output, ids):
    return F.cross_entropy(output, ids.flatten())


CASES = {
    "convolution, batch norm, max pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(36, 10),
        ),
        nn.CrossEntropyLoss(), (IMAGES, LABELS),
    ),
    "group norm, average pools": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, stride=2, bias=False), nn.GroupNorm(2, 8), nn.SiLU(),
            nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        ),
        nn.CrossEntropyLoss(), (IMAGES, LABELS),
    ),
    "transposed convolution, instance norm, interpolation; slow": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(1, 4, 3, stride=2), nn.InstanceNorm2d(4, affine=True),
            nn.LeakyReLU(), nn.Upsample(scale_factor=0.5, mode="bilinear"),
            nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 10),
        ),
        nn.CrossEntropyLoss(), (IMAGES, LABELS),
    ),
    "layer norm, gelu, soft labels": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 10)
        ),
        nn.CrossEntropyLoss(label_smoothing=0.1), (IMAGES, LABELS),
    ),
    "attention with tied weights": (TiedTransformer, flat_loss, (IDS, IDS)),
    "LSTM": (
        lambda: Recurrent(nn.LSTM), nn.CrossEntropyLoss(), (torch.ones(12, 3, 4), LABELS)
    ),
    "GRU, slow": (lambda: Recurrent(nn.GRU), nn.CrossEntropyLoss(), (torch.ones(12, 5, 4), LABELS)),
    "reads and writes at positions": (
        Indexed, F.smooth_l1_loss, (torch.tensor([1, 3, 3, 9]), torch.ones(10, 1))
    ),
}  # fmt: skip


def plain_sgd(parameters):
    # No adaptive step sizes: they would blow rounding up where a gradient is zero but for it.
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[pytest.mark.slow] * one.endswith("slow")) for one in CASES],
)
def test_a_step_trains_as_eager_torch_does(name):
    make, loss_fn, batch = CASES[name]
    torch.manual_seed(0)
    trained = train_both(make(), loss_fn, [batch], plain_sgd, steps=3)
    assert trained.loss_difference() < 1e-5
    assert trained.state_difference() < 1e-5
    assert trained.losses[-1] < trained.losses[0]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), SGD(lr=0.1)),
    "SGD with all its options": (
        sgd, SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    ),
    "SGD with dampening": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
        SGD(lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    ),
    "Adam": (
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
        Adam(lr=1e-2, weight_decay=0.1),
    ),
    "AdamW": (adamw, AdamW(lr=1e-2)),
    "AdamW with all its options": (
        lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.99), 1e-6, 0.1, amsgrad=True),
        AdamW(1e-2, (0.8, 0.99), 1e-6, 0.1, amsgrad=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_and_its_description_do_what_torch_does(name):
    optimizer, described = OPTIMIZERS[name]
    # Half of them as instances, half in words.
    in_words = list(OPTIMIZERS).index(name) % 2
    trained = train_both(
        mlp(),
        F.cross_entropy,
        [(IMAGES, LABELS)],
        optimizer,
        described=described if in_words else None,
    )
    assert trained.loss_difference() < 1e-6
    assert trained.state_difference() < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_torch_optimizer_is_read_as_its_description(name):
    optimizer, described = OPTIMIZERS[name]
    (group,) = describe_optimizer(optimizer(mlp().parameters())).groups
    assert group.rule == described
