"""Who does not hold the network's key is kept out, and learns nothing of who is in."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import pytest
import trio
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID

from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.private_noise import PROTOCOL_ID as PRIVATE_NOISE_ID
from tests.integration.p2p.nodes import (
    ECHO,
    ask,
    echo,
    find,
    port_of,
    settings,
    start,
    table_size,
    until,
)

KEY = os.urandom(32)
CAPABILITY = os.urandom(32)


async def test_members_find_each_other_and_talk() -> None:
    payload = os.urandom(1 << 20)
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, network_key=KEY)
        provider, _ = await start(nursery, {ECHO: echo}, bootstrap=(address,), network_key=KEY)
        member, _ = await start(nursery, bootstrap=(address,), network_key=KEY)
        await until(lambda: table_size(provider) and table_size(member), 15)
        await provider.announce([CAPABILITY])
        await find(member, CAPABILITY, {provider.peer_id})
        stream = await member.open_stream(provider.peer_id, ECHO)
        assert await ask(stream, payload) == payload
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("key", [None, os.urandom(32)], ids=["open network", "other key"])
async def test_an_outsider_connects_in_neither_direction(key: bytes | None) -> None:
    async with trio.open_nursery() as nursery:
        member, address = await start(nursery, {ECHO: echo}, network_key=KEY)
        outsider, elsewhere = await start(nursery, {ECHO: echo}, network_key=key)
        for node, other in ((outsider, address), (member, elsewhere)):
            with pytest.raises(PeerLost), trio.fail_after(8):
                await node.connect(other)
        assert member.connected_peers() == outsider.connected_peers() == 0
        assert table_size(member) == table_size(outsider) == 0
        nursery.cancel_scope.cancel()


def line(text: bytes) -> bytes:
    return bytes([len(text) + 1]) + text + b"\n"


Opening = Callable[[trio.SocketStream], Awaitable[None]]


async def listen_in(port: int, *said: bytes) -> bytes:
    """Everything that a listener answers to an outsider who says this."""
    got = bytearray()
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        with trio.move_on_after(4):
            try:
                for part in said:
                    await stream.send_all(part)
                while data := await stream.receive_some():
                    got += data
            except trio.BrokenResourceError:
                pass
    return bytes(got)


@pytest.mark.parametrize(
    "said",
    [
        (line(b"/multistream/1.0.0"), line(NOISE_ID.encode())),
        (line(b"/multistream/1.0.0"), line(b"/plaintext/2.0.0")),
        # The right protocol with a first Noise message that no key was mixed into: an ephemeral
        # key and a tag of the outsider's making.
        (
            line(b"/multistream/1.0.0"),
            line(PRIVATE_NOISE_ID.encode()) + b"\x00\x30" + os.urandom(48),
        ),
        (line(b"/multistream/1.0.0"), line(PRIVATE_NOISE_ID.encode()) + b"\x00\x20" + bytes(32)),
    ],
    ids=["open noise", "plaintext", "forged", "without tag"],
)
async def test_a_listener_shows_an_outsider_nothing_of_itself(said: tuple[bytes, ...]) -> None:
    async with trio.open_nursery() as nursery:
        member, address = await start(nursery, network_key=KEY, upgrade_timeout_s=2)
        heard = await listen_in(port_of(address), *said)
        # Words of the negotiation and nothing after them: no key, no ID, no Noise message.
        for word in (b"/multistream/1.0.0", b"na", PRIVATE_NOISE_ID.encode()):
            heard = heard.replace(line(word), b"")
        assert heard == b""
        assert member.connected_peers() == 0
        nursery.cancel_scope.cancel()


async def test_a_key_of_another_length_is_no_key() -> None:
    network = Network(settings(network_key=b"short"), {})
    with pytest.raises(NetworkError, match="32 bytes"):
        await network.run()
