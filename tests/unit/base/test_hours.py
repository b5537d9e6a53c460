"""Windows of the week against brute force, and nights in which the clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextgpu_node.hours import DAYS, Window, is_open, next_change, parse_hours, parse_window

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = ["Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"]

minutes = st.integers(0, 24 * 60 - 1)
day_sets = st.frozensets(st.integers(0, 6), min_size=1)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    start = draw(minutes)
    end = draw(st.integers(0, 24 * 60).filter(lambda minute: minute != start))
    return Window(start, end, draw(day_sets))


def open_by_walking(window: Window) -> set[tuple[int, int]]:
    """(weekday, minute) that are inside, found by walking from each beginning to its end."""
    inside: set[tuple[int, int]] = set()
    for day in window.days:
        length = (window.end - window.start) % 1440 or 1440
        for step in range(length):
            at = window.start + step
            inside.add(((day + at // 1440) % 7, at % 1440))
    return inside


@given(windows())
@settings(max_examples=30, deadline=None)
def test_a_window_is_open_exactly_from_its_beginning_to_its_end(window: Window) -> None:
    inside = open_by_walking(window)
    for day in range(7):
        for minute in range(0, 1440, 7):
            assert window.holds(day, minute) is ((day, minute) in inside)
    for day, minute in ((d, m % 1440) for d in range(7) for m in (window.start, window.end)):
        for near in (minute - 1, minute, minute + 1):
            if 0 <= near < 1440:
                assert window.holds(day, near) is ((day, near) in inside)


@given(windows())
def test_what_is_written_is_read_as_the_same(window: Window) -> None:
    assert parse_window(str(window)) == window
    assert parse_hours(str(window)) == [str(window)]


@pytest.mark.parametrize(
    ("text", "day", "clock", "inside"),
    [
        ("22:00-07:00 mon-fri", "mon", "21:59", False),
        ("22:00-07:00 mon-fri", "mon", "22:00", True),
        ("22:00-07:00 mon-fri", "mon", "03:00", False),  # Sunday's night is not among them
        ("22:00-07:00 mon-fri", "sat", "06:59", True),  # Friday's is
        ("22:00-07:00 mon-fri", "sat", "07:00", False),
        ("22:00-07:00 mon-fri", "sat", "23:00", False),
        ("00:00-24:00 sat,sun", "sun", "23:59", True),
        ("00:00-24:00 sat,sun", "mon", "00:00", False),
        ("9:00-17:00", "wed", "12:00", True),
        ("22:00-07:00 fri-mon", "sun", "23:00", True),
        ("22:00-07:00 fri-mon", "tue", "06:00", True),
        ("22:00-07:00 fri-mon", "tue", "23:00", False),
    ],
)
def test_windows_as_people_write_them(text: str, day: str, clock: str, inside: bool) -> None:
    hour, minute = map(int, clock.split(":"))
    assert parse_window(text).holds(DAYS.index(day), hour * 60 + minute) is inside


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22-07",
        "22:00",
        "25:00-26:00",
        "24:01-25:00",
        "22:60-23:00",
        "24:00-07:00",
        "09:00-09:00",
        "22:00-07:00 noday",
        "22:00-07:00 mon-",
        "22:00-07:00 mon;tue",
        "22:00-07:00 mon-fri " + "x" * 1000,
    ],
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_window(text)


def test_several_windows_and_always() -> None:
    assert parse_hours("22:00-07:00 mon-fri; 00:00-24:00 sat sun") == [
        "22:00-07:00 mon-fri",
        "00:00-24:00 sat,sun",
    ]
    assert parse_hours("always") == parse_hours("") == []
    assert is_open([], datetime.now(UTC))


def change_by_walking(window: Window, now: datetime, limit_days: int = 8) -> datetime | None:
    zone = now.tzinfo
    moment = now.astimezone(UTC).replace(second=0, microsecond=0)
    state = is_open([window], now)
    for _ in range(limit_days * 1440):
        moment += timedelta(minutes=1)
        if is_open([window], moment.astimezone(zone)) is not state:
            return moment
    return None


@given(
    windows(),
    st.sampled_from(ZONES),
    # Weeks with and without a change of the clocks, in both hemispheres.
    st.sampled_from([datetime(2026, m, d, tzinfo=UTC) for m, d in ((3, 25), (10, 22), (4, 2))]),
    st.integers(0, 7 * 1440),
)
@settings(max_examples=12, deadline=None)
def test_the_next_change_is_the_one_that_walking_finds(
    window: Window, zone: str, day: datetime, minute: int
) -> None:
    now = (day + timedelta(minutes=minute)).astimezone(ZoneInfo(zone))
    found = next_change([window], now)
    assert found == change_by_walking(window, now)


def test_an_hour_that_is_shown_twice_counts_both_times() -> None:
    """Berlin, 25 October 2026: 02:00 to 03:00 is shown twice."""
    window = parse_window("02:00-03:00")
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    seen = [is_open([window], (first + timedelta(minutes=30 * n)).astimezone(BERLIN))
            for n in range(-2, 5)]  # fmt: skip
    assert seen == [False, True, True, True, True, False, False]


def test_an_hour_that_is_not_shown_opens_nothing() -> None:
    """Berlin, 29 March 2026: after 01:59 comes 03:00."""
    window = parse_window("02:00-03:00 sun")
    start = datetime(2026, 3, 29, 0, 0, tzinfo=UTC)
    assert not any(
        is_open([window], (start + timedelta(minutes=n)).astimezone(BERLIN)) for n in range(240)
    )
