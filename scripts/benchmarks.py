"""The benchmarks behind scripts/bench.

    roundtrip   a no-op program: a fresh unit, and a call inside an open one
    transfer    64 and 512 MiB out and back, beside plain TCP and the sealing primitive
    sealing     256 MiB sealed end to end, as a fraction of its parts, and who spends what
    idle        a daemon at rest: memory, processor time, and that torch is not loaded
    demo        the phases of scripts/demo
    protocol    messages each second, the handshake to the first sealed byte
    programs    steps of five models beside eager torch in the same process
    sandbox     workers: birth, memory, wipe, and the daemon under bombs (bench_sandbox.py)
    lending     from the owner's pause to the end of the worker (bench_lending.py)
    discovery   100 nodes found by need (bench_discovery.py)
    submit      an Executor beside Dask with TLS and Ray (bench_submit.py)

Every figure of one run is taken on the same machine in the same minutes: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import trio

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from nextgpu_node.graph.artifact import Program  # noqa: E402
from nextgpu_node.graph.export import export  # noqa: E402
from nextgpu_node.sdk.client import Client, open_client  # noqa: E402
from nextgpu_node.sdk.events import ReceiptVerified, Started, StepResult, UnitEvent  # noqa: E402
from nextgpu_node.sdk.unit import Needs, RemoteUnit, open_unit  # noqa: E402
from nextgpu_protocol.codec import decode_message_untrusted, encode_message  # noqa: E402
from nextgpu_protocol.envelope import open_envelope_untrusted, sign_message  # noqa: E402
from nextgpu_protocol.limits import (  # noqa: E402
    CHUNK_OVERHEAD_BYTES,
    CHUNK_PLAINTEXT_BYTES,
    MIB,
)
from nextgpu_protocol.sealing import CiphertextHash, KeyPair, Opener, Sealer  # noqa: E402
from tests.support.nodes import Trio, network_of_three, swarm  # noqa: E402

NAMES = (
    "roundtrip",
    "transfer",
    "sealing",
    "idle",
    "demo",
    "submit",
    "discovery",
    "sandbox",
    "programs",
    "protocol",
    "lending",
)
FRESH_UNITS = 40
CALLS = 1000
IDLE_S = 30
SETTLE_S = 70
SETTINGS = {
    "sharing.max_memory": "4 GiB",
    "sharing.max_input": "4 GiB",
    "sharing.max_output": "4 GiB",
    "sharing.max_unit_seconds": "600",
    "sharing.warm_workers": "2",
    # One unit begins while the one before it is still being wiped.
    "sharing.max_concurrent_units": "2",
    "log.level": "warning",
}


class NoOp(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0


class First(torch.nn.Module):
    """Much in, little out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1] + 0


