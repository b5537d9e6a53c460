"""Random numbers from a state: the right ones, the same ones, and from nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nextgpu_node.graph import random_numbers as rn
from nextgpu_node.graph.export import export
from nextgpu_node.graph.link import link_graph_untrusted
from nextgpu_node.graph.local import make_machine
from nextgpu_node.graph.plan import make_plan_untrusted
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import DType, Graph, Node, Ref

M0, M1 = 0xD2E7470EE14C6C93, 0xCA5A826395121157
W0, W1 = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
MASK = 2**64 - 1


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """Philox4x64-10 as in Salmon et al. 2011, figure 4 and table 2."""
    x, (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = M0 * x[0], M1 * x[2]
        x = [(p1 >> 64) ^ x[1] ^ k0, p1 & MASK, (p0 >> 64) ^ x[3] ^ k1, p0 & MASK]
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return x


def words(seed: int, step: int, site: int, count: int) -> list[int]:
    blocks = range(1, count // 4 + 2)
    return [w for j in blocks for w in philox((seed % 2**64, 0), [j, site, step, 0])][:count]


def test_draws_are_what_the_specification_says():
    state = torch.tensor([-3, 11])
    raw = words(-3, 11, 2, 6)
    halves = [half for word in raw for half in (word & 0xFFFFFFFF, word >> 32)]
    assert rn.bits(state, 2, [5]).tolist() == [word >> 1 for word in raw[:5]]
    assert rn.uniform(state, 2, [9], torch.float32).tolist() == [
        h / 2**32 // 2**-24 * 2**-24 for h in halves[:9]
    ]
    assert rn.uniform(state, 2, [3], torch.float64).tolist() == [
        (w >> 11) * 2.0**-53 for w in raw[:3]
    ]
    signed = [half - 2**32 if half >= 2**31 else half for half in halves[:9]]
    threshold = round(0.3 * 2**32) - 2**31
    assert rn.bernoulli(state, 2, [9], 0.3).tolist() == [h < threshold for h in signed]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_have_the_moments_of_their_distribution(dtype):
    """A million numbers: the mean within 5 standard errors."""
    count, state = 1_000_000, rn.make_state(1)
    drawn = rn.uniform(state, 0, [count], dtype).double()
    step = 2.0 ** -rn._UNIFORM_BITS[dtype]
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert abs(float(drawn.mean()) - (1 - step) / 2) < 5 * 0.2887 / 1000
    normal = rn.normal(state, 1, [count], dtype).double()
    assert abs(float(normal.mean())) < 5 / 1000
    assert abs(float(normal.var()) - 1) < 5 * 2**0.5 / 1000
    assert abs(float((normal**4).mean()) - 3) < 5 * 96**0.5 / 1000


def test_longer_draws_begin_like_shorter_ones_across_blocks():
    state, more = rn.make_state(4), 2 * 65536 + 77
    for draw in (rn.bits, lambda *a: rn.uniform(*a, torch.float32)):
        assert torch.equal(draw(state, 0, [more])[:70_000], draw(state, 0, [70_000]))


def test_sites_steps_and_seeds_give_numbers_of_their_own():
    drawn = {
        tuple(rn.bits(torch.tensor([seed, step]), site, [4]).tolist())
        for seed in (0, 1, -1)
        for step in (0, 1, 2**62)
        for site in (0, 1, 2)
    }
    assert len(drawn) == 27


def test_extreme_probabilities_draw_nothing():
    state = rn.make_state(0)
    assert not rn.bernoulli(state, 0, [9], 0.0).any()
    assert rn.bernoulli(state, 0, [9], 1.0).all()


class Noisy(nn.Module):
    def forward(self, x):
        dropped = nn.functional.dropout(x, 0.3)
        return {
            "dropout": dropped,
            "uniform": torch.rand_like(x),
            "normal": torch.randn(x.shape),
            "integers": torch.randint(3, 9, x.shape),
            "coins": torch.bernoulli(torch.full_like(x, 0.25)),
            "order": torch.randperm(x.shape[0]),
            "exponential": torch.empty_like(x).exponential_(2.0),
            "drawn": torch.multinomial(torch.tensor([0.1, 0.0, 0.6, 0.3]), 4000, True),
            "race": torch.multinomial(torch.tensor([[0.1, 0.0, 0.6, 0.3]]).repeat(4000, 1), 2),
        }


@pytest.fixture(scope="module")
def noisy():
    return export(Noisy(), (torch.ones(4000),), seed=3)


def test_a_models_draws_are_distributed_as_torchs_are(noisy):
    ys = make_machine(noisy).step({"x": torch.ones(4000)}).ys
    assert abs(float((ys["dropout"] == 0).float().mean()) - 0.3) < 0.03
    torch.testing.assert_close(float(ys["dropout"].max()), 1 / 0.7)
    assert abs(float(ys["uniform"].mean()) - 0.5) < 0.03
    assert abs(float(ys["normal"].std()) - 1) < 0.06
    assert ys["integers"].unique().tolist() == [3, 4, 5, 6, 7, 8]
    assert abs(float(ys["coins"].mean()) - 0.25) < 0.03
    assert ys["order"].sort().values.tolist() == list(range(4000))
    assert abs(float(ys["exponential"].mean()) - 0.5) < 0.04
    shares = torch.bincount(ys["drawn"], minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0, 0.6, 0.3]), rtol=0, atol=0.03)
    assert not (ys["race"] == 1).any()
    assert not (ys["race"][:, 0] == ys["race"][:, 1]).any()
    assert abs(float((ys["race"][:, 0] == 2).float().mean()) - 0.6) < 0.03


def test_every_step_draws_anew_and_every_run_the_same(noisy):
    machine, again = make_machine(noisy), make_machine(noisy)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (machine.step({"x": torch.ones(4000)}).ys for _ in range(2))
    repeated = again.step({"x": torch.ones(4000)}).ys
    assert all(torch.equal(first[name], repeated[name]) for name in first)
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert machine.carry()["random_state"].tolist() == [3, 2]
    # Nobody else's generator was touched.
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_dropout_between_recurrent_layers_is_not_forgotten():
    lstm = nn.LSTM(4, 8, 2, dropout=0.5, bidirectional=True)
    x = torch.randn(5, 2, 4)
    machine = make_machine(export(lstm, (x,)))
    first, second = (machine.step({"input": x}).ys["output_0"] for _ in range(2))
    assert not torch.equal(first, second)
    quiet = make_machine(export(lstm.eval(), (x,))).step({"input": x}).ys["output_0"]
    torch.testing.assert_close(quiet, lstm(x)[0].detach(), rtol=0, atol=1e-6)


def plan_draw(op: str, state: torch.Tensor, *arguments: object) -> None:
    """Plan one draw of a hand-written program."""
    given = tuple(tuple(one) if isinstance(one, list) else one for one in arguments)
    graph = Graph((Node(op, (Ref(0), *given), (), "t"),), (1,))
    linked = link_graph_untrusted("step", graph, 1)
    make_plan_untrusted(
        linked, [state.to("meta")], device=torch.device("cpu"), max_live_bytes=2**20
    )


GOOD = torch.zeros(2, dtype=torch.int64)
F32 = DType("float32")


@pytest.mark.parametrize(
    ("op", "arguments", "code"),
    [
        ("random.uniform", (torch.zeros(3, dtype=torch.int64), 0, [4], F32), "BAD_PROGRAM"),
        ("random.uniform", (torch.zeros(2), 0, [4], F32), "BAD_PROGRAM"),
        ("random.uniform", (torch.zeros((), dtype=torch.int64), 0, [4], F32), "BAD_PROGRAM"),
        ("random.read", (torch.zeros(2),), "BAD_PROGRAM"),
        ("random.advance", (torch.zeros(1 << 17, dtype=torch.int64),), "BAD_PROGRAM"),
        ("random.uniform", (GOOD, -1, [4], F32), "BAD_PROGRAM"),
        ("random.uniform", (GOOD, 2**31, [4], F32), "BAD_PROGRAM"),
        ("random.uniform", (GOOD, 0, [-4], F32), "BAD_PROGRAM"),
        ("random.uniform", (GOOD, 0, [4], DType("int64")), "BAD_PROGRAM"),
        ("random.normal", (GOOD, 0, [4], DType("complex64")), "BAD_PROGRAM"),
        ("random.bernoulli", (GOOD, 0, [4], 1.5), "BAD_PROGRAM"),
        ("random.bernoulli", (GOOD, 0, [4], -0.1), "BAD_PROGRAM"),
        ("random.bits", (GOOD, 0, [2**40]), "OVER_LIMIT"),
        ("random.normal", (GOOD, 0, [2**10, 2**10], F32), "OVER_LIMIT"),
        ("random.seed", (GOOD,), "UNKNOWN_OPERATOR"),
    ],
)
def test_a_draw_that_can_not_be_is_refused_before_it_is_made(op, arguments, code):
    with pytest.raises(RemoteProtocolError) as caught:
        plan_draw(op, *arguments)
    assert caught.value.code.name == code
