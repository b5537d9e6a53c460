"""A daemon without privileges: with user namespaces it has the same walls as root's, without them
those of tier C.  As uid 65534, in a mount namespace where the interpreter's place is passable."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.attack_profiles import unexpected_verdicts
from tests.support.host_kinds import NOBODY, REPOSITORY, as_nobody, passable_homes

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(
        os.geteuid() != 0,
        reason="only root can become another user; the other tests run unprivileged here",
    ),
]

_MAIN = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import json, structlog, trio
from pathlib import Path
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
from nextgpu_node.sandbox.probe import probe
from tests.support.host_kinds import refuse_namespaces
from tests.support.sandbox import attack_all
REFUSED = %r
if REFUSED:
    refuse_namespaces()
report = probe()
verdicts = trio.run(lambda: attack_all(Path("/mnt/run"), tier=report.tier))
print(json.dumps([report.tier, report.layers, report.missing, verdicts]))
"""


def _as_nobody(tmp_path: Path, *, namespaces_refused: bool) -> list[Any]:
    (tmp_path / "main.py").write_text(_MAIN % namespaces_refused)
    tmp_path.chmod(0o711)
    for name in ("run", "hold"):
        (tmp_path / name).mkdir()
    os.chown(tmp_path / "run", NOBODY, NOBODY)
    lines = [f"mount --bind {tmp_path} /mnt", passable_homes(f"{tmp_path}/hold")]
    command = " ".join(as_nobody("/mnt/main.py"))
    run = subprocess.run(
        ["unshare", "-m", "sh", "-e", "-c", "\n".join([*lines, f"exec {command}"])],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    told: list[Any] = json.loads(run.stdout)
    return told


def test_unprivileged_user_gets_the_same_tier(tmp_path: Path) -> None:
    tier, layers, _, verdicts = _as_nobody(tmp_path, namespaces_refused=False)
    assert (tier, layers[:2]) == ("A", ["tier-A", "user-namespace"])
    assert unexpected_verdicts("A", verdicts) == {}


def test_unprivileged_user_without_namespaces_gets_tier_c(tmp_path: Path) -> None:
    """Landlock and seccomp alone: no file but the packages, no socket, no process, no writing."""
    tier, layers, missing, verdicts = _as_nobody(tmp_path, namespaces_refused=True)
    assert tier == "C"
    assert "mount-namespace" not in layers
    assert [name for name, _ in missing] == ["cgroup", "namespaces", "worker service"]
    assert unexpected_verdicts("C-user", verdicts) == {}
