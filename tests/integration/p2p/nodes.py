"""Nodes on loopback for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.settings import P2PSettings
from nextgpu_node.p2p.streams import PeerStream

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
ECHO = "/test/echo/1"


def settings(**changes: Any) -> P2PSettings:
    return replace(P2PSettings(key_seed=os.urandom(32), listen_addrs=LOOPBACK), **changes)


async def start(
    nursery: trio.Nursery,
    handlers: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[Network, str]:
    """A running node and its one address."""
    network = Network(settings(**changes), handlers or {})
    addresses: list[str] = await nursery.start(network.run)
    return network, addresses[0]


async def until(condition: Callable[[], object], deadline_s: float = 5) -> None:
    """Wait for a condition that no event announces."""
    with trio.fail_after(deadline_s):
        while not condition():  # noqa: ASYNC110  the library announces nothing
            await trio.sleep(0.005)


async def find(network: Network, key: bytes, wanted: set[str]) -> None:
    """Wait until `wanted` is found: an announcement is fire-and-forget and takes a moment."""
    with trio.fail_after(5):
        while set(await network.find_providers(key)) != wanted:  # noqa: ASYNC110
            await trio.sleep(0.02)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def echo(stream: PeerStream) -> None:
    """Send back whatever arrives, and finish when the peer does."""
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def read_all(stream: PeerStream) -> bytes:
    got = bytearray()
    while data := await stream.receive_some():
        got += data
    return bytes(got)


async def ask(stream: PeerStream, question: bytes) -> bytes:
    """Send all, finish, and read to the end."""
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await stream.send_all(question)
            await stream.send_eof()

        return await read_all(stream)
    raise AssertionError


def port_of(address: str) -> int:
    return int(address.split("/")[4])


def table_size(network: Network) -> int:
    assert network._dht is not None
    return len(network._dht.table)