class Grow(torch.nn.Module):
    """Little in, much out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(self.size)


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return {"p50_ms": round(statistics.median(ordered) * 1e3, 2), "p99_ms": round(p99 * 1e3, 2)}


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    began_s = time.perf_counter()
    yield
    into.append(time.perf_counter() - began_s)


# --- roundtrip --------------------------------------------------------------------------------


async def roundtrip(nodes: Trio) -> dict[str, Any]:
    x = torch.ones(16)
    program = export(NoOp(), (x,))
    step = {program.spec.xs[0].name: x}
    async with open_client(nodes.submitter.paths) as client:
        fresh = await fresh_units(nodes, client, program, step)
        calls, throughput = await open_unit_calls(client, program, step)
    return {
        **{name: milliseconds(seconds) for name, seconds in fresh.items()},
        "call_in_open_unit": milliseconds(calls),
        "calls_per_second_pipelined": round(throughput),
        "samples": {"fresh": FRESH_UNITS, "calls": CALLS},
    }


async def fresh_units(
    nodes: Trio, client: Client, program: Program, step: dict[str, torch.Tensor]
) -> dict[str, list[float]]:
    """Discovery by itself; then, the peer known, from the wish for a unit to its offer being
    taken up, to the program being loaded, to the result, to the receipt."""
    marks = ("negotiated", "started", "first_result", "receipt")
    seconds: dict[str, list[float]] = {"find_peer": [], **{f"fresh_unit_{m}": [] for m in marks}}
    for _ in range(FRESH_UNITS):
        await trio.sleep(0.3)  # a warm worker is what is measured: let the pool fill up
        with timed(seconds["find_peer"]):
            (peer,) = await client.find_peers(Needs())
        began_s = time.perf_counter()

        def mark(name: str, began_s: float = began_s) -> None:
            seconds[f"fresh_unit_{name}"].append(time.perf_counter() - began_s)

        socket = nodes.submitter.paths.units_socket
        async with open_unit(socket, peer, Needs(), table_version=1) as unit:
            mark("negotiated")
            await unit.start(program)
            await unit.send_step(step)
            await unit.close_input()
            events = unit.events()
            for name, kind in zip(marks[1:], (Started, StepResult, ReceiptVerified), strict=True):
                await wait_for(events, kind)
                mark(name)
    return seconds


async def open_unit_calls(
    client: Client, program: Program, step: dict[str, torch.Tensor]
) -> tuple[list[float], float]:
    """One call after the other, then as many as the stream takes."""
    calls: list[float] = []
    async with opened(client, program) as (unit, events):
        await wait_for(events, Started)
        for _ in range(CALLS):
            with timed(calls):
                await unit.send_step(step)
                await wait_for(events, StepResult)
        began_s = time.perf_counter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_many, unit, step)
            for _ in range(CALLS):
                await wait_for(events, StepResult)
        throughput = CALLS / (time.perf_counter() - began_s)
    return calls, throughput


async def send_many(unit: RemoteUnit, step: dict[str, torch.Tensor]) -> None:
    for _ in range(CALLS):
        await unit.send_step(step)


@asynccontextmanager
async def opened(
    client: Client, program: Program
) -> AsyncIterator[tuple[RemoteUnit, AsyncIterator[UnitEvent]]]:
    async with client.open_unit(program, Needs()) as (_, unit):
        await unit.start(program)
        events = unit.events()
        yield unit, events
        await unit.close_input()
        await wait_for(events, ReceiptVerified)


async def wait_for(events: AsyncIterator[UnitEvent], kind: type[UnitEvent]) -> None:
    async for event in events:
        if isinstance(event, kind):
            return


# --- transfer ---------------------------------------------------------------------------------


async def transfer(nodes: Trio) -> dict[str, Any]:
    report: dict[str, Any] = {}
    async with open_client(nodes.submitter.paths) as client:
        for mib in (64, 512):
            size = mib * MIB
            out = await best_of(3, lambda size=size: one_transfer(client, First(), size))
            back = await best_of(3, lambda size=size: one_transfer(client, Grow(size), 1))
            report[f"{mib}_mib"] = {
                "out_mb_s": round(size / out / 1e6),
                "back_mb_s": round(size / back / 1e6),
                "plain_tcp_mb_s": round(size / await best_of(3, lambda s=size: tcp(s)) / 1e6),
                "sealing_primitive_mb_s": round(size / sealing(size) / 1e6),
            }
    return report


async def best_of(times: int, measure: Callable[[], Awaitable[float]]) -> float:
    return min([await measure() for _ in range(times)])


async def one_transfer(client: Client, module: torch.nn.Module, size: int) -> float:
    """Seconds from the first byte of a step to the last byte of its result, in an open unit."""
    x = torch.ones(size, dtype=torch.uint8)
    program = export(module, (x,))
    step = {program.spec.xs[0].name: x}
    async with opened(client, program) as (unit, events):
        await wait_for(events, Started)
        began_s = time.perf_counter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(unit.send_step, step)
            await wait_for(events, StepResult)
        return time.perf_counter() - began_s


async def tcp(size: int) -> float:
    """The same bytes through one trio TCP connection between two tasks, in 256 KiB writes."""
    data = bytes(CHUNK_PLAINTEXT_BYTES)
    done = trio.Event()

    async def sink(stream: trio.SocketStream) -> None:
        received = 0
        while received < size:
            received += len(await stream.receive_some(CHUNK_PLAINTEXT_BYTES))
        done.set()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, sink, [listener])
        port = listener.socket.getsockname()[1]
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            began_s = time.perf_counter()
            for _ in range(size // len(data)):
                await stream.send_all(data)
            await done.wait()
            seconds = time.perf_counter() - began_s
        nursery.cancel_scope.cancel()
    return seconds


def sealing(size: int) -> float:
    """Seal and open the same bytes in this process, one after the other."""
    submitter, worker, transcript = KeyPair(bytes(32)), KeyPair(bytes([1]) * 32), bytes(32)
    sealer = Sealer(submitter.submitter_keys(worker.public, transcript).inbound)
    opener = Opener(worker.worker_keys_untrusted(submitter.public, transcript).inbound)
    opener.open_untrusted(sealer.preamble)
    chunk = bytes(CHUNK_PLAINTEXT_BYTES)
    began_s = time.perf_counter()
    for _ in range(size // len(chunk)):
        opener.open_untrusted(sealer.seal(chunk))
    return time.perf_counter() - began_s


# --- sealing ----------------------------------------------------------------------------------

SEALED_MIB = 256


async def sealing_figures(nodes: Trio) -> dict[str, Any]:
    """Sealed streaming end to end as a fraction of what its parts do alone, and where it goes.

    The rate counts from the first byte of a step in the submitter's process to its result.  The
    processor seconds tell more than the rate where other work shares the cores: `fraction_of_cpu`
    is the primitive's share of all that was spent.
    """
    size = SEALED_MIB * MIB
    x = torch.ones(size, dtype=torch.uint8)
    report: dict[str, Any] = {"mib": SEALED_MIB}
    async with open_client(nodes.submitter.paths) as client:
        ways = {"out": (First(), x), "back": (Grow(size), x[:1])}
        for way, (module, given) in ways.items():
            runs = [await one_sealed(nodes, client, module, given) for _ in range(3)]
            seconds, spent = min(runs, key=lambda run: run[0])
            report[way] = {"mb_s": round(size / seconds / 1e6), "cpu_s": spent}
        report["first_byte_ms"] = await first_byte(nodes, client)
    tcp_s = await best_of(3, lambda: tcp(size))
    alone = [(sealing(size), sealing_cpu(size)) for _ in range(3)]
    sealing_s, sealing_cpu_s = map(min, zip(*alone, strict=True))
    report["plain_tcp_mb_s"] = round(size / tcp_s / 1e6)
    report["secretstream_mb_s"] = round(size / sealing_s / 1e6)
    report["secretstream_cpu_s"] = round(sealing_cpu_s, 2)
    slower = max(tcp_s, sealing_s)
    for way in ("out", "back"):
        figures = report[way]
        figures["fraction_of_slower"] = round(figures["mb_s"] * 1e6 / size * slower, 3)
        spent = sum(figures["cpu_s"].values())
        figures["cpu_s_total"] = round(spent, 2)
        figures["fraction_of_cpu"] = round(sealing_cpu_s / spent, 3)
        # What two cores could do if nothing else ran: the bound that the processor sets.
        figures["mb_s_by_cpu"] = round(size / 1e6 / spent * (os.cpu_count() or 1))
    report["codec"] = codec_figures()
    report["sha256_mb_s"] = round(size / sha256(size) / 1e6)
    return report


async def one_sealed(
    nodes: Trio, client: Client, module: torch.nn.Module, given: torch.Tensor
) -> tuple[float, dict[str, float]]:
    """Seconds, and processor seconds of each of the four processes."""
    program = export(module, (given,))
    step = {program.spec.xs[0].name: given}
    await nodes.wait_idle()
    async with opened(client, program) as (unit, events):
        await wait_for(events, Started)
        pids = {"process": os.getpid(), "submitter": nodes.submitter.pid}
        pids["provider"] = nodes.provider.pid
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        workers = {pid: cpu_s(pid) for pid in nodes.worker_pids()}
        began_s = time.perf_counter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(unit.send_step, step)
            await wait_for(events, StepResult)
        seconds = time.perf_counter() - began_s
        spent = {name: round(cpu_s(pid) - before[name], 2) for name, pid in pids.items()}
        busiest = max(cpu_s(pid) - was for pid, was in workers.items() if psutil.pid_exists(pid))
        return seconds, {**spent, "worker": round(busiest, 2)}


async def first_byte(nodes: Trio, client: Client) -> dict[str, float]:
    """From the wish for a unit to the worker's first sealed word, the program loaded."""
    x = torch.ones(16)
    program = export(NoOp(), (x,))
    (peer,) = await client.find_peers(Needs())
    seconds: list[float] = []
    for _ in range(20):
        await nodes.wait_idle()
        await trio.sleep(0.3)
        with timed(seconds):
            socket = nodes.submitter.paths.units_socket
            async with open_unit(socket, peer, Needs(), table_version=1) as unit:
                await unit.start(program)
                await wait_for(unit.events(), Started)
    return milliseconds(seconds)


