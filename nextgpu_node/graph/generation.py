"""A causal language model as a Program that gives one token a step.  Submitter only.

    x      tokens int64 [1, T], T >= 0      the prompt, or what the user adds; empty to go on
    y      token int64 [1], done bool [1]
    carry  keys and values of every layer [1, heads, max_length + 1, size], length, token, done,
           random_state

The token that was chosen last is not in the cache yet: each step runs it together with the new
tokens.  So a whole prompt is one step, an answer needs no word from the submitter, and the next
turn of a chat goes on with the same cache.  In the very first step there is no such token: a
stand-in is written to the cache's last slot, which nobody ever looks at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim

from nextgpu_node.errors import ProgramError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.draws import STATE_NAME
from nextgpu_node.graph.export import export
from nextgpu_node.graph.sampling import Sampling
from nextgpu_protocol.program import DType, Graph, Node, Ref, TensorSpec

TOKENS = "tokens"
TOKEN = "token"  # noqa: S105  a word of the language, not a password
DONE = "done"
LENGTH = "length"

# Any two sizes that torch does not treat as special.
_EXAMPLE_TOKENS = 5


class CachedModel(Protocol):
    """A language model that keeps its own cache, for `generate_program`.

    A torch.nn.Module with buffers for the cache, which `forward` writes to in place.
    """

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Logits [1, vocabulary] for the token after the last.

        tokens     int64 [1, L]
        positions  int64 [L]: where they are in the text; -1 for the first step's stand-in, which
                   must not be looked at by the others
        slots      int64 [L]: where to write them in the cache; max_length for the stand-in
        """
        ...


def generate_program(
    model: nn.Module,
    *,
    max_length: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] | None = None,
    chat: bool = False,
    seed: int = 0,
) -> Program:
    """A program that writes on after a prompt, one token a step.

    model        a causal language model of transformers, or a CachedModel of your own.
    max_length   tokens that prompt and answers may have together: the size of the cache.
    temperature  0 takes the likeliest token; above, it is drawn: see Sampling for top_k, top_p.
    stop_tokens  end the answer; by default the model's own end-of-text tokens.
    chat         False: the scan ends with the answer.  True: it stays open for another turn, and
                 a step without new tokens after the end changes nothing.
    seed         of the drawn tokens.

    The first step takes the prompt, each later one no tokens: `generation_steps`.  `done` is true
    with the token that ended the answer, a stop token or the last that there was room for.

    Raises ProgramError, which names the line of the model and what to do.
    """
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check()
    if max_length < 2:
        raise ProgramError("max_length must be 2 or more.")
    stops = _stop_tokens(model) if stop_tokens is None else tuple(stop_tokens)
    cached = _TransformersCache(model, max_length) if _is_of_transformers(model) else model
    step = _Step(cached, max_length, sampling, stops, chat).eval()
    example = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64)
    program = export(
        step,
        (example,),
        dynamic={TOKENS: {1: Dim("new_tokens", max=max_length)}},
        stop=None if chat else DONE,
        seed=seed,
    )
    return _with_init(program, seed)


def generation_steps(prompt: Tensor, max_new_tokens: int) -> Iterator[dict[str, Tensor]]:
    """The inputs of an answer: `prompt` (int64 [T] or [1, T]), then nothing, again and again.

    ProgramError for an empty prompt.
    """
    tokens = prompt.reshape(1, -1).to(torch.int64)
    if not tokens.shape[1]:
        raise ProgramError("The prompt is empty: give at least one token.")
    yield {TOKENS: tokens}
    for _ in range(max_new_tokens - 1):
        yield {TOKENS: tokens[:, :0]}


# ---------------------------------------------------------------- one step


class _Step(nn.Module):
    """Runs the waiting token and the new ones; chooses the next."""

    length: Tensor
    token: Tensor
    done: Tensor

    def __init__(
        self,
        model: Any,
        max_length: int,
        sampling: Sampling,
        stops: tuple[int, ...],
        chat: bool,
    ) -> None:
        super().__init__()
        self.cached = model
        self._max_length = max_length
        self._sampling = sampling
        self._stops = stops
        self._chat = chat
        self.register_buffer(LENGTH, torch.zeros((), dtype=torch.int64))
        self.register_buffer(TOKEN, torch.zeros(1, dtype=torch.int64))
        self.register_buffer(DONE, torch.zeros(1, dtype=torch.bool))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        run = torch.cat((self.token[None], tokens), 1)
        positions = torch.arange(run.shape[1]) + (self.length - 1)
        slots = torch.where(positions < 0, self._max_length, positions)
        logits = self.cached(run, positions, slots)
        token = self._sampling.choose(logits)
        length = self.length + run.shape[1]
        done = torch.ge(length, self._max_length).reshape(1)
        for stop in self._stops:
            done = done | torch.eq(token, stop)
        if self._chat:
            # After the end, a step without new tokens stands still.
            stands = self.done & torch.eq(torch.ones_like(tokens).sum(), 0)
            token = torch.where(stands, self.token, token)
            length = torch.where(stands, self.length, length).reshape(())
            done = done | stands
        self.token.copy_(token)
        self.length.copy_(length)
        self.done.copy_(done)
        return {TOKEN: token, DONE: done}


