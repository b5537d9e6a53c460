"""The trio-native client: find a peer, run a program on it, read its events.

async with open_client() as client:
    async with client.run(program, steps) as events:
        async for event in events: ...
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from nextgpu_node.api_types import PeerNeed, PeerView
from nextgpu_node.config import load_config
from nextgpu_node.errors import NextGPUError, NoPeerFound, PeerLost, Refused
from nextgpu_node.paths import Paths, find_paths
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sdk.events import InputSent, PeerChosen, UnitEvent
from nextgpu_node.sdk.peer_history import PeerHistory
from nextgpu_node.sdk.unit import Needs, RemoteUnit, open_unit

if TYPE_CHECKING:
    from torch import Tensor

    from nextgpu_node.graph.artifact import Program
    from nextgpu_node.sdk.map_stream import Inputs, ShardResult
    from nextgpu_node.sdk.mapping import MapOptions

Steps = Iterable[Mapping[str, "Tensor"]] | AsyncIterable[Mapping[str, "Tensor"]]

_MANY_PEERS = 200


@asynccontextmanager
async def open_client(paths: Paths | None = None) -> AsyncIterator[Client]:
    """A client of the nextgpud whose files are at `paths`; by default the user's own."""
    paths = paths or find_paths(os.environ)
    async with ApiClient(paths.api_socket) as api:
        yield Client(paths, api)


