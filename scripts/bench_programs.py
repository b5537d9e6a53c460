"""scripts/bench programs: the interpreter beside eager torch, in one process, for five models.

Each pair of runs is one eager call and one step of the program, in turns, so that both meet the
same machine; the figure is the median of the pairs' ratios.  Memory is what torch's allocator held
at most during one call, weights included.  One process for each model and number of threads.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from nextgpu_node.graph.artifact import Program  # noqa: E402
from nextgpu_node.graph.export import export  # noqa: E402
from nextgpu_node.graph.local import make_machine  # noqa: E402
from nextgpu_node.graph.machine import Machine  # noqa: E402

SECONDS = 12.0
MIN_PAIRS = 7
MAX_PAIRS = 400


@dataclass(frozen=True)
class Subject:
    """A model both ways: `eager()` is one call, `xs` the inputs of one step of `program`."""

    eager: Callable[[], Any]
    program: Program
    xs: dict[str, torch.Tensor]
    weights: tuple[torch.Tensor, ...]
    training: bool = False
    # Inputs of another size, for the time of a new plan.
    other: dict[str, torch.Tensor] | None = None


def inference(module: nn.Module, *inputs: torch.Tensor, dynamic: Any = None) -> Subject:
    module.eval()
    program = export(module, inputs, dynamic=dynamic)
    names = [spec.name for spec in program.spec.xs]
    weights = (*module.parameters(), *module.buffers())
    return Subject(lambda: module(*inputs), program, dict(zip(names, inputs, strict=True)), weights)


# --- the models -------------------------------------------------------------------------------


def transformer() -> Subject:
    """A sentence encoder of MiniLM's size: 6 layers, 384 wide, 128 tokens."""
    layer = nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    # Its fused fast path is one operator for a layer, and only for inference in eager mode.
    torch.backends.mha.set_fastpath_enabled(False)
    x = torch.randn(1, 128, 384)
    subject = inference(model, x, dynamic={"src": {1: "tokens"}})
    return Subject(
        subject.eager,
        subject.program,
        subject.xs,
        subject.weights,
        other={"src": torch.randn(1, 96, 384)},
    )


def convolutional() -> Subject:
    """ResNet-50 at 224x224."""
    from transformers import ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ResNetForImageClassification(ResNetConfig(num_labels=1000))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(pixels).logits
            return logits

    return inference(Logits(), torch.randn(1, 3, 224, 224))


