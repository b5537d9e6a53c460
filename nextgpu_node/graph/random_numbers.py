"""Random numbers as data: every draw is a function of a state that the program carries.
Spec: 60-program.md#random-numbers

    random_state   int64 [2]: seed, step       advanced by one at the end of each step
    draw           Philox4x64-10 (Salmon et al. 2011), key (seed, 0), counter (block, site, step, 0)

`site` numbers the draws of a graph, so no two draws of a scan ever use the same block.  No
generator outlives a call and none is shared: the same state gives the same numbers, whatever ran
before.  On the CPU words come from numpy's Philox, whose raw stream numpy guarantees; on other
devices the first word seeds the device's own counter-based generator, which lives for one draw.
Numbers therefore repeat within one class of devices, not across them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

STATE_SHAPE = (2,)

# Words of 64 bits that one pass works on: what it needs beside its result stays in the cache.
_BLOCK_WORDS = 1 << 15
_WORD = 2**64
_MAX_SITE = 2**31

# Bits of a number in [0, 1): one more, and the largest would round to 1.
_UNIFORM_BITS: dict[torch.dtype, int] = {
    torch.float16: 11,
    torch.bfloat16: 8,
    torch.float32: 24,
    torch.float64: 53,
}


def make_state(seed: int) -> Tensor:
    """The state before the first step: int64 [2].  `seed`: any int, taken modulo 2^64."""
    return torch.tensor([_signed(seed % _WORD), 0])


def read(state: Tensor) -> Tensor:
    """`state` in main memory, where draws need it: one wait for the device in each step."""
    return state.cpu()


def advance(state: Tensor) -> Tensor:
    """The state of the next step."""
    return state + torch.tensor([0, 1], device=state.device)


def uniform(
    state: Tensor, site: int, size: Sequence[int], dtype: torch.dtype, *, device: Any = "cpu"
) -> Tensor:
    """Numbers in [0, 1), each multiple of 2^-b equally likely: b = 24 for float32."""
    if torch.device(device).type != "cpu":
        return torch.rand(
            size, dtype=dtype, device=device, generator=_generator(state, site, device)
        )
    return _draw(state, site, torch.empty(size, dtype=dtype), _uniform_converter(dtype))


def normal(
    state: Tensor, site: int, size: Sequence[int], dtype: torch.dtype, *, device: Any = "cpu"
) -> Tensor:
    """Standard normal numbers; on the CPU by Box and Muller (1958)."""
    if torch.device(device).type != "cpu":
        return torch.randn(
            size, dtype=dtype, device=device, generator=_generator(state, site, device)
        )
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    return _draw(state, site, torch.empty(size, dtype=dtype), _NormalConverter(exact))


def bits(state: Tensor, site: int, size: Sequence[int], *, device: Any = "cpu") -> Tensor:
    """int64 numbers, uniform on 0 … 2^63-1."""
    if torch.device(device).type != "cpu":
        generator = _generator(state, site, device)
        return torch.randint(0, 2**63 - 1, size, device=device, generator=generator)
    return _draw(state, site, torch.empty(size, dtype=torch.int64), _Converter(1, _to_int63))


def bernoulli(
    state: Tensor, site: int, size: Sequence[int], p: float, *, device: Any = "cpu"
) -> Tensor:
    """bool: true with probability `p`, to the nearest 2^-32."""
    if torch.device(device).type != "cpu":
        generator = _generator(state, site, device)
        return torch.rand(size, device=device, generator=generator) < p
    threshold = round(p * 2**32)
    if not 0 < threshold < 2**32:
        return torch.full(size, threshold > 0)
    return _draw(state, site, torch.empty(size, dtype=torch.bool), _below(threshold))


# ---------------------------------------------------------------- on shapes alone


def read_shape(state: Tensor) -> Tensor:
    _check_state(state)
    return torch.empty_like(state)


def drawn_shape(
    state: Tensor,
    site: int,
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    device: Any,
) -> Tensor:
    """What `uniform` and `normal` will give; ValueError where they can not be called so."""
    _check_draw(state, site)
    if dtype not in _UNIFORM_BITS:
        raise ValueError(f"random numbers of {dtype}")
    return torch.empty(size, dtype=dtype, device=device)


def bits_shape(state: Tensor, site: int, size: Sequence[int], *, device: Any = "cpu") -> Tensor:
    _check_draw(state, site)
    return torch.empty(size, dtype=torch.int64, device=device)


def bernoulli_shape(
    state: Tensor, site: int, size: Sequence[int], p: float, *, device: Any
) -> Tensor:
    _check_draw(state, site)
    if not 0 <= p <= 1:
        raise ValueError("a probability is not within 0 … 1")
    return torch.empty(size, dtype=torch.bool, device=device)


def _check_draw(state: Tensor, site: int) -> None:
    _check_state(state)
    if not 0 <= site < _MAX_SITE:
        raise ValueError("the site of a draw is out of range")


def _check_state(state: Any) -> None:
    if (
        not isinstance(state, Tensor)
        or state.dtype is not torch.int64
        or state.shape != STATE_SHAPE
    ):
        raise ValueError("a random state is int64 [2]")


# ---------------------------------------------------------------- words


def _philox(state: Tensor, site: int) -> Philox:
    seed, step = state.tolist()
    key = np.array([seed % _WORD, 0], dtype=np.uint64)
    counter = np.array([0, site, step % _WORD, 0], dtype=np.uint64)
    return Philox(key=key, counter=counter)


def _generator(state: Tensor, site: int, device: Any) -> torch.Generator:
    word = int(_philox(state, site).random_raw())
    return torch.Generator(device=device).manual_seed(_signed(word))


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


# (words int64 [n], where they go) -> nothing; `where` has n * per_word elements or fewer.
_Convert = Callable[[Tensor, Tensor], None]


class _Converter:
    """How words become numbers.  `per_word`: numbers from 64 bits."""

    def __init__(self, per_word: int, convert: _Convert) -> None:
        self.per_word = per_word
        self.convert = convert


def _draw(state: Tensor, site: int, result: Tensor, converter: _Converter) -> Tensor:
    philox = _philox(state, site)
    for piece in _pieces(result.view(-1), _BLOCK_WORDS * converter.per_word):
        # Whole pairs of words, so that every length reads the stream in the same places.
        count = -(-piece.numel() // (2 * converter.per_word)) * 2
        words = torch.from_numpy(philox.random_raw(count).view(np.int64))
        converter.convert(words, piece)
    return result


def _pieces(flat: Tensor, length: int) -> Iterator[Tensor]:
    for start in range(0, flat.numel(), length):
        yield flat[start : start + length]


def _halves(words: Tensor, count: int) -> Tensor:
    return words.view(torch.int32)[:count]


def _to_int63(words: Tensor, piece: Tensor) -> None:
    torch.bitwise_and(words[: piece.numel()] >> 1, 2**63 - 1, out=piece)


def _below(threshold: int) -> _Converter:
    def convert(words: Tensor, piece: Tensor) -> None:
        # As signed numbers: all of int32, shifted by 2^31.
        torch.lt(_halves(words, piece.numel()), threshold - 2**31, out=piece)

    return _Converter(2, convert)


def _uniform_converter(dtype: torch.dtype) -> _Converter:
    kept = _UNIFORM_BITS[dtype]
    if dtype is torch.float64:
        return _Converter(1, lambda words, piece: _fill_fraction(words, piece, 64, kept))
    return _Converter(
        2,
        lambda words, piece: _fill_fraction(_halves(words, piece.numel()), piece, 32, kept),
    )


def _fill_fraction(words: Tensor, piece: Tensor, width: int, kept: int) -> None:
    """The `kept` upper bits of each word as a fraction of 2^kept."""
    number = words[: piece.numel()] >> (width - kept)
    # The shift keeps the sign: cut what it filled in.
    piece.copy_(number.bitwise_and_(2**kept - 1))
    piece.mul_(2.0**-kept)


class _NormalConverter(_Converter):
    """Two words make two numbers: radius and angle, then cosine and sine."""

    def __init__(self, exact: torch.dtype) -> None:
        super().__init__(1 if exact is torch.float64 else 2, self._convert)
        self._exact = exact
        self._uniform = _uniform_converter(exact)

    def _convert(self, words: Tensor, piece: Tensor) -> None:
        count = words.numel() * self.per_word
        fractions = torch.empty(count, dtype=self._exact)
        self._uniform.convert(words, fractions)
        # 1 - u is never 0, so its logarithm is finite.
        radius = fractions[: count // 2].neg_().log1p_().mul_(-2).sqrt_()
        angle = fractions[count // 2 :].mul_(2 * math.pi)
        pairs = torch.cat((radius * angle.cos(), radius * angle.sin()))
        piece.copy_(pairs[: piece.numel()])
