"""`client.map`: results of a map as they come, in this process.

async with client.map(program, inputs) as results:
    async for result in results: ...

Nothing is written to disk; for a map that outlives its process, make a job (sdk/jobs.py).
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from nextgpu_node.core.job_state import JobEvent, JobState, ShardState
from nextgpu_node.errors import NextGPUError, UsageError
from nextgpu_node.sdk.attempt import Position, Steps, Tensors
from nextgpu_node.sdk.mapping import MapOptions, MapRun, Shard, ShardOutcome
from nextgpu_node.sdk.peer_history import PeerHistory

if TYPE_CHECKING:
    from torch import Tensor

    from nextgpu_node.graph.artifact import Program
    from nextgpu_node.sdk.client import Client

Inputs = Sequence["Tensors | Sequence[Tensors]"]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The one result of input `index`: tensors by name, or the error that it ended with."""

    index: int
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    error: NextGPUError | None = None
    peer_id: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class InMemoryShard:
    """Inputs that are here: one step, or a sequence of steps."""

    name: str
    steps: Steps = field(repr=False)

    def load(self) -> Steps:
        return self.steps


class _StreamSink:
    """Hands results over one by one; holds them back where they may still be taken back."""

    def __init__(self, send: trio.MemorySendChannel[ShardResult], count: int, *, hold: bool):
        self._send = send
        self._hold = hold
        self._held: dict[int, ShardResult] = {}
        self.state = JobState([ShardState() for _ in range(count)])

    def note(self, event: JobEvent) -> None:
        self.state.apply(event)

    async def store(self, shard: int, result: ShardOutcome) -> None:
        await self._give(ShardResult(shard, result.tensors, None, result.peer_id, result.seconds))

    async def fail(self, shard: int, error: NextGPUError) -> None:
        await self._give(ShardResult(shard, error=error))

    async def drop(self, shard: int) -> None:
        self._held.pop(shard, None)

    async def save_position(self, shard: int, position: Position) -> None:
        """The map itself has it."""

    async def flush(self) -> None:
        """Nothing is on a disk."""

    async def release(self) -> None:
        """The map is done: nothing is taken back any more."""
        for shard in sorted(self._held):
            await self._send.send(self._held[shard])

    async def _give(self, result: ShardResult) -> None:
        if self._hold:
            self._held[result.index] = result
        else:
            await self._send.send(result)


@trio.as_safe_channel
async def map_stream(
    client: Client,
    program: Program,
    inputs: Inputs,
    options: MapOptions | None = None,
    *,
    ordered: bool = True,
    return_exceptions: bool = False,
    history: PeerHistory | None = None,
) -> AsyncGenerator[ShardResult, None]:
    """See `Client.map`."""
    options = options or MapOptions()
    shards = _shards(inputs)
    send, receive = trio.open_memory_channel[ShardResult](math.inf if ordered else 0)
    sink = _StreamSink(send, len(shards), hold=options.audit.is_on)
    run = MapRun(client, program, shards, options, sink, history=history)
    problems: list[NextGPUError] = []

    async def drive() -> None:
        async with send:
            try:
                await run.run()
                await sink.release()
            except NextGPUError as exc:
                problems.append(exc)

    async with trio.open_nursery() as nursery, receive:
        nursery.start_soon(drive)
        results = _in_order(receive) if ordered else receive
        async for result in results:
            if result.error is not None and not return_exceptions:
                problems.append(result.error)
                break
            yield result
        nursery.cancel_scope.cancel()
    if problems:
        raise problems[0]


async def _in_order(
    receive: trio.MemoryReceiveChannel[ShardResult],
) -> AsyncGenerator[ShardResult, None]:
    early: dict[int, ShardResult] = {}
    due = 0
    async for result in receive:
        early[result.index] = result
        while due in early:
            yield early.pop(due)
            due += 1


def _shards(inputs: Inputs) -> Mapping[int, Shard]:
    shards: dict[int, Shard] = {}
    for index, one in enumerate(inputs):
        steps: Steps = [one] if isinstance(one, Mapping) else list(one)
        if not steps:
            raise UsageError(f"Input {index} has no steps.")
        shards[index] = InMemoryShard(f"input {index}", steps)
    return shards
