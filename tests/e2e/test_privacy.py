"""Marked texts go through the real path, units end in every way: afterwards they are nowhere.

The same search finds what is leaked on purpose, in each place, and names it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nextgpu_node.cli.audited_units import AuditedNodes
from nextgpu_node.cli.privacy import FOUND, as_json, run_audit
from nextgpu_node.privacy.marks import Marks
from tests.support.leaky_daemon import SHARED, leak
from tests.support.nodes import Trio

# Where each way of leaking must show, and nothing else may.
LEAKS = {
    "memory": "memory of daemons between units",
    "child": "memory of launchers between units",
    "file": "files of the provider",
    "unlinked": "open and unlinked files",
    "shm": "shared memory",
    "sysv": "shared memory",
}
# The text passes through the leaky daemon's own memory on its way.
SPILLED = "memory of daemons between units"

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="reading another process's memory needs root here"
)


@needs_root
def test_units_leave_no_trace_however_they_end() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nextgpu_node.cli", "privacy", "audit"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing was found" in done.stdout
    for unit in ("success", "error", "timeout", "cancel", "worker killed", "daemon killed"):
        assert unit in done.stdout


@needs_root
async def test_what_is_leaked_on_purpose_is_found_where_it_is() -> None:
    planted: dict[str, bytes] = {}

    def leak_everywhere(nodes: AuditedNodes, marks: Marks) -> None:
        for way in LEAKS:
            planted[way] = marks.plant(f"leak to {way}")
            leak(nodes.provider.home, way, planted[way])

    try:
        report = await run_audit(
            lambda *_: None,
            provider_module="tests.support.leaky_daemon",
            before_search=leak_everywhere,
            only_success=True,
        )
    finally:
        for left in SHARED.glob("leak-*"):
            left.unlink()
    assert report.exit_code == FOUND
    looks = report.looks
    for way, place in LEAKS.items():
        assert looks[place].found.units & {f"leak to {way}", "?"}, (way, place)
    assert {look.place for look in looks.values() if look.found.count} == {*LEAKS.values(), SPILLED}
    # The unit itself, which nobody leaked, is nowhere; no text is in the report.
    assert not any("success" in look.found.units for look in looks.values())
    assert not any(text.decode() in str(as_json(report)) for text in planted.values())


async def test_logs_at_debug_level_hold_no_addresses_and_no_paths(nodes: Trio) -> None:
    text = nodes.log.read_text()
    assert "node.started" in text
    assert "/ip4/" not in text
    assert "127.0.0.1" not in text
    assert str(nodes.provider.home) not in text
