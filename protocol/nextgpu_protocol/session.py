"""Which frame may follow which, between two peers.  Spec: 45-session.md and 47-resuming.md (printed
from here), 48-lane.md

S is the submitter, P the provider.  Both ends run the same table: the side that receives treats
an absent row as the peer's fault, the side that sends treats it as its own bug.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.framing import FrameKind

Side = Literal["S", "P"]


class SessionState(Enum):
    """Where one unit's conversation stands."""

    IDLE = "idle"
    REQUESTED = "requested"
    OFFERED = "offered"
    STREAMING = "streaming"
    INPUT_ENDED = "input ended"
    OUTPUT_ENDED = "output ended"
    CANCELLED = "cancelled"
    RECEIPTED = "receipted"
    CLOSED = "closed"


_S = SessionState
_K = FrameKind

Table = dict[tuple[SessionState, Side, FrameKind], SessionState]

TRANSITIONS: Table = {
    (_S.IDLE, "S", _K.REQUEST): _S.REQUESTED,
    (_S.REQUESTED, "P", _K.OFFER): _S.OFFERED,
    (_S.REQUESTED, "P", _K.REFUSAL): _S.CLOSED,
    (_S.OFFERED, "S", _K.HEADER): _S.STREAMING,
    (_S.OFFERED, "S", _K.CANCEL): _S.CLOSED,
    (_S.OFFERED, "P", _K.ERROR): _S.CLOSED,
    (_S.STREAMING, "S", _K.DATA): _S.STREAMING,
    (_S.STREAMING, "P", _K.DATA): _S.STREAMING,
    (_S.STREAMING, "S", _K.END): _S.INPUT_ENDED,
    (_S.STREAMING, "P", _K.END): _S.OUTPUT_ENDED,
    (_S.STREAMING, "S", _K.CANCEL): _S.CANCELLED,
    (_S.STREAMING, "P", _K.RECEIPT): _S.RECEIPTED,
    (_S.STREAMING, "P", _K.ERROR): _S.CLOSED,
    (_S.INPUT_ENDED, "P", _K.DATA): _S.INPUT_ENDED,
    (_S.INPUT_ENDED, "P", _K.END): _S.OUTPUT_ENDED,
    (_S.INPUT_ENDED, "S", _K.CANCEL): _S.CANCELLED,
    (_S.INPUT_ENDED, "P", _K.RECEIPT): _S.RECEIPTED,
    (_S.INPUT_ENDED, "P", _K.ERROR): _S.CLOSED,
    # A program may stop before its input does: what is then still on its way is dropped.
    (_S.OUTPUT_ENDED, "S", _K.DATA): _S.OUTPUT_ENDED,
    (_S.OUTPUT_ENDED, "S", _K.END): _S.OUTPUT_ENDED,
    (_S.OUTPUT_ENDED, "S", _K.CANCEL): _S.CANCELLED,
    (_S.OUTPUT_ENDED, "P", _K.RECEIPT): _S.RECEIPTED,
    (_S.OUTPUT_ENDED, "P", _K.ERROR): _S.CLOSED,
    (_S.CANCELLED, "P", _K.DATA): _S.CANCELLED,
    (_S.CANCELLED, "P", _K.END): _S.CANCELLED,
    (_S.CANCELLED, "P", _K.RECEIPT): _S.RECEIPTED,
    (_S.CANCELLED, "P", _K.ERROR): _S.CLOSED,
    (_S.RECEIPTED, "S", _K.DATA): _S.RECEIPTED,
    (_S.RECEIPTED, "S", _K.END): _S.RECEIPTED,
    (_S.RECEIPTED, "S", _K.CANCEL): _S.RECEIPTED,
    (_S.RECEIPTED, "S", _K.ACK): _S.CLOSED,
}


# How a stream begins that takes the place of one that was lost.  Once it streams, the unit goes on
# in the state in which it was, by the table above.
RESUMPTION: Table = {
    (_S.IDLE, "S", _K.RESUME): _S.REQUESTED,
    (_S.REQUESTED, "P", _K.RESUMED): _S.STREAMING,
    (_S.REQUESTED, "P", _K.REFUSAL): _S.CLOSED,
}


# How the submitter asks for a lane.
LANE_ASKING: Table = {
    (_S.IDLE, "S", _K.RESUME): _S.REQUESTED,
    (_S.REQUESTED, "P", _K.LANE): _S.CLOSED,
    (_S.REQUESTED, "P", _K.REFUSAL): _S.CLOSED,
}


class Session:
    """The state of one stream's conversation, seen from one side."""

    def __init__(self, own_side: Side, table: Table = TRANSITIONS) -> None:
        self._table = table
        self._own: Side = own_side
        self._peer: Side = "P" if own_side == "S" else "S"
        self.state = SessionState.IDLE

    def sending(self, kind: FrameKind) -> None:
        """Note that we send `kind`.  Raises LocalProtocolError where that is not allowed."""
        following = self._table.get((self.state, self._own, kind))
        if following is None:
            raise LocalProtocolError(f"{kind.name} may not be sent when {self.state.value}")
        self.state = following

    def received_untrusted(self, kind: FrameKind) -> None:
        """Note that the peer sent `kind`.  Raises RemoteProtocolError where it may not."""
        following = self._table.get((self.state, self._peer, kind))
        if following is None:
            detail = f"{kind.name} when {self.state.value}"
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, detail)
        self.state = following
