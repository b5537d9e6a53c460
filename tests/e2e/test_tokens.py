"""Capability tokens through real daemons: what they open, what they cost, how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trio
from safetensors.torch import save_file

from nextgpu_node import identity
from nextgpu_node.api_types import InviteRequest, InviteView, PeerNeed
from nextgpu_node.clock import now_ms
from nextgpu_node.errors import NextGPUError, PeerLost, Refused
from nextgpu_node.graph.artifact import Program
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import Started, StepResult
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.errors import SENTENCES, ErrorCode
from nextgpu_protocol.ids import public_key_from_peer_id
from nextgpu_protocol.limits import GIB
from nextgpu_protocol.messages import HeldToken
from nextgpu_protocol.tokens import attenuate_token, format_token, parse_token_untrusted
from tests.support.nodes import Trio


async def invite(nodes: Trio, seconds: int) -> HeldToken:
    wanted = InviteRequest(gpu_seconds=seconds, expires_s=3600, memory_bytes=GIB)
    async with ApiClient(nodes.provider.paths.api_socket) as api:
        return parse_token_untrusted((await api.invite(wanted)).token)[0]


def id_of(token: HeldToken) -> str:
    return parse_token_untrusted(format_token(token))[1].token_id.hex()


async def account(nodes: Trio, token: HeldToken) -> InviteView:
    """What the provider says of it, once nothing runs."""
    async with ApiClient(nodes.provider.paths.api_socket) as api:
        (found,) = [one for one in (await api.invites()).invites if one.id == id_of(token)]
    return found


async def run(nodes: Trio, program: Program, needs: Needs) -> int:
    """The number of results."""
    results = 0
    step = {program.spec.xs[0].name: torch.ones(2, 4)}
    async with (
        open_client(nodes.submitter.paths) as client,
        client.run(program, [step], needs) as events,
    ):
        async for event in events:
            results += isinstance(event, StepResult)
    return results


async def refusal(nodes: Trio, program: Program, needs: Needs) -> str:
    with pytest.raises(Refused) as caught:
        await run(nodes, program, needs)
    return str(caught.value)


async def test_a_token_is_served_narrowed_counted_and_revoked(
    tokens_only: Trio, linear: Program
) -> None:
    nodes = tokens_only
    assert SENTENCES[ErrorCode.NOT_ALLOWED] in await refusal(nodes, linear, Needs())
    token = await invite(nodes, 100)
    allows = parse_token_untrusted(format_token(token))[1].allows
    me = public_key_from_peer_id(nodes.submitter.ready.peer_id)
    other = public_key_from_peer_id(nodes.first.ready.peer_id)
    mine = attenuate_token(token, replace(allows, gpu_seconds=50, audience=me), os.urandom(32))
    theirs = attenuate_token(token, replace(allows, audience=other), os.urandom(32))

    assert await run(nodes, linear, Needs(token=mine, max_seconds=30)) == 1
    after = await account(nodes, token)
    assert 0 < after.spent_s < 30
    assert after.reserved_s == 0

    too_long = await refusal(nodes, linear, Needs(token=mine, max_seconds=51))
    assert SENTENCES[ErrorCode.TOKEN_LIMIT] in too_long
    assert SENTENCES[ErrorCode.TOKEN_AUDIENCE] in await refusal(nodes, linear, Needs(token=theirs))
    async with ApiClient(nodes.provider.paths.api_socket) as api:
        await api.revoke(after.id[:12])
    assert SENTENCES[ErrorCode.TOKEN_REVOKED] in await refusal(nodes, linear, Needs(token=mine))
    assert (await account(nodes, token)).spent_s == after.spent_s


async def test_revoking_ends_what_runs_under_the_token(tokens_only: Trio, linear: Program) -> None:
    token = await invite(tokens_only, 100)

    async def run_and_revoke() -> None:
        async with (
            ApiClient(tokens_only.provider.paths.api_socket) as api,
            open_client(tokens_only.submitter.paths) as client,
            client.run(linear, never(), Needs(token=token, max_seconds=20)) as events,
        ):
            async for event in events:
                if isinstance(event, Started):
                    await api.revoke(id_of(token))

    with pytest.raises(PeerLost, match="owner"):
        await run_and_revoke()
    spent_s = (await account(tokens_only, token)).spent_s
    assert 0 < spent_s < 20


async def test_units_side_by_side_do_not_overdraw_and_kill_9_spends_what_was_reserved(
    tokens_only: Trio, linear: Program
) -> None:
    nodes = tokens_only
    token = await invite(nodes, 50)
    async with (
        open_client(nodes.submitter.paths) as client,
        client.open_unit(linear, Needs(token=token, max_seconds=30)) as (_, unit),
    ):
        await unit.start(linear)
        assert (await account(nodes, token)).reserved_s == 30
        with pytest.raises(Refused, match="20 s left"):
            async with client.open_unit(linear, Needs(token=token, max_seconds=30)):
                raise AssertionError("served twice")
        nodes.provider.kill()
    await trio.to_thread.run_sync(nodes.provider.start)
    assert (await account(nodes, token)).spent_s == 30
    await wait_for_peer(nodes)
    assert await run(nodes, linear, Needs(token=token, max_seconds=20)) == 1
    spent = await refusal(nodes, linear, Needs(token=token, max_seconds=20))
    assert SENTENCES[ErrorCode.TOKEN_SPENT] in spent
    assert 30 < (await account(nodes, token)).spent_s < 50


async def wait_for_peer(nodes: Trio) -> None:
    """Until the provider, on a new port, is found again."""
    with trio.fail_after(120):
        async with ApiClient(nodes.submitter.paths.api_socket) as api:
            # Another process's state: there is no event of ours to wait for.
            while not (await api.peers(PeerNeed())).peers:  # noqa: ASYNC110
                await trio.sleep(0.2)


async def test_a_token_follows_its_peer_to_a_new_key_which_the_daemon_opens_by_a_credential(
    tokens_only: Trio, linear: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, token = tokens_only, await invite(tokens_only, 100)
    old = nodes.submitter.ready.peer_id
    allows = parse_token_untrusted(format_token(token))[1].allows
    theirs = replace(allows, audience=public_key_from_peer_id(old))
    held = attenuate_token(token, theirs, os.urandom(32))

    nodes.submitter.stop()
    paths = nodes.submitter.paths
    identity.rotate(paths, lambda: b"", now_ms=now_ms())
    identity.set_passphrase(paths, lambda: b"", b"open sesame")
    with pytest.raises(NextGPUError):  # nobody tells it the passphrase
        await trio.to_thread.run_sync(nodes.submitter.start)
    (tmp_path / "nextgpu.passphrase").write_bytes(b"open sesame\n")
    (tmp_path / "nextgpu.passphrase").chmod(0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    await trio.to_thread.run_sync(nodes.submitter.start)
    assert nodes.submitter.ready.peer_id != old
    await wait_for_peer(nodes)
    assert await run(nodes, linear, Needs(token=held, max_seconds=20)) == 1


async def never() -> AsyncIterator[dict[str, torch.Tensor]]:
    """An input that stays open."""
    await trio.sleep_forever()
    yield {}


def test_the_command_line_takes_a_token(tokens_only: Trio, linear: Program, tmp_path: Path) -> None:
    def nextgpu(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nextgpu_node.cli", "--home", str(home), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    provider, submitter = tokens_only.provider.home, tokens_only.submitter.home
    linear.save(tmp_path / "linear.ngp")
    save_file({linear.spec.xs[0].name: torch.ones(2, 4)}, tmp_path / "x.safetensors")
    token, part = tmp_path / "token", tmp_path / "part"
    issued = nextgpu(provider, "invite", "--gpu-seconds", "60", "--output", str(token))
    assert issued.returncode == 0, issued.stderr
    assert token.stat().st_mode & 0o777 == 0o600
    narrowed = nextgpu(
        submitter, "token", "attenuate", str(token), "--gpu-seconds", "30", "--output", str(part)
    )
    assert narrowed.returncode == 0, narrowed.stderr
    done = nextgpu(
        submitter,
        *("run", str(tmp_path / "linear.ngp"), "--input", str(tmp_path / "x.safetensors")),
        *("--output", str(tmp_path / "y.safetensors"), "--token", str(part)),
    )
    assert done.returncode == 0, done.stderr
    listed = nextgpu(provider, "invites")
    assert parse_token_untrusted(token.read_text().strip())[1].token_id.hex()[:16] in listed.stdout
