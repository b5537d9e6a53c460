"""The second implementation (tests/interop, Node.js) as a process that tests talk to."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

ROOM = Path(__file__).parent.parent / "interop"
OLDEST_NODE = 18
_EXIT_S = 15


def node_command() -> list[str]:
    """Its command line; a subcommand follows.  Skips the test where it can not run."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("Node.js is not installed")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.strip().removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"Node.js {OLDEST_NODE} or newer is needed, not {version.stdout.strip()}")
    if not (ROOM / "node_modules" / "libsodium-wrappers-sumo").is_dir():
        pytest.skip("its packages are not installed: (cd tests/interop && npm ci)")
    return [program, str(ROOM / "main.mjs")]


class NodePeer:
    """One unit's end in Node.js.  `stream` is its stdin and stdout."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self.stream = trio.StapledStream(process.stdin, process.stdout)

    async def outcome(self) -> dict[str, Any]:
        """What it says of its unit, once it has ended."""
        assert self._process.stderr is not None
        said = bytearray()
        with trio.fail_after(_EXIT_S):
            async for part in self._process.stderr:
                said += part
        plain: dict[str, Any] = json.loads(said)
        return plain


@asynccontextmanager
async def node_peer(*arguments: str) -> AsyncIterator[NodePeer]:
    """A running subcommand of the second implementation."""
    pipe = subprocess.PIPE
    process = await trio.lowlevel.open_process(
        [*node_command(), *arguments], stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        yield NodePeer(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                assert stream is not None
                await stream.aclose()


async def bridge(one: trio.abc.Stream, other: trio.abc.Stream) -> None:
    """Bytes both ways, until either side ends."""
    async with trio.open_nursery() as nursery:

        async def copy(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            while data := await source.receive_some(64 * 1024):
                await sink.send_all(data)
            nursery.cancel_scope.cancel()

        nursery.start_soon(copy, one, other)
        nursery.start_soon(copy, other, one)
