"""Nodes find each other, open streams by peer ID and move bytes, on loopback."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterable

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.streams import PeerStream
from tests.integration.p2p.nodes import (
    ECHO,
    ask,
    echo,
    find,
    open_fds,
    port_of,
    read_all,
    settings,
    start,
    table_size,
    until,
)

KEY = hashlib.sha256(b"capability").digest()
MIB = 1 << 20


async def test_a_provider_is_found_by_capability_and_reached_by_its_id_alone() -> None:
    payload = os.urandom(8 * MIB)
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        provider, _ = await start(nursery, {ECHO: echo}, bootstrap=(address,))
        submitter, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(provider) >= 1 and table_size(submitter) >= 1)
        await provider.announce([KEY])
        await find(submitter, KEY, {provider.peer_id})
        assert await provider.find_providers(KEY) == []
        assert await submitter.find_providers(hashlib.sha256(b"other").digest()) == []

        stream = await submitter.open_stream(provider.peer_id, ECHO)
        assert stream.peer_id == provider.peer_id
        assert await ask(stream, payload) == payload
        await stream.aclose()
        assert 0 < await submitter.ping(provider.peer_id) < 1
        assert submitter.connected_peers() == 2
        nursery.cancel_scope.cancel()


async def test_a_peers_address_is_looked_up_when_only_its_id_is_known() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        answerer, _ = await start(nursery, {ECHO: echo}, bootstrap=(address,), dht_mode="client")
        asker, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(answerer) and table_size(asker))
        stream = await asker.open_stream(answerer.peer_id, ECHO)
        assert await ask(stream, b"hello") == b"hello"
        nursery.cancel_scope.cancel()


async def test_clients_of_the_dht_do_not_enter_routing_tables() -> None:
    async with trio.open_nursery() as nursery:
        bootstrap, address = await start(nursery)
        client, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: table_size(client) == 1)
        await client.find_providers(KEY)
        assert table_size(bootstrap) == 0
        # Nor does a peer of which nothing but an address is known.
        assert bootstrap._host is not None
        stranger = ID.from_base58(Network(settings(), {}).peer_id)
        bootstrap._host.get_peerstore().add_addrs(stranger, [Multiaddr("/ip4/127.0.0.1/tcp/1")], 9)
        assert not bootstrap._serves_dht(bootstrap._host, stranger)
        nursery.cancel_scope.cancel()


async def test_a_provider_that_has_gone_is_still_listed_and_unreachable() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        submitter, _ = await start(nursery, bootstrap=(address,))
        async with trio.open_nursery() as short_lived:
            provider, _ = await start(short_lived, bootstrap=(address,))
            await until(lambda: table_size(provider) >= 1 and table_size(submitter) >= 1)
            await provider.announce([KEY])
            await find(submitter, KEY, {provider.peer_id})
            short_lived.cancel_scope.cancel()
        assert await submitter.find_providers(KEY) == [provider.peer_id]
        with trio.fail_after(5), pytest.raises(PeerLost, match="can not be reached"):
            await submitter.open_stream(provider.peer_id, ECHO)
        nursery.cancel_scope.cancel()


async def test_a_node_joins_its_bootstrap_once_that_appears_and_again_when_it_returns() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    later = settings(listen_addrs=(f"/ip4/127.0.0.1/tcp/{port}",))
    peer_id = Network(later, {}).peer_id
    async with trio.open_nursery() as nursery:
        node, _ = await start(nursery, bootstrap=(f"{later.listen_addrs[0]}/p2p/{peer_id}",))
        for _ in range(2):
            assert node.connected_peers() == 0
            async with trio.open_nursery() as once:
                await once.start(Network(later, {}).run)
                await until(lambda: node.connected_peers() == 1, 8)
                once.cancel_scope.cancel()
            await until(lambda: node.connected_peers() == 0)
        nursery.cancel_scope.cancel()


async def test_concurrent_streams_to_one_peer_share_one_connection() -> None:
    async with trio.open_nursery() as nursery:
        answerer, address = await start(nursery, {ECHO: echo})
        asker, _ = await start(nursery)
        answers: list[bytes] = []

        async def one(number: int) -> None:
            await asker.connect(address)
            stream = await asker.open_stream(answerer.peer_id, ECHO)
            answers.append(await ask(stream, bytes([number])))

        async with trio.open_nursery() as askers:
            for number in range(20):
                askers.start_soon(one, number)
        assert sorted(answers) == [bytes([number]) for number in range(20)]
        assert asker._host is not None
        conns = asker._host.get_network().connections.items()
        assert [len(c) for peer, c in conns if str(peer) == answerer.peer_id] == [1]
        nursery.cancel_scope.cancel()


async def test_a_peer_that_was_down_can_be_tried_again_at_once() -> None:
    node = settings()
    async with trio.open_nursery() as nursery:
        asker, _ = await start(nursery)
        async with trio.open_nursery() as once:
            network = Network(node, {ECHO: echo})
            address = (await once.start(network.run))[0]
            once.cancel_scope.cancel()
        with pytest.raises(PeerLost):
            await asker.connect(address)
        again = settings(key_seed=node.key_seed, listen_addrs=(address.partition("/p2p/")[0],))
        await nursery.start(Network(again, {ECHO: echo}).run)
        await asker.connect(address)
        stream = await asker.open_stream(network.peer_id, ECHO)
        assert await ask(stream, b"again") == b"again"
        nursery.cancel_scope.cancel()


async def test_another_peer_at_the_address_is_refused() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: echo})
        asker, _ = await start(nursery)
        other = Network(settings(), {}).peer_id
        with pytest.raises(PeerLost, match="another peer answers"):
            await asker.connect(f"{address.partition('/p2p/')[0]}/p2p/{other}")
        assert asker.connected_peers() == 0
        nursery.cancel_scope.cancel()


async def test_misuse_is_named() -> None:
    idle = Network(settings(), {})
    assert idle.connected_peers() == 0
    with pytest.raises(NetworkError, match="not running"):
        await idle.find_providers(KEY)
    async with trio.open_nursery() as nursery:
        network, _ = await start(nursery)
        other, address = await start(nursery)
        await network.connect(address)
        with pytest.raises(NetworkError, match="does not speak /nobody/speaks/this"):
            await network.open_stream(other.peer_id, "/nobody/speaks/this")
        with pytest.raises(NetworkError, match="own peer ID"):
            await network.open_stream(network.peer_id, ECHO)
        with pytest.raises(NetworkError, match="not a peer ID"):
            await network.open_stream("12D3KooWnonsense", ECHO)
        with pytest.raises(ValueError, match="32 bytes"):
            await network.announce([b"short"])
        nursery.cancel_scope.cancel()


async def test_a_taken_port_is_an_error_that_says_what_to_do() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        second = Network(settings(listen_addrs=(address.partition("/p2p/")[0],)), {})
        with (
            trio.fail_after(5),
            pytest.raises(NetworkError, match=f"{port_of(address)} is already taken. Stop"),
        ):
            await second.run()
        nursery.cancel_scope.cancel()


async def test_a_slow_reader_loses_nothing() -> None:
    """Six seconds: longer than the five after which libp2p's own muxer gives up."""
    payload = os.urandom(6 * MIB)

    async def serve(stream: PeerStream) -> None:
        await stream.send_all(payload)
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: serve})
        reader, _ = await start(nursery)
        peer_id = await reader.connect(address)
        stream = await reader.open_stream(peer_id, ECHO)
        first = await stream.receive_some(1000)
        await trio.sleep(6.1)
        assert first + await read_all(stream) == payload
        nursery.cancel_scope.cancel()


