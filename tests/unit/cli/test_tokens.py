"""`nextgpu invite|invites|revoke|token`: what a user types and is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from nextgpu_node.clock import now_ms
from nextgpu_protocol.ids import peer_id_from_public_key
from nextgpu_protocol.limits import GIB
from nextgpu_protocol.messages import SUITE, TokenBlock
from nextgpu_protocol.tokens import format_token, issue_token
from tests.unit.api.backend import MemoryBackend
from tests.unit.cli.conftest import CaptureFd, Cli, Done

ISSUER = SigningKey(b"i" * 32)
FRIEND = peer_id_from_public_key(bytes(SigningKey(b"f" * 32).verify_key))


@pytest.fixture
def token() -> str:
    block = TokenBlock(SUITE, b"", bytes(32), 600, 4 * GIB, ("program",), b"", now_ms() + 10**8)
    return format_token(issue_token(block, ISSUER, b"1" * 32))


class Here:
    """The command in this process."""

    def __init__(self, cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: CaptureFd) -> None:
        self._call = lambda *args: cli.here(monkeypatch, capfd, *args)

    def __call__(self, *args: str) -> Done:
        return self._call(*args)


@pytest.fixture
def here(cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: CaptureFd) -> Here:
    return Here(cli, monkeypatch, capfd)


def test_show_says_what_a_token_allows_without_its_secret(here: Here, token: str) -> None:
    done = here("token", "show", token)
    assert done.code == 0
    for words in ("600 in all", "4.0 GiB", "program", "whoever has it", "12D3KooW"):
        assert words in done.out
    facts = json.loads(here("token", "show", token, "--json").out)
    assert (facts["gpu_seconds"], facts["blocks"], facts["expired"]) == (600, 1, False)


def test_attenuate_narrows_and_says_so(here: Here, token: str) -> None:
    args = ("--gpu-seconds", "60", "--memory", "1GiB", "--expires", "1h", "--for", FRIEND)
    done = here("token", "attenuate", token, *args)
    assert done.code == 0, done.err
    facts = json.loads(here("token", "show", done.out.strip(), "--json").out)
    assert (facts["gpu_seconds"], facts["memory_bytes"], facts["blocks"]) == (60, GIB, 2)
    assert facts["audience"] == FRIEND


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--gpu-seconds", "601"), "gpu_seconds is wider"),
        (("--memory", "5GiB"), "memory_bytes is wider"),
        (("--expires", "10w"), "expires_at_ms is wider"),
        (("--kind", "script"), "kinds are wider"),
        (("--gpu-seconds", "-1"), "from 1 on"),
        (("--expires", "soon"), "--expires takes a time"),
        (("--for", "nobody"), "--for takes a peer ID"),
        (("--memory", "1MB"), "at least"),
    ],
)
def test_what_does_not_narrow_is_refused_with_the_reason(
    here: Here, token: str, args: tuple[str, str], words: str
) -> None:
    done = here("token", "attenuate", token, *args)
    assert done.code == 2
    assert words in done.err
    assert not done.out


def test_a_file_serves_as_well_and_a_broken_one_is_named(
    here: Here, token: str, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    assert here("token", "show", str(file)).code == 0
    for content in (b"", b"ngt1_AAAA", b"\xff" * 10, b"x" * 100_000, token[:-4].encode()):
        file.write_bytes(content)
        done = here("token", "show", str(file))
        assert done.code == 2
        assert "token" in done.err
    missing = here("token", "show", str(tmp_path / "none"))
    assert missing.code == 2
    assert "nor a file" in missing.err


async def test_invite_prints_the_token_once_and_invites_never(
    cli: Cli, backend: MemoryBackend
) -> None:
    done = await cli.beside("invite", "--gpu-seconds", "60", "--expires", "2d", "--for", FRIEND)
    assert done.code == 0, done.err
    assert done.out == "ngt1_example\n"
    assert "60 GPU seconds" in done.err
    assert (backend.invites[0].audience, backend.invites[0].kinds) == (FRIEND, ["program"])
    assert backend.invites[0].expires_at_ms == 2 * 86_400_000
    listed = await cli.beside("invites")
    assert "ngt1" not in listed.out
    assert FRIEND in listed.out
    revoked = await cli.beside("revoke", "abab", "--json")
    assert json.loads(revoked.out)["invite"]["revoked"] is True


async def test_without_a_node_an_invite_says_what_to_do(cli: Cli) -> None:
    done = await cli.beside("invite", "--gpu-seconds", "60")
    assert done.code == 3
    assert "nextgpu up" in done.err
