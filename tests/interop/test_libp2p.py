"""js-libp2p and this node: each dials the other, and each finds what the other announces."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from nextgpu_node.clock import now_ms
from nextgpu_node.daemon.peers import CAPACITY_PROTOCOL
from nextgpu_node.p2p.hardening import DHT_PROTOCOL
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_protocol.envelope import sign_message
from nextgpu_protocol.framing import FrameKind, encode_frame
from tests.integration.p2p.nodes import ECHO, ask, start, table_size, until
from tests.protocol import samples
from tests.support.interop import node_command

KEY = bytes(range(32))
ROOM = Path(__file__).parent / "libp2p"


@pytest.fixture
def client(node: list[str]) -> list[str]:
    if not (ROOM / "node_modules" / "libp2p").is_dir():
        pytest.skip("its packages are not installed: (cd tests/interop/libp2p && npm ci)")
    return [node_command()[0], str(ROOM / "client.mjs")]


@asynccontextmanager
async def running(command: list[str], *arguments: str) -> AsyncIterator[trio.Process]:
    pipe = subprocess.PIPE
    process = await trio.lowlevel.open_process(
        [*command, *arguments], stdin=pipe, stdout=pipe, stderr=None
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()


async def first_line(process: trio.Process) -> dict[str, Any]:
    assert process.stdout is not None
    said = b""
    while not said.endswith(b"\n"):
        part = await process.stdout.receive_some()
        assert part, "the client ended without a word"
        said += part
    plain: dict[str, Any] = json.loads(said)
    return plain


async def test_node_js_finds_a_provider_and_verifies_its_signed_capacity(client: list[str]) -> None:
    seed = bytes(samples.PROVIDER)

    async def tell(stream: PeerStream) -> None:
        capacity = samples.fresh_capacity(now_ms())
        record = sign_message(capacity, samples.PROVIDER).data
        await stream.send_all(encode_frame(FrameKind.CAPACITY, record))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            _, address = await start(nursery)
            provider, _ = await start(
                nursery, {CAPACITY_PROTOCOL: tell}, key_seed=seed, bootstrap=(address,)
            )
            await until(lambda: table_size(provider), 10)
            assert await provider.announce([KEY]) == 1
            async with running(client, "ask", address, KEY.hex()) as process:
                answer = await first_line(process)
            nursery.cancel_scope.cancel()
    assert DHT_PROTOCOL in answer["protocols"]
    assert answer["ping_ms"] >= 0
    (found,) = answer["found"]
    assert found["peer"] == provider.peer_id
    assert found["capacity"]["devices"][0]["name"] == samples.DEVICE.name


async def test_this_node_finds_and_dials_what_node_js_announces(client: list[str]) -> None:
    payload = os.urandom(300_000)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            holder, address = await start(nursery)
            seeker, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
            arguments = ("lend", address, KEY.hex(), os.urandom(32).hex())
            async with running(client, *arguments) as process:
                said = await first_line(process)
                assert said["codes"] == [0]
                await until(lambda: table_size(seeker), 10)
                assert await seeker.find_providers(KEY) == [said["peer"]]
                stream = await seeker.open_stream(said["peer"], ECHO)
                assert await ask(stream, payload) == payload
                assert 0 < await seeker.ping(said["peer"]) < 5
                # A client of the DHT: it is in nobody's routing table.
                assert table_size(holder) == 0
            nursery.cancel_scope.cancel()
