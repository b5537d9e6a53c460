"""Old nodes stay, dead ones leave, and one network can not surround a place."""

from __future__ import annotations

import hashlib
import os

import pytest

from nextgpu_node.p2p.routing_table import (
    BUCKET_NODES,
    PER_NETWORK_IN_BUCKET,
    PER_NETWORK_IN_TABLE,
    Node,
    RoutingTable,
    estimate_nodes,
    network_of,
)
from nextgpu_protocol.dht import distance, node_place

OWN = node_place(bytes(32))


def node(number: int, network: str = "", at_s: float = 0.0) -> Node:
    key = hashlib.sha256(b"node %d" % number).digest()
    return Node(key, (f"/ip4/192.0.2.1/tcp/{number % 60000 + 1}",), network, at_s)


def in_far_half(count: int) -> list[Node]:
    """Nodes of the one bucket that half of all nodes belong to."""
    every = (node(number) for number in range(10 * count))
    return [one for one in every if (one.place[0] ^ OWN[0]) & 0x80][:count]


def test_a_full_bucket_keeps_its_old_nodes() -> None:
    table = RoutingTable(OWN)
    nodes = in_far_half(BUCKET_NODES + 30)
    entered = [table.answered(one) for one in nodes]
    assert entered == [True] * BUCKET_NODES + [False] * 30
    assert {one.key for one in table} == {one.key for one in nodes[:BUCKET_NODES]}


def test_a_node_leaves_after_three_failures_and_the_newest_that_waits_takes_its_place() -> None:
    table = RoutingTable(OWN)
    nodes = in_far_half(BUCKET_NODES + 3)
    for one in nodes:
        table.answered(one)
    for _ in range(3):
        table.failed(nodes[0].key)
        table.failed(nodes[0].key)
        assert nodes[0].key in table
        table.answered(nodes[0])  # an answer in between: counted anew
    for _ in range(3):
        table.failed(nodes[0].key)
    assert nodes[0].key not in table
    assert nodes[-1].key in table
    assert len(table) == BUCKET_NODES


def test_one_network_has_two_nodes_in_a_bucket_and_ten_in_the_table() -> None:
    table = RoutingTable(OWN)
    sybils = [node(number, network="203.0.113.0/24") for number in range(5000)]
    entered = [one for one in sybils if table.answered(one)]
    assert len(entered) == PER_NETWORK_IN_TABLE
    far = [one for one in entered if (one.place[0] ^ OWN[0]) & 0x80]
    assert len(far) == PER_NETWORK_IN_BUCKET
    # There is room for everybody else, however many of them came first.
    honest = [node(10_000 + n, network=f"198.51.{n}.0/24") for n in range(100)]
    assert sum(table.answered(one) for one in honest) > 50


def test_nodes_on_private_addresses_are_not_counted() -> None:
    table = RoutingTable(OWN)
    assert all(table.answered(one) for one in in_far_half(BUCKET_NODES))


@pytest.mark.parametrize(
    ("ip", "network"),
    [
        ("8.8.8.8", "8.8.8.0/24"),
        ("8.8.8.200", "8.8.8.0/24"),
        ("::ffff:8.8.8.8", "8.8.8.0/24"),
        ("2a00:1450:4001:81b::200e", "2a00:1450:4001::/48"),
        ("127.0.0.1", ""),
        ("10.1.2.3", ""),
        ("fe80::1", ""),
        ("", ""),
        ("no address", ""),
    ],
)
def test_networks(ip: str, network: str) -> None:
    assert network_of(ip) == network


def test_nearest_is_what_sorting_all_of_them_gives() -> None:
    table = RoutingTable(OWN)
    for number in range(300):
        table.answered(node(number))
    place = os.urandom(32)
    wanted = sorted(table, key=lambda one: distance(one.place, place))[:8]
    assert table.nearest(place, 8) == wanted


def test_a_place_in_a_bucket_is_in_it() -> None:
    table = RoutingTable(OWN)
    for number in range(300):
        table.answered(node(number))
    for index in table.bucket_indices():
        place = table.place_in_bucket(index, os.urandom(32))
        assert 256 - distance(place, OWN).bit_length() == index


def test_a_node_is_not_its_own_neighbour() -> None:
    table = RoutingTable(OWN)
    assert not table.answered(Node(bytes(32), (), "", 0.0))
    assert len(table) == 0


def test_the_quietest_is_named_once_it_is_quiet_for_long() -> None:
    table = RoutingTable(OWN)
    for number in range(5):
        table.answered(node(number, at_s=float(number)))
    assert table.quietest(before_s=0.0) is None
    quiet = table.quietest(before_s=3.0)
    assert quiet is not None
    assert quiet.answered_at_s == 0.0


def test_the_size_of_a_network_is_estimated_from_the_density_around_a_place() -> None:
    places = [node(number).place for number in range(2000)]
    estimates = []
    for _ in range(50):
        target = os.urandom(32)
        near = sorted(places, key=lambda place: distance(place, target))[:20]
        estimates.append(estimate_nodes(near, target))
    assert 1600 < sorted(estimates)[25] < 2500
    assert estimate_nodes([], OWN) == 0
