"""Since when nobody has touched this machine: logind, the desktop, X11, terminals.

    graphical sessions   the longest idle time that any source gives for them: a desktop that never
                         tells logind is asked itself (Mutter, freedesktop ScreenSaver, X11)
    terminals            the time since the last read of a tty or pty: a key that was pressed
    the machine          the shortest of both; None where nothing tells

Sources: org.freedesktop.login1 (systemd's D-Bus API), org.gnome.Mutter.IdleMonitor,
org.freedesktop.ScreenSaver, the X extension MIT-SCREEN-SAVER, stat(2) of /dev/tty* and /dev/pts/*.
A daemon uses a thread: a bus may hang.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_BUS_TIMEOUT_S: Final = 2.0
_GRAPHICAL: Final = ("x11", "wayland", "mir")
_LOGIN1: Final = "org.freedesktop.login1"
_LOGIN1_PATH: Final = "/org/freedesktop/login1"


@dataclass(frozen=True, slots=True)
class LoginSession:
    """One session of logind.  `idle_s` is 0 while it is in use, or does not say."""

    kind: str  # "tty", "x11", "wayland", …
    remote: bool
    idle_s: float


@dataclass(frozen=True, slots=True)
class Sources:
    """What was heard.  None: that source is not there, or did not answer."""

    sessions: tuple[LoginSession, ...] | None
    desktop_s: float | None
    terminals_s: float | None


def idle_seconds(sources: Sources) -> float | None:
    """How long the owner has been away; None where that is unknown."""
    if sources.sessions is None:
        # Without logind nobody knows whether somebody sits in front of a desktop.
        if sources.desktop_s is None:
            return None
        return min(sources.desktop_s, _known(sources.terminals_s))
    graphical = [s.idle_s for s in sources.sessions if s.kind in _GRAPHICAL and not s.remote]
    idle_s = _known(sources.terminals_s)
    if graphical:
        # A desktop that was asked itself knows better than a hint that nobody keeps.
        idle_s = min(idle_s, max(min(graphical), sources.desktop_s or 0.0))
    return idle_s


def _known(idle_s: float | None) -> float:
    return float("inf") if idle_s is None else idle_s


class ActivityWatch:
    """Asks every source of this machine; connections to the buses are kept."""

    def __init__(
        self, environ: Mapping[str, str] | None = None, devices: Path = Path("/dev")
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self._devices = devices
        self._buses: dict[str, Any] = {}

    def idle_s(self) -> float | None:
        return idle_seconds(self.sources())

    def sources(self) -> Sources:
        return Sources(self._sessions(), self._desktop_s(), terminals_idle_s(self._devices))

    def close(self) -> None:
        for bus in self._buses.values():
            with suppress(OSError):
                bus.close()
        self._buses.clear()

    # --- D-Bus --------------------------------------------------------------------------------

    def _sessions(self) -> tuple[LoginSession, ...] | None:
        manager = (_LOGIN1_PATH, _LOGIN1, f"{_LOGIN1}.Manager")
        listed = self._call("SYSTEM", *manager, "ListSessions")
        if listed is None:
            return None
        found = [self._session(path) for _, _, _, _, path in listed[0]]
        return tuple(session for session in found if session is not None)

    def _session(self, path: str) -> LoginSession | None:
        """None for one that has ended meanwhile, or is no person's."""
        reply = self._call(
            "SYSTEM", path, _LOGIN1, "org.freedesktop.DBus.Properties", "GetAll",
            ("s", (f"{_LOGIN1}.Session",)),
        )  # fmt: skip
        if reply is None:
            return None
        facts = {name: value for name, (_, value) in reply[0].items()}
        if facts.get("Class", "user") != "user":
            return None
        since_s = facts.get("IdleSinceHint", 0) / 1e6
        idle_s = max(0.0, time.time() - since_s) if facts.get("IdleHint") and since_s else 0.0
        return LoginSession(str(facts.get("Type", "")), bool(facts.get("Remote")), idle_s)

    def _desktop_s(self) -> float | None:
        """The first of the owner's own desktop interfaces that answers."""
        if self._environ.get("DBUS_SESSION_BUS_ADDRESS"):
            mutter = self._call(
                "SESSION", "/org/gnome/Mutter/IdleMonitor/Core", "org.gnome.Mutter.IdleMonitor",
                "org.gnome.Mutter.IdleMonitor", "GetIdletime",
            )  # fmt: skip
            if mutter is not None:
                return float(mutter[0]) / 1000
            saver = self._call(
                "SESSION", "/org/freedesktop/ScreenSaver", "org.freedesktop.ScreenSaver",
                "org.freedesktop.ScreenSaver", "GetSessionIdleTime",
            )  # fmt: skip
            if saver is not None:
                return float(saver[0]) / 1000
        return x11_idle_s(self._environ) if self._environ.get("DISPLAY") else None

    def _call(
        self, bus: str, path: str, name: str, interface: str, method: str,
        arguments: tuple[str, tuple[object, ...]] | None = None,
    ) -> Any:  # fmt: skip
        """The reply's body, or None where nobody answers as asked."""
        # Imported here: a node that does not ask pays nothing.
        from jeepney import DBusAddress, MessageFlag, MessageType, new_method_call
        from jeepney.io.blocking import open_dbus_connection

        try:
            if bus not in self._buses:
                self._buses[bus] = open_dbus_connection(bus=bus)
            address = DBusAddress(path, name, interface)
            message = new_method_call(address, method, *(arguments or ()))
            # A question must not start a service that the owner does not use.
            message.header.flags |= MessageFlag.no_auto_start
            reply = self._buses[bus].send_and_get_reply(message, timeout=_BUS_TIMEOUT_S)
            return None if reply.header.message_type is MessageType.error else reply.body
        except (OSError, KeyError, ValueError, TimeoutError, EOFError):
            self._forget(bus)
            return None

    def _forget(self, bus: str) -> None:
        connection = self._buses.pop(bus, None)
        if connection is not None:
            with suppress(OSError):
                connection.close()


# --- without a bus ----------------------------------------------------------------------------


def terminals_idle_s(devices: Path) -> float | None:
    """Seconds since the last key on any console or terminal; None where there is none.

    The access time of a terminal is its last input, as w(1) and who(1) show it.  A console that
    nobody has ever used has that of its making.
    """
    paths = [*devices.glob("tty[0-9]*"), *devices.glob("pts/[0-9]*")]
    times = [found for path in paths if (found := _access_time(path)) is not None]
    return max(0.0, time.time() - max(times)) if times else None


def _access_time(path: Path) -> float | None:
    try:
        return path.stat().st_atime
    except OSError:
        return None


def x11_idle_s(environ: Mapping[str, str]) -> float | None:
    """Seconds since the last input of an X server that we may ask; None without python-xlib."""
    try:
        from Xlib import display, error
        from Xlib.ext import screensaver
    except ImportError:
        return None
    try:
        server = display.Display(environ.get("DISPLAY"))
        try:
            idle_ms: int = screensaver.query_info(server.screen().root).idle
        finally:
            server.close()
    except (OSError, AttributeError, error.DisplayError, error.XError):
        return None
    return idle_ms / 1000
