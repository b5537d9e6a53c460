"""Discovery in networks of 1,000, 10,000 and 100,000 nodes: a deterministic model, and its plots.

    scripts/simulate_discovery.py [--json] [--plots docs/plots]

The lookups are the node's own (`nextgpu_node.p2p.lookup`), over tables with full buckets of which a
part has died since they were checked; crowded places follow the rules of the record store.  Sizes
of messages are those of the real encoder.  What a call costs the processor was measured on loopback
(docs/network.md).  Same seed, same figures.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import json
import math
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from nacl.signing import SigningKey  # noqa: E402

from nextgpu_node.p2p.dht import ESTIMATE_S, HOLDERS, HOLDERS_ASKED, level_for  # noqa: E402
from nextgpu_node.p2p.lookup import Lookup  # noqa: E402
from nextgpu_node.p2p.record_store import SHELF_RECORDS  # noqa: E402
from nextgpu_protocol.dht import (  # noqa: E402
    Contact,
    Find,
    FindNode,
    Found,
    Nodes,
    Store,
    StoreItem,
    encode_dht,
)
from nextgpu_protocol.envelope import sign_message  # noqa: E402
from nextgpu_protocol.messages import Announcement  # noqa: E402

SIZES = (1_000, 10_000, 100_000)
LOOKUPS = 200
BITS = 64  # of a place, enough to tell 100,000 nodes apart
BUCKET = 20
KEYS = 4  # three ranges of memory and the node's own ID
OLD_KEYS = 10  # every bucket at or below one's own, and the ID: what was planned first
PERIOD_S = 600.0
LIFETIME_S = 1800.0
CALL_MS = 5.0  # processor time of one call on each side, measured; a new connection costs 5 more
RTT_S = 0.1
TIMEOUT_S = 5.0
# Half of the network's tables were checked within this time.
CHECKED_S = 600.0
# Each node looks for a peer so often.
SEARCH_S = 600.0
# BOINC ran 81 % of the time on the hosts of SETI@home, connected for 83 % of that (Anderson and
# Fedak, CCGrid 2006, 330,000 hosts).  With one break a day, a host is there for 16 hours at a time.
SESSION_S = 0.81 * 0.83 * 24 * 3600
# The hard case: machines that come for an hour.
SHORT_SESSION_S = 3600.0


class Peer(NamedTuple):
    key: bytes
    place: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Bytes:
    """Messages as the real encoder makes them."""

    find_node: int
    nodes: int
    store_one: int
    find: int
    record: int


def message_bytes() -> Bytes:
    key = bytes(range(32))
    addresses = ("/ip4/203.0.113.77/tcp/4650",)
    record = sign_message(
        Announcement(1, key, addresses, 10**12, 10**12 + 1000), SigningKey(key)
    ).data
    return Bytes(
        find_node=len(encode_dht(FindNode(key))),
        nodes=len(encode_dht(Nodes((Contact(key, addresses),) * BUCKET))),
        store_one=len(encode_dht(Store((StoreItem(0, record),)))),
        find=len(encode_dht(Find(key, 0, 0))),
        record=len(encode_dht(Found(0, (record,), more=False))),
    )


class World:
    """N nodes at random places; a node knows 20 of each part of the ring, chosen by lot."""

    def __init__(self, size: int, dead_share: float) -> None:
        self._lots = random.Random(size)
        self.places = sorted({self._lots.getrandbits(BITS) for _ in range(size)})
        self._dead_share = dead_share

    def is_dead(self, number: int) -> bool:
        """Of those in tables: it has left since it was checked last."""
        return random.Random(number ^ 0xDEAD).random() < self._dead_share

    def known_near(self, asked: int, target: int) -> list[int]:
        """The 20 nearest to `target` that `asked` knows: its bucket on that side of the ring."""
        own = self.places[asked]
        shared = BITS - (own ^ target).bit_length()
        if shared >= BITS:
            return [asked]
        width = BITS - shared - 1
        low = (target >> width) << width
        first, last = (
            bisect.bisect_left(self.places, low),
            bisect.bisect_left(self.places, low + (1 << width)),
        )
        found = range(first, last)
        if len(found) > BUCKET:
            return random.Random(asked * BITS + shared).sample(found, BUCKET)
        # All of that part, and neighbours of the asked one itself.
        near = range(max(0, asked - BUCKET), min(len(self.places), asked + BUCKET))
        return sorted({*found, *near}, key=lambda n: self.places[n] ^ target)[:BUCKET]

    def peer(self, number: int) -> Peer:
        place = self.places[number].to_bytes(BITS // 8)
        return Peer(number.to_bytes(8), place, number)

    def look_up(self) -> tuple[int, int, float]:
        """Calls, of these to the dead, and seconds of one lookup from anywhere to anywhere."""
        start, target = self._lots.randrange(len(self.places)), self._lots.getrandbits(BITS)
        seeds = [self.peer(n) for n in self.known_near(start, target)]
        lookup = Lookup(target.to_bytes(BITS // 8), HOLDERS, start.to_bytes(8), seeds)
        dead, rounds_s = 0, 0.0
        while not lookup.is_done:
            asked = [peer for _ in range(3) if (peer := lookup.next()) is not None]
            lost = [peer for peer in asked if self.is_dead(peer.number)]
            dead += len(lost)
            # A dead node's two other questions go on; what waits for it alone waits for long.
            rounds_s += RTT_S if len(lost) < len(asked) else TIMEOUT_S
            for peer in asked:
                if peer in lost:
                    lookup.failed(peer.key)
                else:
                    near = (self.peer(n) for n in self.known_near(peer.number, target))
                    lookup.answered(peer.key, near)
        return lookup.asked, dead, rounds_s


def lookups(size: int, dead_share: float) -> dict[str, float]:
    world = World(size, dead_share)
    seen = [world.look_up() for _ in range(LOOKUPS)]
    calls, dead, seconds = (list(column) for column in zip(*seen, strict=True))
    return {
        "calls_mean": round(statistics.mean(calls), 1),
        "calls_p95": sorted(calls)[int(0.95 * LOOKUPS)],
        "to_dead_mean": round(statistics.mean(dead), 2),
        "seconds_p50": round(statistics.median(seconds), 2),
        "seconds_p95": round(sorted(seconds)[int(0.95 * LOOKUPS)], 2),
    }


def crowded_place(providers: int, periods: int = 12) -> dict[str, float]:
    """A place of level 0 that everybody belongs to, through `periods` of ten minutes.

    In each, some providers leave and others come (SESSION_S); a newcomer asks once, the others as
    `Dht._is_due` says.
    """
    lots = random.Random(providers)
    ranks = [lots.random() for _ in range(providers)]
    heard = [0] * providers  # the rate that each one heard last
    held: dict[int, float] = {}
    sampling, offered = 0, [0] * periods
    for period in range(periods):
        for index in range(providers):
            if lots.random() < PERIOD_S / SESSION_S:
                ranks[index], heard[index] = lots.random(), 0
                held.pop(index, None)
            known = heard[index]
            if ranks[index] >= 2.0 ** -max(known - 1, 0) and lots.random() >= 2.0**-known:
                continue
            offered[period] += 1
            if ranks[index] < 2.0**-sampling:
                held[index] = ranks[index]
            while len(held) > SHELF_RECORDS:
                sampling += 1
                held = {i: lot for i, lot in held.items() if lot < 2.0**-sampling}
            heard[index] = sampling
        if len(held) < SHELF_RECORDS // 4 and sampling:
            sampling -= 1
    return {
        "records_held": len(held),
        "sampling": sampling,
        "estimate_of_true": round(len(held) * 2**sampling / providers, 2),
        "announcements_per_s_settled": round(statistics.mean(offered[-6:]) / PERIOD_S, 2),
        "announcements_per_s_if_all_came": round(providers / PERIOD_S, 2),
    }


def figures(size: int, sizes: Bytes, dead_share: float) -> dict[str, Any]:
    found = lookups(size, dead_share)
    calls = found["calls_mean"]
    lookup_bytes = calls * (sizes.find_node + sizes.nodes)
    announce_bytes = lookup_bytes + HOLDERS * (sizes.store_one + 20)
    root = crowded_place(size)
    level = level_for(size)
    in_shard = size / 16**level
    search_bytes = lookup_bytes + HOLDERS_ASKED * (
        sizes.find + min(in_shard, SHELF_RECORDS) * sizes.record
    )
    # A search asks level 0, at 4 of its holders, once an hour; the shards spread the rest.
    each_search = size / SEARCH_S * HOLDERS_ASKED / HOLDERS
    root_searches = size / max(SEARCH_S, ESTIMATE_S) * HOLDERS_ASKED / HOLDERS
    root_calls = root_searches + root["announcements_per_s_settled"]
    all_calls = each_search + root["announcements_per_s_if_all_came"]
    return {
        "nodes": size,
        "lookup": found,
        "bytes_of_a_lookup": round(lookup_bytes),
        "bytes_of_a_search": round(search_bytes),
        "announce_bytes_per_s_per_node": round(KEYS * announce_bytes / PERIOD_S, 1),
        "announce_bytes_per_s_per_node_with_ten_keys": round(
            OLD_KEYS * announce_bytes / PERIOD_S, 1
        ),
        "announce_cpu_share_per_node": round(
            KEYS * (calls + HOLDERS) * CALL_MS / 1000 / PERIOD_S, 5
        ),
        "hottest_key": root
        | {
            "level_read": level,
            "providers_in_a_shard": round(in_shard, 1),
            "calls_per_s_at_a_holder": round(root_calls, 2),
            "cpu_share_of_a_holder": round(root_calls * CALL_MS / 1000, 4),
            "calls_per_s_if_every_search_asked_level_0": round(
                each_search + root["announcements_per_s_settled"], 2
            ),
            "calls_per_s_if_all_came": round(all_calls, 2),
            "records_if_all_were_held": size,
            "providers_that_stock_libp2p_finds": min(size, 31),
        },
        "new_one_found_after_s": round(2 * found["seconds_p50"] + RTT_S, 2),
        "dead_one_gone_from_the_dht_after_s": {
            "mean": LIFETIME_S - PERIOD_S / 2,
            "most": LIFETIME_S,
            "shown_to_users": "never: its capacity is fetched first",
        },
    }


def simulate() -> dict[str, Any]:
    dead_share = 1 - math.exp(-CHECKED_S / SESSION_S)
    sizes = message_bytes()
    hard = 1 - math.exp(-CHECKED_S / SHORT_SESSION_S)
    return {
        "message_bytes": {name: getattr(sizes, name) for name in Bytes.__slots__},
        "dead_share_in_tables": round(dead_share, 4),
        "sizes": [figures(size, sizes, dead_share) for size in SIZES],
        "with_sessions_of_an_hour": {
            "dead_share_in_tables": round(hard, 3),
            "lookup": {str(size): lookups(size, hard) for size in SIZES},
        },
        "digest": "",
    }


# Plots: a line or two over the number of nodes, both axes in powers of ten.


def plot(title: str, unit: str, lines: dict[str, list[float]]) -> str:
    """A small SVG.  Values of 0 are drawn at the lower edge."""
    width, height, left, top = 460, 250, 64, 34
    values = [v for line in lines.values() for v in line if v > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(index: int) -> float:
        return left + index * (width - left - 20) / (len(SIZES) - 1)

    def y(value: float) -> float:
        part = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return height - 40 - part * (height - 40 - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="16" font-size="13">{title}</text>',
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts += [
            f'<path d="M{left} {at:.1f}H{width - 20}" stroke="#ddd"/>',
            f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>',
        ]
    for index, size in enumerate(SIZES):
        parts.append(
            f'<text x="{x(index):.1f}" y="{height - 22}" text-anchor="middle">{size:,}</text>'
        )
    parts.append(f'<text x="{left}" y="{height - 6}">nodes; {unit}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = ("#1667a8", "#c2410c", "#4d7c0f")[number]
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(line))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(
            f'<text x="{left + 8}" y="{top + 4 + 14 * number}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def plots(result: dict[str, Any]) -> dict[str, str]:
    sizes = result["sizes"]
    hot = [one["hottest_key"] for one in sizes]
    return {
        "lookup-calls.svg": plot(
            "Calls of one lookup",
            "calls",
            {
                "mean": [one["lookup"]["calls_mean"] for one in sizes],
                "p95": [one["lookup"]["calls_p95"] for one in sizes],
                "p95, sessions of an hour": [
                    result["with_sessions_of_an_hour"]["lookup"][str(size)]["calls_p95"]
                    for size in SIZES
                ],
            },
        ),
        "announce-traffic.svg": plot(
            "Announcing, each node",
            "bytes a second",
            {
                "four keys, as it is": [one["announce_bytes_per_s_per_node"] for one in sizes],
                "ten keys, as first planned": [
                    one["announce_bytes_per_s_per_node_with_ten_keys"] for one in sizes
                ],
            },
        ),
        "hottest-key.svg": plot(
            "Calls at a holder of the hottest key",
            "a second, each node searching every ten minutes",
            {
                "sampled, shards, level 0 once an hour": [
                    one["calls_per_s_at_a_holder"] for one in hot
                ],
                "level 0 at each search": [
                    one["calls_per_s_if_every_search_asked_level_0"] for one in hot
                ],
                "everybody at one place": [one["calls_per_s_if_all_came"] for one in hot],
            },
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plots", type=Path)
    arguments = parser.parse_args()
    result = simulate()
    result["digest"] = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for name, text in plots(result).items():
            (arguments.plots / name).write_text(text, encoding="utf-8")
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
