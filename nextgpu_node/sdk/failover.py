"""One piece of work over peers that come and go.

    run_reliably(book, attempt) ──► attempt(best peer) ──► its result
                                        │ PeerLost, Refused, …
                                        └──► note it in the book, pause, the next peer

`attempt` is any coroutine that runs something on the peer that it is given and raises the errors of
`nextgpu_node.errors`: a fresh unit (sdk/attempt.py), or a call in an open one.  It carries its own
position, so that it goes on from its last checkpoint when it is called for another peer.
Work of many shards is sdk/mapping.py's, which uses the same book and the same table of remedies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from nextgpu_node.api_types import PeerView
from nextgpu_node.core.retry import Remedy
from nextgpu_node.errors import NextGPUError, Refused
from nextgpu_node.sdk.peer_book import PeerBook

_Result = TypeVar("_Result")

DEFAULT_PATIENCE_S: Final = 60.0
# More failures than this of one piece of work say something about the work.
DEFAULT_ATTEMPTS: Final = 6
_POLL_S: Final = 0.25
# Our own nextgpud may be on its way up again.
_LOCAL_PAUSE_S: Final = 1.0


async def run_reliably(
    book: PeerBook,
    attempt: Callable[[PeerView], Awaitable[_Result]],
    *,
    patience_s: float = DEFAULT_PATIENCE_S,
    attempts: int = DEFAULT_ATTEMPTS,
) -> _Result:
    """What the first peer gives that brings it to an end.

    Raises the error itself where it would fail anywhere; the last one after `attempts` peers were
    lost; and why nobody takes it (NoPeerFound, Refused) where for `patience_s` seconds nobody did.
    """
    waiting_since_s = trio.current_time()
    left = attempts
    while True:
        peer = await _next_peer(book, waiting_since_s + patience_s)
        try:
            result = await attempt(peer)
        except NextGPUError as exc:
            remedy = book.failed(peer.peer_id, exc)
            if remedy is Remedy.GIVE_UP:
                raise
            if isinstance(exc, Refused):
                # Bounded by `patience_s`: that a thousand peers refuse is no fault of the work.
                continue
            left -= 1
            if not left:
                raise
            if remedy is Remedy.LOCAL:
                await trio.sleep(_LOCAL_PAUSE_S)
            waiting_since_s = trio.current_time()
            continue
        book.succeeded(peer.peer_id)
        return result


async def _next_peer(book: PeerBook, until_s: float) -> PeerView:
    """The best peer that may be asked now; waits for one until `until_s`."""
    while True:
        if candidates := book.candidates():
            return candidates[0]
        await book.refresh()
        if candidates := book.candidates():
            return candidates[0]
        if trio.current_time() >= until_s:
            raise book.nobody()
        await trio.sleep(_POLL_S)