def recurrent() -> Subject:
    """A 2-layer LSTM, 512 wide, 64 steps."""

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(256, 512, num_layers=2, batch_first=True)
            self.head = nn.Linear(512, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output, _ = self.lstm(x)
            logits: torch.Tensor = self.head(output)
            return logits

    return inference(Outputs(), torch.randn(4, 64, 256))


class DecoderLayer(nn.Module):
    """A Llama layer with grouped queries and a cache of fixed size."""

    def __init__(self, hidden: int, inner: int, heads: int, groups: int, slots: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, hidden // heads
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, groups * self.size, bias=False)
        self.v = nn.Linear(hidden, groups * self.size, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.register_buffer("keys", torch.zeros(1, groups, slots, self.size))
        self.register_buffer("values", torch.zeros(1, groups, slots, self.size))

    def forward(
        self, x: torch.Tensor, at: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        y = self.norm1(x)
        q = self.q(y).view(1, 1, self.heads, self.size).transpose(1, 2)
        k = self.k(y).view(1, 1, self.groups, self.size).transpose(1, 2)
        v = self.v(y).view(1, 1, self.groups, self.size).transpose(1, 2)
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        y = nn.functional.scaled_dot_product_attention(
            q, self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).reshape(1, 1, -1))
        y = self.norm2(x)
        added: torch.Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + added


def turned(x: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


class Decoder(nn.Module):
    """SmolLM2-135M by its sizes: 30 layers, 576 wide, 9 heads in 3 groups."""

    def __init__(self, slots: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(49152, 576)
        self.layers = nn.ModuleList(DecoderLayer(576, 1536, 9, 3, slots) for _ in range(30))
        self.norm = nn.RMSNorm(576)
        self.register_buffer("slots", torch.arange(slots))
        self.register_buffer("rates", 1.0 / 1e5 ** (torch.arange(0, 64, 2) / 64))

    def forward(self, token: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        angles = at[:, None] * torch.cat((self.rates, self.rates))
        mask = (self.slots <= at)[None, None, None]
        x = self.embedding(token)
        for layer in self.layers:
            x = layer(x, at, angles.cos(), angles.sin(), mask)
        return nn.functional.linear(self.norm(x), self.embedding.weight).argmax(-1)


def decoding() -> Subject:
    """One token of a 135 M language model with a static cache."""
    return inference(Decoder(), torch.tensor([[7]]), torch.tensor([40]))


def training() -> Subject:
    """One AdamW step of a small language model: 4 layers, 256 wide, 4 x 64 tokens."""
    from nextgpu_node.graph.optimizers import AdamW
    from nextgpu_node.graph.training import train_step

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(1000, 256)
            layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
            self.head = nn.Linear(256, 1000)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.layers(self.embedding(tokens)))
            return logits

    def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    model = Model().train()
    tokens, target = torch.randint(0, 1000, (4, 64)), torch.randint(0, 1000, (4, 64))
    program = train_step(model, loss_of, (tokens,), (target,), optimizer=AdamW(lr=1e-4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def eager() -> None:
        optimizer.zero_grad()
        loss_of(model(tokens), target).backward()
        optimizer.step()

    names = [spec.name for spec in program.spec.xs]
    xs = dict(zip(names, (tokens, target), strict=True))
    eager()
    state = [t for one in optimizer.state.values() for t in one.values()]
    return Subject(eager, program, xs, (*model.parameters(), *state), training=True)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "transformer": transformer,
    "resnet50": convolutional,
    "lstm": recurrent,
    "decode_135m": decoding,
    "adamw_step": training,
}


# --- one of them ------------------------------------------------------------------------------


def measure(name: str, threads: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    subject = SUBJECTS[name]()
    machine = make_machine(subject.program)

    def eager() -> None:
        if subject.training:
            subject.eager()
        else:
            with torch.inference_mode():
                subject.eager()

    began_s = time.perf_counter()
    machine.step(subject.xs)
    first_s = time.perf_counter() - began_s
    pairs = paired(eager, lambda: machine.step(subject.xs))
    step_ms = statistics.median(ours for _, ours in pairs)
    return {
        "ratio": quartiles([ours / theirs for theirs, ours in pairs]),
        "eager_ms": round(statistics.median(theirs for theirs, _ in pairs), 3),
        "step_ms": round(step_ms, 3),
        "nodes": len(subject.program.spec.step.nodes),
        "pairs": len(pairs),
        # The first step of a size, without the step itself.
        "plan_ms": round(first_s * 1000 - step_ms, 1),
        "new_size_ms": new_size_ms(machine, subject),
        **memory(subject, machine, eager),
    }


def paired(left: Callable[[], object], right: Callable[[], object]) -> list[tuple[float, float]]:
    """Milliseconds of both, in turns; which is first changes from pair to pair."""
    for _ in range(3):
        left()
        right()
    pairs: list[tuple[float, float]] = []
    end_s = time.perf_counter() + SECONDS
    while len(pairs) < MAX_PAIRS and (len(pairs) < MIN_PAIRS or time.perf_counter() < end_s):
        if len(pairs) % 2:
            right_ms = timed_ms(right)
            pairs.append((timed_ms(left), right_ms))
        else:
            left_ms = timed_ms(left)
            pairs.append((left_ms, timed_ms(right)))
    return pairs


def timed_ms(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return (time.perf_counter() - began_s) * 1000


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 3), "q1": round(low, 3), "q3": round(high, 3)}


def new_size_ms(machine: Machine, subject: Subject) -> float | None:
    """What the first step of another size costs more than its second."""
    other = subject.other
    if other is None:
        return None
    first_ms = timed_ms(lambda: machine.step(other))
    return round(
        first_ms - statistics.median(timed_ms(lambda: machine.step(other)) for _ in "abc"), 1
    )


def memory(subject: Subject, machine: Machine, eager: Callable[[], object]) -> dict[str, Any]:
    weights = sum(one.nbytes for one in {id(one): one for one in subject.weights}.values())
    eager_bytes = weights + highest_bytes(eager)
    # The carry is state that eager keeps in its weights: both begin with one of it.
    ours_bytes = weights + highest_bytes(lambda: machine.step(subject.xs))
    return {
        "eager_peak_mb": round(eager_bytes / 1e6, 1),
        "step_peak_mb": round(ours_bytes / 1e6, 1),
        "peak_ratio": round(ours_bytes / eager_bytes, 3),
        "planned_peak_mb": round(machine.peak_bytes / 1e6, 1),
    }


def highest_bytes(call: Callable[[], object]) -> int:
    """The most that torch's allocator gave out during the call and had not got back."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        call()
    live = highest = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


# --- all of them ------------------------------------------------------------------------------


def programs() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in SUBJECTS:
        for threads in (1, 2):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, name, str(threads)],
                capture_output=True,
                text=True,
                check=False,
            )
            key = f"{name}_{threads}_thread{'s' if threads > 1 else ''}"
            if done.returncode:
                figures[key] = {"failed": done.stderr.strip().splitlines()[-1:]}
            else:
                figures[key] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
