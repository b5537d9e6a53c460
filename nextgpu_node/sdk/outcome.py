"""From the protocol's codes and statuses to the errors that a user reads: one table each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from nextgpu_node.errors import (
    IntegrityError,
    JobFailed,
    JobTimeout,
    NextGPUError,
    OutOfMemory,
    OwnerReturned,
    PeerLost,
    Refused,
)
from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.errors import SENTENCES, ErrorCode, RemoteProtocolError
from nextgpu_protocol.messages import Refusal

_REFUSED = (
    ErrorCode.NOT_SHARING,
    ErrorCode.NOT_ALLOWED,
    ErrorCode.BUSY,
    ErrorCode.OVER_LIMIT,
    ErrorCode.NO_SUCH_DEVICE,
    ErrorCode.OLD_TABLE,
    ErrorCode.RATE_LIMITED,
    ErrorCode.SHUTTING_DOWN,
    ErrorCode.PYTHON_NOT_ALLOWED,
    ErrorCode.BAD_TOKEN,
    ErrorCode.TOKEN_EXPIRED,
    ErrorCode.TOKEN_SPENT,
    ErrorCode.TOKEN_REVOKED,
    ErrorCode.TOKEN_AUDIENCE,
    ErrorCode.TOKEN_ISSUER,
    ErrorCode.TOKEN_LIMIT,
    ErrorCode.EXPIRED,
    ErrorCode.NOT_YET_VALID,
    ErrorCode.INTERNAL,
)
_ERROR_OF_CODE: dict[ErrorCode, type[NextGPUError]] = {
    **dict.fromkeys(_REFUSED, Refused),
    ErrorCode.BAD_PROGRAM: JobFailed,
    ErrorCode.UNKNOWN_OPERATOR: JobFailed,
    ErrorCode.BAD_TENSORS: JobFailed,
    ErrorCode.STEP_FAILED: JobFailed,
    ErrorCode.CANCELLED: JobFailed,
    ErrorCode.WORKER_CRASHED: JobFailed,
    ErrorCode.OUT_OF_MEMORY: OutOfMemory,
    ErrorCode.TIMED_OUT: JobTimeout,
    ErrorCode.PEER_UNREACHABLE: PeerLost,
    ErrorCode.SUBMITTER_LOST: PeerLost,
    ErrorCode.OWNER_RETURNED: OwnerReturned,
    ErrorCode.TRUNCATED: PeerLost,
    ErrorCode.UNKNOWN_UNIT: PeerLost,
    ErrorCode.WRONG_OFFSET: PeerLost,
}
_CODE_OF_STATUS = {
    "failed": ErrorCode.STEP_FAILED,
    "cancelled": ErrorCode.CANCELLED,
    "timed_out": ErrorCode.TIMED_OUT,
    "out_of_memory": ErrorCode.OUT_OF_MEMORY,
    "worker_crashed": ErrorCode.WORKER_CRASHED,
    "submitter_lost": ErrorCode.SUBMITTER_LOST,
    "over_limit": ErrorCode.OVER_LIMIT,
}


def error_for(code: ErrorCode, detail: str) -> NextGPUError:
    """The error for a code; one that is in no row is a broken seal, signature or protocol."""
    kind = _ERROR_OF_CODE.get(code, IntegrityError)
    error = kind(f"{SENTENCES[code]} ({detail})" if detail else SENTENCES[code])
    error.code = code
    return error


def refusal_untrusted(body: bytes) -> NextGPUError:
    """The error in a REFUSAL or ERROR frame."""
    refusal = decode_message_untrusted(Refusal, body)
    return error_for(refusal.error_code(), refusal.detail)


def status_error(status: str) -> NextGPUError:
    """The error for a receipt's status other than "done"."""
    if status == "owner_stopped":
        error = OwnerReturned()
        error.code = ErrorCode.OWNER_RETURNED
        return error
    return error_for(_CODE_OF_STATUS.get(status, ErrorCode.BAD_SEAL), "")


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the protocol and the socket raise into errors for the user."""
    try:
        yield
    except RemoteProtocolError as exc:
        raise error_for(exc.code, exc.detail) from exc
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise PeerLost("The connection ended in the middle of the unit.") from exc
