"""docs/configuration.md says what config.py does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from nextgpu_node.config import SETTINGS, Choice, Setting, Size, Whole, format_size

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def documented() -> dict[str, tuple[str, str, str]]:
    """Dotted key -> the cells default, range, meaning."""
    rows: dict[str, tuple[str, str, str]] = {}
    section = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip()
        row = re.fullmatch(r"\| `(\w+)` \| `(.+?)` \| (.*?) ?\| (.+) \|", line)
        if row:
            rows[f"{section}.{row[1]}"] = (row[2], row[3], row[4])
    return rows


def test_every_key_is_on_the_page_in_its_order_and_no_other() -> None:
    assert list(documented()) == list(SETTINGS)


def test_every_default_on_the_page_is_the_one_in_the_code() -> None:
    for dotted, (default, _, _) in documented().items():
        written = tomllib.loads(f"x = {default}")["x"]
        assert SETTINGS[dotted].rule.read(written) == SETTINGS[dotted].default, dotted


def range_in_words(setting: Setting) -> str | None:
    match setting.rule:
        case Whole(low, high):
            return f"{low} to {high}" + (" s" if setting.key.endswith("_seconds") else "")
        case Size(low, high):
            return f"{format_size(low)} to {format_size(high)}"
        case Choice(options):
            return ", ".join(f'`"{option}"`' for option in options)
        case _:
            return None


def test_every_range_on_the_page_is_the_one_in_the_code() -> None:
    for dotted, (_, shown, _) in documented().items():
        words = range_in_words(SETTINGS[dotted])
        assert words is None or shown == words, dotted
