"""One shard on one peer, once: a fresh unit from the last position to the verified receipt.

    Position ──► run_on(peer) ──► Position* ──► Outcome
                                     └─ what another peer can go on from, if this one is lost

A position is a number of steps that are done, their results, and the carry behind them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nextgpu_node.api_types import PeerView
from nextgpu_node.errors import JobFailed
from nextgpu_node.sdk.client import Client
from nextgpu_node.sdk.events import (
    Checkpoint,
    FinalResult,
    Finished,
    InputSent,
    Offered,
    ReceiptVerified,
    StepResult,
    UnitEvent,
)
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.messages import Offer, Receipt

if TYPE_CHECKING:
    from torch import Tensor

    from nextgpu_node.graph.artifact import Program

Tensors = Mapping[str, "Tensor"]


class Steps(Protocol):
    """The inputs of each step, made when they are asked for: a list will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensors: ...

    def __iter__(self) -> Iterator[Tensors]: ...


@dataclass(frozen=True, slots=True)
class Position:
    """So far: one result for each step that is done.  `carry` is None where there is none yet."""

    ys: tuple[Tensors, ...] = field(default=(), repr=False)
    carry: Tensors | None = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        return len(self.ys)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All results of a shard.  `offer` and `receipt` are of the unit that ended it."""

    ys: tuple[Tensors, ...] = field(repr=False)
    final: Tensors | None = field(repr=False)
    carry: Tensors | None = field(repr=False)
    seconds: float
    sent_bytes: int
    offer: Offer | None = None
    receipt: Receipt | None = None
    unit_id: str = ""


@dataclass(frozen=True, slots=True)
class AttemptOptions:
    """`checkpoint_ms` and `checkpoint_steps` 0: none, so that a lost peer costs the whole shard."""

    needs: Needs
    checkpoint_ms: int = 0
    checkpoint_steps: int = 0
    return_carry: bool = False


async def attempt(
    client: Client,
    peer: PeerView,
    program: Program,
    steps: Steps,
    options: AttemptOptions,
    *,
    since: Position,
    on_position: Callable[[Position], None],
    on_event: Callable[[UnitEvent], None],
) -> Outcome:
    """Run what is left of `steps` after `since` on `peer`.

    `on_position` gets everything that another attempt could begin from, the last time just before
    this one raises.  Raises what `Client.run_on` raises.
    """
    scan = _Scan(since, has_carry=bool(program.spec.carry))
    began_s = time.monotonic()
    try:
        async with client.run_on(
            peer,
            program,
            [steps[index] for index in range(since.steps, len(steps))],
            options.needs,
            carry=since.carry,
            return_carry=options.return_carry,
            checkpoint_ms=options.checkpoint_ms,
            checkpoint_steps=options.checkpoint_steps,
        ) as events:
            async for event in events:
                on_event(event)
                scan.take(event)
                if isinstance(event, Checkpoint):
                    on_position(scan.position)
    except BaseException:
        on_position(scan.position)
        raise
    if not scan.finished:
        raise JobFailed("The unit ended without results.")
    return scan.outcome(time.monotonic() - began_s)


class _Scan:
    """Collects what one unit says, behind the position where it began."""

    def __init__(self, since: Position, *, has_carry: bool) -> None:
        self._begin = since.steps
        self._position = since
        self._has_carry = has_carry
        self._ys = list(since.ys)
        self._final: Tensors | None = None
        self._sent_bytes = 0
        self._offer: Offer | None = None
        self._receipt: Receipt | None = None
        self._unit_id = ""
        self.finished = False

    def take(self, event: UnitEvent) -> None:
        match event:
            case Offered(offer=offer, unit_id=unit_id):
                self._offer, self._unit_id = offer, unit_id
            case InputSent(sent_bytes=sent_bytes):
                self._sent_bytes = sent_bytes
            case StepResult(tensors=tensors):
                self._ys.append(tensors)
            case Checkpoint(steps=steps, carry=carry):
                # A worker that counts wrongly can only shorten what is kept.
                done = min(self._begin + steps, len(self._ys))
                self._position = Position(tuple(self._ys[:done]), carry)
            case FinalResult(tensors=tensors):
                self._final = tensors
            case Finished():
                self.finished = True
            case ReceiptVerified(receipt=receipt):
                self._receipt = receipt
            case _:
                pass

    @property
    def position(self) -> Position:
        """Without a carry every result stands for itself; with one, only a checkpoint counts."""
        return self._position if self._has_carry else Position(tuple(self._ys))

    def outcome(self, seconds: float) -> Outcome:
        return Outcome(
            tuple(self._ys),
            self._final,
            self._position.carry,
            seconds,
            self._sent_bytes,
            self._offer,
            self._receipt,
            self._unit_id,
        )
