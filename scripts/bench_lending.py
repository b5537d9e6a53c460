"""scripts/bench lending: how long the owner waits for the device.

small_state    a unit between two steps, a state of a few hundred bytes
large_state    the same with 64 MiB of state
in_a_step      in the middle of a step that takes far longer than the grace
killed         the worker of the first case killed by hand: what no policy could beat

Each from `pause` to the end of the worker process, and whether its state reached the submitter.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import trio
from torch import nn

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from nextgpu_node.api_types import PeerNeed  # noqa: E402
from nextgpu_node.errors import NextGPUError  # noqa: E402
from nextgpu_node.graph.artifact import Program  # noqa: E402
from nextgpu_node.graph.optimizers import SGD  # noqa: E402
from nextgpu_node.graph.training import train_step  # noqa: E402
from nextgpu_node.sdk.api_client import ApiClient  # noqa: E402
from nextgpu_node.sdk.client import open_client  # noqa: E402
from nextgpu_node.sdk.events import Checkpoint, StepResult  # noqa: E402
from tests.support.nodes import Swarm, swarm  # noqa: E402

ROUNDS = 3
SMALL, LARGE = 8, 4096
Word = Callable[[ApiClient, set[int]], Awaitable[object]]


def lending(settings: dict[str, str]) -> dict[str, Any]:
    """All figures, on one pair of nodes."""
    with swarm(1, {**settings, "sharing.warm_workers": "1", "sharing.threads": "1"}) as pair:
        return trio.run(_measure, pair)


async def _measure(pair: Swarm) -> dict[str, Any]:
    async with ApiClient(pair.providers[0].paths.api_socket) as owner:
        return {
            "killed": await _case(pair, owner, SMALL, 4, _kill),
            "small_state": await _case(pair, owner, SMALL, 4, _pause),
            "large_state": await _case(pair, owner, LARGE, 4, _pause),
            "in_a_step": await _case(pair, owner, LARGE, LARGE, _pause, in_a_step=True),
        }


async def _pause(owner: ApiClient, _pids: set[int]) -> None:
    await owner.pause()


async def _kill(_owner: ApiClient, pids: set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


async def _case(
    pair: Swarm, owner: ApiClient, width: int, batch: int, word: Word, *, in_a_step: bool = False
) -> dict[str, Any]:
    program, step = _training(width, batch)
    gone_s, saved = [], 0
    for _ in range(ROUNDS):
        await _until_lending(pair, owner)
        seconds, has_state = await _once(pair, owner, program, step, word, in_a_step=in_a_step)
        gone_s.append(seconds)
        saved += has_state
        await owner.resume()
    return {
        "worker_gone_ms": round(statistics.median(gone_s) * 1e3, 1),
        "longest_ms": round(max(gone_s) * 1e3, 1),
        "states_saved": f"{saved} of {ROUNDS}",
    }


def _training(width: int, batch: int) -> tuple[Program, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    step = {"input": torch.ones(batch, width), "target": torch.zeros(batch, dtype=torch.int64)}
    program = train_step(
        nn.Linear(width, width), nn.CrossEntropyLoss(), step["input"], step["target"],
        optimizer=SGD(lr=0.1),
    )  # fmt: skip
    return program, step


async def _once(
    pair: Swarm,
    owner: ApiClient,
    program: Program,
    step: dict[str, torch.Tensor],
    word: Word,
    *,
    in_a_step: bool,
) -> tuple[float, bool]:
    send, receive = trio.open_memory_channel[dict[str, torch.Tensor]](2)
    began, has_state, seconds = trio.Event(), False, 0.0

    async def run() -> None:
        nonlocal has_state
        try:
            async with (
                open_client(pair.submitter.paths) as client,
                client.run(program, receive) as events,
            ):
                async for event in events:
                    if isinstance(event, StepResult):
                        began.set()
                    has_state |= isinstance(event, Checkpoint)
        except NextGPUError:
            return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await send.send(step)
        if in_a_step:
            await _until_busy(pair)
        else:
            await began.wait()
        pids = _lent_workers(pair)
        began_s = time.perf_counter()
        await word(owner, pids)
        while any(psutil.pid_exists(pid) for pid in pids):  # noqa: ASYNC110  no event of ours
            await trio.sleep(0.001)
        seconds = time.perf_counter() - began_s
    return seconds, has_state


def _lent_workers(pair: Swarm) -> set[int]:
    launchers = psutil.Process(pair.providers[0].pid).children()
    return {child.pid for one in launchers for child in one.children(recursive=True)}


async def _until_busy(pair: Swarm) -> None:
    """Until a worker has computed for a second."""
    while not any(_cpu_s(pid) > 1.5 for pid in _lent_workers(pair)):  # noqa: ASYNC110  as above
        await trio.sleep(0.05)


def _cpu_s(pid: int) -> float:
    try:
        return sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.Error:
        return 0.0


async def _until_lending(pair: Swarm, owner: ApiClient) -> None:
    """Until the provider lends and the submitter has heard of it."""
    while (await owner.status()).sharing.free_slots < 1:  # noqa: ASYNC110  as above
        await trio.sleep(0.05)
    async with ApiClient(pair.submitter.paths.api_socket) as submitter:
        while not (await submitter.peers(PeerNeed())).peers:  # noqa: ASYNC110  as above
            await trio.sleep(0.1)
