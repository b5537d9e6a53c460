"""Commands that ask the daemon, against the real API with a small back end behind it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess

import trio

from nextgpu_node.api import server
from nextgpu_node.api_types import PeerNeed, PeersReply
from tests.unit.api.backend import GIB, UNIT_ID, MemoryBackend
from tests.unit.cli.conftest import Cli


async def test_peers_in_plain_columns(cli: Cli, backend: MemoryBackend) -> None:
    done = await cli.beside("peers", "--vram", "4", "--kind", "cuda", "--limit", "5")
    assert (done.code, done.err) == (0, "")
    head, row = done.out.splitlines()
    assert head.split()[:2] == ["PEER", "DEVICE"]
    assert "12D3KooWPeer" in row
    assert (backend.needs[0].memory_bytes, backend.needs[0].limit) == (4 * 10**9, 5)


async def test_a_hostile_name_does_not_steer_the_terminal(cli: Cli, backend: MemoryBackend) -> None:
    done = await cli.beside("peers")
    assert "Evil\N{REPLACEMENT CHARACTER}[31mGPU" in done.out
    assert "\x1b" not in done.out
    assert len(done.out.splitlines()) == 2
    shown = await trio.to_thread.run_sync(_on_a_terminal, cli, "peers")
    assert "Evil" in shown
    assert "\x1b[31m" not in shown


async def test_no_color_means_no_colour(cli: Cli, backend: MemoryBackend) -> None:
    cli.environ |= {"NO_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    shown = await trio.to_thread.run_sync(_on_a_terminal, cli, "status")
    assert "12D3KooWTest" in shown
    assert "\x1b[3" not in shown


async def test_nobody_fits(cli: Cli, backend: MemoryBackend) -> None:
    done = await cli.beside("peers", "--vram", "64")
    assert (done.code, done.out) == (4, "")
    assert "1 found in the network" in done.err
    done = await cli.beside("peers", "--vram", "64", "--json")
    assert done.code == 4
    assert json.loads(done.out)["peers"] == []


async def test_json_everywhere(cli: Cli, backend: MemoryBackend) -> None:
    for args in (["status"], ["peers"], ["units"], ["share", "on"], ["cancel", UNIT_ID]):
        done = await cli.beside(*args, "--json")
        assert (done.code, done.err) == (0, "")
        assert json.loads(done.out)["schema"] == 1


async def test_a_cpu_is_called_one(cli: Cli, backend: MemoryBackend) -> None:
    assert "cpu (no GPU here), 4.0 GiB free" in (await cli.beside("status")).out


async def test_sharing_is_switched_and_said(cli: Cli, backend: MemoryBackend) -> None:
    assert (await cli.beside("share", "on")).out == "Sharing is on, 1 of 1 slots free.\n"
    assert backend.sharing is True
    done = await cli.beside("share", "off")
    assert done.out == "Sharing is off.\n"
    assert backend.sharing is False


async def test_units_and_cancel(cli: Cli, backend: MemoryBackend) -> None:
    assert UNIT_ID in (await cli.beside("units")).out
    assert (await cli.beside("cancel", UNIT_ID)).code == 0
    again = await cli.beside("cancel", UNIT_ID)
    assert again.code == 1
    assert "`nextgpu units`" in again.err
    assert (await cli.beside("units")).out == "No work unit is here now.\n"


async def test_the_daemons_error_is_the_commands(cli: Cli, backend: MemoryBackend) -> None:
    backend.failure = ValueError("a bug over there")
    done = await cli.beside("status")
    assert done.code == 1
    assert done.err.startswith("nextgpu: The daemon met an error of its own")


async def test_a_size_may_be_in_gibibytes(cli: Cli, backend: MemoryBackend) -> None:
    await cli.beside("peers", "--vram", "8GiB")
    assert backend.needs[0].memory_bytes == 8 * GIB


async def test_an_interrupt_is_exit_code_130(cli: Cli, nursery: trio.Nursery) -> None:
    asked = trio.Event()

    class Waiting(MemoryBackend):
        async def peers(self, need: PeerNeed) -> PeersReply:
            asked.set()
            await trio.sleep_forever()
            raise AssertionError

    await nursery.start(server.run, Waiting(), cli.paths.api_socket)
    process = await trio.lowlevel.open_process(
        cli.command("peers"),
        env=cli.environ,
        stderr=subprocess.PIPE,
        # Under nohup, or behind `&`, the tests' own SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with trio.fail_after(20):
        await asked.wait()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    assert process.stderr is not None
    async with process.stderr as stderr:
        assert await stderr.receive_some() == b"nextgpu: interrupted\n"


def _on_a_terminal(cli: Cli, *args: str) -> str:
    """What a person sees: stdout is a pseudo-terminal of 200 columns."""
    leader, follower = pty.openpty()
    environ = {**cli.environ, "COLUMNS": "200"}
    environ.setdefault("TERM", "xterm")
    with subprocess.Popen(cli.command(*args), env=environ, stdout=follower, stderr=follower):
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 10_000)
            except OSError:  # EIO: the last writer has closed its end
                break
            shown += part
    os.close(leader)
    return shown.decode()
