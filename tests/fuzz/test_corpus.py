"""Every input that the fuzzer found worth keeping, through its target again.

One file for each target, one input in hex on each line; docs/fuzzing.md says where they come from.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_what_the_fuzzer_kept_still_holds(name: str) -> None:
    lines = (CORPUS / f"{name}.txt").read_text(encoding="ascii").split()
    assert lines
    for line in lines:
        TARGETS[name](bytes.fromhex(line))
