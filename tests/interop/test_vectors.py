"""The second implementation reads each vector as the spec says: its fault, or its content."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from nextgpu_protocol import limits
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.records import RecordKind
from nextgpu_protocol.session import TRANSITIONS
from tests.protocol.vectors import PROTOCOL, Vector, load_vectors

Classified = Mapping[str, dict[str, Any]]


def lines(command: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def classified(node: list[str]) -> Classified:
    """What the second implementation makes of each vector, by name."""
    return {line["name"]: line for line in lines([*node, "classify", str(PROTOCOL / "vectors")])}


@pytest.mark.parametrize("vector", load_vectors(), ids=lambda vector: vector.name)
def test_the_second_implementation_agrees_with_vector(
    vector: Vector, classified: Classified
) -> None:
    seen = classified[vector.name]
    assert (seen["expect"], seen["decoded"]) == (vector.expect, vector.decoded)


def test_both_implementations_have_the_same_tables(node: list[str]) -> None:
    (tables,) = lines([*node, "tables"])
    assert tables["errors"] == {str(code.value): code.name for code in ErrorCode}
    assert tables["frames"] == {str(kind.value): kind.name for kind in FrameKind}
    assert tables["records"] == {str(k.value): k.name for k in RecordKind if k.value}
    assert tables["limits"] == {name: getattr(limits, name) for name in tables["limits"]}
    assert tables["transitions"] == sorted(
        [state.value, f"{side} {kind.name}", following.value]
        for (state, side, kind), following in TRANSITIONS.items()
    )
