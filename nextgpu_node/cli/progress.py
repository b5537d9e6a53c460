"""What the person who waits sees: one status at a time, on stderr.

queued -> transferring -> starting -> running -> returning -> done
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from nextgpu_node.cli.output import Output, printable

if TYPE_CHECKING:
    from rich.status import Status as Spinner

Status = Literal["queued", "transferring", "starting", "running", "returning", "done"]


class Progress:
    """A line that changes on a terminal, one line for each status elsewhere, or nothing.

    `seconds` is how long each status has lasted; it is kept in every case.
    """

    def __init__(self, out: Output, *, quiet: bool) -> None:
        self._out = out
        self._quiet = quiet
        self._spinner: Spinner | None = None
        self._status: Status | None = None
        self._since_s = time.monotonic()
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            self._spinner = self._out.console(stderr=True).status("")
            self._spinner.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._account()
        if self._spinner is not None:
            self._spinner.stop()

    def enter(self, status: Status, detail: str = "") -> None:
        """The unit is in `status` from now on."""
        self._account()
        self._status = status
        self._show(f"{status}: {detail}" if detail else status, transient=False)

    def advance(self, detail: str) -> None:
        """More of the same status: shown only where the line can change."""
        self._show(f"{self._status}: {detail}", transient=True)

    def _account(self) -> None:
        now_s = time.monotonic()
        if self._status is not None:
            lasted_s = now_s - self._since_s
            self.seconds[self._status] = self.seconds.get(self._status, 0.0) + lasted_s
        self._since_s = now_s

    def _show(self, text: str, *, transient: bool) -> None:
        if self._quiet:
            return
        if self._spinner is not None:
            from rich.text import Text

            self._spinner.update(Text(printable(text)))
        elif not transient:
            self._out.note(text)
