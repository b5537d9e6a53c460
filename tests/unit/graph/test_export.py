"""Models of several kinds, exported, run as a worker would run them, and compared with eager."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import make_machine, run_local
from nextgpu_node.graph.optable import TABLE

torch.manual_seed(0)


def tensors_in(value) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def check(model, args, *, dynamic=None, other=None, tolerance=0.0):
    """Export with `args`, run with `other` (of other sizes), compare with eager."""
    program = export(model, args, dynamic=dynamic)
    args = other or args
    with torch.no_grad():
        expected = tensors_in(model(*args))
    results = run_local(program, *args)
    assert len(results) == len(expected)
    for result, wanted in zip(results.values(), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=tolerance)
    assert all(node.op in TABLE for node in program.spec.step.nodes)
    return program


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return {"logits": self.out(self.embed(ids))}


class RunningTotal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.total.add_(x)
        return {"total": self.total * 1, "done": self.total.sum() > 8}


class NoGradInside(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            doubled = x * 2
        return doubled + x


def cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(16, 10),
        nn.Softmax(-1),
    )
    model(torch.randn(4, 3, 16, 16))  # running statistics other than their defaults
    return model.eval()


def test_a_convolutional_network_with_batch_norm_at_another_batch_size():
    images = torch.randn(2, 3, 16, 16), torch.randn(5, 3, 16, 16)
    batch = {"input": {0: "batch"}}
    program = check(cnn(), images[:1], dynamic=batch, other=images[1:], tolerance=1e-6)
    assert program.spec.xs[0].shape == ("batch", 3, 16, 16)
    assert program.spec.ys[0].name == "output"


def test_recurrent_networks():
    lstm = nn.LSTM(4, 8, 2, batch_first=True, bidirectional=True).eval()
    check(lstm, (torch.randn(2, 5, 4),), tolerance=1e-6)
    check(nn.GRU(4, 8).eval(), (torch.randn(5, 2, 4),), tolerance=1e-6)


def test_normalisation_by_the_statistics_of_the_input():
    check(nn.InstanceNorm2d(3, affine=True).eval(), (torch.randn(2, 3, 5, 5),), tolerance=1e-5)


def test_batch_norm_in_training_carries_its_statistics():
    torch.manual_seed(1)
    model = nn.BatchNorm1d(3)
    batch = torch.randn(4, 3)
    machine = make_machine(export(model, (batch,)))
    result = machine.step({"input": batch}).ys["output"]
    torch.testing.assert_close(result, model(batch).detach(), rtol=0, atol=1e-6)
    for name, value in machine.carry().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6)


def test_a_transformer_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    check(model, (torch.randn(2, 7, 32),), tolerance=2e-6)


def test_tied_weights_are_sent_once():
    program = check(Tied(), (torch.tensor([1, 2]),))
    assert len(program.constants) == 1
    assert [spec.name for spec in program.spec.ys] == ["logits"]


def test_a_changed_buffer_is_the_carry_of_a_scan_that_stops():
    program = export(RunningTotal(), (torch.ones(3),), stop="done")
    machine = make_machine(program)
    outcomes = [machine.step({"x": torch.ones(3)}) for _ in range(3)]
    assert [outcome.stop for outcome in outcomes] == [False, False, True]
    assert outcomes[-1].ys["total"].tolist() == [3.0, 3.0, 3.0]
    assert machine.carry()["total"].tolist() == [3.0, 3.0, 3.0]
    # The program itself still starts from the beginning.
    assert program.carry["total"].tolist() == [0.0, 0.0, 0.0]


def test_a_scan_resumes_from_its_carry():
    program = export(RunningTotal(), (torch.ones(3),))
    first = make_machine(program)
    first.step({"x": torch.ones(3)})
    second = make_machine(program)
    second.load_carry(first.carry())
    whole = make_machine(program)
    for _ in range(2):
        expected = whole.step({"x": torch.ones(3)})
    resumed = second.step({"x": torch.ones(3)})
    assert torch.equal(resumed.ys["total"], expected.ys["total"])


FUNCTIONS = {
    "lists of results": (
        lambda x: [c * 2 for c in x.split(2)] + list(x.chunk(3, 1)) + list(x.unbind(0)),
        (torch.randn(5, 6),),
    ),
    "a composite that is taken apart": (
        lambda x, y: torch.einsum("bij,bjk->bik", x, y),
        (torch.randn(2, 3, 4), torch.randn(2, 4, 5)),
    ),
    "writes in place": (lambda x: x.clone().add_(1).relu_(), (torch.randn(3),)),
    "padding": (
        lambda x: nn.functional.pad(x, (1, 1), mode="reflect"),
        (torch.randn(1, 3, 8),),
    ),
    "interpolation": (
        lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
        (torch.randn(1, 3, 8, 8),),
    ),
    "half precision": (lambda x: (x.half() @ x.half().T).to(torch.bfloat16), (torch.randn(3, 3),)),
    "containers": (
        lambda a, b: a["k"][0] + b[1],
        ({"k": [torch.randn(2), torch.randn(2)]}, (torch.randn(2), torch.randn(2))),
    ),
    "scatter": (
        lambda x, i: torch.zeros(4, 3).scatter_add(0, i, x),
        (torch.randn(3, 3), torch.zeros(3, 3, dtype=torch.long)),
    ),
    "uninitialised memory": (lambda x: torch.empty_like(x).fill_(3) + x, (torch.randn(3),)),
    "a gradient mode": (NoGradInside(), (torch.randn(3),)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_tensors(name):
    function, args = FUNCTIONS[name]
    check(function, args)


def test_uninitialised_memory_is_served_as_zeros():
    program = export(lambda x: torch.empty_like(x), (torch.randn(1000),))
    assert not run_local(program, torch.randn(1000))["output"].any()


def test_arithmetic_on_sizes():
    sizes = torch.randn(4, 6), torch.randn(7, 6)
    check(
        lambda x: torch.cat([x, torch.ones(x.shape[0], 2)], 1).sum() * x.shape[0],
        sizes[:1],
        dynamic={"x": {0: "n"}},
        other=sizes[1:],
    )
    doubled = export(lambda x: torch.cat([x, x]), sizes[:1], dynamic={"x": {0: "n"}})
    assert doubled.spec.ys[0].shape == (None, 6)
    assert run_local(doubled, sizes[1])["output"].shape == (14, 6)


def test_inputs_in_containers_have_stable_names():
    program = export(lambda a, b: a["k"][0] + b[1], FUNCTIONS["containers"][1])
    assert [spec.name for spec in program.spec.xs] == ["a.k.0", "a.k.1", "b.0", "b.1"]


def test_a_size_out_of_its_range_is_refused():
    weight = torch.randn(8, 2)
    program = export(
        lambda x: x + weight[: x.shape[0]], (torch.randn(4, 2),), dynamic={"x": {0: "n"}}
    )
    assert program.spec.symbols[0].maximum == 8
    with pytest.raises(Exception, match="n is 9"):
        run_local(program, torch.randn(9, 2))


def even(x):
    return x * 2 if x.shape[0] % 2 == 0 else x * 3


def longer(x, y):
    return x.sum() * 2 + y.sum() if x.shape[0] > y.shape[0] else x.sum() + y.sum()


def not_five(x):
    return x * 2 if x.shape[0] != 5 else x * 3


def doubled(x, y):
    return x.view(-1, 2).sum(1) + y


@pytest.mark.parametrize(
    ("function", "example", "works", "fails"),
    [
        (even, (4,), (6,), (3,)),
        (longer, (4, 3), (9, 2), (3, 7)),
        (not_five, (4,), (6,), (5,)),
        (doubled, (8, 4), (6, 3), (6, 4)),
    ],
)
def test_a_branch_on_sizes_is_checked_at_other_sizes(function, example, works, fails):
    def inputs(sizes):
        return [torch.arange(float(size)) for size in sizes]

    names = [{0: name} for name in ("n", "m")][: len(example)]
    program = export(function, inputs(example), dynamic=names)
    assert torch.equal(run_local(program, *inputs(works))["output"], function(*inputs(works)))
    with pytest.raises(Exception, match=r"sizes|n is|m is"):
        run_local(program, *inputs(fails))


def test_checks_of_values_are_left_out():
    def checked(x):
        torch._check_tensor_all(x > 0)
        return x * 2

    program = export(checked, (torch.ones(3),))
    assert run_local(program, torch.ones(3))["output"].tolist() == [2.0, 2.0, 2.0]


def test_a_graph_taken_apart_for_one_device_runs_on_any():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken_apart = torch.export.export(attention, (x, x, x)).run_decompositions()
    program = export(taken_apart)
    ops = {node.op for node in program.spec.step.nodes}
    assert not any("flash" in op for op in ops)
    with torch.no_grad():
        expected = attention(x, x, x)
    for result, wanted in zip(run_local(program, x, x, x).values(), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-6)


def test_an_exported_program_of_the_submitter_is_taken():
    linear = nn.Linear(3, 2)
    x = torch.randn(1, 3)
    traced = torch.export.export(linear, (x,))
    assert torch.equal(run_local(export(traced), x)["output"], linear(x))


def random_layer(x):
    return torch.poisson(x.abs())


def data_dependent(x):
    return x[x > 0] * 2


def branching(x):
    return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (random_layer, "draw the numbers first"),
        (data_dependent, "depends on values"),
        (branching, "could not follow"),
    ],
)
def test_what_can_not_be_exported_names_its_line(function, words):
    with pytest.raises(ProgramError) as caught:
        export(function, (torch.randn(3),))
    assert words in str(caught.value)
    assert f"{Path(__file__).name}" in str(caught.value)


def test_wrong_names_are_told_with_the_right_ones():
    linear = nn.Linear(3, 2)
    with pytest.raises(ProgramError, match="the inputs are: input"):
        export(linear, (torch.randn(1, 3),), dynamic={"x": {0: "n"}})
    program = export(linear, (torch.randn(1, 3),))
    with pytest.raises(ProgramError, match="the inputs are: input"):
        run_local(program, x=torch.randn(1, 3))
    with pytest.raises(ProgramError, match="1 more inputs"):
        run_local(program)
    with pytest.raises(ProgramError, match="the outputs are: output"):
        export(linear, (torch.randn(1, 3),), stop="done")


def test_one_tensor_given_twice_is_two_inputs():
    x = torch.ones(3)
    program = export(lambda a, b: a - b, (x, x))
    assert run_local(program, x * 5, x * 2)["output"].tolist() == [3.0, 3.0, 3.0]
