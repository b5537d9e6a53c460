"""What the dashboard takes from others is what its table says, with its licences."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import nextgpu_node.api.web as web

VENDOR = Path(web.__file__).parent / "dashboard" / "vendor"
ROW = re.compile(r"\| `([^`]+)` \| (\S+) \| `[^`]+` \| (.*) \| `([0-9a-f]{64})` \|")


def test_each_vendored_file_is_the_one_of_the_table() -> None:
    rows = ROW.findall((VENDOR / "README.md").read_text())
    assert {name for name, *_ in rows} == {f.name for f in VENDOR.iterdir()} - {"README.md"}
    for name, _, _, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


def test_each_package_has_its_licence_beside_it() -> None:
    rows = ROW.findall((VENDOR / "README.md").read_text())
    packages = {package.partition("@")[0] for _, package, *_ in rows}
    assert packages == {"htm", "uplot", "preact"}
    for package in packages:
        assert (VENDOR / f"LICENSE.{package}").stat().st_size > 500
