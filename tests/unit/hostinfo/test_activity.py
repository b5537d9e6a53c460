"""Whether somebody is at the machine: what each source says, and what it means together."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextgpu_node.hostinfo.activity import (
    ActivityWatch,
    LoginSession,
    Sources,
    idle_seconds,
    terminals_idle_s,
)
from tests.support.fake_logind import Desk, desk

needs_dbus = pytest.mark.skipif(
    shutil.which("dbus-daemon") is None, reason="dbus-daemon is not installed"
)
INFINITE = float("inf")


def x11(idle_s: float, *, remote: bool = False) -> LoginSession:
    return LoginSession("x11", remote, idle_s)


@pytest.mark.parametrize(
    ("sources", "idle_s"),
    [
        # Nothing is known of a desktop: unknown, whatever the terminals say.
        (Sources(None, None, None), None),
        (Sources(None, None, 9000.0), None),
        (Sources(None, 700.0, 9000.0), 700.0),
        # Nobody is logged in at a desktop: the terminals decide.
        (Sources((), None, 9000.0), 9000.0),
        (Sources((), None, None), INFINITE),
        (Sources((LoginSession("tty", True, 0.0),), None, 5.0), 5.0),
        # Somebody is: any sign of life counts.
        (Sources((x11(0.0),), None, 9000.0), 0.0),
        (Sources((x11(600.0),), None, 9000.0), 600.0),
        (Sources((x11(600.0), x11(0.0)), None, 9000.0), 0.0),
        (Sources((x11(600.0),), None, 3.0), 3.0),
        # A desktop that tells logind nothing is asked itself.
        (Sources((x11(0.0),), 800.0, 9000.0), 800.0),
        # Who is far away is not at the machine.
        (Sources((x11(0.0, remote=True),), None, 9000.0), 9000.0),
    ],
)
def test_what_the_sources_mean_together(sources: Sources, idle_s: float | None) -> None:
    assert idle_seconds(sources) == idle_s


def test_a_terminal_was_used_when_it_was_last_read(tmp_path: Path) -> None:
    assert terminals_idle_s(tmp_path) is None
    (tmp_path / "pts").mkdir()
    for name, age_s in (("tty1", 4000), ("pts/0", 30), ("ttyS0", 1), ("pts/ptmx", 1)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age_s, time.time()))
    assert terminals_idle_s(tmp_path) == pytest.approx(30, abs=2)


@pytest.fixture
def somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with desk(tmp_path) as made:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", made.address)
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", made.address)
        yield made


@needs_dbus
def test_logind_and_the_desktop_are_asked_over_the_bus(somebody: Desk, tmp_path: Path) -> None:
    watch = ActivityWatch(os.environ, tmp_path)
    try:
        assert watch.sources() == Sources((), None, None)
        somebody.sit("1", "wayland")
        somebody.sit("2", "tty", remote=True)
        somebody.sit("c1", "x11", cls="greeter")
        assert {s.kind for s in watch.sources().sessions or ()} == {"wayland", "tty"}
        assert watch.idle_s() == 0.0
        somebody.sit("1", "wayland", idle_since_s=400)
        assert watch.idle_s() == pytest.approx(400, abs=5)
        somebody.sit("1", "wayland")
        somebody.screensaver_ms = 900_000
        assert watch.idle_s() == 900.0
        somebody.mutter_ms = 1_500
        assert watch.idle_s() == 1.5
    finally:
        watch.close()


def test_a_machine_without_a_bus_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    watch = ActivityWatch({}, tmp_path)
    assert watch.sources().sessions is None
    assert watch.idle_s() is None


@needs_dbus
def test_a_bus_that_dies_is_unknown_and_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = ActivityWatch({}, tmp_path)
    for number in range(2):
        place = tmp_path / str(number)
        place.mkdir()
        with desk(place) as made:
            monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", made.address)
            made.sit("1", "x11")
            assert watch.idle_s() == 0.0
        assert watch.idle_s() is None
