"""The owner wants the device back: a signal to a worker, heard between two steps.

    SIGUSR1 ─► while it waits for input: at once      ─► the last state, sealed; the end
               while it computes: after this step     ─► the same
               too late                               ─► the daemon kills it

A signal, since the socket may hold minutes of input in front of anything that is said there now.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final, TypeVar

GIVE_BACK: Final = signal.SIGUSR1

_T = TypeVar("_T")


class OwnerIsBack(Exception):
    """Give the device back, with what can be saved."""


class Preemption:
    """Whether the owner has asked.  `install` it in the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._waiting = False

    def install(self) -> None:
        """Without effect outside the main thread, where Python takes no signals."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(GIVE_BACK, self._on_signal)

    def check(self) -> None:
        """Raises OwnerIsBack where the owner has asked."""
        if self.requested:
            raise OwnerIsBack

    def wait(self, receive: Callable[[], _T]) -> _T:
        """`receive()`, which blocks.  Raises OwnerIsBack as soon as the owner asks."""
        self._waiting = True
        try:
            # After the line above: a signal before it is seen here, one behind it interrupts.
            self.check()
            return receive()
        finally:
            self._waiting = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if self._waiting:
            raise OwnerIsBack
