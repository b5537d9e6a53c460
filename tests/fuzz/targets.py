"""What the fuzzer calls, one function for each reader of a peer's bytes.

    scripts/fuzz NAME --seconds 600       runs TARGETS[NAME] under atheris
    tests/fuzz/test_corpus.py             runs it over every input that was worth keeping

A target returns for any bytes.  It raises AssertionError where a claim does not hold, and lets
through whatever else the code raises: both are findings.  RemoteProtocolError is the one error
that bytes from a peer may cause.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.codec import codec
from tests.fuzz.framing import framing
from tests.fuzz.programs import change_values, plan, program, run, tensors
from tests.fuzz.stream import stream

Target = Callable[[bytes], Any]

TARGETS: dict[str, Target] = {
    "codec": codec,
    "framing": framing,
    "stream": stream,
    "program": program,
    "plan": plan,
    "run": run,
    "tensors": tensors,
}

# Targets whose inputs are msgpack: most changes are to whole values, so that they stay msgpack.
CHANGES: dict[str, Callable[[bytes, int], bytes | None]] = {
    "program": change_values,
    "plan": change_values,
    "run": change_values,
}
