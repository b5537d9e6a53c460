"""Protocol errors and the one table between wire codes and meanings.  Spec: errors.md

`RemoteProtocolError`  the other side broke the protocol, or said that we may not go on
`LocalProtocolError`   we were about to break it ourselves: a bug on this side
"""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """Wire codes.  A number, once released, never changes its meaning."""

    MALFORMED = 1
    NOT_CANONICAL = 2
    TOO_LARGE = 3
    UNEXPECTED_MESSAGE = 4
    BAD_SIGNATURE = 5
    WRONG_PEER = 6
    EXPIRED = 7
    NOT_YET_VALID = 8
    REPLAYED = 9
    UNKNOWN_SUITE = 10
    WRONG_OFFER = 11
    BAD_SEAL = 12
    TRUNCATED = 13
    UNKNOWN_UNIT = 14
    WRONG_OFFSET = 15
    NOT_SHARING = 20
    NOT_ALLOWED = 21
    BUSY = 22
    OVER_LIMIT = 23
    NO_SUCH_DEVICE = 24
    OLD_TABLE = 25
    RATE_LIMITED = 26
    SHUTTING_DOWN = 27
    PYTHON_NOT_ALLOWED = 28
    BAD_TOKEN = 30
    TOKEN_EXPIRED = 31
    TOKEN_SPENT = 32
    TOKEN_REVOKED = 33
    TOKEN_AUDIENCE = 34
    TOKEN_ISSUER = 35
    TOKEN_LIMIT = 36
    BAD_PROGRAM = 40
    UNKNOWN_OPERATOR = 41
    BAD_TENSORS = 42
    OUT_OF_MEMORY = 43
    TIMED_OUT = 44
    WORKER_CRASHED = 45
    CANCELLED = 46
    STEP_FAILED = 47
    SUBMITTER_LOST = 48
    OWNER_RETURNED = 49
    PEER_UNREACHABLE = 60
    INTERNAL = 99


SENTENCES: dict[ErrorCode, str] = {
    ErrorCode.MALFORMED: "The bytes are not a message of this protocol.",
    ErrorCode.NOT_CANONICAL: "The message is not in its one canonical encoding.",
    ErrorCode.TOO_LARGE: "A frame, message or stream is larger than its limit.",
    ErrorCode.UNEXPECTED_MESSAGE: "This message may not follow the one before it.",
    ErrorCode.BAD_SIGNATURE: "The signature does not verify.",
    ErrorCode.WRONG_PEER: "The message was signed by, or addressed to, another peer.",
    ErrorCode.EXPIRED: "The message has expired.",
    ErrorCode.NOT_YET_VALID: "The message is dated in the future; check the clocks.",
    ErrorCode.REPLAYED: "This message was used before.",
    ErrorCode.UNKNOWN_SUITE: "The cryptographic suite is not supported.",
    ErrorCode.WRONG_OFFER: "The message answers another offer or request.",
    ErrorCode.BAD_SEAL: "The sealed stream does not open: it was changed or uses another key.",
    ErrorCode.TRUNCATED: "The stream ended before its end marker.",
    ErrorCode.UNKNOWN_UNIT: "There is no such unit here, or not any more.",
    ErrorCode.WRONG_OFFSET: "The unit can not go on from there: those frames are not held.",
    ErrorCode.NOT_SHARING: "This node is not sharing its device now.",
    ErrorCode.NOT_ALLOWED: "The owner of this node does not serve this submitter.",
    ErrorCode.BUSY: "All device slots are in use.",
    ErrorCode.OVER_LIMIT: "The unit asks for more than the owner's limits.",
    ErrorCode.NO_SUCH_DEVICE: "This node has no device of the kind asked for.",
    ErrorCode.OLD_TABLE: "The program needs a newer operator table than this node has.",
    ErrorCode.RATE_LIMITED: "Too many requests; try again later.",
    ErrorCode.SHUTTING_DOWN: "This node is shutting down.",
    ErrorCode.PYTHON_NOT_ALLOWED: "The owner of this node runs no Python of this submitter.",
    ErrorCode.BAD_TOKEN: "The capability token is malformed, or its chain does not hold.",
    ErrorCode.TOKEN_EXPIRED: "The capability token has expired.",
    ErrorCode.TOKEN_SPENT: "The capability token has not enough GPU seconds left.",
    ErrorCode.TOKEN_REVOKED: "The capability token was revoked, or its issuer has no record of it.",
    ErrorCode.TOKEN_AUDIENCE: "The capability token was given to another peer.",
    ErrorCode.TOKEN_ISSUER: "The capability token was issued by another peer.",
    ErrorCode.TOKEN_LIMIT: "The unit asks for more than the capability token allows.",
    ErrorCode.BAD_PROGRAM: "The program is not valid.",
    ErrorCode.UNKNOWN_OPERATOR: "The program names an operator that is not in the table.",
    ErrorCode.BAD_TENSORS: "The tensors do not match what the program declares.",
    ErrorCode.OUT_OF_MEMORY: "The unit needed more memory than its limit.",
    ErrorCode.TIMED_OUT: "The unit ran past its time limit.",
    ErrorCode.WORKER_CRASHED: "The worker process ended in the middle of the unit.",
    ErrorCode.CANCELLED: "The unit was cancelled.",
    ErrorCode.STEP_FAILED: "An operator failed while the program ran.",
    ErrorCode.SUBMITTER_LOST: "The submitter went away before the unit was complete.",
    ErrorCode.OWNER_RETURNED: "The owner of the device took it back.",
    ErrorCode.PEER_UNREACHABLE: "The peer can not be reached.",
    ErrorCode.INTERNAL: "The node met an error of its own.",
}


class ProtocolError(Exception):
    """Base of both kinds."""


class LocalProtocolError(ProtocolError):
    """This side tried to do what the protocol forbids."""


class RemoteProtocolError(ProtocolError):
    """The other side's bytes break the protocol.

    `code` goes on the wire; `detail` is for this side's own error message and names the field,
    never its content.
    """

    def __init__(self, code: ErrorCode, detail: str = "") -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{SENTENCES[code]} ({detail})" if detail else SENTENCES[code])
