"""A real D-Bus daemon with a small logind and a small desktop on it, for tests without either."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jeepney import HeaderFields, MessageType, new_error, new_method_return
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow own="*"/>
<allow receive_sender="*"/></policy></busconfig>"""


@dataclass
class Desk:
    """What the bus says.  `sessions`: path -> properties of logind's sessions."""

    address: str = ""
    sessions: dict[str, dict[str, tuple[str, Any]]] = field(default_factory=dict)
    mutter_ms: int | None = None
    screensaver_ms: int | None = None

    def sit(self, name: str, kind: str, *, idle_since_s: float | None = None, **more: Any) -> None:
        """A session of a person; `idle_since_s`: seconds ago, None while in use."""
        since = 0 if idle_since_s is None else round((time.time() - idle_since_s) * 1e6)
        self.sessions[f"/org/freedesktop/login1/session/{name}"] = {
            "Type": ("s", kind),
            "Class": ("s", more.get("cls", "user")),
            "Remote": ("b", more.get("remote", False)),
            "IdleHint": ("b", idle_since_s is not None),
            "IdleSinceHint": ("t", since),
        }

    def answer(self, path: str, member: str) -> tuple[str, tuple[Any, ...]] | None:
        match member:
            case "ListSessions":
                rows = [(p.rsplit("/", 1)[1], 1000, "owner", "seat0", p) for p in self.sessions]
                return "a(susso)", (rows,)
            case "GetAll" if path in self.sessions:
                return "a{sv}", (self.sessions[path],)
            case "GetIdletime" if self.mutter_ms is not None:
                return "t", (self.mutter_ms,)
            case "GetSessionIdleTime" if self.screensaver_ms is not None:
                return "u", (self.screensaver_ms,)
        return None


@contextmanager
def desk(directory: Path) -> Iterator[Desk]:
    """A bus below `directory`, with everything that `Desk` says on it."""
    socket, config = directory / "bus", directory / "bus.conf"
    config.write_text(_CONFIG.format(socket=socket))
    daemon = subprocess.Popen(
        [
            shutil.which("dbus-daemon") or "",
            f"--config-file={config}",
            "--nofork",
            "--print-address",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    made = Desk(address=f"unix:path={socket}")
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline(), "the bus did not start"
        bus = open_dbus_connection(bus=made.address)
        for name in (
            "org.freedesktop.login1",
            "org.gnome.Mutter.IdleMonitor",
            "org.freedesktop.ScreenSaver",
        ):
            bus.send_and_get_reply(message_bus.RequestName(name))
        server = threading.Thread(target=_serve, args=(bus, made), daemon=True)
        server.start()
        yield made
    finally:
        daemon.kill()
        daemon.communicate()
        server.join(5)


def _serve(bus: Any, made: Desk) -> None:
    with bus, suppress(OSError, EOFError, ValueError):
        while True:
            message = bus.receive()
            if message.header.message_type is not MessageType.method_call:
                continue
            fields = message.header.fields
            said = made.answer(fields[HeaderFields.path], fields[HeaderFields.member])
            unknown = "org.freedesktop.DBus.Error.UnknownMethod"
            bus.send(new_method_return(message, *said) if said else new_error(message, unknown))
