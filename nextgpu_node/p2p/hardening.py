"""libp2p 0.8.1, made fit for strangers.  Each class names the defect it cures.

docs/libp2p-defects.md describes the defects; tests/*/p2p/test_defects.py shows each with the
stock class and its absence with ours.  The cures override private methods, so that any other
release of libp2p is refused (`check_version`) until somebody has looked at it again.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream, ISecureConn
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection import swarm_connection
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from multiaddr import Multiaddr

from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.p2p.noise_pipe import remote_address
from nextgpu_node.p2p.yamux import MuxLimits, ReceiveBudget, Yamux
from nextgpu_protocol.errors import RemoteProtocolError

if TYPE_CHECKING:
    from nextgpu_node.p2p.settings import P2PSettings

log = structlog.get_logger()

SUPPORTED_VERSION: Final = "0.8.1"
DHT_PROTOCOL: Final = "/nextgpu/dht/1"

# One more address is tried every so often, as in RFC 8305, but the wait ends with the first
# success; libp2p always waits 250 ms, even when it is connected after two.
_DIAL_STAGGER_S: Final = 0.25
_MAX_DIALED_ADDRESSES: Final = 8
_WRONG_PEER: Final = "WrongPeer"
_MAX_PENDING_UPGRADES: Final = 64
_PLAIN_TCP: Final = {(name, "tcp") for name in ("ip4", "ip6", "dns", "dns4", "dns6")}


def check_version() -> None:
    found = version("libp2p")
    if found != SUPPORTED_VERSION:
        raise NetworkError(
            f"libp2p {found} is installed, but this node is hardened for {SUPPORTED_VERSION} only."
            f" Run `pip install libp2p=={SUPPORTED_VERSION}`."
        )


def quiet_logs() -> None:
    """Silence libp2p's own logging: it prints peers' addresses, payloads and tracebacks.

    What matters to the owner is logged by this room.  `swarm_connection` even calls the root
    logger, whose first use installs a handler on stderr for the whole process.
    """
    logger = logging.getLogger("libp2p")
    logger.setLevel(logging.CRITICAL + 1)
    logger.propagate = False
    swarm_connection.logging = logger
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("libp2p."):  # some of its modules set a level of their own
            logging.getLogger(name).setLevel(logging.NOTSET)
    for name in ("multiaddr", "trio.serve_listeners"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class WrongPeer(SwarmException):  # type: ignore[misc]
    """Another peer than the one asked for answers at this address."""


class HardenedMuxer(MuxerMultistream):  # type: ignore[misc]
    """Builds our Yamux; libp2p's muxer option is ignored for yamux (defects 4 and 5)."""

    def __init__(self, limits: MuxLimits, budget: ReceiveBudget) -> None:
        super().__init__({YAMUX_ID: Yamux})
        self._limits = limits
        self._budget = budget

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = Yamux(
            conn,
            peer_id,
            is_initiator=conn.is_initiator,
            limits=self._limits,
            budget=self._budget,
        )
        return self._annotate_connection(muxed, conn, protocol)


