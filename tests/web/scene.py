"""Two real nodes with something to see: one's dashboard is open, the other borrows from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nextgpu_node.cli.processes import DaemonProcess, run_cli

ROOM = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The browser's path.  Skips the test where something is missing, and says what."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    if not (ROOM / "node_modules" / "playwright-core").is_dir():
        pytest.skip("playwright-core is not installed: scripts/test-web sets it up")
    for name in BROWSERS:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip("chromium is not installed: scripts/test-web sets it up")


def drive(url: str, browser: str, **wanted: object) -> dict[str, Any]:
    """What the browser met on all pages (drive.mjs)."""
    asked = {"url": url, "chromium": browser, "widths": [360, 1440], "themes": ["light", "dark"]}
    done = subprocess.run(
        ["node", str(ROOM / "drive.mjs"), json.dumps({**asked, **wanted})],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@contextmanager
def one_node(settings: Mapping[str, str] | None = None) -> Iterator[DaemonProcess]:
    """A node that lends nothing, with its dashboard closed."""
    work = Path(tempfile.mkdtemp(prefix="ngpu-web-"))
    try:
        with ExitStack() as stack:
            port = {"web.port": "0"}
            node = DaemonProcess(work / "home", settings={**port, **(settings or {})})
            stack.enter_context(node)
            node.wait_ready()
            yield node
    finally:
        shutil.rmtree(work)


def open_dashboard(node: DaemonProcess) -> str:
    """Its address, as `nextgpu web --print-url` gives it."""
    command = [sys.executable, "-m", "nextgpu_node.cli", "--home", str(node.home)]
    done = subprocess.run(
        [*command, "web", "--print-url"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def sharing(node: DaemonProcess) -> dict[str, Any]:
    """What the daemon itself says."""
    found: Any = run_cli(node.home, "status")["sharing"]
    return dict(found)
