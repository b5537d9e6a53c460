"""Messages that never leave a machine: on the unit socket, and between a daemon and its worker.

They use the same frames and the same codec as the wire, so each hop is read by the same code.

    submitter's process -> its daemon    CONNECT Connect        a peer to talk to
                                         SIGN    SignDraft      a typed message to sign
    its daemon -> the process            CONNECTED key (32)     frames are relayed from here on;
                                                                the key is the one that signs
                                         SIGNED  envelope
    daemon -> worker                     ASSIGN  Assignment     what the one-time key is now for
    worker -> daemon                     HELLO   one-time key (32 bytes)
"""

from __future__ import annotations

from dataclasses import dataclass

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import KEY_BYTES
from nextgpu_protocol.messages import ReceiptAck, UnitHeader, UnitRequest

# What a submitter's process may ask its own daemon to sign.  The daemon decodes the typed
# message before it signs: it never signs bytes.
SIGNABLE: dict[str, type[UnitRequest] | type[UnitHeader] | type[ReceiptAck]] = {
    "request": UnitRequest,
    "header": UnitHeader,
    "ack": ReceiptAck,
}


@dataclass(frozen=True, slots=True)
class Connect:
    """Reach this peer and open a unit stream to it."""

    peer_key: bytes

    def validate(self) -> None:
        if len(self.peer_key) != KEY_BYTES:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "Connect.peer_key has 32 bytes")


@dataclass(frozen=True, slots=True)
class SignDraft:
    """An encoded message of the named type, to be signed with the node's identity."""

    type: str
    payload: bytes

    def validate(self) -> None:
        if self.type not in SIGNABLE:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "this is never signed")


@dataclass(frozen=True, slots=True)
class Assignment:
    """The two envelopes from which the worker derives its keys."""

    offer: bytes
    header: bytes