def sealing_cpu(size: int) -> float:
    """Processor seconds of `sealing`."""
    began_s = time.process_time()
    sealing(size)
    return time.process_time() - began_s


def sha256(size: int) -> float:
    """The hash of a receipt over `size` bytes, alone."""
    digest, body = CiphertextHash(), bytes(CHUNK_PLAINTEXT_BYTES + CHUNK_OVERHEAD_BYTES)
    began_s = time.perf_counter()
    for _ in range(size // CHUNK_PLAINTEXT_BYTES):
        digest.update(body)
    return time.perf_counter() - began_s


def codec_figures() -> dict[str, int]:
    """Signed messages a second: an offer encoded and signed; verified, decoded, compared."""
    from tests.protocol.samples import OFFER, PROVIDER

    count = 5000
    began_s = time.perf_counter()
    for _ in range(count):
        signed = sign_message(OFFER, PROVIDER)
    signed_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    for _ in range(count):
        open_envelope_untrusted(type(OFFER), signed.data)
    opened_s = time.perf_counter() - began_s
    payload = encode_message(OFFER)
    began_s = time.perf_counter()
    for _ in range(count):
        decode_message_untrusted(type(OFFER), payload)
    decoded_s = time.perf_counter() - began_s
    return {
        "sign_per_s": round(count / signed_s),
        "open_per_s": round(count / opened_s),
        "decode_per_s": round(count / decoded_s),
    }


# --- idle -------------------------------------------------------------------------------------


async def idle(nodes: Trio) -> dict[str, Any]:
    """After the first minute, in which a node meets its network and announces itself often."""
    watched = {"submitter": nodes.submitter.pid, "provider": nodes.provider.pid}
    (launcher,) = psutil.Process(nodes.provider.pid).children()
    workers = launcher.children(recursive=True)
    await trio.sleep(SETTLE_S)
    before = {name: cpu_s(pid) for name, pid in watched.items()}
    await trio.sleep(IDLE_S)
    report: dict[str, Any] = {
        name: {
            "rss_mb": megabytes(pid, "rss"),
            "pss_mb": megabytes(pid, "pss"),
            "cpu_percent": round(100 * (cpu_s(pid) - before[name]) / IDLE_S, 3),
            "torch_loaded": has_torch(pid),
        }
        for name, pid in watched.items()
    }
    report["launcher_pss_mb"] = megabytes(launcher.pid, "pss")
    report["warm_worker_pss_mb"] = [megabytes(worker.pid, "pss") for worker in workers]
    return report


def megabytes(pid: int, kind: str) -> float:
    return round(getattr(psutil.Process(pid).memory_full_info(), kind) / 1e6, 1)


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


# --- demo -------------------------------------------------------------------------------------


def demo() -> dict[str, Any]:
    """`scripts/demo --json`, twice: the second run finds everything installed and cached."""
    runs = []
    for _ in range(2):
        began_s = time.monotonic()
        done = subprocess.run(
            [str(PROJECT / "scripts" / "demo"), "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        report = json.loads(done.stdout.splitlines()[-1])
        runs.append({"wall": round(time.monotonic() - began_s, 1), **report["seconds"]})
    return {"first": runs[0], "second": runs[1]}


def sandbox() -> dict[str, Any]:
    """The launcher by itself, then a daemon while five units do their worst."""
    from scripts import bench_sandbox as bench

    figures = trio.run(bench.measure, milliseconds)
    with swarm(1, bench.BOMB_SETTINGS, allow_python=True) as nodes:
        figures["status"] = trio.run(bench.status_of_provider, nodes, milliseconds)
    return figures


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": found[1] if found else platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.name == "demo":
        figures = demo()
    elif arguments.name == "programs":
        from scripts.bench_programs import programs

        figures = programs()
    elif arguments.name == "protocol":
        from scripts.bench_protocol import protocol

        figures = protocol(SETTINGS)
    elif arguments.name == "lending":
        from scripts.bench_lending import lending

        figures = lending(SETTINGS)
    elif arguments.name == "discovery":
        from scripts.bench_discovery import discovery

        figures = discovery()
    elif arguments.name == "submit":
        from scripts.bench_submit import submit

        figures = submit()
    elif arguments.name == "sandbox":
        figures = sandbox()
    else:
        measure = {
            "roundtrip": roundtrip,
            "transfer": transfer,
            "sealing": sealing_figures,
            "idle": idle,
        }[arguments.name]
        with network_of_three(SETTINGS) as nodes:
            figures = trio.run(measure, nodes)
    report = {"schema": 1, "benchmark": arguments.name, "machine": machine(), "figures": figures}
    print(json.dumps(report, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