class Client:
    """Runs programs on peers, through the local nextgpud, which sees ciphertext only."""

    def __init__(self, paths: Paths, api: ApiClient) -> None:
        self.paths = paths
        self.api = api

    async def find_peers(self, needs: Needs) -> list[PeerView]:
        """Peers that fit, best first.  Raises NoPeerFound where there is none."""
        wanted = needs.wanted_peer
        limit = _MANY_PEERS if wanted else 20
        reply = await self.api.peers(
            PeerNeed(kind=needs.kind, memory_bytes=needs.device_memory_bytes, limit=limit)
        )
        peers = [p for p in reply.peers if wanted in (None, p.peer_id)]
        if not peers:
            raise NoPeerFound(_nobody_sentence(needs, reply.candidates))
        return peers

    @asynccontextmanager
    async def open_unit_on(
        self, peer: PeerView, program: Program, needs: Needs | None = None
    ) -> AsyncIterator[RemoteUnit]:
        """A unit on `peer`.  Raises Refused, PeerLost, IntegrityError or DaemonUnreachable."""
        async with open_unit(
            self.paths.units_socket,
            peer,
            needs or Needs(),
            table_version=program.spec.min_table_version,
        ) as unit:
            yield unit

    @asynccontextmanager
    async def open_unit(
        self, program: Program, needs: Needs | None = None
    ) -> AsyncIterator[tuple[PeerView, RemoteUnit]]:
        """A unit on the best peer that takes it; refusals move on to the next one."""
        needs = needs or Needs()
        refusals: list[str] = []
        async with AsyncExitStack() as stack:
            for peer in await self.find_peers(needs):
                try:
                    unit = await stack.enter_async_context(self.open_unit_on(peer, program, needs))
                except (Refused, PeerLost) as exc:
                    refusals.append(str(exc))
                    continue
                yield peer, unit
                return
            raise Refused(f"No peer took the unit. The last answer: {refusals[-1]}")

    @trio.as_safe_channel
    async def run(
        self,
        program: Program,
        steps: Steps,
        needs: Needs | None = None,
        *,
        carry: Mapping[str, Tensor] | None = None,
        return_carry: bool = False,
        checkpoint_ms: int = 0,
        checkpoint_steps: int = 0,
    ) -> AsyncGenerator[UnitEvent, None]:
        """Run `program` over `steps` on one peer.  Yields its events, in order.

        `carry` goes on from an earlier Checkpoint; `return_carry` gives one at the end,
        `checkpoint_ms` one every so often, `checkpoint_steps` one after each so many steps.

        Raises NoPeerFound, Refused, PeerLost, JobFailed, OutOfMemory, JobTimeout,
        IntegrityError or DaemonUnreachable.  Leaving early ends the unit.
        """
        start = _Start(program, carry, return_carry, checkpoint_ms, checkpoint_steps)
        async with (
            self.open_unit(program, needs) as (peer, unit),
            _conversation(peer, unit, start, steps) as events,
        ):
            async for event in events:
                yield event

    @trio.as_safe_channel
    async def run_on(
        self,
        peer: PeerView,
        program: Program,
        steps: Steps,
        needs: Needs | None = None,
        *,
        carry: Mapping[str, Tensor] | None = None,
        return_carry: bool = False,
        checkpoint_ms: int = 0,
        checkpoint_steps: int = 0,
    ) -> AsyncGenerator[UnitEvent, None]:
        """The same on `peer` and on no other.  Raises as `run`, but NoPeerFound."""
        start = _Start(program, carry, return_carry, checkpoint_ms, checkpoint_steps)
        async with (
            self.open_unit_on(peer, program, needs) as unit,
            _conversation(peer, unit, start, steps) as events,
        ):
            async for event in events:
                yield event

    def map(
        self,
        program: Program,
        inputs: Inputs,
        options: MapOptions | None = None,
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> AbstractAsyncContextManager[trio.abc.ReceiveChannel[ShardResult]]:
        """Run `program` on each of `inputs`, over every peer that fits.

        An input is the tensors of one step by name, or a sequence of steps.  Yields one
        ShardResult for each: in the order of the inputs, or as they are completed.  An input that
        fails raises its error at its turn, or with `return_exceptions` is a result with `error`.
        With an audit on, results are handed out when every audit has agreed.

        Raises DaemonUnreachable where our own nextgpud does not answer.  Leaving early ends it.
        """
        from nextgpu_node.sdk.map_stream import map_stream

        return map_stream(
            self,
            program,
            inputs,
            options,
            ordered=ordered,
            return_exceptions=return_exceptions,
            history=self.history,
        )

    @property
    def history(self) -> PeerHistory:
        """What is remembered of peers, or, where the user wants none, nothing."""
        config = load_config(self.paths, overrides={}, environ=os.environ)
        remember = config.submit.remember_peers
        return PeerHistory(self.paths.peer_history_file if remember else None)


@dataclass(frozen=True, slots=True)
class _Start:
    """What a unit begins with."""

    program: Program
    carry: Mapping[str, Tensor] | None
    return_carry: bool
    checkpoint_ms: int
    checkpoint_steps: int

    async def send(self, unit: RemoteUnit) -> None:
        await unit.start(
            self.program,
            carry=self.carry,
            return_carry=self.return_carry,
            checkpoint_ms=self.checkpoint_ms,
            checkpoint_steps=self.checkpoint_steps,
        )


@trio.as_safe_channel
async def _conversation(
    peer: PeerView, unit: RemoteUnit, start: _Start, steps: Steps
) -> AsyncGenerator[UnitEvent, None]:
    """Send everything while the events come in."""
    yield PeerChosen(peer=peer)
    yield unit.offered()
    problems: list[Exception] = []
    async with trio.open_nursery() as nursery:
        try:
            await start.send(unit)
            yield InputSent(sent_bytes=unit.sent_bytes, total_bytes=None)
            nursery.start_soon(_send_steps, unit, steps, problems, nursery)
            async for event in unit.events():
                yield event
        except NextGPUError as exc:
            problems.append(exc)
        nursery.cancel_scope.cancel()
    if problems:
        raise problems[0]


async def _send_steps(
    unit: RemoteUnit, steps: Steps, problems: list[Exception], nursery: trio.Nursery
) -> None:
    try:
        if isinstance(steps, AsyncIterable):
            async for xs in steps:
                await unit.send_step(xs)
        else:
            for xs in steps:
                await unit.send_step(xs)
        await unit.close_input()
    except PeerLost:
        # The receiving side sees the same end, with the reason in front of it.
        return
    except Exception as exc:
        # From the caller's own iterable: it goes back to the caller as it is, not in a group.
        problems.append(exc)
        nursery.cancel_scope.cancel()


def _nobody_sentence(needs: Needs, candidates: int) -> str:
    wanted = [] if needs.kind == "any" else [f"kind {needs.kind}"]
    if needs.device_memory_bytes:
        wanted.append(f"at least {needs.device_memory_bytes / 2**30:g} GiB")
    if needs.peer_id:
        wanted.append("this peer id")
    what = " with " + ", ".join(wanted) if wanted else ""
    return (
        f"No peer{what} is sharing now ({candidates} asked). "
        "Try again later, ask for less, or see `nextgpu doctor`."
    )
