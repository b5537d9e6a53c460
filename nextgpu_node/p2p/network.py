"""The node's place in the peer-to-peer network: TCP + Noise + yamux, one DHT of our own.

Give `Network` its settings and a handler per protocol, start `run` in a nursery, which answers
with the node's own multiaddrs, and open streams to peers by their ID.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import Any

import structlog
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.exceptions import StreamFailure
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from nacl.signing import SigningKey

from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.p2p import host as hosts
from nextgpu_node.p2p.dht import Dht, FoundProviders
from nextgpu_node.p2p.hardening import DHT_PROTOCOL, HardenedHost, WrongPeer
from nextgpu_node.p2p.routing_table import network_of
from nextgpu_node.p2p.settings import P2PSettings
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_node.p2p.yamux import Yamux
from nextgpu_protocol.dht import Contact, node_place
from nextgpu_protocol.ids import peer_id_from_public_key, public_key_from_peer_id
from nextgpu_protocol.limits import MAX_ADDRESS_BYTES, MAX_ADDRESSES

log = structlog.get_logger()

StreamHandler = Callable[[PeerStream], Awaitable[None]]

_SHUTDOWN_S = 1.5
_BOOTSTRAP_FIRST_RETRY_S = 0.5
_BOOTSTRAP_SLOWEST_RETRY_S = 60.0
_ENTER_PEER_S = 30.0
_ADDRESS_LIFETIME_S = 1800
_KNOWN_PEERS_AT_ONCE = 4
_KNOWN_PEERS_TRIED = 32
_MEET_S = 3.0
_PRUNE_S = 15.0
_IDLE_S = 60.0
_jitter = random.SystemRandom()


class Network:
    """One node's host, DHT and streams.  `run` it once; the other methods work while it runs."""

    def __init__(self, settings: P2PSettings, handlers: Mapping[str, StreamHandler]) -> None:
        self._settings = settings
        self._handlers = dict(handlers)
        self.peer_id = hosts.peer_id_of_seed(settings.key_seed)
        self._host: HardenedHost | None = None
        self._dht: Dht | None = None
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
            nursery.start_soon(self._running_dht().run)
            nursery.start_soon(self._meet_known_peers)
            nursery.start_soon(self._prune_forever)
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
        is_server = self._settings.dht_mode == "server"
        dht = Dht(
            SigningKey(self._settings.key_seed),
            is_server=is_server,
            open_stream=self._open_dht_stream,
            own_addresses=self._own_addresses,
            connected_at=self._connected_at,
            connected_servers=self._connected_servers,
        )
        if is_server:
            host.set_stream_handler(DHT_PROTOCOL, _as_libp2p_handler(dht.serve))
        async with host.run(listen):
            try:
                hosts.check_is_listening(host, listen)
                self._host, self._dht = host, dht
                try:
                    yield host
                finally:
                    self._host = self._dht = None
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
        return await self._new_stream(host, target, protocol)

    async def _new_stream(self, host: HardenedHost, target: ID, protocol: str) -> PeerStream:
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
        return PeerStream(net_stream, str(target))

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

    def ip_of(self, peer_id: str) -> str | None:
        """The address at which a peer is connected now; None where it is not, or not directly."""
        host = self._running_host()
        for conn in host.get_network().get_connections(self._parse_peer_id(peer_id)):
            address: tuple[str, int] | None = conn.muxed_conn.get_remote_address()
            if address is not None and not conn.is_closed:
                return address[0]
        return None

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
            with suppress(PeerStoreError):
                host.get_peerstore().clear_addrs(target)
            key = public_key_from_peer_id(str(target))
            if not self._remember(host, target, await self._running_dht().find_addresses(key)):
                raise PeerLost(_unreachable(first)) from first
            try:
                await host.get_network().dial_peer(target)
            except BaseLibp2pError as exc:
                raise PeerLost(_unreachable(exc)) from exc

    @staticmethod
    def _is_connected(host: HardenedHost, target: ID) -> bool:
        return any(not conn.is_closed for conn in host.get_network().get_connections(target))

    # Discovery.

    async def announce(self, keys: Sequence[bytes]) -> int:
        """Announce 32-byte capability keys, and take back those that are not among them.

        Returns how many of them the network holds now.  The records live for half an hour: the
        caller repeats this every ten minutes.
        """
        return await self._running_dht().announce(keys)

    @property
    def is_announced(self) -> bool:
        """Whether the network held everything that was announced last."""
        return self._dht is not None and self._dht.is_announced

    async def find(self, key: bytes) -> FoundProviders:
        """Who announces `key`, each statement verified.  Some may have gone: ask them."""
        host, dht = self._running_host(), self._running_dht()
        if len(key) != len(dht.public_key):
            raise ValueError(f"a capability key has {len(dht.public_key)} bytes, not {len(key)}")
        if self._settings.bootstrap or self._settings.known_peers:
            # Asked right after the start: there is a network, and it is about to be met.
            with trio.move_on_after(_MEET_S):
                await dht.wait_met()
        found = await dht.find(key)
        for record in found.records:
            if record.signer_id != self.peer_id:
                self._remember(host, ID.from_base58(record.signer_id), record.message.addresses)
        return found

    async def find_providers(self, key: bytes) -> list[str]:
        """Peer ids of those whom `find` finds, without ourselves."""
        found = await self.find(key)
        return [one.signer_id for one in found.records if one.signer_id != self.peer_id]

    def known_peers(self) -> list[str]:
        """Addresses of the DHT's servers that this node knows, to meet them after a restart."""
        if self._dht is None:
            return []
        return [
            f"{node.addresses[0]}/p2p/{peer_id_from_public_key(node.key)}"
            for node in self._dht.table
            if node.addresses
        ]

    async def _open_dht_stream(self, key: bytes, addresses: tuple[str, ...]) -> PeerStream:
        """A stream to a DHT server, dialled where it is said to be; nothing is looked up."""
        host = self._running_host()
        target = ID.from_base58(peer_id_from_public_key(key))
        if not self._is_connected(host, target):
            self._remember(host, target, addresses)
            try:
                await host.get_network().dial_peer(target)
            except BaseLibp2pError as exc:
                raise PeerLost(_unreachable(exc)) from exc
        return await self._new_stream(host, target, DHT_PROTOCOL)

    def _remember(self, host: HardenedHost, target: ID, addresses: Sequence[str]) -> bool:
        """Note a peer's addresses; whether there are any that can be dialled."""
        usable = hosts.dialable_untrusted(addresses)
        if usable:
            host.get_peerstore().add_addrs(target, usable, _ADDRESS_LIFETIME_S)
        return bool(usable)

    def _own_addresses(self) -> tuple[str, ...]:
        addresses = (str(a).partition("/p2p/")[0] for a in self._running_host().get_addrs())
        fitting = [address for address in addresses if len(address) <= MAX_ADDRESS_BYTES]
        return tuple(dict.fromkeys(fitting))[:MAX_ADDRESSES]

    def _connected_at(self, place: bytes) -> Contact | None:
        host = self._running_host()
        for peer in host.get_connected_peers():
            if _place_of(peer) == place:
                return self._contact(host, peer)
        return None

    def _connected_servers(self) -> list[Contact]:
        host = self._running_host()
        serving = (p for p in host.get_connected_peers() if self._serves_dht(host, p))
        return [c for c in (self._contact(host, peer) for peer in serving) if c is not None]

    def _contact(self, host: HardenedHost, peer: ID) -> Contact | None:
        """A peer as others are told of it; None where its key is of another kind."""
        try:
            key = public_key_from_peer_id(str(peer))
        except ValueError:
            return None
        try:
            known = [str(a).partition("/p2p/")[0] for a in host.get_peerstore().addrs(peer)]
        except PeerStoreError:
            known = []
        fitting = [a for a in dict.fromkeys(known) if len(a) <= MAX_ADDRESS_BYTES]
        return Contact(key, tuple(fitting[:MAX_ADDRESSES]))

    def _note_identified(self, peer_id: ID) -> None:
        if self._identified_send is not None:
            # A full queue means hundreds of newcomers at once; the DHT will meet this one again.
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                self._identified_send.send_nowait(peer_id)

    async def _enter_identified_peers(self) -> None:
        async for peer_id in self._identified:
            host, dht = self._running_host(), self._running_dht()
            contact = self._contact(host, peer_id)
            if contact is None or not self._serves_dht(host, peer_id):
                continue
            with trio.move_on_after(_ENTER_PEER_S):
                await dht.enter(contact, network_of(self._remote_ip(host, peer_id)))

    @staticmethod
    def _serves_dht(host: HardenedHost, peer_id: ID) -> bool:
        """Whether identify has shown that a peer serves our DHT: clients do not."""
        try:
            return DHT_PROTOCOL in host.get_peerstore().get_protocols(peer_id)
        except PeerStoreError:
            return False

    @staticmethod
    def _remote_ip(host: HardenedHost, peer_id: ID) -> str:
        for conn in host.get_network().get_connections(peer_id):
            if remote := conn.muxed_conn.get_remote_address():
                return str(remote[0])
        return ""

    async def _meet_known_peers(self) -> None:
        """Dial nodes of an earlier run, in any order, until a few have answered."""
        known = []
        for address in self._settings.known_peers:
            with suppress(NetworkError):  # of a file that anybody may have edited
                known.append(hosts.parse_bootstrap(address))
        _jitter.shuffle(known)
        met = 0
        for info in known[:_KNOWN_PEERS_TRIED]:
            if met >= _KNOWN_PEERS_AT_ONCE or str(info.peer_id) == self.peer_id:
                continue
            host = self._running_host()
            host.get_peerstore().add_addrs(info.peer_id, info.addrs, _ADDRESS_LIFETIME_S)
            with suppress(BaseLibp2pError):
                await host.get_network().dial_peer(info.peer_id)
                met += 1

    async def _prune_forever(self) -> None:
        """Close connections that nobody uses, the oldest first: lookups leave many behind."""
        while True:
            await trio.sleep(_PRUNE_S)
            host = self._running_host()
            kept = {str(hosts.parse_bootstrap(a).peer_id) for a in self._settings.bootstrap}
            before = trio.current_time() - _IDLE_S
            idle = []
            for conn in host.get_network().get_connections():
                since = conn.muxed_conn.idle_since()
                if (
                    since is not None
                    and since < before
                    and str(conn.muxed_conn.peer_id) not in kept
                ):
                    idle.append((since, conn))
            idle.sort(key=lambda one: one[0])
            for _, conn in idle[: max(0, len(idle) - self._settings.idle_connections)]:
                with suppress(BaseLibp2pError):
                    await conn.close()

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

    def _running_dht(self) -> Dht:
        if self._dht is None:
            raise NetworkError("The peer-to-peer network is not running.")
        return self._dht

    def _parse_peer_id(self, peer_id: str) -> ID:
        try:
            public_key_from_peer_id(peer_id)
        except ValueError as exc:
            raise NetworkError(f"{peer_id!r} is not a peer ID.") from exc
        if peer_id == self.peer_id:
            raise NetworkError("That is this node's own peer ID.")
        return ID.from_base58(peer_id)


@lru_cache(maxsize=4096)
def _place_of(peer: ID) -> bytes | None:
    """A peer's place in the DHT; None where its key is of another kind."""
    try:
        return node_place(public_key_from_peer_id(str(peer)))
    except ValueError:
        return None


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
