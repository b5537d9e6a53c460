"""Whole runs of training: real data, dropout, a language model; and what else a step can do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import nn

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.local import make_machine
from nextgpu_node.graph.optimizers import SGD, AdamW, WarmupCosine, WarmupLinear
from nextgpu_node.graph.trained import load_carry_into
from nextgpu_node.graph.training import train_step
from tests.support.models import tiny_llama
from tests.support.training import train_both

BATCH = 64


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 handwritten digits, 8 x 8 (Alpaydin & Kaynak 1998), shuffled; scaled to 0 … 1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(found.target)[order]


def digit_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def accuracy(output, target):
    return {"accuracy": (output.argmax(-1) == target).float().mean()}


def test_a_network_learns_real_digits_as_it_does_in_eager_torch():
    images, labels = digits()
    train = [(images[at : at + BATCH], labels[at : at + BATCH]) for at in range(0, 1472, BATCH)]
    trained = train_both(
        digit_network(), nn.CrossEntropyLoss(), train,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), steps=2 * len(train),
        metrics=accuracy, dynamic={"input": {0: "batch"}, "target": {0: "batch"}},
    )  # fmt: skip
    # Rounding differs in the last bits and grows from step to step; measured: 3e-6.
    assert trained.loss_difference() < 1e-4
    assert trained.losses[-1] < 0.3 < 2 < trained.losses[0]

    def right(module: nn.Module) -> int:
        with torch.no_grad():
            return int((module.eval()(images[1472:]).argmax(-1) == labels[1472:]).sum())

    # Running statistics included: eval() uses them.
    mine = right(load_carry_into(digit_network(), trained.carry))
    assert mine == right(trained.eager)
    assert mine > 0.9 * 325
    assert [y.name for y in trained.program.spec.ys] == ["loss", "accuracy"]
    # Another size of batch, the rest of an epoch.
    machine = make_machine(trained.program)
    machine.step({"input": images[:7], "target": labels[:7]})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.out = nn.Linear(16, 13)

    def forward(self, ids):
        return self.out(self.layer(self.embed(ids))).flatten(0, 1)


def test_a_transformer_with_dropout_goes_on_from_a_carry_exactly():
    torch.manual_seed(0)
    ids = torch.randint(0, 13, (8, 6))
    program = train_step(
        Block(), lambda output, target: F.cross_entropy(output, target.flatten()), ids, ids,
        optimizer=AdamW(lr=1e-2), seed=3,
    )  # fmt: skip
    batch = {"ids": ids, "target": ids}
    whole, first, second = (make_machine(program) for _ in range(3))
    losses = [whole.step(batch).ys["loss"] for _ in range(6)]
    early = [first.step(batch).ys["loss"] for _ in range(3)]
    second.load_carry(first.carry())
    late = [second.step(batch).ys["loss"] for _ in range(3)]
    assert torch.equal(torch.stack(losses), torch.stack([*early, *late]))
    assert all(torch.equal(value, second.carry()[name]) for name, value in whole.carry().items())
    assert losses[-1] < losses[0]
    assert second.carry()["random_state"].tolist() == [3, 6]


def test_a_two_layer_llama_learns_as_it_does_in_eager_torch():
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
    trained = train_both(
        tiny_llama().train(), None, [({"input_ids": ids, "labels": ids}, ())],
        lambda p: torch.optim.AdamW(p, lr=1e-3), clip_norm=0.5,
    )  # fmt: skip
    assert trained.loss_difference() < 1e-5
    assert trained.state_difference() < 1e-4


# ---------------------------------------------------------------- what else there is to say

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 3


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_frozen_parameters_do_not_change_and_do_not_travel_back():
    module = small()
    module[0].requires_grad_(False)
    program = train_step(module, F.cross_entropy, X, Y, optimizer=SGD(lr=0.1))
    assert {"model/2.weight", "model/2.bias"} <= {one.name for one in program.spec.carry}
    assert not any("0." in one.name for one in program.spec.carry)
    assert {one.name for one in program.spec.constants} == {"module.0.weight", "module.0.bias"}


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (WarmupLinear(2, 6), [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        (WarmupCosine(1, 5, final=0.1), [0.5, 1, 0.9 * 0.8535534 + 0.1, 0.55, 0.2318019]),
    ],
)
def test_a_schedule_multiplies_the_learning_rate(schedule, factors):
    program = train_step(small(), F.cross_entropy, X, Y, optimizer=SGD(lr=0.5), schedule=schedule)
    machine = make_machine(program)
    eager = small()
    for factor in factors:
        optimizer = torch.optim.SGD(eager.parameters(), lr=0.5 * factor)
        loss = F.cross_entropy(eager(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step = machine.step({"input": X, "target": Y})
        torch.testing.assert_close(step.ys["loss"], loss.detach(), rtol=0, atol=1e-6)


def test_parameter_groups_keep_their_own_settings():
    def groups(parameters):
        first, second, *rest = list(parameters)
        return torch.optim.AdamW(
            [{"params": [first, second], "lr": 0.1}, {"params": rest, "weight_decay": 0.5}], lr=0.01
        )

    trained = train_both(small(), F.cross_entropy, [(X, Y)], groups)
    assert trained.state_difference() < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    ],
)
def test_training_goes_there_and_comes_back_in_the_middle(make):
    """Two steps here, two there, two here again: as six here."""

    def step_here(module, optimizer):
        loss = F.cross_entropy(module(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    eager = small()
    eager_optimizer = make(eager.parameters())
    for _ in range(6):
        step_here(eager, eager_optimizer)

    module = small()
    optimizer = make(module.parameters())
    for _ in range(2):
        step_here(module, optimizer)
    machine = make_machine(train_step(module, F.cross_entropy, X, Y, optimizer=optimizer))
    for _ in range(2):
        machine.step({"input": X, "target": Y})
    load_carry_into(module, machine.carry(), optimizer)
    for _ in range(2):
        step_here(module, optimizer)
    for mine, wanted in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


def test_a_carry_of_another_model_changes_nothing():
    carry = dict(make_machine(train_step(small(), F.cross_entropy, X, Y, optimizer=SGD())).carry())
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    before = {name: one.clone() for name, one in other.state_dict().items()}
    with pytest.raises(ProgramError, match="another model: 2"):
        load_carry_into(other, carry)
    assert all(torch.equal(one, before[name]) for name, one in other.state_dict().items())
    with pytest.raises(ProgramError, match="holds no model"):
        load_carry_into(other, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_fn": lambda output, target: output}, "it must be one floating-point number"),
        ({"loss_fn": None}, "targets need a loss_fn"),
        ({"loss_fn": None, "targets": ()}, "it must be one floating-point number"),
        ({"loss_fn": lambda output, target: target.sum() * 1.0}, "does not depend"),
        ({"inputs": (X, X)}, "do not fit"),
        ({"optimizer": torch.optim.Adagrad([nn.Parameter(X)])}, "The optimizer is a Adagrad"),
        ({"optimizer": SGD(nesterov=True)}, "Nesterov"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(X)])}, "Nothing is trained"),
        ({"module": "small"}, "not a torch.nn.Module"),
    ],
)
def test_what_can_not_be_trained_is_told_in_words(change, words):
    given = {
        "module": small(), "loss_fn": F.cross_entropy, "inputs": X, "targets": Y,
        "optimizer": SGD(), **change,
    }  # fmt: skip
    with pytest.raises(ProgramError, match=words):
        train_step(**given)
