"""How commands speak: results on stdout, everything else on stderr.

    a terminal     rich: bold headings, columns that fit
    a pipe         the same words in plain, aligned columns
    --json         one object per command, with `schema`

Names of devices, reasons and addresses come from other people's machines.  Before they reach a
terminal, every character that could steer it is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA: Final = 1

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def printable(text: str) -> str:
    """`text` on one line, without anything that moves a cursor or changes a colour."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def human_bytes(size_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    power = 0
    while size_bytes >= 1024 and power < len(_UNITS) - 1:
        size_bytes /= 1024
        power += 1
    return f"{size_bytes:.1f} {_UNITS[power]}" if power else f"{size_bytes:.0f} B"


def human_seconds(seconds: float) -> str:
    """93784.2 -> "1 d 2 h"; the two largest units that are not zero at the front."""
    parts: list[str] = []
    rest = int(seconds)
    for name, length_s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length_s)
        if count or parts:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"


class Output:
    """`json`: print objects, not sentences.  `color`: whether colour is wanted at all."""

    def __init__(self, *, json: bool, color: bool) -> None:
        self.json = json
        self.color = color

    def print_json(self, **facts: Any) -> None:
        """The command's one object.  Non-ASCII is escaped: any terminal can show it."""
        print(json.dumps({"schema": SCHEMA, **facts}))

    def say(self, *sentences: str) -> None:
        for sentence in sentences:
            print(printable(sentence))

    def note(self, *sentences: str) -> None:
        """For the person who watches, not part of the result."""
        for sentence in sentences:
            print(printable(sentence), file=sys.stderr)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names and values, one pair a line."""
        width = max(map(len, facts))
        for name, value in facts.items():
            self._line(name.ljust(width), printable(value))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under their headings.  Only on a terminal are cells cut to its width."""
        clean = [[printable(cell) for cell in row] for row in rows]
        if sys.stdout.isatty():
            self._rich_table(columns, clean)
            return
        widths = [max(map(len, column)) for column in zip(columns, *clean, strict=True)]
        for row in (columns, *clean):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            print("  ".join(cells).rstrip())

    def console(self, *, stderr: bool = False) -> Console:
        """rich's console under the same rules about colour."""
        from rich.console import Console

        return Console(stderr=stderr, no_color=not self.color, highlight=False, markup=False)

    def _line(self, name: str, value: str) -> None:
        if sys.stdout.isatty():
            from rich.text import Text

            self.console().print(Text.assemble((name, "bold"), "  ", value))
        else:
            print(f"{name}  {value}")

    def _rich_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console().print(table)
