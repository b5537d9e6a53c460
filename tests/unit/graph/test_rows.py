"""Every row of the operator table, called: what it gives and takes is what the plan promised."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tests.fuzz
from tests.support.rows import case_of, rows

SOURCE = Path(tests.fuzz.__path__[0]) / "guard_malloc.c"
PROJECT = SOURCE.parent.parent.parent
# Rows that nobody can call in a test, with the reason.
NOT_CALLED: dict[str, str] = {}


def test_every_row_has_a_small_valid_call():
    missing = {row.op for row in rows() if case_of(row.op) is None}
    assert missing == NOT_CALLED.keys(), "write its call into tests/support/rows.py"


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """Guarded tensor memory; without a compiler the same calls run in ordinary memory."""
    compiler = shutil.which("cc")
    if compiler is None:
        return {}
    library = tmp_path_factory.mktemp("guard") / "guard_malloc.so"
    flags = ["-O2", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([compiler, *flags, str(SOURCE), "-ldl", "-lpthread"], check=True)
    return {"LD_PRELOAD": str(library), "GUARD_MALLOC": str(library)}


def test_every_row_stays_in_its_memory_and_keeps_the_promises_of_its_plan(guard):
    """In memory that ends at an inaccessible page and is filled with a pattern: no row reads or
    writes outside of its tensors, gives what was never written, allocates more than was planned,
    or gives another shape, dtype or, the second time, other bytes.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz.rows", "valid"],
        cwd=PROJECT,
        env=os.environ | guard | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # On a crash, the last line of stderr is the row.
    assert done.returncode == 0, done.stderr.splitlines()[-1:]
    *findings, tally = map(json.loads, done.stdout.splitlines())
    assert findings == []
    assert tally["ran"] == tally["calls"] >= 1500
