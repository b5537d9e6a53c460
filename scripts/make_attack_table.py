"""docs/attacks.md from the attack suite: what each profile does with each attack.

    scripts/make_attack_table.py [--check]

The verdicts are those that the tests demand of every run (tests/support/attack_profiles.py), so
the table can not say more than what holds.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from tests.support.attack_profiles import ENDINGS, KNOWN_OPEN  # noqa: E402
from tests.support.attack_worker import ATTACKS, KINDS, LETHAL  # noqa: E402

PAGE = PROJECT / "docs" / "attacks.md"
PROFILES = ("A", "A-gpu", "B", "C", "C-user")
_HEAD = """# Attacks on the sandbox

Made by `scripts/make_attack_table.py` from `tests/support/attack_worker.py`. Every attack runs from
inside a real worker, by code with all the rights that a worker has: `tests/integration/sandbox`
runs all of them under each profile, and fails where a verdict differs from this page.
[sandbox.md](sandbox.md) says what the profiles are.

- **-** blocked: refused, or there is nothing there
- **l** limited: goes through up to the worker's own limit, and no further
- **open**: goes through; the reasons stand below

`call_…` is the bare system call: blocked means that the kernel refused it at the door. "A-gpu" ran
here without a card: its walls are tested, the driver is not.
"""


def page() -> str:
    return "\n".join([_HEAD, _counts(), *_tables(), _endings(), _reasons()])


def _verdict(name: str, profile: str) -> str:
    if name in KNOWN_OPEN[profile]:
        return "**open**"
    is_bomb = KINDS[name] == "bombs" and not name.startswith("call_")
    return "l" if is_bomb else "-"


def _counts() -> str:
    lines = ["| | " + " | ".join(PROFILES) + " |", "|---|" + "---|" * len(PROFILES)]
    for word, label in (("-", "blocked"), ("l", "limited"), ("**open**", "open")):
        counts = (sum(_verdict(name, p) == word for name in ATTACKS) for p in PROFILES)
        lines.append(f"| {label} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join([*lines, ""])


def _tables() -> list[str]:
    tables = []
    for kind in dict.fromkeys(KINDS.values()):
        lines = [f"## {kind.capitalize()}\n", f"| attack | {' | '.join(PROFILES)} |"]
        lines.append("|---|" + "---|" * len(PROFILES))
        lines += [_row(name) for name in ATTACKS if KINDS[name] == kind]
        tables.append("\n".join([*lines, ""]))
    return tables


def _row(name: str) -> str:
    return f"| {name} | " + " | ".join(_verdict(name, profile) for profile in PROFILES) + " |"


def _endings() -> str:
    assert ENDINGS.keys() == LETHAL.keys()
    lines = ["## Attacks that end their worker\n", "| attack | what comes of it |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {end} |" for name, end in ENDINGS.items()), ""])


def _reasons() -> str:
    lines = ["## Why some are open\n", "| attack | where | why |", "|---|---|---|"]
    for name in ATTACKS:
        where = [profile for profile in PROFILES if name in KNOWN_OPEN[profile]]
        for reason in dict.fromkeys(KNOWN_OPEN[profile][name] for profile in where):
            same = [profile for profile in where if KNOWN_OPEN[profile][name] == reason]
            lines.append(f"| {name} | {', '.join(same)} | {reason} |")
    return "\n".join([*lines, ""])


def main() -> int:
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() == page():
            return 0
        print(f"{PAGE}: run scripts/make_attack_table.py")
        return 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
