"""The published vectors: the implementation agrees with each, and the script makes them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nextgpu_protocol.errors import ErrorCode
from tests.protocol.vectors import PROTOCOL, Vector, load_vectors, run_vector

VECTORS = load_vectors()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_implementation_agrees_with_vector(vector: Vector) -> None:
    outcome, decoded = run_vector(vector)
    assert outcome == vector.expect, vector.comment
    if vector.expect == "ok":
        assert decoded == vector.decoded


def test_vectors_and_tables_are_what_the_script_makes() -> None:
    script = PROTOCOL.parent / "scripts" / "make_vectors.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_most_vectors_fail_and_name_a_known_code() -> None:
    failing = [vector for vector in VECTORS if vector.expect != "ok"]
    assert len(failing) >= 150
    assert {vector.expect for vector in failing} <= set(ErrorCode.__members__)
    assert len(failing) > 3 * (len(VECTORS) - len(failing))


def test_every_kind_of_vector_has_one_that_passes() -> None:
    kinds = {"message", "envelope", "frame", "stream", "session", "token", "successions", "check"}
    kinds |= {"lane"}
    assert {vector.kind for vector in VECTORS if vector.expect == "ok"} == kinds
