"""Each defect of libp2p 0.8.1 with the stock class, beside its absence with ours.

An upgrade that cures one of them fails the stock half here: then our cure can go.  The numbers
are those of docs/libp2p-defects.md.
"""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.secio import transport as secio
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset
from libp2p.stream_muxer.mplex.mplex import MPLEX_PROTOCOL_ID, Mplex
from libp2p.stream_muxer.yamux.yamux import DEFAULT_WINDOW_SIZE
from libp2p.stream_muxer.yamux.yamux import Yamux as StockYamux
from libp2p.stream_muxer.yamux.yamux import YamuxStream as StockStream
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from nextgpu_node.errors import PeerLost
from nextgpu_node.p2p import yamux as y
from nextgpu_node.p2p.hardening import DHT_PROTOCOL
from nextgpu_node.p2p.network import Network
from tests.integration.p2p.nodes import ECHO, ask, echo, port_of, settings, start, until
from tests.unit.p2p.muxed import RawPeer, noise_pair, peer


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Let what a test leaked be reported by that test and no later one."""
    yield
    gc.collect()


STOCK_DHT = "/ipfs/kad/1.0.0"
ANYWHERE = Multiaddr("/ip4/127.0.0.1/tcp/0")


def noise(keys: Any) -> Any:
    return NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)


@asynccontextmanager
async def stock_host(*, security: Any = None, **options: Any) -> AsyncIterator[tuple[Any, str]]:
    """A host as libp2p's own `new_host` builds it, listening on loopback, and its address."""
    keys = create_new_key_pair(os.urandom(32))
    sec_opt = {name: build(keys) for name, build in security.items()} if security else None
    host = new_host(key_pair=keys, sec_opt=sec_opt, **options)
    async with host.run([ANYWHERE]):
        try:
            yield host, str(host.get_addrs()[0])
        finally:
            with trio.move_on_after(2, shield=True):
                await host.close()


async def connects(host: Any, address: str) -> bool:
    """Whether a stock host gets a connection that also carries a stream."""
    info = info_from_p2p_addr(Multiaddr(address))
    with trio.move_on_after(2), suppress(BaseLibp2pError):
        await host.connect(info)
        await host.new_stream(info.peer_id, ["/ipfs/ping/1.0.0"])
        return True
    return False


# 1: inbound slots are never given back.


async def test_1_stock_listener_is_full_for_ever() -> None:
    small = ConnectionConfig(
        max_connections=3, min_connections=0, low_watermark=0, high_watermark=3
    )
    async with stock_host(security={NOISE_ID: noise}, connection_config=small) as (host, address):
        outcomes = []
        for _ in range(4):
            async with stock_host(security={NOISE_ID: noise}) as (visitor, _):
                outcomes.append(await connects(visitor, address))
            await until(lambda: not host.get_network().connections)
        assert not host.get_network().connections
        assert outcomes == [True, True, True, False]


async def test_1_our_listener_takes_the_next_one() -> None:
    async with trio.open_nursery() as nursery:
        host, address = await start(nursery, {ECHO: echo}, max_connections=3)
        for _ in range(4):
            async with stock_host(security={NOISE_ID: noise}) as (visitor, _):
                assert await connects(visitor, address)
            await until(lambda: not host.connected_peers())
        nursery.cancel_scope.cancel()


# 2: plaintext, SECIO and mplex.

WEAK = {
    "plaintext": {"security": {PLAINTEXT_PROTOCOL_ID: InsecureTransport}},
    "secio": {"security": {secio.ID: secio.Transport}},
    "mplex": {"security": {NOISE_ID: noise}, "muxer_opt": {MPLEX_PROTOCOL_ID: Mplex}},
}


@pytest.mark.parametrize("weak", ["plaintext", "secio"])
async def test_2_stock_host_accepts_weak_security(weak: str) -> None:
    async with stock_host() as (_, address), stock_host(**WEAK[weak]) as (caller, _):
        assert await connects(caller, address)


@pytest.mark.parametrize("weak", list(WEAK))
async def test_2_our_host_refuses_it_in_both_directions(weak: str) -> None:
    async with (
        stock_host(**WEAK[weak]) as (caller, callers_address),
        trio.open_nursery() as nursery,
    ):
        ours, address = await start(nursery, {ECHO: echo})
        assert not await connects(caller, address)
        with pytest.raises(PeerLost):
            await ours.connect(callers_address)
        assert ours.connected_peers() == 0
        nursery.cancel_scope.cancel()


# 3: an exception in any handler ends the host.


# The dying host leaves its socket to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_3_stock_host_dies_of_a_handler() -> None:
    async def broken(_: Any) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with stock_host(security={NOISE_ID: noise}) as (host, address):
            host.set_stream_handler("/test/broken/1", broken)
            async with stock_host(security={NOISE_ID: noise}) as (caller, _):
                info = info_from_p2p_addr(Multiaddr(address))
                with suppress(BaseLibp2pError):
                    await caller.connect(info)
                    await caller.new_stream(info.peer_id, ["/test/broken/1"])
                with trio.move_on_after(3):
                    await trio.sleep_forever()
    assert caught.group_contains(RuntimeError, match="a bug")


