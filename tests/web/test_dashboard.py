"""The dashboard of a real node in a real browser: every page, both widths, both themes."""

from __future__ import annotations

import pytest

from nextgpu_node.cli.processes import run_cli
from tests.web.scene import chromium, drive, one_node, open_dashboard, sharing


@pytest.fixture(scope="module")
def browser() -> str:
    return chromium()


def test_every_page_works_and_the_switch_moves_the_node(browser: str) -> None:
    with one_node() as node:
        url = open_dashboard(node)
        assert sharing(node)["enabled"] is False
        report = drive(url, browser, share=True, limits=True)
        assert sharing(node)["enabled"] is True
        assert run_cli(node.home, "config", "show")["settings"]["sharing.hours"] == ["22:00-07:00"]
    assert report["errors"] == []
    assert report["violations"] == []
    assert report["foreign"] == []
    assert report["overflows"] == []
    assert report["unnamed"] == []
    assert report["contrast"] == []
    assert report["visited"] == 20
    assert (report["share"]["before"], report["share"]["after"]) == ("false", "true")
    assert "Sharing is on" in report["share"]["said"]
    assert "windows such as" in report["limits"]["wrong"]
    assert (report["cookies"], report["stored"]) == (0, 0)
    assert not any("token" in address for address in report["addresses"])
    assert report["locked"] == "This page needs its key"
