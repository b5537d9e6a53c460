"""The benchmark of the sandbox, for scripts/benchmarks.py: how fast, how small, how steady.

Launcher and workers as the daemon has them, the real worker module, beside what one would use
instead: a fresh interpreter, bubblewrap alone, a process pool's fork server.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import trio

from nextgpu_node.config import SharingConfig
from nextgpu_node.sandbox.launcher import Launcher
from nextgpu_node.sandbox.policy import MIB, WorkerPolicy
from nextgpu_node.sandbox.probe import probe
from nextgpu_node.sdk.api_client import ApiClient
from scripts.hello import say_hello
from tests.support.bombs import POLL_S, status_under_bombs, time_status
from tests.support.nodes import Swarm

BIRTHS = 150
UNITS_S = 10.0
AT_ONCE = 2
HELLO_S = 120.0
IDLE_COUNTS = (1, 2, 4, 8)
POLICY = WorkerPolicy(memory_bytes=SharingConfig().max_memory_bytes, max_threads=1)
SMALL = dataclasses.replace(POLICY, memory_bytes=512 * MIB)


async def measure(milliseconds: Callable[[list[float]], dict[str, float]]) -> dict[str, Any]:
    """All figures; `milliseconds` is how a list of seconds is summed up."""
    report: dict[str, Any] = {"tier": probe().tier}
    with tempfile.TemporaryDirectory(prefix="nextgpu-bench-") as work:
        began_s = time.perf_counter()
        async with running(Launcher(runtime_dir=Path(work))) as launcher:
            first = await launcher.spawn(SMALL)
            report["cold_start_ms"] = round((time.perf_counter() - began_s) * 1e3)
            await first.finish()
            births, wipes = await births_and_wipes(launcher)
            report["decision_to_worker_with_key"] = milliseconds(births)
            report["wipe"] = milliseconds(wipes)
            report["single_use_units_per_second"] = await units_per_second(launcher)
            report["cpu_ms_per_unit"] = await cpu_per_unit(launcher)
            report["idle_workers"] = await idle_memory(launcher)
            report["launcher_image_mb"] = image_mb(launcher.zygote_pid)
    report["beside"] = {
        "python_import_torch_ms": program([sys.executable, "-c", "import torch"], 5),
        "bubblewrap_true_ms": bubblewrap(["true"], 30),
        "bubblewrap_python_import_torch_ms": bubblewrap([sys.executable, "-c", "import torch"], 3),
        "fork_server_process": fork_server(milliseconds),
    }
    return report


class running:  # noqa: N801  reads as a function
    """A launcher in a nursery of its own."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._manager = trio.open_nursery()

    async def __aenter__(self) -> Launcher:
        self._nursery = await self._manager.__aenter__()
        await self._nursery.start(self._launcher.run)
        return self._launcher

    async def __aexit__(self, *error: Any) -> None:
        self._nursery.cancel_scope.cancel()
        await self._manager.__aexit__(*error)


async def births_and_wipes(launcher: Launcher) -> tuple[list[float], list[float]]:
    """One after the other: from the daemon's decision to HELLO with the key; kill to verified."""
    births: list[float] = []
    wipes: list[float] = []
    for _ in range(BIRTHS):
        with clock(births):
            worker = await launcher.spawn(SMALL)
        with clock(wipes):
            await worker.finish()
    return births, wipes


async def units_per_second(launcher: Launcher) -> float:
    """Workers that are born, say hello, are killed and verified to be gone, two at a time."""
    count = 0
    began_s = time.perf_counter()

    async def one_after_the_other() -> None:
        nonlocal count
        while time.perf_counter() - began_s < UNITS_S:
            worker = await launcher.spawn(SMALL)
            await worker.finish()
            count += 1

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(one_after_the_other)
    return round(count / (time.perf_counter() - began_s), 1)


async def cpu_per_unit(launcher: Launcher) -> float:
    """Processor time of launcher and worker for one birth and death: steadier than wall time on a
    busy machine."""
    assert launcher.zygote_pid is not None
    process = psutil.Process(launcher.zygote_pid)
    before = sum(process.cpu_times()[:4])
    for _ in range(50):
        await (await launcher.spawn(SMALL)).finish()
    return round((sum(process.cpu_times()[:4]) - before) / 50 * 1e3, 1)


