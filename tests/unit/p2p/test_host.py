"""What the host is built from: keys, addresses, ports, the pinned library."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys

import pytest
from libp2p.crypto.ed25519 import Ed25519PublicKey, create_new_key_pair
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from nacl.signing import SigningKey

from nextgpu_node.errors import NetworkError
from nextgpu_node.p2p import hardening, host
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.settings import P2PSettings
from nextgpu_protocol.ids import peer_id_from_public_key, public_key_from_peer_id

SOMEBODY = "/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
QUIC = f"/ip4/1.2.3.4/udp/4001/quic-v1{SOMEBODY}"
RELAYED = f"/ip4/1.2.3.4/tcp/4001{SOMEBODY}/p2p-circuit{SOMEBODY}"


def test_peer_ids_of_the_protocol_are_those_of_libp2p() -> None:
    for _ in range(20):
        seed = os.urandom(32)
        public_key = bytes(SigningKey(seed).verify_key)
        theirs = ID.from_pubkey(create_new_key_pair(seed).public_key)
        assert peer_id_from_public_key(public_key) == str(theirs) == host.peer_id_of_seed(seed)
        assert public_key_from_peer_id(str(theirs)) == public_key
        assert ID.from_pubkey(Ed25519PublicKey.from_bytes(public_key)) == theirs


def test_the_secret_seed_is_not_printed() -> None:
    assert "secret" not in repr(P2PSettings(key_seed=b"secret" * 5 + b"!!"))


def test_a_seed_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(NetworkError, match="32 bytes"):
        Network(P2PSettings(key_seed=b"short"), {})


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "/ip4/127.0.0.1",
        "/ip4/1.2.3.4/udp/4001/quic-v1",
        "/ip4/1.2.3.4/tcp/4001/ws",
        "/dns4/example.org/tcp/4001",
        "/ip4/999.1.1.1/tcp/1",
    ],
)
def test_only_plain_tcp_can_be_listened_on(text: str) -> None:
    with pytest.raises(NetworkError, match="/tcp/"):
        host.parse_listen(text)


@pytest.mark.parametrize("text", ["/ip4/1.2.3.4/tcp/4001", "/p2p/abc", "x", QUIC, RELAYED])
def test_a_bootstrap_address_is_plain_tcp_and_names_its_peer(text: str) -> None:
    with pytest.raises(NetworkError):
        host.parse_bootstrap(text)


async def test_a_wrong_address_stops_the_start() -> None:
    with pytest.raises(NetworkError, match="not a peer's address"):
        await Network(
            P2PSettings(bytes(32), ("/ip4/127.0.0.1/tcp/0",), bootstrap=("/ip4/1.2.3.4/tcp/1",)), {}
        ).run()


async def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(NetworkError, match=r"no address 192\.0\.2\.1"):
        await host.check_port_is_free(Multiaddr("/ip4/192.0.2.1/tcp/0"))


async def test_a_port_in_time_wait_is_free_and_a_listening_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")
        with pytest.raises(NetworkError, match="already taken"):
            await host.check_port_is_free(address)
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()  # the server's side closes first: TIME_WAIT is here
            assert client.recv(1) == b""
    await host.check_port_is_free(address)


def test_all_interfaces_are_announced_as_their_addresses() -> None:
    tell = host._addresses_to_tell(P2PSettings(bytes(32)))
    told = [str(address) for address in tell([Multiaddr("/ip4/0.0.0.0/tcp/4001")])]
    assert told
    assert not any("/0.0.0.0/" in address for address in told)
    chosen = P2PSettings(bytes(32), announce_addrs=("/dns4/example.org/tcp/9",))
    told = [str(address) for address in host._addresses_to_tell(chosen)([])]
    assert told == ["/dns4/example.org/tcp/9"]


def test_another_release_of_libp2p_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "version", lambda _: "0.9.0")
    with pytest.raises(NetworkError, match=r"0\.9\.0 is installed.*pip install libp2p==0\.8\.1"):
        hardening.check_version()


def test_libp2p_prints_nothing() -> None:
    """In a process of its own: logging is global.  The root logger is the trap (see quiet_logs)."""
    code = """
import logging
from nextgpu_node.p2p import hardening
from libp2p.network.connection import swarm_connection
hardening.quiet_logs()
for name in list(logging.root.manager.loggerDict):
    if name.startswith("libp2p"):
        logging.getLogger(name).critical("secret address")
swarm_connection.logging.warning("secret address")
assert not logging.root.handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_logging_levels_set_by_modules_are_overruled() -> None:
    hardening.quiet_logs()
    assert not logging.getLogger("libp2p.network.auto_connector").isEnabledFor(logging.CRITICAL)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
    ],
)
def test_callers_are_counted_by_what_they_can_not_choose(one: str, other: str, same: bool) -> None:
    assert (hardening.neighbourhood(one) == hardening.neighbourhood(other)) is same
