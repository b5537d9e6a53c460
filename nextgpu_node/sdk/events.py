"""What happens to a unit, as its submitter sees it.

    PeerChosen -> Offered -> InputSent* -> Started -> (InputSent | StepResult | Checkpoint)*
               -> Finished -> ReceiptVerified

Only after ReceiptVerified are the results known to be the complete stream that the provider
signed for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from nextgpu_node.api_types import PeerView
from nextgpu_protocol.messages import Offer, Receipt
from nextgpu_protocol.records import UnitSummary

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PeerChosen:
    """The peer that is asked now.  A second one follows where the first refuses."""

    peer: PeerView


@dataclass(frozen=True, slots=True)
class Offered:
    """The peer's signed offer, verified.  `unit_id` is what `nextgpu cancel` takes."""

    offer: Offer
    unit_id: str


@dataclass(frozen=True, slots=True)
class InputSent:
    """So many plaintext bytes are sealed and sent; `total_bytes` is None for an open stream."""

    sent_bytes: int
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Started:
    """The worker has the whole program and runs."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outputs of step `index` (from 0) by name, on the CPU."""

    index: int
    # Tensors are the submitter's data: no log or error message prints them by accident.
    tensors: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True, slots=True)
class FinalResult:
    """What the program's finish graph made of the last carry."""

    tensors: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The carry after `steps` steps: a later unit can go on from it."""

    steps: int
    carry: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Finished:
    """The worker is done with every step; what it says about itself is under the seal."""

    summary: UnitSummary


@dataclass(frozen=True, slots=True)
class ReceiptVerified:
    """The provider's receipt: its signature, the transcript and both hashes hold."""

    receipt: Receipt
    peer_id: str


@dataclass(frozen=True, slots=True)
class LogText:
    """What a function printed: `stream` is 1 for stdout, 2 for stderr.  A peer's words: text."""

    stream: int
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CallResult:
    """What call `index` (from 0) gave back or raised, as plain data (python_unit.result_of)."""

    index: int
    outcome: int
    value: Any = field(repr=False)
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FileReceived:
    """A file that a script left; `name` is relative and stays below its directory."""

    name: str
    content: bytes = field(repr=False)


UnitEvent: TypeAlias = (
    PeerChosen
    | Offered
    | InputSent
    | Started
    | StepResult
    | FinalResult
    | Checkpoint
    | Finished
    | ReceiptVerified
    | LogText
    | CallResult
    | FileReceived
)
