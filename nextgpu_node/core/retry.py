"""What to do about an attempt that failed.  Pure.

WAIT       the peer is full or hurried: ask it again after a pause, others now
ELSEWHERE  lost, stopped, too small or out of time: go on at another peer, from the checkpoint
DISTRUST   a seal, signature, receipt or result was wrong: nothing more goes to this peer
LOCAL      our own nextgpud does not answer: the peers are not to blame
GIVE_UP    the program or its input is at fault: it would fail anywhere
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from nextgpu_node.errors import (
    DaemonUnreachable,
    IntegrityError,
    JobTimeout,
    NoPeerFound,
    OutOfMemory,
    PeerLost,
    Refused,
)
from nextgpu_protocol.errors import ErrorCode

_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 30.0

_PASSING: Final = frozenset(
    {ErrorCode.BUSY, ErrorCode.RATE_LIMITED, ErrorCode.INTERNAL, ErrorCode.EXPIRED}
)
# What a peer says that will not change while this job lasts.
_LASTING: Final = frozenset(
    {
        ErrorCode.NOT_ALLOWED,
        ErrorCode.PYTHON_NOT_ALLOWED,
        ErrorCode.OVER_LIMIT,
        ErrorCode.NO_SUCH_DEVICE,
        ErrorCode.OLD_TABLE,
        ErrorCode.NOT_YET_VALID,
        ErrorCode.BAD_TOKEN,
        ErrorCode.TOKEN_EXPIRED,
        ErrorCode.TOKEN_SPENT,
        ErrorCode.TOKEN_REVOKED,
        ErrorCode.TOKEN_AUDIENCE,
        ErrorCode.TOKEN_ISSUER,
        ErrorCode.TOKEN_LIMIT,
    }
)


class Remedy(Enum):
    WAIT = "wait"
    ELSEWHERE = "elsewhere"
    DISTRUST = "distrust"
    LOCAL = "local"
    GIVE_UP = "give up"


def remedy_for(error: BaseException) -> Remedy:
    """The one table from an error to what is done about it."""
    match error:
        case IntegrityError():
            return Remedy.DISTRUST
        case Refused(code=code):
            return Remedy.WAIT if code in _PASSING else Remedy.ELSEWHERE
        case PeerLost() | OutOfMemory() | JobTimeout() | NoPeerFound():
            return Remedy.ELSEWHERE
        case DaemonUnreachable():
            return Remedy.LOCAL
    # A crash may be the machine's; the schedule bounds how many peers may crash over one shard.
    crashed = getattr(error, "code", None) == ErrorCode.WORKER_CRASHED
    return Remedy.ELSEWHERE if crashed else Remedy.GIVE_UP


def is_lasting(error: BaseException) -> bool:
    """True where asking this peer again within the same job is pointless."""
    return isinstance(error, Refused) and error.code in _LASTING


def pause_s(failures: int, *, jitter: float) -> float:
    """Seconds to leave a peer alone after `failures` in a row: exponential, with full jitter.

    `jitter` is uniform in [0, 1): many submitters that lost one peer must not come back to it at
    the same moment (Brooker, "Exponential Backoff And Jitter", 2015).
    """
    longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures, 16))
    return longest_s * (0.5 + jitter / 2)
