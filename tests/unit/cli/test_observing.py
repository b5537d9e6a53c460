"""log-level, events, metrics, web and bugreport against a served API."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path

import pytest
import trio

from nextgpu_node.api import server
from tests.unit.api.backend import MemoryBackend
from tests.unit.api.desk import MemoryDesk
from tests.unit.cli.conftest import Cli

PEER = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"


@pytest.fixture
async def desk(nursery: trio.Nursery, cli: Cli) -> MemoryDesk:
    desk = MemoryDesk()
    await nursery.start(server.run, MemoryBackend(), cli.paths.api_socket, desk)
    return desk


async def test_the_running_node_is_looked_at_and_told(cli: Cli, desk: MemoryDesk) -> None:
    done = await cli.beside("log-level", "debug")
    assert (done.code, done.out) == (0, "debug\n")
    assert desk.level == "debug"
    assert (await cli.beside("log-level", "loud")).code == 2
    assert (await cli.beside("metrics")).out == "nextgpu_up 1\n"
    assert json.loads((await cli.beside("events")).out)["event"] == "node.status"


async def test_the_address_of_the_dashboard_is_printed_alone(cli: Cli, desk: MemoryDesk) -> None:
    done = await cli.beside("web", "--print-url")
    assert done.out == "http://127.0.0.1:1/#token=x\n"
    assert "closed" in (await cli.beside("web", "--close")).out


async def test_a_browser_is_led_through_a_private_page(cli: Cli, desk: MemoryDesk) -> None:
    """Its command line, which every user can read, has no key."""
    browser = cli.home / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {cli.home}/opened\n')
    browser.chmod(0o700)
    cli.environ["BROWSER"] = str(browser)
    assert (await cli.beside("web")).code == 0
    with trio.fail_after(5):
        while not (cli.home / "opened").exists():  # noqa: ASYNC110  another process writes it
            await trio.sleep(0.02)
    assert "token" not in (cli.home / "opened").read_text()
    page = cli.paths.web_page_file
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert "url=http://127.0.0.1:1/#token=x" in page.read_text()


def test_without_a_node_each_says_so(cli: Cli) -> None:
    for words in (["log-level"], ["metrics"], ["events"], ["web"]):
        assert cli(*words).code == 3


async def test_a_bugreport_has_nothing_that_is_the_owners(cli: Cli, desk: MemoryDesk) -> None:
    cli.paths.config_file.write_text(
        f'[network]\nbootstrap = ["/ip4/203.0.113.7/tcp/1/p2p/{PEER}"]\n'
        f'[sharing]\nallow = ["{PEER}"]\nthreads = 3\n'
    )
    done = await cli.beside("bugreport")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["settings"]["sharing.threads"] == 3
    assert report["settings"]["sharing.allow"] == "set"
    assert report["daemon"]["version"] == "0.1.0"
    assert report["daemon"]["logged"] == {"node.started": 1}
    for secret in (PEER, "12D3KooW", "203.0.113.7", "/ip4", str(cli.home), socket.gethostname(),
                   "Test CPU", "0123456789abcdef"):  # fmt: skip
        assert secret not in done.out, secret
    values = json.dumps([value for key, value in report.items() if key != "packages"])
    assert "/" not in values.replace("cgroup-v1", "")
    # Nobody was there to agree: it was shown, not saved.
    assert not (cli.home / "nextgpu-bugreport.json").exists()


def test_a_bugreport_is_saved_privately_where_it_is_wanted(cli: Cli, tmp_path: Path) -> None:
    done = cli("bugreport", "--yes", "-o", str(tmp_path / "r.json"))
    assert done.code == 0
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(done.out)
    assert (tmp_path / "r.json").stat().st_mode & 0o777 == 0o600
    assert cli("bugreport", "--yes", "-o", str(tmp_path / "r.json")).code == 2