class NoAutoConnector(AutoConnector):  # type: ignore[misc]
    """Dials nobody.  The stock one dials every peer the node has ever heard of (defect 11)."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        pass

    async def maybe_connect(self) -> None:
        pass

    # Its memory of peers is only ever pruned by `maybe_connect`.
    def record_successful_connection(self, peer_id: ID) -> None:
        pass

    def record_disconnect(self, peer_id: ID) -> None:
        pass

    def record_failed_connection(self, peer_id: ID) -> None:
        pass


class HardenedSwarm(Swarm):  # type: ignore[misc]
    """Inbound slots come back, addresses have caps, and every address of a peer is dialled."""

    def __init__(self, *args: Any, settings: P2PSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._per_ip: Counter[str] = Counter()
        self._upgrading = trio.CapacityLimiter(_MAX_PENDING_UPGRADES)
        self.auto_connector = NoAutoConnector(swarm=self)

    # Defect 1: the stock handler holds the slot until the swarm stops.  Upstream waits for
    # `manager.wait_finished()` where the end of this one connection is meant.
    async def _do_handle_inbound_connection(
        self, read_write_closer: ReadWriteCloser, maddr: Multiaddr, failure_event: object
    ) -> None:
        remote = remote_address(read_write_closer.stream)
        ip = neighbourhood(remote[0]) if remote else ""
        if self._per_ip[ip] >= self._settings.max_connections_per_ip:
            await read_write_closer.close()
            return
        self._per_ip[ip] += 1
        try:
            await self._serve_inbound(read_write_closer, maddr)
        finally:
            self._per_ip[ip] -= 1
            if not self._per_ip[ip]:
                del self._per_ip[ip]

    async def _serve_inbound(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        try:
            async with self._upgrading:
                raw = RawConnection(read_write_closer, False)
                muxed = await self.upgrade_inbound_raw_conn(raw, maddr)
        except Exception as exc:  # whatever a stranger's bytes provoked ends that stranger only
            log.debug("connection.refused", reason=type(exc).__name__)
            with suppress(Exception):
                await read_write_closer.close()
            return
        await muxed.event_closed.wait()

    # Defect 10: stock `dial_peer` tries one TCP address of a peer, always waits 250 ms, and
    # after a failure refuses the peer for 60 s.
    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Connections to `peer_id`, dialled if there are none.  Concurrent callers share a dial."""
        while True:
            live = [conn for conn in self.get_connections(peer_id) if not conn.is_closed]
            if live:
                return live
            ongoing = self._ongoing_dials.get(peer_id)
            if ongoing is None:
                break
            await ongoing.wait()
        self._ongoing_dials[peer_id] = done = trio.Event()
        try:
            return [await self._dial_any(peer_id, self._addresses_to_dial(peer_id))]
        finally:
            done.set()
            del self._ongoing_dials[peer_id]

    def _addresses_to_dial(self, peer_id: ID) -> list[Multiaddr]:
        try:
            known = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            known = []
        usable = [a for a in dict.fromkeys(known) if is_dialable(a)]
        # Loopback last: another machine's 127.0.0.1 is not ours.
        usable.sort(key=lambda address: "/127." in str(address) or "/::1/" in str(address))
        if not usable:
            raise SwarmException("no address of this peer is known")
        return usable[:_MAX_DIALED_ADDRESSES]

    async def _dial_any(self, peer_id: ID, addresses: Sequence[Multiaddr]) -> INetConn:
        won: list[INetConn] = []
        reasons: list[str] = []

        async def attempt(address: Multiaddr, failed: trio.Event) -> None:
            try:
                won.append(await self._dial_addr_single_attempt(address, peer_id))
                nursery.cancel_scope.cancel()
            except Exception as exc:
                reasons.append(_reason(exc))
                log.debug("dial.failed", peer_id=str(peer_id), reason=reasons[-1])
                failed.set()

        with trio.move_on_after(self.connection_config.dial_timeout):
            async with self._global_dial_limiter, trio.open_nursery() as nursery:
                for address in addresses:
                    failed = trio.Event()
                    nursery.start_soon(attempt, address, failed)
                    with trio.move_on_after(_DIAL_STAGGER_S):
                        await failed.wait()
        for spare in won[1:]:
            await spare.close()
        if not won and _WRONG_PEER in reasons:
            raise WrongPeer("another peer answers at this address")
        if not won:
            raise SwarmException(f"none of {len(addresses)} addresses of this peer answered")
        return won[0]

    # The stock trimmer closes older connections with streams in use; we turn the newest away.
    def _trim_connections(self, peer_id: ID) -> None:
        for conn in self.connections[peer_id][self.connection_config.max_connections_per_peer :]:
            self.manager.run_task(self._close_connection_async, conn)

    async def close_all(self) -> None:
        """Close every connection at once; libp2p does it one after the other, 0.2 s each."""
        async with trio.open_nursery() as nursery:
            for conn in self.get_connections():
                nursery.start_soon(conn.close)


class HardenedHost(BasicHost):  # type: ignore[misc]
    """No stream can end the host (defect 3), and a peer has only so many of them at once."""

    def __init__(
        self,
        *args: Any,
        settings: P2PSettings,
        on_identified: Callable[[ID], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._on_identified = on_identified
        self._streams_of: Counter[ID] = Counter()

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        peer_id = net_stream.muxed_conn.peer_id
        if self._streams_of[peer_id] >= self._settings.max_streams_per_peer:
            await net_stream.reset()
            return
        self._streams_of[peer_id] += 1
        try:
            await super()._swarm_stream_handler(net_stream)
        except Exception as exc:
            # A peer that leaves or breaks the protocol is everyday; anything else is a bug.
            everyday = isinstance(exc, PeerLost | RemoteProtocolError)
            say = log.debug if everyday else log.warning
            say("stream.handler_failed", peer_id=str(peer_id), error=type(exc).__name__)
            with suppress(Exception):
                await net_stream.reset()
        finally:
            self._streams_of[peer_id] -= 1
            if not self._streams_of[peer_id]:
                del self._streams_of[peer_id]

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        await super()._identify_peer(peer_id, reason=reason)
        if peer_id in self._identified_peers:
            self._on_identified(peer_id)


def neighbourhood(ip: str) -> str:
    """What one caller can choose from freely: an IPv4 address, or a /64 of IPv6."""
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv4Address):
        return ip
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _reason(exc: BaseException) -> str:
    """The name of the error at the bottom of libp2p's chain of re-raised ones."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    if "mismatch" in str(exc).lower() or "Mismatches" in type(exc).__name__:
        return _WRONG_PEER
    return type(exc).__name__


def is_dialable(address: Multiaddr) -> bool:
    """Whether this is a plain TCP address of a host: no relay, no QUIC, no WebSocket."""
    names = tuple(protocol.name for protocol in address.protocols())
    return names[:2] in _PLAIN_TCP and names[2:] in ((), ("p2p",))
