"""What a call may be made of: containers, objects, numbers, modules that a function closes over."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import make_machine, run_local


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Batch:
    ids: torch.Tensor
    extra: dict
    count: int = 2
    mask: torch.Tensor | None = None


class Cache:
    """As transformers has them: tensors in the attributes of objects in a list."""

    def __init__(self, *tensors):
        self.layers = [Layer(tensor) for tensor in tensors]
        self.owner = self  # objects may be circular


class Layer:
    def __init__(self, keys):
        self.keys = keys
        self.length = 3


def names(specs):
    return [spec.name for spec in specs]


def test_tensors_are_found_in_every_container():
    def model(batch, pair, cache, *rest, scale=2.0, **named):
        total = batch.ids + pair.left + cache.layers[1].keys + rest[1] + named["last"]["k"]
        return {"a": total * scale * batch.count, "b": [batch.extra["x"][0], None, 5]}

    one = torch.ones(2)
    args = (Batch(one, {"x": (one, one)}), Pair(one, one), Cache(one, one), one, one)
    kwargs = {"scale": 3.0, "last": {"k": one}}
    program = export(model, args, kwargs)
    assert names(program.spec.xs) == [
        "batch.ids",
        "batch.extra.x.0",
        "batch.extra.x.1",
        "pair.left",
        "pair.right",
        "cache.layers.0.keys",
        "cache.layers.1.keys",
        "rest.0",
        "rest.1",
        "last.k",
    ]
    assert names(program.spec.ys) == ["a", "b.0", "b.2"]
    result = run_local(program, *args, **kwargs)
    assert result["a"].tolist() == [30.0, 30.0]
    assert result["b.2"].item() == 5


def test_objects_come_out_after_what_was_returned_as_such():
    def model(x):
        return {"cache": Cache(x + 1), "logits": x * 2, "pair": Pair(x, x - 1)}

    program = export(model, (torch.ones(2),))
    assert names(program.spec.ys) == ["logits", "pair.left", "pair.right", "cache.layers.0.keys"]


def test_a_transformers_cache_goes_in_and_comes_out():
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        cache = model(ids[:, :2], use_cache=True).past_key_values
        expected = model(ids).logits[:, 2:]
    kwargs = {"input_ids": ids[:, 2:], "past_key_values": cache}
    program = export(model, (), kwargs)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 2  # the example is left as it was
    result = run_local(program, **kwargs)
    torch.testing.assert_close(result["logits"], expected, rtol=0, atol=1e-5)
    assert result["past_key_values.layers.0.keys"].shape == (1, 2, 3, 8)


def test_numbers_and_none_are_built_into_the_program():
    def model(x, n, flag, mask=None, mode="double"):
        x = x * n if flag else x
        return x * 2 if mode == "double" and mask is None else x

    program = export(model, (torch.ones(2), 3, True))
    assert names(program.spec.xs) == ["x"]
    assert run_local(program, torch.ones(2))["output"].tolist() == [6.0, 6.0]


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls

    def doubled(self, x):
        return self(x) * 2


def test_modules_that_a_function_uses_keep_the_names_of_their_weights():
    counter = Counter()
    x = torch.ones(1, 2)
    for function in (counter.doubled, functools.partial(counter.doubled), lambda x: counter(x) * 2):
        program = export(function, (x,))
        assert all(name.endswith(("linear.weight", "linear.bias")) for name in program.constants)
        assert [name.rpartition(".")[2] for name in program.carry] == ["calls"]
        machine = make_machine(program)
        first, second = (machine.step({"x": x}).ys["output"] for _ in range(2))
        torch.testing.assert_close(second, 2 * first)
    assert counter.calls.item() == 0  # tracing changes nothing of the submitter's


@pytest.mark.parametrize(
    "dynamic",
    [
        {"pairs": {0: "n"}, "x": {0: "n"}},
        {"pairs": [{0: "n"}, {0: "n"}], "x": {-2: "n"}},
        {"pairs.0": {0: "n"}, "pairs.1": {0: "n"}, "x": ["n", None]},
        ([{0: "n"}, ("n",)], {0: torch.export.Dim("n")}),
    ],
)
def test_sizes_are_named_in_any_of_the_usual_ways(dynamic):
    def model(pairs, x):
        return x + pairs[0][:, None] + pairs[1][:, None]

    args = ([torch.ones(3), torch.ones(3)], torch.ones(3, 2))
    program = export(model, args, dynamic=dynamic)
    assert {spec.shape[0] for spec in program.spec.xs} == {"n"}
    other = ([torch.ones(5), torch.ones(5)], torch.ones(5, 2))
    assert run_local(program, *other)["output"].shape == (5, 2)


def test_an_example_of_size_one_may_vary():
    program = export(nn.Linear(3, 2), (torch.ones(1, 3),), dynamic={"input": {0: "batch"}})
    assert run_local(program, torch.ones(4, 3))["output"].shape == (4, 2)
    assert run_local(program, torch.ones(1, 3))["output"].shape == (1, 2)


def test_a_recurrent_layer_takes_sequences_of_any_length():
    gru = nn.GRU(3, 4, batch_first=True, bidirectional=True).eval()
    sizes = {"input": {0: "batch", 1: "time"}}
    program = export(gru, (torch.ones(2, 5, 3),), dynamic=sizes)
    x = torch.randn(3, 9, 3)
    result = run_local(program, x)
    with torch.no_grad():
        torch.testing.assert_close(result["output_0"], gru(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2).to_sparse(), "dense"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_what_programs_do_not_carry_is_said(value, words):
    with pytest.raises(ProgramError, match=words):
        export(lambda x: x * 1, (value,))


def test_a_call_that_does_not_fit_is_said():
    with pytest.raises(ProgramError, match="do not fit the model"):
        export(nn.Linear(2, 2), (torch.ones(2), 1))
    with pytest.raises(ProgramError, match="neither a module nor a function"):
        export("model", (torch.ones(2),))
    with pytest.raises(ProgramError, match="dimension 2 of input, which has 2"):
        export(nn.Linear(2, 2), (torch.ones(2, 2),), dynamic={"input": {2: "n"}})
