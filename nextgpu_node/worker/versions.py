"""What a Python unit runs on, and whether functions from here run there."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

# Functions travel as byte code, which one minor version of Python reads; torch and cloudpickle
# rebuild objects by code of their own.
_MATCHED: Final = ("python", "torch", "cloudpickle")
_PART: Final = re.compile(r"(\w+) (\S+)")


def python_runtime() -> str:
    """Such as "python 3.11.7, torch 2.13.0, cloudpickle 3.1.3"; empty without cloudpickle."""
    try:
        parts = {
            "python": platform.python_version(),
            "torch": version("torch").partition("+")[0],
            "cloudpickle": version("cloudpickle"),
        }
    except PackageNotFoundError:
        return ""
    return ", ".join(f"{name} {number}" for name, number in parts.items())


def mismatch(here: str, there: str) -> str:
    """Why functions from a process on `here` do not run on `there`; empty where they do."""
    ours, theirs = dict(_PART.findall(here)), dict(_PART.findall(there))
    for name in _MATCHED:
        if _significant(name, ours.get(name, "")) != _significant(name, theirs.get(name, "")):
            return f"here is {name} {ours.get(name, 'none')}, there {theirs.get(name, 'none')}"
    return ""


def _significant(name: str, number: str) -> str:
    return ".".join(number.split(".")[:2]) if name == "python" else number
