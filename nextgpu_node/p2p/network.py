"""The node's place in the peer-to-peer network: TCP + Noise + yamux, one DHT of our own.

Give `Network` its settings and a handler per protocol, start `run` in a nursery, which answers
with the node's own multiaddrs, and open streams to peers by their ID.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.exceptions import StreamFailure
from libp2p.io.exceptions import IOException
from libp2p.kad_dht.kad_dht import DHTMode
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.tools.anyio_service import background_trio_service

from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.p2p import host as hosts
from nextgpu_node.p2p.discovery import CapabilityDHT, Discovery
from nextgpu_node.p2p.hardening import HardenedHost, WrongPeer
from nextgpu_node.p2p.settings import P2PSettings
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_node.p2p.yamux import Yamux
from nextgpu_protocol.ids import public_key_from_peer_id

log = structlog.get_logger()

StreamHandler = Callable[[PeerStream], Awaitable[None]]

_SHUTDOWN_S = 1.5
_BOOTSTRAP_FIRST_RETRY_S = 0.5
_BOOTSTRAP_SLOWEST_RETRY_S = 60.0
_ENTER_PEER_S = 30.0
_ADDRESS_LIFETIME_S = 1800
_jitter = random.SystemRandom()


class Network:
    """One node's host, DHT and streams.  `run` it once; the other methods work while it runs."""

    def __init__(self, settings: P2PSettings, handlers: Mapping[str, StreamHandler]) -> None:
        self._settings = settings
        self._handlers = dict(handlers)
        self.peer_id = hosts.peer_id_of_seed(settings.key_seed)
        self._host: HardenedHost | None = None
        self._discovery: Discovery | None = None
        self._identified_send: trio.MemorySendChannel[ID] | None = None

    async def run(
        self, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen, serve and stay in the network until cancelled.

        Starts with this node's own multiaddrs.  Raises NetworkError where the port is taken, an
        address makes no sense, or libp2p is not the release this room is hardened for.
        """
        async with self._open_host() as host, trio.open_nursery() as nursery:
            nursery.start_soon(self._enter_identified_peers)
            for address in self._settings.bootstrap:
                nursery.start_soon(self._stay_joined, hosts.parse_bootstrap(address))
            addresses = [str(address) for address in host.get_addrs()]
            log.info("network.started", dht_mode=self._settings.dht_mode, listening=len(addresses))
            task_status.started(addresses)

    @asynccontextmanager
    async def _open_host(self) -> AsyncIterator[HardenedHost]:
        listen = [hosts.parse_listen(address) for address in self._settings.listen_addrs]
        for address in listen:
            await hosts.check_port_is_free(address)
        for address in self._settings.bootstrap:
            hosts.parse_bootstrap(address)
        self._identified_send, self._identified = trio.open_memory_channel[ID](256)
        host = hosts.build_host(self._settings, on_identified=self._note_identified)
        for protocol, handler in self._handlers.items():
            host.set_stream_handler(protocol, _as_libp2p_handler(handler))
        mode = DHTMode.SERVER if self._settings.dht_mode == "server" else DHTMode.CLIENT
        dht = CapabilityDHT(host, mode)
        async with host.run(listen):
            try:
                hosts.check_is_listening(host, listen)
                async with background_trio_service(dht):
                    self._host, self._discovery = host, Discovery(host, dht)
                    try:
                        yield host
                    finally:
                        self._host = self._discovery = None
            finally:
                # Leaving `host.run` alone leaves sockets open.
                with trio.move_on_after(_SHUTDOWN_S, shield=True), suppress(Exception):
                    await host.get_network().close_all()
                    await host.close()

    # Streams.

    async def open_stream(self, peer_id: str, protocol: str) -> PeerStream:
        """A new stream of `protocol` to a peer, found by the DHT if its address is not known.

        Raises PeerLost where the peer can not be reached, NetworkError where it does not speak
        `protocol` or `peer_id` is not one.
        """
        host = self._running_host()
        target = self._parse_peer_id(peer_id)
        await self._connect(host, target)
        try:
            net_stream = await host.new_stream(target, [protocol])
        except StreamFailure as exc:
            if "not supported" in str(exc.__cause__):
                raise NetworkError(
                    f"The peer does not speak {protocol}: it may run another version or role."
                ) from exc
            raise PeerLost("The connection to the peer was lost.") from exc
        except (BaseLibp2pError, IOException) as exc:
            raise PeerLost("The connection to the peer was lost.") from exc
        return PeerStream(net_stream, peer_id)

    async def connect(self, address: str) -> str:
        """Connect to a multiaddr that ends in /p2p/ID; returns the peer id."""
        host = self._running_host()
        info = hosts.parse_bootstrap(address)
        host.get_peerstore().add_addrs(info.peer_id, info.addrs, _ADDRESS_LIFETIME_S)
        await self._connect(host, info.peer_id)
        return str(info.peer_id)

    async def ping(self, peer_id: str) -> float:
        """Round-trip time to a peer in seconds, over its connection."""
        host = self._running_host()
        target = self._parse_peer_id(peer_id)
        await self._connect(host, target)
        try:
            muxed: Yamux = (await host.get_network().dial_peer(target))[0].muxed_conn
            return await muxed.ping()
        except BaseLibp2pError as exc:
            raise PeerLost("The connection to the peer was lost.") from exc

    def connected_peers(self) -> int:
        """How many peers this node is connected to."""
        return 0 if self._host is None else len(self._host.get_connected_peers())

    async def _connect(self, host: HardenedHost, target: ID) -> None:
        """Be connected to `target`.  Addresses that fail are looked up afresh, once."""
        if self._is_connected(host, target):
            return
        try:
            await host.get_network().dial_peer(target)
        except BaseLibp2pError as first:
            discovery = self._running_discovery()
            with suppress(PeerStoreError):
                host.get_peerstore().clear_addrs(target)
            if not await discovery.find_addresses(target):
                raise PeerLost(_unreachable(first)) from first
            try:
                await host.get_network().dial_peer(target)
            except BaseLibp2pError as exc:
                raise PeerLost(_unreachable(exc)) from exc

    @staticmethod
    def _is_connected(host: HardenedHost, target: ID) -> bool:
        return any(not conn.is_closed for conn in host.get_network().get_connections(target))

    # Discovery.

    async def announce(self, keys: Sequence[bytes]) -> None:
        """Announce 32-byte capability keys; at most ten per eleven seconds, so this takes time.

        The records live for an hour in the network: the caller repeats this every 20 minutes.
        """
        await self._running_discovery().announce(keys)

    async def find_providers(self, key: bytes) -> list[str]:
        """Peer ids that announced `key`, without ourselves.  Some may have gone: ask them."""
        return await self._running_discovery().find_providers(key)

    def _note_identified(self, peer_id: ID) -> None:
        if self._identified_send is not None:
            # A full queue means hundreds of newcomers at once; the DHT will meet this one again.
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                self._identified_send.send_nowait(peer_id)

    async def _enter_identified_peers(self) -> None:
        async for peer_id in self._identified:
            discovery = self._discovery
            if discovery is not None:
                with trio.move_on_after(_ENTER_PEER_S):
                    await discovery.enter(peer_id)

    async def _stay_joined(self, bootstrap: Any) -> None:
        """Keep a connection to one bootstrap node, however long it takes it to appear."""
        host = self._running_host()
        if str(bootstrap.peer_id) == self.peer_id:
            return
        delay_s = _BOOTSTRAP_FIRST_RETRY_S
        while True:
            store = host.get_peerstore()
            store.add_addrs(bootstrap.peer_id, bootstrap.addrs, _ADDRESS_LIFETIME_S)
            try:
                conn = (await host.get_network().dial_peer(bootstrap.peer_id))[0]
            except BaseLibp2pError as exc:
                log.debug("bootstrap.unreachable", reason=type(exc).__name__)
            else:
                log.info("bootstrap.joined", peer_id=str(bootstrap.peer_id))
                joined_at = trio.current_time()
                await conn.muxed_conn.event_closed.wait()
                if trio.current_time() - joined_at > _BOOTSTRAP_SLOWEST_RETRY_S:
                    delay_s = _BOOTSTRAP_FIRST_RETRY_S
            # Nodes that lost their bootstrap at the same moment must not all return at once.
            await trio.sleep(delay_s * _jitter.uniform(0.5, 1.5))
            delay_s = min(delay_s * 2, _BOOTSTRAP_SLOWEST_RETRY_S)

    # Helpers.

    def _running_host(self) -> HardenedHost:
        if self._host is None:
            raise NetworkError("The peer-to-peer network is not running.")
        return self._host

    def _running_discovery(self) -> Discovery:
        if self._discovery is None:
            raise NetworkError("The peer-to-peer network is not running.")
        return self._discovery

    def _parse_peer_id(self, peer_id: str) -> ID:
        try:
            public_key_from_peer_id(peer_id)
        except ValueError as exc:
            raise NetworkError(f"{peer_id!r} is not a peer ID.") from exc
        if peer_id == self.peer_id:
            raise NetworkError("That is this node's own peer ID.")
        return ID.from_base58(peer_id)


def _unreachable(exc: BaseException) -> str:
    if isinstance(exc, WrongPeer):
        return "The peer can not be reached: another peer answers at its address."
    return "The peer can not be reached: no address of it is known, or none answers."


def _as_libp2p_handler(handler: StreamHandler) -> Callable[[Any], Awaitable[None]]:
    """`handler` with its stream closed at the end, reset if it raises."""

    async def handle(net_stream: Any) -> None:
        stream = PeerStream(net_stream, str(net_stream.muxed_conn.peer_id))
        try:
            await handler(stream)
        except BaseException:
            await stream.reset()
            raise
        await stream.aclose()

    return handle


__all__ = ["Network", "P2PSettings", "PeerStream", "StreamHandler"]
