"""`scripts/bench submit`: what a submitter waits for, beside Dask (TLS) and Ray in the same run.

    noop_call         one call after the other, in an open unit or worker that is warm
    calls_per_s       1,000 calls at once, one worker
    shards_over_4     1,000 calls over four workers (for NextGPU: four nodes)
    64_mib            one call with 64 MiB out, one with 64 MiB back
    program           a real program (two layers of a transformer), over running it in this process

NextGPU signs, seals and sandboxes; Dask with TLS encrypts and pickles; Ray does neither.  All run
one thread a worker on the same two cores.  All are up; each row is measured on one after the other.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nextgpu_node.graph.export import export
from nextgpu_node.sdk.executor import Executor
from scripts.bench_calls import BIG, First, Grow, NoOp, make_real, run
from tests.support.nodes import swarm

CALLS = 300
MANY = 1000
# No row takes much longer: all of it is done in minutes, also on a busy machine.
ENOUGH_S = 15.0
NODES = 4
SETTINGS = {
    "sharing.max_memory": "2 GiB",
    "sharing.max_input": "4 GiB",
    "sharing.max_output": "4 GiB",
    "sharing.max_unit_seconds": "600",
    "sharing.threads": "1",
    "log.level": "warning",
}


# What a system is asked: call(module, x) -> a future-like.
Call = Callable[[torch.nn.Module, torch.Tensor], Any]


@dataclass(frozen=True)
class System:
    """`one` calls one worker, `four` all four; `wait` gives the tensor of what they gave."""

    one: Call
    four: Call
    wait: Callable[[Any], torch.Tensor]

    def result(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.wait(self.one(module, x))


def measure(systems: dict[str, System]) -> dict[str, dict[str, Any]]:
    """Every row of every system; one row after the other, so that what else the machine does at
    the time is about the same for all."""
    small, real = torch.ones(16), torch.randn(8, 64, 256)
    noop, first, grow, model = NoOp(), First(), Grow(), make_real()
    out, back = torch.ones(BIG, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
    report: dict[str, dict[str, Any]] = {name: {} for name in systems}

    def row(title: str, figure: Callable[[System], Any]) -> None:
        for name, system in systems.items():
            began_s = time.perf_counter()
            found = report[name][title] = figure(system)
            took_s = time.perf_counter() - began_s
            print(f"{title}: {name} {found}  ({took_s:.1f} s)", file=sys.stderr, flush=True)

    def over_here(system: System) -> float:
        here_s = fastest(lambda: model(real), times=7)
        return round(fastest(lambda: system.result(model, real), times=7) / here_s, 3)

    row("noop_call", lambda system: latency(lambda: system.result(noop, small)))
    row("calls_per_s", lambda system: round(rate(system.one, system.wait, noop, small)))
    row("shards_over_4_per_s", lambda system: round(rate(system.four, system.wait, noop, small)))
    row("64_mib_out_mb_s", lambda system: megabytes_per_s(lambda: system.result(first, out)))
    row("64_mib_back_mb_s", lambda system: megabytes_per_s(lambda: system.result(grow, back)))
    row("program_over_here", over_here)
    return report


def megabytes_per_s(move: Callable[[], Any]) -> int:
    return round(BIG / fastest(move) / 1e6)


def latency(work: Callable[[], Any]) -> dict[str, float]:
    work()
    seconds: list[float] = []
    while len(seconds) < CALLS and sum(seconds) < ENOUGH_S:
        seconds.append(fastest(work, times=1))
    seconds.sort()
    return {
        "p50_ms": round(seconds[len(seconds) // 2] * 1e3, 2),
        "p99_ms": round(seconds[len(seconds) * 99 // 100] * 1e3, 2),
    }


def rate(
    call: Call, wait: Callable[[Any], torch.Tensor], module: torch.nn.Module, x: torch.Tensor
) -> float:
    """Calls a second of MANY that are submitted at once: the better of two runs."""

    def once() -> None:
        futures = [call(module, x + i) for i in range(MANY)]
        for i, future in enumerate(futures):
            assert wait(future)[0].item() == 1 + i

    return MANY / fastest(once, times=2)


def fastest(work: Callable[[], Any], times: int = 3) -> float:
    """Seconds; of the best of `times`, the first of which may have been cold.

    On a machine that is busy with something else it is content with fewer.
    """
    seconds: list[float] = []
    with torch.no_grad():
        while len(seconds) < times and sum(seconds) < ENOUGH_S:
            began_s = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began_s)
    return min(seconds)


# --- the systems ------------------------------------------------------------------------------


@contextmanager
def nextgpu() -> Iterator[System]:
    programs: dict[tuple[int, Any], Any] = {}

    def caller(executor: Executor) -> Call:
        def call(module: torch.nn.Module, x: torch.Tensor) -> Any:
            key = (id(module), x.shape)
            if key not in programs:
                programs[key] = (module, export(module, (x,)))
            return executor.submit(programs[key][1], x)

        return call

    def wait(future: Any) -> torch.Tensor:
        (tensor,) = future.result().values()
        return tensor

    with swarm(NODES, SETTINGS) as nodes:
        paths = nodes.submitter.paths
        with Executor(paths=paths, max_units=1) as one, Executor(paths=paths, max_units=4) as four:
            yield System(caller(one), caller(four), wait)


@contextmanager
def dask_tls() -> Iterator[System]:
    from distributed import Client, LocalCluster
    from distributed.security import Security

    @contextmanager
    def opened(workers: int) -> Iterator[Call]:
        security = Security.temporary()
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            security=security,
            dashboard_address=None,
            silence_logs=40,
        )
        with cluster, Client(cluster, security=security) as client:
            # The module lies there already, as the program does in an open unit.
            there: dict[int, Any] = {}

            def call(module: torch.nn.Module, x: torch.Tensor) -> Any:
                if id(module) not in there:
                    there[id(module)] = client.scatter(module, broadcast=True, hash=False)
                return client.submit(run, there[id(module)], x, pure=False)

            yield call

    with opened(1) as one, opened(4) as four:
        yield System(one, four, lambda future: future.result())


@contextmanager
def ray_actors() -> Iterator[System]:
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")

    @ray.remote
    class Worker:
        def run(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            return run(module, x)

        def threads(self) -> None:
            torch.set_num_threads(1)

    workers = [Worker.remote() for _ in range(4)]  # type: ignore[attr-defined]
    ray.get([worker.threads.remote() for worker in workers])
    there: dict[int, Any] = {}
    turn = iter(range(10**9))

    def caller(count: int) -> Call:
        def call(module: torch.nn.Module, x: torch.Tensor) -> Any:
            if id(module) not in there:
                there[id(module)] = ray.put(module)
            return workers[next(turn) % count].run.remote(there[id(module)], x)

        return call

    try:
        yield System(caller(1), caller(4), ray.get)
    finally:
        ray.shutdown()


def submit() -> dict[str, Any]:
    """Each system, and the ratios that matter: above 1, NextGPU is the quicker one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    # Ray's workers run at 15 otherwise, and starve where anything else runs.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  as Ray spells it
    opening = [nextgpu, dask_tls]
    if importlib.util.find_spec("ray") is not None:
        opening.append(ray_actors)
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        systems = {one.__name__: stack.enter_context(one()) for one in opening}
        report: dict[str, Any] = measure(systems)
    for other in [name for name in report if name != "nextgpu"]:
        report[f"times_quicker_than_{other}"] = ratios(report["nextgpu"], report[other])
    return report


def ratios(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name in mine:
        match mine[name]:
            case dict():
                for key in mine[name]:
                    found[f"{name}_{key}"] = round(theirs[name][key] / mine[name][key], 2)
            case _ if name.endswith("_s") or name == "calls_per_s":
                found[name] = round(mine[name] / theirs[name], 2)
            case _ if name == "program_over_here":
                found[name] = round(theirs[name] / mine[name], 2)
    return found
