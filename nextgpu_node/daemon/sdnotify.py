"""systemd's notification protocol: one datagram of "NAME=value" lines (sd_notify(3)).

    READY=1         started; systemd starts what waits for us
    STATUS=…        one line for `systemctl status`
    WATCHDOG=1      the loop is alive; systemd restarts us after WATCHDOG_USEC without one
    STOPPING=1      a deliberate stop has begun

Without NOTIFY_SOCKET nothing is sent: the same code runs in a terminal.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Mapping

import structlog
import trio

_log = structlog.get_logger()


class Notifier:
    """Sends this process's state to the service manager that started it.

    Built before the daemon starts any child, from its environment; the caller then removes
    NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID from it, so that no child speaks for us.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(environ) if self._address else None

    def ready(self, status: str = "") -> None:
        self._send("READY=1", *_status(status))

    def stopping(self, status: str = "") -> None:
        self._send("STOPPING=1", *_status(status))

    def status(self, text: str) -> None:
        """One line, seen by everyone who may call `systemctl status`: no ids, no addresses."""
        self._send(*_status(text))

    async def run_watchdog(self) -> None:
        """Tell systemd twice per period that this loop turns; returns at once without a watchdog.

        The ping is sent from the daemon's own loop, as a task of its own nursery: a loop that is
        blocked or a daemon that has crashed sends none.  A thread would ping for a dead loop.
        """
        if self.watchdog_s is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await trio.sleep(self.watchdog_s / 2)  # half the period: sd_watchdog_enabled(3)

    def _send(self, *lines: str) -> None:
        if self._address is None or not lines:
            return
        flags = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_UNIX, flags) as sender:
            try:
                sender.connect(self._address)
                sender.sendall("\n".join(lines).encode())
            except OSError as exc:
                # A manager that is busy or gone is its own trouble, and the watchdog's to find.
                _log.warning("notify.not_sent", errno=errno.errorcode.get(exc.errno or 0, ""))


def _address(text: str) -> str | None:
    """NOTIFY_SOCKET as an address; a leading "@" is the abstract name space's NUL (unix(7))."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else None


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """The period, where it is set and meant for this process."""
    pid = environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    try:
        period_s = int(environ.get("WATCHDOG_USEC", "")) / 1_000_000
    except ValueError:
        return None
    return period_s if period_s > 0 and math.isfinite(period_s) else None


def _status(text: str) -> tuple[str, ...]:
    """A status of one line: a line break would begin another assignment."""
    line = " ".join(text.split())
    return (f"STATUS={line}",) if line else ()