def _stop_tokens(model: Any) -> tuple[int, ...]:
    for holder in ("generation_config", "config"):
        found = getattr(getattr(model, holder, None), "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


# ---------------------------------------------------------------- models of transformers


def _is_of_transformers(model: Any) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


class _TransformersCache(nn.Module):
    """A transformers model with its keys and values in buffers."""

    def __init__(self, model: Any, max_length: int) -> None:
        super().__init__()
        self.model = model
        shapes = _cache_shapes(model)
        for layer, (keys, values) in enumerate(shapes):
            for name, (heads, size) in (("keys", keys), ("values", values)):
                buffer = torch.zeros(1, heads, max_length + 1, size, dtype=model.dtype)
                self.register_buffer(f"{name}_{layer}", buffer)
        self._layers = len(shapes)

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        cache = _make_cache(
            [
                (getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}"))
                for layer in range(self._layers)
            ],
            positions,
            slots,
        )
        output = self.model(
            input_ids=tokens,
            position_ids=positions.clamp(min=0)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _make_cache(buffers: Sequence[tuple[Tensor, Tensor]], positions: Tensor, slots: Tensor) -> Any:
    from transformers.cache_utils import Cache, StaticLayer

    class CarriedLayer(StaticLayer):  # type: ignore[misc]  # transformers has no types
        """Keys and values in given buffers, written where the step says."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__(max_cache_len=keys.shape[2])
            self.keys, self.values = keys, values
            self.cumulative_length = positions[0]
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(2, slots, key_states)
            self.values.index_copy_(2, slots, value_states)
            return self.keys, self.values

    return Cache(layers=[CarriedLayer(keys, values) for keys, values in buffers])


def _cache_shapes(model: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(heads, size) of keys and of values, for each layer: seen on one token."""
    from transformers.cache_utils import DynamicCache

    was_training = model.training
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        cache = DynamicCache()
        try:
            model.eval()(input_ids=token, past_key_values=cache, use_cache=True)
        finally:
            model.train(was_training)
    layers: list[Any] = [
        (getattr(one, "keys", None), getattr(one, "values", None)) for one in cache.layers
    ]
    if not layers or any(keys is None or keys.dim() != 4 for keys, _ in layers):
        raise ProgramError(
            f"{type(model).__name__} does not keep keys and values of every layer in a cache; "
            "wrap it as a CachedModel (docs/training-and-generation.md)."
        )
    return [
        ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))
        for keys, values in layers
    ]


# ---------------------------------------------------------------- the first state


def _with_init(program: Program, seed: int) -> Program:
    """The carry made on the worker, instead of sent: it is zeros but for the random state."""
    nodes: list[Node] = []
    outputs: list[int] = []
    value = len(program.spec.constants)
    for one in program.spec.carry:
        made = _seeded(value, seed) if one.name.endswith(STATE_NAME) else [_zeros(one)]
        nodes += made
        value += len(made)
        outputs.append(value - 1)
    symbols = tuple(replace(one, minimum=0) for one in program.spec.symbols)
    spec = replace(program.spec, init=Graph(tuple(nodes), tuple(outputs)), symbols=symbols)
    return Program.from_parts(spec, program.constants)


def _zeros(spec: TensorSpec) -> Node:
    shape = tuple(int(str(size)) for size in spec.shape)
    return Node("aten.zeros.default", (shape,), (("dtype", DType(spec.dtype)),), "t")


def _seeded(value: int, seed: int) -> list[Node]:
    """[seed, 0], the values before it numbered up to `value`."""
    signed = (seed + 2**63) % 2**64 - 2**63
    numbers = [
        Node("aten.full.default", ((1,), number), (("dtype", DType("int64")),), "t")
        for number in (signed, 0)
    ]
    joined = Node("aten.cat.default", ((Ref(value), Ref(value + 1)),), (), "t")
    return [*numbers, joined]