async def test_one_side_is_used_by_one_task_at_a_time() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: echo})
        node, _ = await start(nursery)
        stream = await node.open_stream(await node.connect(address), ECHO)
        async with trio.open_nursery() as readers:
            readers.start_soon(stream.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await stream.receive_some()
            readers.cancel_scope.cancel()
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
        nursery.cancel_scope.cancel()


async def test_a_reset_reaches_the_peer_as_a_loss() -> None:
    seen: list[type[BaseException]] = []

    async def serve(stream: PeerStream) -> None:
        try:
            await read_all(stream)
        except PeerLost as exc:
            seen.append(type(exc))

    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: serve})
        node, _ = await start(nursery)
        stream = await node.open_stream(await node.connect(address), ECHO)
        await stream.send_all(b"half a message")
        await stream.reset()
        await until(lambda: seen == [PeerLost])
        nursery.cancel_scope.cancel()


async def test_shutdown_closes_every_socket_quickly() -> None:
    before = open_fds()
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: echo})
        nodes = [(await start(nursery, bootstrap=(address,)))[0] for _ in range(5)]
        await until(lambda: all(node.connected_peers() for node in nodes))
        streams = [await node.open_stream(address.partition("/p2p/")[2], ECHO) for node in nodes]
        for stream in streams:
            await stream.send_all(b"unfinished business")
        nursery.cancel_scope.cancel()
        started = trio.current_time()
    assert trio.current_time() - started < 2
    assert open_fds() <= before


def read_address(lines: Iterable[str]) -> str:
    """The line with the server's address; its log may come first."""
    return next(line.strip() for line in lines if line.startswith("/ip4/"))


SERVER = """
    import sys, trio
    from nextgpu_node.p2p.network import Network
    from nextgpu_node.p2p.settings import P2PSettings

    async def pour(stream):
        while True:
            await stream.send_all(bytes(65536))

    async def main():
        network = Network(P2PSettings(b"k" * 32, ("/ip4/127.0.0.1/tcp/0",)), {"/test/pour/1": pour})
        async with trio.open_nursery() as nursery:
            print((await nursery.start(network.run))[0], flush=True)

    trio.run(main)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_peer_that_vanishes_mid_transfer_is_noticed(end: signal.Signals) -> None:
    server = subprocess.Popen(  # noqa: ASYNC220  it starts nothing that blocks
        [sys.executable, "-c", textwrap.dedent(SERVER)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        with server.stdout:
            address = await trio.to_thread.run_sync(read_address, server.stdout)
        async with trio.open_nursery() as nursery:
            node, _ = await start(nursery, keepalive_s=0.3, keepalive_timeout_s=0.7)
            stream = await node.open_stream(await node.connect(address), "/test/pour/1")
            for _ in range(20):
                assert await stream.receive_some()
            server.send_signal(end)
            started = trio.current_time()
            with trio.fail_after(10), pytest.raises(PeerLost):  # noqa: PT012
                while await stream.receive_some():
                    pass
            assert trio.current_time() - started < (0.5 if end == signal.SIGKILL else 2)
            nursery.cancel_scope.cancel()
    finally:
        server.kill()
        server.wait()
