"""Ways to run one shard on one peer.

SharedUnits   an open unit on each peer takes shard after shard: the program travels once
FreshUnits    a unit for each shard: programs with a carry, whose checkpoints move between peers
RunHere       this process, without any peer: audits, referees, `--local`

Each gives an Outcome or raises the errors of `nextgpu_node.errors`; cancelling ends the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import trio

from nextgpu_node.api_types import PeerView
from nextgpu_node.errors import IntegrityError, NextGPUError
from nextgpu_node.sdk.attempt import AttemptOptions, Outcome, Position, Steps, attempt
from nextgpu_node.sdk.client import Client
from nextgpu_node.sdk.events import UnitEvent
from nextgpu_node.sdk.outcome import error_for
from nextgpu_node.sdk.pool import Call, CallLost, OpenUnit, is_shared, open_calls
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.errors import RemoteProtocolError

if TYPE_CHECKING:
    from nextgpu_node.graph.artifact import Program

_HALF_OF_MEMORY: Final = 2


class Watcher(Protocol):
    """What an attempt reports on its way."""

    def entered(self, status: str) -> None:
        """queued, transferring, starting, running or returning."""

    def reached(self, position: Position) -> None:
        """Another attempt could go on from here."""

    def saw(self, event: UnitEvent) -> None:
        """An event of a fresh unit, as `Client.run` gives it."""


class Runner(Protocol):
    async def run(
        self, peer: PeerView, steps: Steps, since: Position, watcher: Watcher
    ) -> Outcome: ...

    def units_on(self, peer_id: str) -> int:
        """Units of ours that take a slot there now."""


class FreshUnits:
    """See the module."""

    def __init__(self, client: Client, program: Program, options: AttemptOptions) -> None:
        self._client = client
        self._program = program
        self._options = options
        self._units: dict[str, int] = {}

    def units_on(self, peer_id: str) -> int:
        return self._units.get(peer_id, 0)

    async def run(self, peer: PeerView, steps: Steps, since: Position, watcher: Watcher) -> Outcome:
        from nextgpu_node.sdk.events import InputSent, Offered, Started, StepResult

        left = len(steps) - since.steps
        results = 0

        def on_event(event: UnitEvent) -> None:
            nonlocal results
            match event:
                case Offered():
                    watcher.entered("transferring")
                case InputSent():
                    watcher.entered("starting")
                case Started():
                    watcher.entered("running")
                case StepResult():
                    results += 1
                    if results == left:
                        watcher.entered("returning")
                case _:
                    pass
            watcher.saw(event)

        self._units[peer.peer_id] = self.units_on(peer.peer_id) + 1
        try:
            return await attempt(
                self._client,
                peer,
                self._program,
                steps,
                self._options,
                since=since,
                on_position=watcher.reached,
                on_event=on_event,
            )
        finally:
            self._units[peer.peer_id] -= 1


class SharedUnits:
    """See the module.  `nursery` holds the units' tasks; `aclose` waits for their receipts.

    `on_broken` is told of a peer whose unit ended with a broken seal or receipt: what it answered
    before is in doubt too.
    """

    def __init__(
        self,
        units_socket: Path,
        program: Program,
        needs: Needs,
        nursery: trio.Nursery,
        on_broken: Callable[[str, NextGPUError], None],
    ) -> None:
        self._units_socket = units_socket
        self._program = program
        self._needs = needs
        self._nursery = nursery
        self._on_broken = on_broken
        self._idle: dict[str, list[OpenUnit]] = {}
        self._units: dict[str, int] = {}
        self._all_ended = trio.Event()

    def units_on(self, peer_id: str) -> int:
        return self._units.get(peer_id, 0)

    async def run(self, peer: PeerView, steps: Steps, since: Position, watcher: Watcher) -> Outcome:
        began_s = time.monotonic()
        answered = trio.Event()
        call = Call([steps[k] for k in range(since.steps, len(steps))], lambda _: answered.set())
        unit = await self._unit_for(peer, call)
        watcher.entered("running" if unit.has_started else "transferring")
        unit.put(call)
        try:
            await answered.wait()
        except trio.Cancelled:
            # The worker would go on with it: end the unit, nobody else is in there.
            self._nursery.start_soon(unit.cancel)
            raise
        finally:
            ys = (*since.ys, *call.results)
            watcher.reached(Position(ys))
        if isinstance(call.error, CallLost):
            raise call.error.cause
        if call.error is not None:
            raise call.error
        self._give_back(peer.peer_id, unit)
        seconds = time.monotonic() - began_s
        return Outcome(ys, None, None, seconds, call.input_bytes, unit_id=unit.unit_id)

    async def aclose(self) -> None:
        """End every idle unit; returns when each has given its receipt or gone."""
        for units in self._idle.values():
            for unit in units:
                unit.close()
        while any(self._units.values()):
            self._all_ended = trio.Event()
            await self._all_ended.wait()

    async def _unit_for(self, peer: PeerView, call: Call) -> OpenUnit:
        idle = self._idle.setdefault(peer.peer_id, [])
        while idle:
            unit = idle.pop()
            if unit.has_room(call):
                return unit
            unit.close()
        opened: OpenUnit = await self._nursery.start(self._tend, peer)
        return opened

    def _give_back(self, peer_id: str, unit: OpenUnit) -> None:
        if unit.is_open:
            self._idle.setdefault(peer_id, []).append(unit)

    async def _tend(
        self, peer: PeerView, *, task_status: trio.TaskStatus[OpenUnit] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self._units[peer.peer_id] = self.units_on(peer.peer_id) + 1
        try:
            opening = open_calls(self._units_socket, peer, self._program, self._needs)
            async with opening as unit:
                task_status.started(unit)
                await unit.ended.wait()
            if isinstance(unit.error, IntegrityError):
                self._on_broken(peer.peer_id, unit.error)
        finally:
            self._units[peer.peer_id] -= 1
            self._all_ended.set()


class RunHere:
    """See the module.  A thread computes; cancelling leaves it to end by itself, unheard."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def units_on(self, peer_id: str) -> int:
        return 0

    async def run(
        self, peer: PeerView | None, steps: Steps, since: Position, watcher: Watcher
    ) -> Outcome:
        watcher.entered("running")
        return await trio.to_thread.run_sync(self._compute, steps, since, abandon_on_cancel=True)

    def _compute(self, steps: Steps, since: Position) -> Outcome:
        import psutil

        from nextgpu_node.graph.local import make_machine

        began_s = time.monotonic()
        try:
            memory_bytes = psutil.virtual_memory().available // _HALF_OF_MEMORY
            machine = make_machine(self._program, max_live_bytes=memory_bytes)
            if since.carry is not None:
                machine.load_carry(since.carry)
            ys = list(since.ys)
            for k in range(since.steps, len(steps)):
                outcome = machine.step(steps[k])
                ys.append(outcome.ys)
                if outcome.stop:
                    break
            final = machine.finish() if self._program.spec.finish is not None else None
            carry = machine.carry() if self._program.spec.carry else None
        except RemoteProtocolError as exc:
            raise error_for(exc.code, exc.detail) from exc
        return Outcome(tuple(ys), final, carry, time.monotonic() - began_s, 0)


def can_share(program: Program) -> bool:
    """Whether shards of `program` may follow each other in one open unit."""
    return is_shared(program)
