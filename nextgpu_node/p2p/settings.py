"""What the peer-to-peer room is told at its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class P2PSettings:
    """Addresses are multiaddrs, for example /ip4/0.0.0.0/tcp/4001; bootstrap ones end in /p2p/ID.

    Port 0 asks the system for a free one.  Sizes in bytes, times in seconds.
    """

    key_seed: bytes = field(repr=False)  # 32 bytes, the seed of the node's Ed25519 key
    listen_addrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/4001",)
    # What others are told instead of the addresses of this machine's interfaces.
    announce_addrs: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    # DHT servers of an earlier run, as `bootstrap`: tried once, after which they may be gone.
    known_peers: tuple[str, ...] = ()
    dht_mode: Literal["server", "client"] = "server"
    # 32 bytes: only nodes with the same key are met, and none without.  None: the open network.
    network_key: bytes | None = field(default=None, repr=False)

    max_connections: int = 400
    idle_connections: int = 64  # kept open though nobody uses them
    max_connections_per_peer: int = 4
    max_connections_per_ip: int = 64
    max_streams_per_peer: int = 64
    max_window_bytes: int = 4 * 1024 * 1024
    max_unread_bytes: int = 256 * 1024 * 1024
    dial_timeout_s: float = 10.0
    upgrade_timeout_s: float = 5.0
    keepalive_s: float = 30.0
    keepalive_timeout_s: float = 30.0
