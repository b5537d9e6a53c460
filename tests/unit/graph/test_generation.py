"""Generation as a program against transformers' own generate, and the sampling by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.generation import generate_program, generation_steps
from nextgpu_node.graph.local import make_machine
from nextgpu_node.graph.sampling import Sampling
from tests.support.models import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2

MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "mistral": tiny_mistral, "gpt2": tiny_gpt2}
PROMPT = torch.randint(3, 99, (9,), generator=torch.Generator().manual_seed(3))
NEW = 14


def answer(machine, prompt: torch.Tensor, count: int) -> list[int]:
    """The tokens of one answer, its last included."""
    tokens = []
    for xs in generation_steps(prompt, count):
        outcome = machine.step(xs)
        tokens.append(int(outcome.ys["token"]))
        if outcome.stop:
            break
    return tokens


def eager_answer(model, prompt: torch.Tensor, count: int) -> list[int]:
    with torch.no_grad():
        whole = model.generate(
            prompt[None], max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "name",
    [*("llama", "gpt2"), *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "mistral"))],
)
def test_greedy_tokens_are_those_of_transformers(name):
    model = MODELS[name]()
    program = generate_program(model, max_length=len(PROMPT) + NEW - 2, stop_tokens=())
    # The answer ends where the cache is full.
    expected = eager_answer(model, PROMPT, NEW)[:-2]
    assert answer(make_machine(program), PROMPT, NEW) == expected
    # The cache is made where the program runs, it does not travel.
    assert not program.carry


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def sampled(model):
    return generate_program(model, max_length=40, temperature=1.2, stop_tokens=(), seed=5)


def test_a_seed_gives_the_same_tokens_and_another_seed_others(sampled):
    torch.manual_seed(1)
    first = answer(make_machine(sampled), PROMPT, NEW)
    torch.manual_seed(2)  # torch's own generator has no part in it
    assert answer(make_machine(sampled), PROMPT, NEW) == first
    other = make_machine(sampled)
    (state,) = (name for name in other.carry() if name.endswith("random_state"))
    other.load_carry({**other.carry(), state: torch.tensor([6, 0])})
    assert answer(other, PROMPT, NEW) != first


def test_sampling_goes_on_from_a_carry_exactly(sampled):
    steps = list(generation_steps(PROMPT, NEW))
    whole = answer(make_machine(sampled), PROMPT, NEW)
    first, second = make_machine(sampled), make_machine(sampled)
    early = [int(first.step(xs).ys["token"]) for xs in steps[:5]]
    second.load_carry(first.carry())
    assert early + [int(second.step(xs).ys["token"]) for xs in steps[5:]] == whole


class Counting(nn.Module):
    """Says the number after the last."""

    def forward(self, tokens, positions, slots):
        return nn.functional.one_hot(tokens[:, -1] + 1, 50).float()


def test_an_answer_ends_with_a_stop_token():
    program = generate_program(Counting(), max_length=20, stop_tokens=(7, 9))
    assert answer(make_machine(program), torch.tensor([3, 4]), 12) == [5, 6, 7]
    assert answer(make_machine(program), torch.tensor([3, 7]), 12) == [8, 9]


def test_a_chat_goes_on_after_its_end_with_the_same_cache(model):
    free = eager_answer(model, PROMPT, NEW)
    program = generate_program(model, max_length=60, stop_tokens=(free[2],), chat=True)
    assert program.spec.stop is None
    machine = make_machine(program)
    turns = [machine.step(xs).ys for xs in generation_steps(PROMPT, 6)]
    end = free.index(free[2])
    # Steps after the end stand still: the last token again, nothing new in the cache.
    assert [int(ys["token"]) for ys in turns] == free[: end + 1] + [free[2]] * (5 - end)
    assert [bool(ys["done"]) for ys in turns] == [False] * end + [True] * (6 - end)
    more = torch.tensor([7, 8])
    text = torch.cat((PROMPT, torch.tensor(free[: end + 1]), more))
    assert int(machine.step({"tokens": more[None]}).ys["token"]) == eager_answer(model, text, 1)[0]


def test_a_model_of_ones_own_keeps_its_cache_in_buffers():
    class Echo(nn.Module):
        """Says what was said two tokens ago, read from its cache."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("said", torch.zeros(21, dtype=torch.int64))

        def forward(self, tokens, positions, slots):
            self.said.index_copy_(0, slots, tokens[0])
            ago = (positions[-1] - 1).clamp(min=0)
            return nn.functional.one_hot(self.said.index_select(0, ago[None]), 50).float()

    program = generate_program(Echo(), max_length=20, stop_tokens=())
    assert answer(make_machine(program), torch.tensor([3, 4]), 4) == [3, 4, 3, 4]


# ---------------------------------------------------------------- which token

LOGITS = torch.log(torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (Sampling(1.0, top_k=2), [0.4, 0.3, 0, 0, 0]),
        (Sampling(1.0, top_p=0.5), [0.4, 0.3, 0, 0, 0]),
        (Sampling(1.0, top_p=0.4), [0.4, 0, 0, 0, 0]),
        (Sampling(1.0, top_p=0.86), [0.4, 0.3, 0.15, 0.1, 0]),
        (Sampling(1.0, top_k=3, top_p=0.9), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(0.5), [0.16, 0.09, 0.0225, 0.01, 0.0025]),
    ],
)
def test_what_a_token_is_drawn_from(sampling, kept):
    order = torch.tensor([3, 0, 4, 1, 2])
    wanted = torch.tensor([kept]) / sum(kept)
    found = sampling.probabilities(LOGITS[:, order])
    torch.testing.assert_close(found, wanted[:, order], rtol=0, atol=1e-6)


def test_drawn_tokens_are_distributed_as_they_should_be():
    """Chi-square over 4,000 draws of one program: the 0.999 quantile with 4 degrees is 18.5."""

    class Fixed(nn.Module):
        def forward(self, tokens, positions, slots):
            return LOGITS + 0.0 * tokens.sum()

    count = 4000
    program = generate_program(Fixed(), max_length=count + 2, temperature=1.0, stop_tokens=())
    drawn = torch.tensor(answer(make_machine(program), torch.tensor([1]), count))
    found = torch.bincount(drawn, minlength=5)
    expected = count * LOGITS.exp()[0]
    assert float(((found - expected) ** 2 / expected).sum()) < 18.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"top_k": 5}, "need a temperature"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_options_out_of_their_range_are_refused_in_words(options, words):
    with pytest.raises(ProgramError, match=words):
        generate_program(nn.Linear(1, 1), **{"max_length": 8, "stop_tokens": (), **options})


def test_an_empty_prompt_is_refused():
    with pytest.raises(ProgramError, match="empty"):
        next(generation_steps(torch.tensor([], dtype=torch.int64), 3))
