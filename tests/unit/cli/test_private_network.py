from __future__ import annotations

import json
import stat

import pytest

from nextgpu_node.private_network import (
    NetworkInvite,
    fingerprint,
    format_invite,
    read_network_key,
)
from tests.unit.cli.conftest import Cli

KEY = bytes(range(32))
ADDRESS = "/ip4/192.0.2.7/tcp/4650/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
INVITE = format_invite(NetworkInvite(KEY, (ADDRESS,)))


def test_joining_keeps_the_key_for_the_owner_and_takes_the_addresses(cli: Cli) -> None:
    done = cli("network", "join", INVITE)
    assert (done.code, fingerprint(KEY) in done.out) == (0, True)
    assert read_network_key(cli.paths.network_key_file) == KEY
    assert stat.S_IMODE(cli.paths.network_key_file.stat().st_mode) == 0o600
    shown = json.loads(cli("config", "show", "--json").out)
    assert shown["settings"]["network.bootstrap"] == [ADDRESS]
    assert json.loads(cli("network", "show", "--json").out)["network"] == fingerprint(KEY)


def test_the_key_is_in_nothing_that_is_printed_but_an_invite(cli: Cli) -> None:
    said = [cli("network", "join", INVITE), cli("network", "show"), cli("data", "show")]
    for done in said:
        assert KEY.hex() not in done.out + done.err
        assert INVITE not in done.out + done.err


def test_create_then_leave(cli: Cli) -> None:
    cli.paths.state_dir.mkdir(parents=True, mode=0o700)
    cli.paths.known_peers_file.write_text("of the open network")
    assert cli("network", "create").code == 0
    assert not cli.paths.known_peers_file.exists()
    assert read_network_key(cli.paths.network_key_file) is not None
    again = cli("network", "create")
    assert again.code == 2
    assert "nextgpu network leave" in again.err
    assert cli("network", "leave").code == 0
    assert read_network_key(cli.paths.network_key_file) is None
    assert cli("network", "leave").code == 2


def test_an_invite_through_members_needs_no_running_node(cli: Cli) -> None:
    cli("network", "join", INVITE)
    assert cli("network", "invite").out.strip() == INVITE
    file = cli.home / "invite"
    assert cli("network", "invite", "--output", str(file)).out == ""
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().strip() == INVITE


@pytest.mark.parametrize("invite", ["nonsense", INVITE[:-3]])
def test_a_bad_invite_changes_nothing(cli: Cli, invite: str) -> None:
    assert cli("network", "join", invite).code == 2
    assert not cli.paths.network_key_file.exists()


def test_an_invite_with_a_bad_address_changes_nothing(cli: Cli) -> None:
    bad = format_invite(NetworkInvite(KEY, ("/ip4/192.0.2.7/udp/1",)))
    assert cli("network", "join", bad).code == 2
    assert not cli.paths.network_key_file.exists()


def test_without_a_network_there_is_no_invite(cli: Cli) -> None:
    done = cli("network", "invite")
    assert done.code == 2
    assert "network create" in done.err
