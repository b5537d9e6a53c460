"""The page of attacks is made from the suite, and the suite is as large as we say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.attack_profiles import ENDINGS, KNOWN_OPEN
from tests.support.attack_worker import ATTACKS, KINDS, LETHAL

REPOSITORY = Path(__file__).parents[3]


def test_the_page_says_what_the_suite_demands() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_attack_table.py", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_attack_has_a_section_and_every_open_one_a_reason() -> None:
    assert KINDS.keys() == ATTACKS.keys()
    assert ENDINGS.keys() == LETHAL.keys()
    for known in KNOWN_OPEN.values():
        assert known.keys() <= ATTACKS.keys()
        assert all(len(reason) > 20 for reason in known.values())
    assert len(ATTACKS) > 300
