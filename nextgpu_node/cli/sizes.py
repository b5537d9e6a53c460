"""Sizes and times as people type them."""

from __future__ import annotations

import re

from nextgpu_node.config import parse_size
from nextgpu_node.errors import UsageError
from nextgpu_protocol.limits import MAX_MEMORY_BYTES

_DURATION = re.compile(r"([0-9]{1,9})([smhdw]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST_S = 10 * 366 * 86_400


def gigabytes(option: str, text: str) -> int:
    """Bytes of "16" (GB, as on the box of a card), "16GiB" or "512 MiB".

    Raises UsageError naming `option`.
    """
    try:
        return _bounded(round(float(text) * 10**9) if _is_number(text) else parse_size(text))
    except ValueError as exc:
        raise UsageError(
            f'{option} takes a size such as 16 (GB) or "16GiB", not {text!r}.'
        ) from exc


def size(option: str, text: str) -> int:
    """Bytes of "2GB", "512 MiB" or "1048576" (bytes).  Raises UsageError naming `option`."""
    try:
        return _bounded(parse_size(text))
    except ValueError as exc:
        raise UsageError(f'{option} takes a size such as "2GB" or "512MiB", not {text!r}.') from exc


def duration_s(option: str, text: str) -> int:
    """Seconds of "7d", "12h", "30m", "90s" or "90".  Raises UsageError naming `option`."""
    match = _DURATION.fullmatch(text.strip())
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(f'{option} takes a time such as "7d", "12h" or "30m", not {text!r}.')
    return seconds


def _bounded(size_bytes: int) -> int:
    """More than the protocol can say is a slip of the keyboard."""
    if size_bytes > MAX_MEMORY_BYTES:
        raise ValueError(size_bytes)
    return size_bytes


def _is_number(text: str) -> bool:
    whole, _, fraction = text.partition(".")
    return text.isascii() and whole.isdigit() and (fraction.isdigit() or "." not in text)
