"""A lookup finds the nearest nodes, around the dead; liars cost it a bounded number of calls."""

from __future__ import annotations

import hashlib
import os
import random
from typing import NamedTuple

import pytest

from nextgpu_node.p2p.lookup import MAX_ASKED, Lookup
from nextgpu_node.p2p.routing_table import Node, RoutingTable
from nextgpu_protocol.dht import distance


def node(number: int) -> Node:
    return Node(hashlib.sha256(b"node %d" % number).digest(), ("/ip4/192.0.2.1/tcp/1",), "", 0.0)


class Near(NamedTuple):
    key: bytes
    place: bytes


def nearer(number: int) -> Near:
    """The higher the number, the nearer to place zero."""
    return Near(number.to_bytes(32), (2**200 - number).to_bytes(32))


def network(size: int) -> dict[bytes, RoutingTable]:
    lots = random.Random(size)
    nodes = [node(number) for number in range(size)]
    tables = {}
    for one in nodes:
        table = RoutingTable(one.place)
        # Its neighbours, and some of the rest.
        for other in sorted(nodes, key=lambda n: distance(n.place, one.place))[:21]:
            table.answered(other)
        for other in lots.sample(nodes, min(size, 100)):
            table.answered(other)
        tables[one.key] = table
    return tables


def look_up(
    tables: dict[bytes, RoutingTable], target: bytes, dead: set[bytes]
) -> tuple[list[Node], int]:
    start = next(key for key in tables if key not in dead)
    lookup = Lookup(target, 8, start, tables[start].nearest(target, 20))
    while not lookup.is_done:
        asked = lookup.next()
        assert asked is not None
        if asked.key in dead:
            lookup.failed(asked.key)
        else:
            lookup.answered(asked.key, tables[asked.key].nearest(target, 20))
    return lookup.result(), lookup.asked


@pytest.mark.parametrize("dead_share", [0.0, 0.3])
def test_the_nearest_that_live_are_found(dead_share: float) -> None:
    tables = network(300)
    keys = list(tables)
    dead = set(keys[: int(dead_share * len(keys))])
    found_all = 0
    for _ in range(20):
        target = os.urandom(32)
        alive = [n for n in map(node, range(300)) if n.key not in dead]
        nearest = sorted(alive, key=lambda n: distance(n.place, target))
        found, asked = look_up(tables, target, dead)
        start = next(key for key in tables if key not in dead)
        wanted = [n.key for n in nearest if n.key != start][:8]
        # The nearest three have answered; of the rest, some may have died since they were named.
        living = [n.key for n in found if n.key not in dead]
        found_all += living[:3] == wanted[:3] and set(living) <= set(wanted)
        assert asked < 40
    assert found_all >= 19


def test_liars_that_invent_ever_nearer_nodes_are_asked_a_bounded_number_of_times() -> None:
    lookup = Lookup(bytes(32), 8, b"own", [nearer(number) for number in range(20)])
    invented = 20
    while (asked := lookup.next()) is not None:
        lookup.answered(asked.key, [nearer(invented + n) for n in range(20)])
        invented += 20
    assert lookup.asked == MAX_ASKED
    assert lookup.is_done


def test_a_node_is_asked_once_and_never_itself() -> None:
    own = node(0)
    lookup = Lookup(os.urandom(32), 8, own.key, [own, node(1), node(1)])
    first = lookup.next()
    assert first is not None
    assert first.key == node(1).key
    assert lookup.next() is None
    assert not lookup.is_done
    lookup.answered(first.key, [own, node(1)])
    assert lookup.is_done
    assert [n.key for n in lookup.result()] == [node(1).key]


def test_nobody_to_ask_is_the_end() -> None:
    lookup: Lookup[Node] = Lookup(os.urandom(32), 8, b"own", [])
    assert lookup.is_done
    assert lookup.result() == []


def test_a_node_that_names_only_the_dead_is_not_believed_for_long() -> None:
    liar, honest = nearer(50), nearer(10)
    lookup = Lookup(bytes(32), 8, b"own", [liar, honest])
    invented = [nearer(1000 + number) for number in range(20)]
    while (asked := lookup.next()) is not None:
        if asked == liar:
            lookup.answered(asked.key, invented)
        elif asked == honest:
            lookup.answered(asked.key, [nearer(20)])
        elif asked in invented:
            lookup.failed(asked.key)
        else:
            lookup.answered(asked.key, [])
    assert lookup.asked <= 2 + 4 + 1
    assert lookup.result() == [liar, nearer(20), honest]
