"""When this machine lends: windows of local wall-clock time by weekday.

    "22:00-07:00 mon-fri"    begins on Monday to Friday at 22:00 and ends the next morning
    "00:00-24:00 sat,sun"    both whole days
    "12:00-13:00"            every day

A window belongs to the day on which it begins.  What the wall clock shows decides, so a night in
which clocks change is as long as its hours say: an hour that is shown twice counts both times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")  # datetime.weekday()
_DAY_MINUTES: Final = 24 * 60
_WINDOW = re.compile(r"(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})(?:\s+(\S.*))?")
# A week holds every window; one more day, since the clocks may change in between.
_LOOKAHEAD_DAYS: Final = 8


@dataclass(frozen=True, slots=True)
class Window:
    """`start` and `end` are minutes of the day; where `end` is not later, it is the next day's."""

    start: int
    end: int
    days: frozenset[int]  # on which it begins; 0 is Monday

    @property
    def is_overnight(self) -> bool:
        return self.end <= self.start

    def holds(self, day: int, minute: int) -> bool:
        """Whether a wall clock that shows `minute` of weekday `day` is inside."""
        if not self.is_overnight:
            return day in self.days and self.start <= minute < self.end
        began_yesterday = (day - 1) % 7 in self.days and minute < self.end
        return began_yesterday or (day in self.days and minute >= self.start)

    def __str__(self) -> str:
        hours = f"{_clock(self.start)}-{_clock(self.end)}"
        return hours if len(self.days) == len(DAYS) else f"{hours} {_format_days(self.days)}"


def parse_window(text: str) -> Window:
    """Raises ValueError where `text` is not a window, or one that is never open."""
    match = _WINDOW.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(text)
    start = _minutes(match[1], match[2])
    end = _minutes(match[3], match[4])
    if start in (_DAY_MINUTES, end):
        raise ValueError(text)
    return Window(start, end, _parse_days(match[5]) if match[5] else frozenset(range(7)))


def parse_hours(text: str) -> list[str]:
    """Windows with semicolons between them, each in its shortest form; "always" is none."""
    if text.strip().lower() in ("", "always"):
        return []
    return [str(parse_window(part)) for part in text.split(";") if part.strip()]


def is_open(windows: Sequence[Window], local: datetime) -> bool:
    """Whether the wall clock of `local` is inside one of them.  No windows: always."""
    if not windows:
        return True
    minute = local.hour * 60 + local.minute
    return any(window.holds(local.weekday(), minute) for window in windows)


def next_change(windows: Sequence[Window], now: datetime) -> datetime | None:
    """The next moment, in UTC, at which `is_open` changes in the zone of `now`; None if never."""
    zone = now.tzinfo
    assert zone is not None
    state = is_open(windows, now)
    for moment in sorted(_candidates(windows, now, zone)):
        if moment > now and is_open(windows, moment.astimezone(zone)) is not state:
            return moment
    return None


def _candidates(windows: Iterable[Window], now: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Where the wall clock shows the beginning or the end of a window, or jumps over it."""
    midnight = datetime(now.year, now.month, now.day)  # noqa: DTZ001  a wall clock's
    for window in windows:
        for minute in (window.start, window.end):
            for day in range(-1, _LOOKAHEAD_DAYS + 1):
                wall = midnight + timedelta(days=day, minutes=minute)
                for fold in (0, 1):
                    yield wall.replace(tzinfo=zone, fold=fold).astimezone(UTC)
    yield from _clock_changes(now, zone)


def _clock_changes(now: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Moments of the coming days at which the zone's offset to UTC changes."""
    before = now.astimezone(UTC)
    for _ in range(_LOOKAHEAD_DAYS + 1):
        after = before + timedelta(days=1)
        if _offset(before, zone) != _offset(after, zone):
            yield _bisect(before, after, zone)
        before = after


def _bisect(before: datetime, after: datetime, zone: tzinfo) -> datetime:
    """The first minute with the offset of `after`."""
    low = before.replace(second=0, microsecond=0)
    minutes = int((after - low).total_seconds()) // 60 + 1
    first, last = 0, minutes
    while last - first > 1:
        middle = (first + last) // 2
        same = _offset(low + timedelta(minutes=middle), zone) == _offset(before, zone)
        first, last = (middle, last) if same else (first, middle)
    return low + timedelta(minutes=last)


def _offset(moment: datetime, zone: tzinfo) -> timedelta | None:
    return moment.astimezone(zone).utcoffset()


def _minutes(hour: str, minute: str) -> int:
    total = int(hour) * 60 + int(minute)
    if int(minute) > 59 or total > _DAY_MINUTES:
        raise ValueError(f"{hour}:{minute}")
    return total


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _parse_days(text: str) -> frozenset[int]:
    """ "mon-fri", "sat,sun", "mon wed fri-sun"; a range may go over the end of the week."""
    found: set[int] = set()
    for part in re.split(r"[,\s]+", text.strip()):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(text)
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found |= {day % 7 for day in range(begin, end + 1 if end >= begin else end + 8)}
    return frozenset(found)


def _format_days(days: frozenset[int]) -> str:
    """The shortest way to write them: runs of three or more as a range."""
    runs: list[list[int]] = []
    for day in sorted(days):
        if runs and runs[-1][-1] == day - 1:
            runs[-1].append(day)
        else:
            runs.append([day])
    parts: list[str] = []
    for run in runs:
        names = [DAYS[day] for day in run]
        parts += [f"{names[0]}-{names[-1]}"] if len(run) > 2 else names
    return ",".join(parts)
