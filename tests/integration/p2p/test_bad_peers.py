"""Whatever one peer does ends that peer's stream or connection, never the node."""

from __future__ import annotations

import gc
import os
import socket
from contextlib import suppress

import psutil
import pytest
import trio
from libp2p.peer.id import ID

from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.p2p.hardening import DHT_PROTOCOL
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.streams import PeerStream
from tests.integration.p2p.nodes import ECHO, ask, echo, find, open_fds, port_of, start, until


async def still_serves(address: str) -> bool:
    """Whether a newcomer is answered."""
    async with trio.open_nursery() as nursery:
        node, _ = await start(nursery)
        with trio.fail_after(5):
            stream = await node.open_stream(await node.connect(address), ECHO)
            answer = await ask(stream, b"still there?")
        nursery.cancel_scope.cancel()
    return answer == b"still there?"


async def hangs_up(port: int, opening: bytes, deadline_s: float = 3) -> None:
    """The listener ends a connection that begins like this."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        with trio.fail_after(deadline_s):
            try:
                await stream.send_all(opening)
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass


MULTISTREAM = b"\x13/multistream/1.0.0\n"
NOISE = b"\x07/noise\n"


@pytest.mark.parametrize(
    "opening",
    [
        os.urandom(100_000),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 10,
        MULTISTREAM + b"\xff\xff\xff\xff\x7f" + bytes(1000),
        MULTISTREAM + NOISE + b"\xff\xff" + os.urandom(65535),
        MULTISTREAM + NOISE + b"\x00\x00" * 10,
        MULTISTREAM + NOISE + b"\x00\x20" + os.urandom(32),
        MULTISTREAM + b"\x11/plaintext/2.0.0\n",
    ],
    ids=["random", "http", "varint", "huge", "noise", "empty noise", "half", "plaintext"],
)
async def test_garbage_on_the_port(opening: bytes) -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: echo}, upgrade_timeout_s=0.5)
        await hangs_up(port_of(address), opening)
        assert await still_serves(address)
        nursery.cancel_scope.cancel()


async def test_silent_callers_of_one_address_leave_room_for_the_rest() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: echo}, max_connections_per_ip=5)
        silent = [await trio.open_tcp_stream("127.0.0.1", port_of(address)) for _ in range(5)]
        # The sixth of this address is turned away at once, the upgrade timeout is 5 s.
        await hangs_up(port_of(address), b"", deadline_s=1)
        elsewhere = trio.socket.socket()
        await elsewhere.bind(("127.0.0.2", 0))
        await elsewhere.connect(("127.0.0.1", port_of(address)))
        async with trio.SocketStream(elsewhere) as other:
            with trio.fail_after(2):
                assert (await other.receive_some(100)).endswith(b"/multistream/1.0.0\n")
        for stream in silent:
            await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_handler_that_raises_ends_its_stream_only() -> None:
    async def broken(stream: PeerStream) -> None:
        await stream.receive_some()
        raise RuntimeError("a bug")

    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {"/test/broken/1": broken, ECHO: echo})
        node, _ = await start(nursery)
        peer_id = await node.connect(address)
        steady = await node.open_stream(peer_id, ECHO)
        for _ in range(3):
            doomed = await node.open_stream(peer_id, "/test/broken/1")
            await doomed.send_all(b"x")
            with pytest.raises(PeerLost):
                await doomed.receive_some()
        assert await ask(steady, b"unharmed") == b"unharmed"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "protocol", [DHT_PROTOCOL, "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0"]
)
@pytest.mark.parametrize(
    "message",
    [os.urandom(300), b"\xff" * 64, b"\x02\x08\x63", b"\x80\x80\x80\x80\x04", b""],
    ids=["random", "ones", "unknown type", "huge length", "empty"],
)
async def test_garbage_to_the_librarys_own_protocols(protocol: str, message: bytes) -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: echo})
        node, _ = await start(nursery)
        peer_id = await node.connect(address)
        stream = await node.open_stream(peer_id, protocol)
        try:
            await stream.send_all(message)
            await stream.send_eof()
            with trio.move_on_after(0.3):
                while await stream.receive_some():
                    pass
        except PeerLost:
            pass
        assert await still_serves(address)
        nursery.cancel_scope.cancel()


async def hold_until_refused(node: Network, peer_id: str) -> list[PeerStream]:
    """Streams that were opened before the peer took no more; nine at most."""
    held: list[PeerStream] = []
    with suppress(PeerLost):
        while len(held) < 9:
            held.append(await node.open_stream(peer_id, "/test/hold/1"))
    return held


async def test_one_peers_streams_are_capped_and_come_back() -> None:
    release = trio.Event()

    async def hold(stream: PeerStream) -> None:
        await release.wait()

    async with trio.open_nursery() as nursery:
        _, address = await start(
            nursery, {"/test/hold/1": hold, ECHO: echo}, max_streams_per_peer=8
        )
        node, _ = await start(nursery)
        peer_id = await node.connect(address)
        held = await hold_until_refused(node, peer_id)
        # The node's own questions (identify, the DHT) may have had some of the eight.
        assert 4 <= len(held) <= 8
        assert await still_serves(address)
        release.set()
        for stream in held:
            assert await stream.receive_some() == b""
        stream = await node.open_stream(peer_id, ECHO)
        assert await ask(stream, b"room again") == b"room again"
        nursery.cancel_scope.cancel()


async def test_three_hundred_visitors_leave_nothing_behind() -> None:
    """The stock listener is full for ever after 250 (defect 1)."""
    async with trio.open_nursery() as nursery:
        host, address = await start(nursery, {ECHO: echo}, max_connections=20)
        await still_serves(address)
        await until(lambda: host.connected_peers() == 0)
        fds, tasks = open_fds(), trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as visitors:
            nodes = [(await start(visitors))[0] for _ in range(12)]
            async with trio.open_nursery() as visits:
                for node in nodes:
                    visits.start_soon(visit_often, node, address, 25)
            visitors.cancel_scope.cancel()
        await until(lambda: host.connected_peers() == 0)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks)
        assert open_fds() <= fds
        assert await still_serves(address)
        nursery.cancel_scope.cancel()


async def test_streams_are_counted_over_all_connections_of_a_peer() -> None:
    """One identity on two connections: each muxer alone would allow it its own share."""

    async def hold(stream: PeerStream) -> None:
        await stream.receive_some()

    seed = os.urandom(32)
    async with trio.open_nursery() as nursery:
        handlers = {"/test/hold/1": hold}
        _, address = await start(nursery, handlers, max_streams_per_peer=6)
        twins = [(await start(nursery, key_seed=seed))[0] for _ in range(2)]
        held = 0
        for twin in twins:
            peer_id = await twin.connect(address)
            for _ in range(5):
                try:
                    await twin.open_stream(peer_id, "/test/hold/1")
                    held += 1
                except PeerLost:
                    pass
        assert 5 <= held <= 6
        nursery.cancel_scope.cancel()


async def visit_often(node: Network, address: str, times: int) -> None:
    assert node._host is not None
    for _ in range(times):
        peer_id = await node.connect(address)
        await node._host.disconnect(ID.from_base58(peer_id))


async def is_refused(stream: PeerStream) -> bool:
    """Whether the other side ended an idle stream."""
    with trio.move_on_after(0.05):
        try:
            return await stream.receive_some() == b""
        except PeerLost:
            return True
    return False


async def test_idle_dht_streams_of_one_peer_do_not_stop_the_dht() -> None:
    """Twelve are enough to stop the stock DHT for everybody (defect 7)."""
    key = os.urandom(32)
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        attacker, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        provider, _ = await start(nursery, bootstrap=(address,))
        seeker, _ = await start(nursery, bootstrap=(address,), dht_mode="client")
        await until(lambda: all(n.connected_peers() for n in (attacker, provider, seeker)))
        held: list[PeerStream] = []
        for _ in range(20):
            try:
                held.append(await attacker.open_stream(address.partition("/p2p/")[2], DHT_PROTOCOL))
            except PeerLost:
                continue
        refused = [stream for stream in held if await is_refused(stream)]
        assert len(held) - len(refused) <= 4
        await provider.announce([key])
        await find(seeker, key, {provider.peer_id})
        nursery.cancel_scope.cancel()


async def test_ipv6_works_where_the_machine_has_it() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery, {ECHO: echo}, listen_addrs=("/ip6/::1/tcp/0",))
        assert address.startswith("/ip6/::1/tcp/")
        assert await still_serves(address)
        nursery.cancel_scope.cancel()


async def knock(port: int, opening: bytes) -> None:
    """Connect, say something that is no protocol, leave without waiting for an answer."""
    with suppress(OSError, trio.BrokenResourceError):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(opening)


async def call_and_babble(node: Network, address: str, protocol: str) -> None:
    """A whole connection, garbage on a stream of it, and away."""
    assert node._host is not None
    with suppress(PeerLost, NetworkError):
        peer_id = await node.connect(address)
        stream = await node.open_stream(peer_id, protocol)
        await stream.send_all(os.urandom(200))
        await stream.reset()
        await node._host.disconnect(ID.from_base58(peer_id))


OPENINGS = (
    b"",
    os.urandom(3000),
    b"GET / HTTP/1.1\r\n\r\n",
    MULTISTREAM,
    MULTISTREAM + NOISE,
    MULTISTREAM + NOISE + b"\x00\x20" + os.urandom(32),
    MULTISTREAM + NOISE + b"\xff\xff" + os.urandom(500),
)


async def bad_cycles(address: str, count: int) -> None:
    """`count` times connect, garbage, disconnect; each tenth gets through the handshake first."""
    async with trio.open_nursery() as nursery:
        node, _ = await start(nursery, dht_mode="client")
        for number in range(count):
            if number % 10:
                await knock(port_of(address), OPENINGS[number % len(OPENINGS)])
            else:
                await call_and_babble(node, address, (ECHO, DHT_PROTOCOL)[number // 10 % 2])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_connect_garbage_disconnect_leaves_nothing_behind(count: int) -> None:
    process = psutil.Process()
    async with trio.open_nursery() as nursery:
        host, address = await start(nursery, {ECHO: echo}, upgrade_timeout_s=2)
        await bad_cycles(address, 100)  # what is kept for good is there after these
        await quiet(host)
        fds, tasks = open_fds(), trio.lowlevel.current_statistics().tasks_living
        rss_bytes = process.memory_info().rss
        await bad_cycles(address, count)
        await quiet(host)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks)
        await until(lambda: open_fds() <= fds)
        grown = process.memory_info().rss - rss_bytes
        print(f"{count} cycles: {grown / 2**20:+.1f} MiB")
        assert grown < 16 * 2**20
        assert await still_serves(address)
        nursery.cancel_scope.cancel()


async def quiet(host: Network) -> None:
    """Until nobody is connected and no upgrade waits, both ends of this process counted."""
    await until(lambda: host.connected_peers() == 0, deadline_s=15)
    await trio.sleep(2.1)  # upgrades that were begun time out
    gc.collect()
