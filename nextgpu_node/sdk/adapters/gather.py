"""Several futures as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any


def gather(parts: Sequence[Future[Any]], finish: Callable[[list[Any]], Any]) -> Future[Any]:
    """A future of `finish` of all results; the first error ends it and cancels the other parts."""
    whole: Future[Any] = Future()
    whole.set_running_or_notify_cancel()
    left = len(parts)
    lock = threading.Lock()

    def part_done(part: Future[Any]) -> None:
        nonlocal left
        error = CancelledError() if part.cancelled() else part.exception()
        with lock:
            left -= 1
            if whole.done() or (left and error is None):
                return
            if error is None:
                _settle(whole, parts, finish)
                return
            whole.set_exception(error)
        for other in parts:
            other.cancel()

    if not parts:
        _settle(whole, parts, finish)
    for part in parts:
        part.add_done_callback(part_done)
    return whole


def _settle(
    whole: Future[Any], parts: Sequence[Future[Any]], finish: Callable[[list[Any]], Any]
) -> None:
    try:
        whole.set_result(finish([part.result() for part in parts]))
    except Exception as exc:
        whole.set_exception(exc)
