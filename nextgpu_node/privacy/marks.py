"""Marked texts that nothing else on this machine holds, and how they are recognised.

    20 random letters (of the audit) ‖ 1 letter (which unit) ‖ 11 random letters

The worker gives each byte back raised by one, so that a result is a mark of its own.  The search is
for the first twenty letters, plain, in hexadecimal and in base64; what follows them tells the unit.
"""

from __future__ import annotations

import base64
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MARK_BYTES: Final = 32
_PREFIX_LETTERS: Final = 20
# Up to "y": raised by one it is a letter still.
_LETTERS: Final = bytes(range(ord("a"), ord("z")))
# Long enough for every form of the prefix to fall into one of two neighbouring chunks whole.
OVERLAP_BYTES: Final = 128


@dataclass(frozen=True, slots=True)
class Found:
    """Marks in one place.  `units` names whose; "?" where the form does not tell."""

    count: int = 0
    units: frozenset[str] = frozenset()

    def __add__(self, other: Found) -> Found:
        return Found(self.count + other.count, self.units | other.units)


NONE_FOUND: Final = Found()


class Marks:
    """The marks of one audit: `plant` makes one for each unit, `search` counts them."""

    def __init__(self) -> None:
        self._prefix = _letters(_PREFIX_LETTERS)
        self._units: dict[int, str] = {}
        self._forms = (*_forms(self._prefix, 0), *_forms(raised(self._prefix), 1))

    @property
    def plain_prefixes(self) -> tuple[bytes, bytes]:
        """What every mark and every result begins with, for a search without our code."""
        return self._prefix, raised(self._prefix)

    def plant(self, unit: str) -> bytes:
        """A new mark for the unit of that name; MARK_BYTES long."""
        letter = _LETTERS[len(self._units)]
        self._units[letter] = unit
        return self._prefix + bytes([letter]) + _letters(MARK_BYTES - _PREFIX_LETTERS - 1)

    def search(self, data: bytes) -> Found:
        """How many marks `data` holds, in any form."""
        units: Counter[str] = Counter()
        for form, shift in self._forms:
            at = data.find(form)
            while at >= 0:
                units[self._unit_behind(data, at + len(form), shift)] += 1
                at = data.find(form, at + 1)
        return Found(units.total(), frozenset(units))

    def _unit_behind(self, data: bytes, at: int, shift: int | None) -> str:
        if shift is None or at >= len(data):
            return "?"
        return self._units.get(data[at] - shift, "?")


def raised(text: bytes) -> bytes:
    """Each byte plus one: what the marked unit gives back."""
    return bytes(byte + 1 for byte in text)


def _letters(count: int) -> bytes:
    return bytes(secrets.choice(_LETTERS) for _ in range(count))


def _forms(text: bytes, shift: int) -> Iterator[tuple[bytes, int | None]]:
    """(pattern, by how much the byte behind it is raised; None where that byte is encoded)."""
    yield text, shift
    yield text.hex().encode(), None
    for offset in range(3):
        whole = base64.b64encode(bytes(offset) + text + bytes(3))
        # Letters that depend on what stands before or behind are left out.
        first = (offset * 8 + 5) // 6
        yield whole[first : (offset + len(text)) * 8 // 6], None