async def idle_memory(launcher: Launcher) -> list[dict[str, float]]:
    """Of the last worker born, with so many alive: what is shared is divided among them."""
    rows, workers = [], []
    for count in IDLE_COUNTS:
        while len(workers) < count:
            workers.append(await launcher.spawn(POLICY))
        found = rollup(workers[-1].pid)
        rows.append(
            {
                "workers": count,
                "pss_mb": round(found["Pss"], 1),
                "private_mb": round(found["Private_Dirty"] + found["Private_Clean"], 1),
                "rss_mb": round(found["Rss"], 1),
            }
        )
    for worker in workers:
        await worker.finish()
    return rows


def rollup(pid: int) -> dict[str, float]:
    """Megabytes by kind (proc_pid_smaps(5))."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {row.split(":")[0]: int(row.split()[1]) * 1024 / 1e6 for row in rows}


def image_mb(pid: int | None) -> float:
    """What the launcher holds once for all workers (sandbox/image.py)."""
    sizes = 0
    for row in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "nextgpu-image" in row:
            start, end = row.split()[0].split("-")
            sizes += int(end, 16) - int(start, 16)
    return round(sizes / 1e6, 1)


@contextmanager
def clock(into: list[float]) -> Iterator[None]:
    began_s = time.perf_counter()
    yield
    into.append(time.perf_counter() - began_s)


# --- beside -----------------------------------------------------------------------------------


def program(argv: list[str], times: int) -> float:
    """Median milliseconds of a program from its start to its end."""
    seconds: list[float] = []
    for _ in range(times):
        with clock(seconds):
            subprocess.run(argv, check=True, capture_output=True, env={**os.environ})
    return round(sorted(seconds)[len(seconds) // 2] * 1e3, 1)


def bubblewrap(argv: list[str], times: int) -> float | str:
    """The same in every namespace that bubblewrap has, without filters; or why not."""
    tool = shutil.which("bwrap")
    if tool is None:
        return "not measured: bubblewrap is not installed (apt install bubblewrap)"
    walls = ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    walls.append("--unshare-all")
    try:
        return program([tool, *walls, *argv], times)
    except subprocess.CalledProcessError as exc:
        return f"not measured: {exc.stderr.decode().strip()[-100:]}"


def fork_server(
    milliseconds: Callable[[list[float]], dict[str, float]],
) -> dict[str, float] | str:
    """A fresh process of the standard library's fork server with torch loaded: no wall at all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "scripts.hello"])
    main, seconds = sys.modules["__main__"], list[float]()
    # Else every child would import the program that runs this as well.
    main.__file__, file = None, main.__file__
    try:
        for _ in range(31):
            with clock(seconds):
                said = one_hello(context)
            if not said:
                return f"not measured: a process said nothing in {HELLO_S} s"
    finally:
        main.__file__ = file
    return milliseconds(seconds[1:])  # the first one waits for the import


def one_hello(context: Any) -> bool:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=say_hello, args=(theirs,))
    with ours:
        process.start()
        theirs.close()  # else an early end of the process would not be seen
        said = bool(ours.poll(HELLO_S)) and ours.recv() == b"hello"
    process.join()
    return said


# --- the daemon while bombs go off --------------------------------------------------------------

AT_REST_S = 2.0
BOMB_SETTINGS = {
    "sharing.max_memory": "512 MiB",
    "sharing.max_unit_seconds": "8",
    "sharing.max_concurrent_units": "5",
    "log.level": "warning",
}


async def status_of_provider(
    nodes: Swarm, milliseconds: Callable[[list[float]], dict[str, float]]
) -> dict[str, Any]:
    """What `status` takes at rest, and while five units do their worst until they are ended."""
    quiet = await status_at_rest(nodes)
    loud, endings = await status_under_bombs(nodes)
    return {
        "at_rest": milliseconds(quiet),
        "five_bombs": {**milliseconds(loud), "max_ms": round(max(loud) * 1e3, 1)},
        "share_over_100_ms": round(sum(seconds > 0.1 for seconds in loud) / len(loud), 4),
        "endings": endings,
    }


async def status_at_rest(nodes: Swarm) -> list[float]:
    taken: list[float] = []
    async with ApiClient(nodes.providers[0].paths.api_socket) as api:
        until_s = time.perf_counter() + AT_REST_S
        while time.perf_counter() < until_s:
            taken.append(await time_status(api))
            await trio.sleep(POLL_S)
    return taken
