"""What holds for one submitter in place of what holds for everyone.

    "12D3KooW… units=1 seconds_per_day=3600 requests_per_minute=10 kinds=program,python"

What is not named is as for everyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nextgpu_protocol.ids import public_key_from_peer_id

KINDS: Final = ("program", "python")
_LIMITS: Final[Mapping[str, int]] = {
    "units": 64,
    "seconds_per_day": 64 * 86_400,
    "requests_per_minute": 100_000,
}


@dataclass(frozen=True, slots=True)
class PeerTerms:
    """None: as for everyone.  `kinds` are the only kinds of unit that this peer may run; with
    "python" among them its functions run too."""

    peer_id: str
    units: int | None = None
    seconds_per_day: int | None = None
    requests_per_minute: int | None = None
    kinds: tuple[str, ...] | None = None

    def as_mapping(self) -> dict[str, str]:
        """The terms that are named, as text."""
        named = {name: getattr(self, name) for name in _LIMITS}
        found = {name: str(value) for name, value in named.items() if value is not None}
        return found | ({"kinds": ",".join(self.kinds)} if self.kinds is not None else {})

    def __str__(self) -> str:
        return " ".join([self.peer_id, *(f"{k}={v}" for k, v in self.as_mapping().items())])


def parse_terms(text: str) -> PeerTerms:
    """Raises ValueError where a word is not a term, or not one that can hold."""
    peer_id, *words = text.split()
    return make_terms(peer_id, dict(_split(word) for word in words))


def make_terms(peer_id: str, terms: Mapping[str, str]) -> PeerTerms:
    """`parse_terms`, with the words apart."""
    public_key_from_peer_id(peer_id)
    numbers = {name: _number(name, value) for name, value in terms.items() if name != "kinds"}
    return PeerTerms(
        peer_id,
        numbers.get("units"),
        numbers.get("seconds_per_day"),
        numbers.get("requests_per_minute"),
        _kinds(terms["kinds"]) if "kinds" in terms else None,
    )


def _split(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(word)
    return name, value


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(sorted(set(text.split(","))))
    if not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds={text}")
    return kinds


def _number(name: str, text: str) -> int:
    if name not in _LIMITS or not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ValueError(f"{name}={text}")
    if not 1 <= int(text) <= _LIMITS[name]:
        raise ValueError(f"{name}={text}")
    return int(text)
