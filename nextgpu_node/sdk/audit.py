"""Do two runs of one shard agree?

Inside one hardware class (same device, same runtime) equal bits are expected, and hashes tell.
Anything else is compared by tolerance: other devices and other thread counts sum in another order,
so the last bits differ between honest peers.  A peer that is wrong by less than the tolerance is
therefore not found by peers of another class.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nextgpu_node.api_types import PeerView
from nextgpu_node.core.schedule import AuditPlan, draw_sample
from nextgpu_node.errors import UsageError
from nextgpu_node.sdk.results import Tensors, tensors_digest

if TYPE_CHECKING:
    from torch import Tensor

# Relative to the largest magnitude of the tensor: a sum of many terms is as exact as its largest.
_TOLERANCES: Final = {
    "float64": 1e-9,
    "float32": 1e-4,
    "complex64": 1e-4,
    "float16": 1e-2,
    "bfloat16": 3e-2,
}
# Each peer's first canary comes at a turn in this range, each further one as much later.
_CANARY_SPREAD: Final = 4


@dataclass(frozen=True, slots=True)
class Audit:
    """`share` of the shards run twice; `canaries` known answers go to every peer.

    `seed` is for tests: without it the sample comes from the system's randomness, which no peer
    can foresee.
    """

    share: float = 0.0
    canaries: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError("An audit is a share of the shards, from 0% to 100%.")

    @property
    def is_on(self) -> bool:
        return bool(self.share or self.canaries)

    def draw(self, shards: Sequence[int]) -> AuditPlan:
        """What will be looked at, decided before anything runs."""
        source = random.SystemRandom() if self.seed is None else random.Random(self.seed)  # noqa: S311
        sampled = draw_sample(shards, self.share, [source.random() for _ in shards])
        turns, turn = [], 0
        for _ in range(self.canaries):
            turn += source.randrange(_CANARY_SPREAD)
            turns.append(turn)
        return AuditPlan(sampled, tuple(turns))


def hardware_class(peer: PeerView | None) -> tuple[object, ...]:
    """What has to be equal for equal bits to be expected; None is this machine, a class of its own.

    The owner's number of threads is not told, which is why a difference inside one class is
    decided by a referee and is no verdict yet.
    """
    if peer is None:
        return ("here",)
    devices = sorted((d.kind, d.name, d.compute_capability) for d in peer.devices)
    return (*devices, peer.runtime)


def agree(one: Tensors, other: Tensors, *, same_class: bool) -> bool:
    """Whether two results are the same, by hash or within the tolerance of their dtypes."""
    if tensors_digest(one) == tensors_digest(other):
        return True
    if same_class or one.keys() != other.keys():
        return False
    return all(_is_close(one[name], other[name]) for name in one)


def _is_close(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN; infinities must be the same ones."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    tolerance = _TOLERANCES.get(str(one.dtype).removeprefix("torch."))
    if tolerance is None or not one.numel():
        return torch.equal(one, other)
    wide = torch.complex128 if one.is_complex() else torch.float64
    a, b = one.to(wide), other.to(wide)
    finite = b.abs()[torch.isfinite(b.abs())]
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-12), equal_nan=True)