# Ours: test_bad_peers.test_a_handler_that_raises_ends_its_stream_only


# 4: the receive window is not enforced.


async def test_4_stock_muxer_buffers_beyond_its_window() -> None:
    ours, theirs = await noise_pair()
    victim = StockYamux(theirs, peer("aaaa"), is_initiator=False)
    raw = RawPeer(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(victim.start)
        await raw.send(y.WINDOW_UPDATE, y.SYN, 1, 0)
        for _ in range(64):
            await raw.send(y.DATA, 0, 1, 60_000, bytes(60_000))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(victim.stream_buffers[1]) == 64 * 60_000 > 10 * DEFAULT_WINDOW_SIZE
        nursery.cancel_scope.cancel()


# Ours: test_yamux.test_data_beyond_the_window_ends_the_connection


# 5: a reader that pauses for five seconds loses its sender.


async def test_5_stock_writer_gives_up(autojump_clock: trio.testing.MockClock) -> None:
    _, theirs = await noise_pair()
    stream = StockStream(1, StockYamux(theirs, peer("aaaa"), is_initiator=True), True)
    stream.send_window = 0
    started = trio.current_time()
    with pytest.raises(MuxedStreamError, match="5 seconds"):
        await stream.write(b"patience")
    assert trio.current_time() - started == pytest.approx(5, abs=0.1)


# Ours: test_yamux.test_a_reader_may_pause_for_minutes,
# test_network.test_a_slow_reader_loses_nothing


# 7: idle DHT streams of one peer occupy all handlers.


async def test_7_idle_streams_of_one_peer_stop_the_stock_dht() -> None:
    async with (
        stock_host(security={NOISE_ID: noise}) as (host, address),
        background_trio_service(KadDHT(host, DHTMode.SERVER)),
        trio.open_nursery() as nursery,
    ):
        attacker, _ = await start(nursery, dht_mode="client")
        peer_id = await attacker.connect(address)
        held = [await attacker.open_stream(peer_id, STOCK_DHT) for _ in range(12)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        other, _ = await start(nursery, dht_mode="client")
        await other.connect(address)
        assert not await dht_pings(other, peer_id)
        assert len(held) == 12
        nursery.cancel_scope.cancel()


# Ours: test_bad_peers.test_idle_dht_streams_of_one_peer_do_not_stop_the_dht


async def dht_pings(node: Network, peer_id: str) -> bool:
    try:
        stream = await node.open_stream(peer_id, STOCK_DHT)
        await stream.send_all(b"\x02\x08\x05")  # length, then field 1 (type) = 5 (PING)
        return bool(await stream.receive_some())
    except PeerLost:
        return False


# 8: a lost connection looks like the end of the stream.


@pytest.mark.parametrize(
    ("muxer", "seen"), [(StockYamux, MuxedStreamEOF), (y.Yamux, MuxedStreamReset)]
)
async def test_8_a_lost_connection(muxer: Any, seen: type[Exception]) -> None:
    ours, theirs = await noise_pair()
    ends = []
    for session, is_initiator in ((ours, True), (theirs, False)):
        extra = {"limits": y.MuxLimits(), "budget": y.ReceiveBudget()} if muxer is y.Yamux else {}
        ends.append(muxer(session, peer("aaaa"), is_initiator=is_initiator, **extra))
    async with trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(end.start)
            await end.event_started.wait()
        stream = await ends[0].open_stream()
        await ends[1].accept_stream()
        nursery.start_soon(theirs.conn.read_writer.read_write_closer.stream.stream.aclose)
        with pytest.raises(MuxedStreamError) as caught:
            await stream.read(1)
        assert type(caught.value) is seen
        nursery.cancel_scope.cancel()


# 9: the DHT's protocol prefix is ignored, and it stores unknown keys unchecked.


async def test_9_stock_dht_ignores_its_prefix_and_ours_speaks_its_own() -> None:
    async with stock_host(security={NOISE_ID: noise}) as (host, _):
        KadDHT(host, DHTMode.SERVER, protocol_prefix="/elsewhere")
        assert not [name for name in host.get_mux().handlers if "/elsewhere" in str(name)]
    async with trio.open_nursery() as nursery:
        ours, _ = await start(nursery)
        assert ours._host is not None
        assert DHT_PROTOCOL in ours._host.get_mux().handlers
        assert STOCK_DHT not in ours._host.get_mux().handlers
        nursery.cancel_scope.cancel()


# 10: dialling tries one TCP address, waits 250 ms after success, and then refuses for a minute.


async def test_10_stock_dial_tries_only_the_first_address_and_sulks() -> None:
    async with trio.open_nursery() as nursery:
        ours, target, good = await node_with_a_dead_address_first(nursery)
        swarm = ours._host.get_network()
        with pytest.raises(BaseLibp2pError, match="no addresses established"):
            await Swarm.dial_peer(swarm, target)
        swarm.peerstore.clear_addrs(target)
        swarm.peerstore.add_addrs(target, [good], 100)
        with pytest.raises(BaseLibp2pError, match="negative cache"):
            await Swarm.dial_peer(swarm, target)
        swarm._negative_peer_cache.clear()
        started = trio.current_time()
        await Swarm.dial_peer(swarm, target)
        assert trio.current_time() - started >= 0.25
        nursery.cancel_scope.cancel()


async def test_10_ours_tries_them_all_without_delay() -> None:
    async with trio.open_nursery() as nursery:
        ours, target, _ = await node_with_a_dead_address_first(nursery)
        started = trio.current_time()
        assert len(await ours._host.get_network().dial_peer(target)) == 1
        assert trio.current_time() - started < 0.25
        nursery.cancel_scope.cancel()


async def node_with_a_dead_address_first(nursery: trio.Nursery) -> tuple[Any, ID, Multiaddr]:
    _, address = await start(nursery)
    ours, _ = await start(nursery)
    assert ours._host is not None
    info = info_from_p2p_addr(Multiaddr(address))
    dead = Multiaddr("/ip4/127.0.0.1/tcp/1")
    ours._host.get_peerstore().add_addrs(info.peer_id, [dead, *info.addrs], 100)
    return ours, info.peer_id, info.addrs[0]


# 11: the auto-connector dials every known peer although every minimum is zero.


async def test_11_stock_auto_connector_dials_whom_it_knows_and_ours_does_not() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        ours, _ = await start(nursery)
        assert ours._host is not None
        await trio.testing.wait_all_tasks_blocked(0.05)  # the DHT's first look around
        info = info_from_p2p_addr(Multiaddr(address))
        ours._host.get_peerstore().add_addrs(info.peer_id, info.addrs, 100)
        swarm = ours._host.get_network()
        await swarm.auto_connector.maybe_connect()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert ours.connected_peers() == 0
        stock = AutoConnector(swarm=swarm)
        await stock.start()
        await stock.maybe_connect()
        await until(lambda: ours.connected_peers() == 1)
        nursery.cancel_scope.cancel()


# 12: a second host on a taken port starts without a word.


async def test_12_stock_host_shares_a_taken_port() -> None:
    async with trio.open_nursery() as nursery:
        _, address = await start(nursery)
        port = port_of(address)
        second = new_host(key_pair=create_new_key_pair(os.urandom(32)))
        async with second.run([Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")]):
            assert port_of(str(second.get_addrs()[0])) == port
            await second.close()
        nursery.cancel_scope.cancel()


# Ours: test_network.test_a_taken_port_is_an_error_that_says_what_to_do


# 13: leaving `run` leaves the sockets of its streams behind, and `close` takes 0.2 s per peer.


STOCK_CLOSE_S = 0.15


async def test_13_stock_close_takes_its_time_per_connection() -> None:
    async with trio.open_nursery() as nursery:
        addresses = [(await start(nursery))[1] for _ in range(3)]
        async with stock_host(security={NOISE_ID: noise}) as (host, _):
            for address in addresses:
                assert await connects(host, address)
            started = trio.current_time()
            await host.close()
            assert trio.current_time() - started > 3 * STOCK_CLOSE_S
        nursery.cancel_scope.cancel()


async def test_13_ours_closes_them_together() -> None:
    async with trio.open_nursery() as nursery:
        addresses = [(await start(nursery))[1] for _ in range(10)]
        async with trio.open_nursery() as short_lived:
            node, _ = await start(short_lived)
            for address in addresses:
                await node.connect(address)
            short_lived.cancel_scope.cancel()
            started = trio.current_time()
        assert trio.current_time() - started < 10 * STOCK_CLOSE_S
        nursery.cancel_scope.cancel()


# And both libraries understand each other.


async def test_a_stock_host_with_noise_and_yamux_can_talk_to_ours() -> None:
    async with stock_host(security={NOISE_ID: noise}) as (stock, address):

        async def answer(stream: Any) -> None:
            await stream.write((await stream.read(5))[::-1])
            await stream.close()

        stock.set_stream_handler(ECHO, answer)
        async with trio.open_nursery() as nursery:
            ours, ours_address = await start(nursery, {ECHO: echo})
            stream = await ours.open_stream(await ours.connect(address), ECHO)
            assert await ask(stream, b"hello") == b"olleh"
            info = info_from_p2p_addr(Multiaddr(ours_address))
            await stock.connect(info)
            theirs = await stock.new_stream(info.peer_id, [ECHO])
            await theirs.write(b"hello")
            assert await theirs.read(5) == b"hello"
            assert Network(settings(), {}).peer_id != ours.peer_id
            nursery.cancel_scope.cancel()
