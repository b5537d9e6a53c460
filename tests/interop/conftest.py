"""Where the second implementation runs: Node.js with the packages of package-lock.json."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OLDEST_NODE = 18


@pytest.fixture(scope="session")
def node() -> list[str]:
    """The command line of the second implementation; its subcommand and arguments follow."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("Node.js is not installed")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.strip().removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"Node.js {OLDEST_NODE} or newer is needed, not {version.stdout.strip()}")
    if not (HERE / "node_modules" / "libsodium-wrappers-sumo").is_dir():
        pytest.skip("its packages are not installed: (cd tests/interop && npm ci)")
    return [program, str(HERE / "main.mjs")]
