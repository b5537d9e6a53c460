"""Invites say what they hold or nothing; the key's file is the owner's alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from nextgpu_node.errors import ConfigError, UsageError
from nextgpu_node.private_network import (
    NetworkInvite,
    fingerprint,
    format_invite,
    new_network_key,
    parse_invite,
    read_network_key,
    write_network_key,
)

KEY = bytes(range(32))
INVITE = NetworkInvite(KEY, ("/ip4/192.0.2.7/tcp/4650/p2p/12D3KooW",))


def test_an_invite_comes_back_through_mail_that_breaks_lines() -> None:
    text = format_invite(INVITE)
    assert parse_invite(text) == INVITE
    assert parse_invite(f"  {text[:30]}\n{text[30:]}\n") == INVITE


@pytest.mark.parametrize("cut", range(7, 40, 4))
def test_a_cut_or_changed_invite_is_refused(cut: int) -> None:
    text = format_invite(INVITE)
    letter = "A" if text[cut] != "A" else "B"
    for bad in (text[:-cut], text[:cut] + letter + text[cut + 1 :]):
        with pytest.raises(UsageError) as caught:
            parse_invite(bad)
        assert KEY.hex() not in str(caught.value)


@pytest.mark.parametrize("text", ["", "hello", "ngnet1", "ngnet1!!!!", "ngnet1" + "A" * 9000])
def test_what_is_no_invite_is_called_that(text: str) -> None:
    with pytest.raises(UsageError):
        parse_invite(text)


def test_the_key_is_written_for_the_owner_alone_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "data" / "network.key"
    assert read_network_key(path) is None
    write_network_key(path, KEY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert read_network_key(path) == KEY
    with pytest.raises(UsageError, match="leave"):
        write_network_key(path, new_network_key())
    assert read_network_key(path) == KEY


def test_a_key_file_that_others_can_read_or_that_is_none_stops_the_node(tmp_path: Path) -> None:
    path = tmp_path / "data" / "network.key"
    write_network_key(path, KEY)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_network_key(path)
    path.chmod(0o600)
    for bad in (b"", b"NextGPU network key 1\n", path.read_bytes() + b"0", bytes(87)):
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match=r"invite|no network key"):
            read_network_key(path)
    path.unlink()
    path.symlink_to("/dev/null")
    with pytest.raises(ConfigError):
        read_network_key(path)


def test_the_key_does_not_appear_where_its_invite_is_printed() -> None:
    assert KEY.hex() not in repr(INVITE)
    assert str(KEY) not in repr(INVITE)
    assert len(fingerprint(KEY)) == 8
    assert fingerprint(KEY) != fingerprint(new_network_key())
