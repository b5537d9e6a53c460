"""Building the hardened libp2p host, and checking what it is given."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from nextgpu_node.errors import NetworkError
from nextgpu_node.p2p import hardening
from nextgpu_node.p2p.private_noise import PROTOCOL_ID as PRIVATE_NOISE_ID
from nextgpu_node.p2p.private_noise import PrivateNoise
from nextgpu_node.p2p.settings import P2PSettings
from nextgpu_node.p2p.yamux import MuxLimits, ReceiveBudget
from nextgpu_node.private_network import KEY_BYTES as NETWORK_KEY_BYTES

_SEED_BYTES = 32


def build_host(
    settings: P2PSettings, *, on_identified: Callable[[ID], None]
) -> hardening.HardenedHost:
    """A host that speaks TCP, Noise and yamux and nothing else.  It does not listen yet."""
    hardening.check_version()
    hardening.quiet_logs()
    keys = _key_pair(settings.key_seed)
    # One security transport and one muxer: the stock defaults also accept plaintext and SECIO,
    # over which a caller can claim any peer ID (defect 2).
    upgrader = TransportUpgrader(_security(keys, settings.network_key), {})
    upgrader.muxer_multistream = hardening.HardenedMuxer(
        MuxLimits(
            max_inbound_streams=settings.max_streams_per_peer,
            max_outbound_streams=settings.max_streams_per_peer,
            max_window_bytes=settings.max_window_bytes,
            keepalive_s=settings.keepalive_s,
            keepalive_timeout_s=settings.keepalive_timeout_s,
        ),
        ReceiveBudget(settings.max_unread_bytes),
    )
    peer_id = ID.from_pubkey(keys.public_key)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, keys)
    swarm = hardening.HardenedSwarm(
        peer_id,
        peerstore,
        upgrader,
        transports=[TCP()],
        connection_config=_connection_config(settings),
        settings=settings,
    )
    return hardening.HardenedHost(
        swarm,
        addrs_factory=_addresses_to_tell(settings),
        disable_identify_address_discovery=True,
        settings=settings,
        on_identified=on_identified,
    )


def _security(keys: Any, network_key: bytes | None) -> dict[Any, Any]:
    """The one security protocol that is spoken: in a private network, not the open one's."""
    noise_key = create_noise_key_pair().private_key
    if network_key is None:
        return {NOISE_ID: NoiseTransport(keys, noise_privkey=noise_key)}
    if len(network_key) != NETWORK_KEY_BYTES:
        raise NetworkError(f"A network's key has {NETWORK_KEY_BYTES} bytes.")
    return {PRIVATE_NOISE_ID: PrivateNoise(keys, noise_key, network_key)}


def _connection_config(settings: P2PSettings) -> ConnectionConfig:
    return ConnectionConfig(
        max_connections=settings.max_connections,
        max_connections_per_peer=settings.max_connections_per_peer,
        # No minimum: all slots may be taken by callers.
        min_connections=0,
        low_watermark=0,
        high_watermark=settings.max_connections,
        dial_timeout=settings.dial_timeout_s,
        inbound_upgrade_timeout=settings.upgrade_timeout_s,
        outbound_upgrade_timeout=settings.upgrade_timeout_s,
    )


def _key_pair(seed: bytes) -> Any:
    if len(seed) != _SEED_BYTES:
        raise NetworkError(f"The node's key seed must have {_SEED_BYTES} bytes.")
    return create_new_key_pair(seed)


def peer_id_of_seed(seed: bytes) -> str:
    """The peer ID of the Ed25519 key with this 32-byte seed."""
    return str(ID.from_pubkey(_key_pair(seed).public_key))


# Addresses.


def parse_listen(text: str) -> Multiaddr:
    """A listening address: /ip4 or /ip6, then /tcp."""
    address = _parse(text)
    if [p.name for p in address.protocols()] not in (["ip4", "tcp"], ["ip6", "tcp"]):
        raise NetworkError(
            f"Can not listen on {text}: use /ip4/ADDRESS/tcp/PORT or /ip6/ADDRESS/tcp/PORT."
        )
    return address


