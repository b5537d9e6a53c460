"""`scripts/bench discovery`: 100 real nodes on loopback, found by need.

    a few processes of many nodes each ── DHT ── one seeker, which asks as `nextgpu peers` does

Every node serves the DHT and a signed capacity; half of them have 24 GB or more.  The seeker looks
for those: how long it takes, how many of them it finds; then again with 30 % of the nodes killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import structlog
import trio

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from nacl.signing import SigningKey  # noqa: E402

from nextgpu_node import logs  # noqa: E402
from nextgpu_node.api_types import PeerNeed  # noqa: E402
from nextgpu_node.clock import now_ms  # noqa: E402
from nextgpu_node.daemon.peers import (  # noqa: E402
    CAPACITY_PROTOCOL,
    PeerFinder,
    announce_forever,
    serve_capacity,
)
from nextgpu_node.p2p.network import Network  # noqa: E402
from nextgpu_node.p2p.settings import P2PSettings  # noqa: E402
from nextgpu_node.p2p.streams import PeerStream  # noqa: E402
from nextgpu_protocol.capability import keys_for_capacity  # noqa: E402
from nextgpu_protocol.envelope import sign_message  # noqa: E402
from nextgpu_protocol.limits import GIB  # noqa: E402
from nextgpu_protocol.messages import Capacity, DeviceInfo  # noqa: E402

log = structlog.get_logger()

NODES = 100
PROCESSES = 5
QUERIES = 60
SIZES_GIB = (8, 12, 16, 24, 40, 80)
NEED_GIB = 24
SETTLE_S = 25
ECHO = "/bench/echo/1"


def settings(seed: bytes, bootstrap: tuple[str, ...]) -> P2PSettings:
    return P2PSettings(
        key_seed=seed,
        listen_addrs=("/ip4/127.0.0.1/tcp/0",),
        bootstrap=bootstrap,
        max_connections_per_ip=1000,
    )


def capacity(key: SigningKey, memory_gib: int) -> bytes:
    """What a provider with one such card says of itself now."""
    device = DeviceInfo("cuda", "NVIDIA Example", memory_gib * GIB, memory_gib * GIB, "8.9")
    message = Capacity(
        suites=(1,),
        devices=(device,),
        free_slots=1,
        memory_bytes=GIB,
        max_seconds=600,
        input_bytes=GIB,
        output_bytes=GIB,
        runtime="torch 2.13.0",
        table_version=1,
        isolation=("seccomp",),
        sharing=True,
        reason="",
        issued_at_ms=now_ms(),
        expires_at_ms=now_ms() + 60_000,
    )
    return sign_message(message, key).data


async def echo(stream: PeerStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def serve_one(
    number: int, bootstrap: tuple[str, ...], nursery: trio.Nursery
) -> tuple[str, Network]:
    """One provider; its address and its network."""
    seed = random.Random(number).randbytes(32)
    key, memory_gib = SigningKey(seed), SIZES_GIB[number % len(SIZES_GIB)]

    async def tell(stream: PeerStream) -> None:
        await serve_capacity(stream, lambda: capacity(key, memory_gib))
        await stream.aclose()

    network = Network(settings(seed, bootstrap), {CAPACITY_PROTOCOL: tell, ECHO: echo})
    addresses: list[str] = await nursery.start(network.run)
    keys = keys_for_capacity("cuda", memory_gib * GIB)
    nursery.start_soon(announce_forever, network, lambda: keys)
    return addresses[0], network


async def serve_many(first: int, count: int, bootstrap: tuple[str, ...]) -> None:
    """Nodes `first` and on in this process; prints the first one's address, and "ready" when the
    network holds all announcements."""
    async with trio.open_nursery() as nursery:
        networks = []
        for number in range(first, first + count):
            address, network = await serve_one(number, bootstrap, nursery)
            networks.append(network)
            if number == first:
                print(address, flush=True)
                bootstrap = bootstrap or (address,)
        while not all(network.is_announced for network in networks):  # noqa: ASYNC110
            await trio.sleep(0.5)
        print("ready", flush=True)


class Farm:
    """The processes with the nodes."""

    def __init__(self, nodes: int, processes: int) -> None:
        self.share = nodes // processes
        self.processes: list[subprocess.Popen[str]] = []
        bootstrap: tuple[str, ...] = ()
        for index in range(processes):
            process = self._start(index, bootstrap)
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            bootstrap = bootstrap or (address,)
        self.bootstrap = bootstrap
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"

    def _start(self, index: int, bootstrap: tuple[str, ...]) -> subprocess.Popen[str]:
        arguments = ["--serve", str(self.share), "--first", str(index * self.share)]
        for address in bootstrap:
            arguments += ["--bootstrap", address]
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        return process

    def fitting(self, processes: list[int]) -> int:
        """How many nodes of these processes fill the need."""
        numbers = [
            n for index in processes for n in range(index * self.share, (index + 1) * self.share)
        ]
        return sum(SIZES_GIB[number % len(SIZES_GIB)] >= NEED_GIB for number in numbers)

    def kill(self, indices: list[int]) -> None:
        for index in indices:
            self.processes[index].send_signal(signal.SIGKILL)
            self.processes[index].wait()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


async def ask(finder: PeerFinder, queries: int, exist: int, dead: set[str]) -> dict[str, Any]:
    """Time and completeness of `queries` searches."""
    need = PeerNeed(kind="cuda", memory_bytes=NEED_GIB * GIB, limit=200)
    times, shares, shown_dead = [], [], 0
    for _ in range(queries):
        began_s = time.perf_counter()
        reply = await finder.find(need)
        times.append(time.perf_counter() - began_s)
        shares.append(len(reply.peers) / exist)
        shown_dead += sum(peer.peer_id in dead for peer in reply.peers)
    times_ms = sorted(1000 * t for t in times)
    return {
        "first_ms": round(1000 * times[0]),
        "p50_ms": round(statistics.median(times_ms)),
        "p95_ms": round(times_ms[int(0.95 * (len(times_ms) - 1))]),
        "found_of_existing_mean": round(statistics.mean(shares), 4),
        "found_of_existing_least": round(min(shares), 4),
        "exist": exist,
        "dead_ones_shown": shown_dead,
    }


async def echo_ms(network: Network, peer_id: str) -> float:
    """A new stream and one round trip on it: what a single question costs in this run."""
    times = []
    for _ in range(50):
        began_s = time.perf_counter()
        stream = await network.open_stream(peer_id, ECHO)
        await stream.send_all(b"x")
        await stream.receive_some()
        times.append(time.perf_counter() - began_s)
        await stream.aclose()
    return round(1000 * statistics.median(times), 2)


async def measure(farm: Farm) -> dict[str, Any]:
    seeker = Network(settings(os.urandom(32), farm.bootstrap), {})
    everyone = list(range(len(farm.processes)))
    async with trio.open_nursery() as nursery:
        await nursery.start(seeker.run)
        await trio.sleep(SETTLE_S)
        finder = PeerFinder(seeker)
        fresh = await ask(finder, QUERIES, farm.fitting(everyone), set())
        one_echo_ms = await echo_ms(seeker, farm.bootstrap[0].rpartition("/")[2])
        # Not the first: its first node is the bootstrap, whose loss is another matter.
        gone = everyone[-max(1, round(0.3 * len(everyone))) :]
        dead = {peer_ids(farm, index) for index in gone}
        farm.kill(gone)
        alive = [index for index in everyone if index not in gone]
        after = await ask(finder, QUERIES // 3, farm.fitting(alive), set().union(*dead))
        nursery.cancel_scope.cancel()
    return {
        "nodes": farm.share * len(farm.processes),
        "new_stream_and_echo_ms": one_echo_ms,
        "all_alive": fresh | {"p50_in_echoes": round(fresh["p50_ms"] / one_echo_ms, 1)},
        "killed": {"share": round(len(gone) / len(everyone), 2)} | after,
    }


def peer_ids(farm: Farm, index: int) -> frozenset[str]:
    numbers = range(index * farm.share, (index + 1) * farm.share)
    return frozenset(
        Network(settings(random.Random(number).randbytes(32), ()), {}).peer_id for number in numbers
    )


def discovery(nodes: int = NODES, processes: int = PROCESSES) -> dict[str, Any]:
    farm = Farm(nodes, processes)
    try:
        return trio.run(measure, farm)
    finally:
        farm.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--bootstrap", action="append", default=[])
    arguments = parser.parse_args()
    logs.configure("error", "json", sys.stderr)
    if arguments.serve:
        trio.run(serve_many, arguments.first, arguments.serve, tuple(arguments.bootstrap))
    else:
        print(discovery())


if __name__ == "__main__":
    main()
