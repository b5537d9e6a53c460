"""The history of lent units: recorded beside the daemon's work, tidied every hour."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import structlog
import trio

from nextgpu_node.api_types import HistoryReply, PastUnitView
from nextgpu_node.clock import now_ms
from nextgpu_node.config import HistoryConfig
from nextgpu_node.core.quotas import DAY_MS, UsageBook
from nextgpu_node.errors import StoreError
from nextgpu_node.store.unit_history import PastUnit, UnitHistory

log = structlog.get_logger()

_TIDY_S: Final = 3600
# Units that wait to be written; more are not recorded, and nobody waits for the disk.
_MOST_WAITING: Final = 1000
_Result = TypeVar("_Result")


class History:
    """`open` it, then `run` it.  While recording is off there is no file at all."""

    def __init__(self, path: Path, config: HistoryConfig) -> None:
        self._path = path
        self._config = config
        self._store = UnitHistory(path)
        self._is_open = False
        self._send, self._receive = trio.open_memory_channel[PastUnit](_MOST_WAITING)
        # sqlite3 is used by one thread at a time, in the order of what was asked.
        self._turn = trio.Lock()

    def open(self) -> None:
        """A history that cannot be had is no reason not to run."""
        if not self._config.record:
            return
        try:
            self._store.open()
            self._store.tidy(now_ms=now_ms(), keep_days=self._config.keep_days)
            self._is_open = True
        except StoreError:
            log.error("history.not_usable")

    def close(self) -> None:
        self._store.close()
        self._is_open = False

    def restore(self, usage: UsageBook) -> None:
        """What peers used in the last 24 hours, as far as it was recorded."""
        if self._is_open:
            for peer, at_ms, used_ms in self._store.used_since(now_ms() - DAY_MS):
                usage.add(peer, used_ms, at_ms=at_ms)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tidy_forever)
            async for unit in self._receive:
                try:
                    await self._in_turn(lambda unit=unit: self._store.add(unit))  # type: ignore[misc]
                except StoreError:
                    log.error("history.not_written")

    def add_soon(self, unit: PastUnit) -> None:
        """Record it when there is time."""
        if not self._is_open:
            return
        try:
            self._send.send_nowait(unit)
        except trio.WouldBlock:
            log.warning("history.full")

    async def newest(self, limit: int) -> HistoryReply:
        units = await self._in_turn(lambda: self._store.newest(limit)) if self._is_open else []
        return self._reply([_view(unit) for unit in units])

    async def clear(self) -> HistoryReply:
        if self._is_open:
            await self._in_turn(self._store.clear)
        else:
            self._path.unlink(missing_ok=True)
        return self._reply([])

    async def set_config(self, config: HistoryConfig) -> None:
        """Off deletes what there is: nobody who switches it off wants the rest kept."""
        self._config = config
        if config.record and not self._is_open:
            self.open()
        elif not config.record:
            self.close()
            self._path.unlink(missing_ok=True)
        else:
            await self._tidy()

    def _reply(self, units: list[PastUnitView]) -> HistoryReply:
        config = self._config
        return HistoryReply(enabled=config.record, keep_days=config.keep_days, units=units)

    async def _tidy_forever(self) -> None:
        while True:
            await trio.sleep(_TIDY_S)
            if self._is_open:
                try:
                    await self._tidy()
                except StoreError:
                    log.error("history.not_tidied")

    async def _tidy(self) -> None:
        days = self._config.keep_days
        await self._in_turn(lambda: self._store.tidy(now_ms=now_ms(), keep_days=days))

    async def _in_turn(self, work: Callable[[], _Result]) -> _Result:
        async with self._turn:
            return await trio.to_thread.run_sync(work)


def _view(unit: PastUnit) -> PastUnitView:
    metering = unit.metering
    return PastUnitView(
        unit_id=unit.unit_id.hex(),
        peer=unit.peer,
        peer_is_hash=unit.peer_is_hash,
        kind=unit.kind,
        device=unit.device,
        started_at_ms=unit.started_at_ms,
        wall_ms=metering.wall_ms,
        cpu_ms=metering.cpu_ms,
        input_bytes=metering.input_bytes,
        output_bytes=metering.output_bytes,
        peak_memory_bytes=metering.peak_memory_bytes,
        status=unit.status,
        wiped=unit.wiped,
        receipt_sha256=hashlib.sha256(unit.receipt).hexdigest(),
    )