def parse_bootstrap(text: str) -> PeerInfo:
    """A peer's address and ID: /ip4, /ip6 or /dns names, then /tcp and /p2p."""
    address = _parse(text)
    if not hardening.is_dialable(address) or address.protocols()[-1].name != "p2p":
        raise NetworkError(f"{text} is not a peer's address: use /ip4/ADDRESS/tcp/PORT/p2p/ID.")
    return info_from_p2p_addr(address)


def dialable_untrusted(addresses: Sequence[str]) -> list[Multiaddr]:
    """Those of a peer's claimed addresses that can be dialled; nothing is raised for the rest."""
    usable = []
    for text in addresses:
        with suppress(NetworkError):
            address = _parse(text)
            if hardening.is_dialable(address):
                usable.append(address)
    return usable


def _parse(text: str) -> Multiaddr:
    try:
        return Multiaddr(text)
    except Exception as exc:  # multiaddr raises its codecs' errors as they come
        raise NetworkError(f"{text!r} is not a multiaddr such as /ip4/0.0.0.0/tcp/4001.") from exc


def host_and_port(address: Multiaddr) -> tuple[str, int]:
    name = address.protocols()[0].name
    return address.value_for_protocol(name), int(address.value_for_protocol("tcp"))


async def check_port_is_free(address: Multiaddr) -> None:
    """NetworkError where `address` can not be listened on.

    libp2p sets SO_REUSEPORT, so that a second node on a port starts without a word and the two
    share the callers between them; and it logs other failures instead of raising them.
    """
    ip, port = host_and_port(address)
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Lets go of connections in TIME_WAIT from a previous run, not of a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as exc:
            raise NetworkError(_listen_failure(exc, ip, port)) from exc
    await trio.lowlevel.checkpoint()


def _listen_failure(exc: OSError, ip: str, port: int) -> str:
    match exc.errno:
        case errno.EADDRINUSE:
            return (
                f"TCP port {port} is already taken. Stop the other program (perhaps another"
                " nextgpud) or choose another port in p2p.listen_addrs."
            )
        case errno.EACCES:
            return f"TCP port {port} needs root. Choose a port of 1024 or above."
        case errno.EADDRNOTAVAIL:
            return f"This machine has no address {ip}. Choose another in p2p.listen_addrs."
        case _:
            return f"Can not listen on TCP port {port}: {exc.strerror}."


def check_is_listening(host: hardening.HardenedHost, wanted: Sequence[Multiaddr]) -> None:
    """libp2p's `run` goes on without a listener; this does not."""
    if len(host.get_transport_addrs()) < len(wanted):
        raise NetworkError("One of p2p.listen_addrs could not be opened for listening.")


def _addresses_to_tell(
    settings: P2PSettings,
) -> Callable[[list[Multiaddr]], list[Multiaddr]]:
    """What to announce: the owner's own choice, or our interfaces in place of 0.0.0.0."""
    chosen = [_parse(text) for text in settings.announce_addrs]

    def addresses(listening: list[Multiaddr]) -> list[Multiaddr]:
        if chosen:
            return list(chosen)
        return [concrete for address in listening for concrete in _concrete(address)]

    return addresses


def _concrete(address: Multiaddr) -> list[Multiaddr]:
    ip, port = host_and_port(address)
    if not ipaddress.ip_address(ip).is_unspecified:
        return [address]
    version = ipaddress.ip_address(ip).version
    own = _interface_addresses(version)
    outward = [a for a in own if not a.is_loopback] or own
    return [Multiaddr(f"/ip{version}/{a}/tcp/{port}") for a in outward]


def _interface_addresses(version: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    found = [
        ipaddress.ip_address(entry.address.partition("%")[0])
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == family
    ]
    return [address for address in found if not address.is_link_local]
