"""What the owner sees and does around the node.  Implements `desk_types.Desk`.

The user's jobs are read from their directories when the owner looks at them: names, states and
places, never a tensor.  Blocking looks at the disk happen in threads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Final, cast

import msgspec
import structlog
import trio

from nextgpu_node import data, logs
from nextgpu_node.api.web import Web
from nextgpu_node.api_types import Backend, GpusReply, UnitView
from nextgpu_node.clock import now_ms
from nextgpu_node.daemon.events import follow
from nextgpu_node.data import Holding
from nextgpu_node.desk_types import (
    AuditReply,
    DataKindView,
    DataReply,
    JobLine,
    JobReply,
    JobResult,
    JobsReply,
    JobSummary,
    LogReply,
    WebReply,
)
from nextgpu_node.errors import Refused
from nextgpu_node.paths import Paths
from nextgpu_node.sdk.jobs import Job, JobView, list_jobs

log = structlog.get_logger()

_MAX_JOBS: Final = 500
_MAX_LINES: Final = 60
_MAX_RESULTS: Final = 200
_AUDIT_S: Final = 900
_AUDIT: Final = [sys.executable, "-m", "nextgpu_node.cli", "privacy", "audit", "--json"]
# Fields of a journal's event that are numbers of a kind that nobody reads.
_UNREAD: Final = ("at_ms", "event", "digest")


class OwnersDesk:
    """The one object of its kind in a daemon.  `run` it once."""

    def __init__(
        self,
        backend: Backend,
        gpus: Callable[[], Awaitable[GpusReply]],
        paths: Paths,
        web: Web,
        *,
        open_web: bool,
    ) -> None:
        self._backend = backend
        self._gpus = gpus
        self._paths = paths
        self._web = web
        self._open_web = open_web
        self._audit = AuditReply(state="none")
        self._wanted = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The dashboard, and audits that are asked for; until cancelled."""
        # One that a killed daemon left leads nowhere: its key ended with it.
        self._paths.web_page_file.unlink(missing_ok=True)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._web.run)
                if self._open_web:
                    self._web.open()
                task_status.started()
                await self._run_audits()
        finally:
            self._paths.web_page_file.unlink(missing_ok=True)

    # --- data -------------------------------------------------------------------------------

    async def data(self) -> DataReply:
        return await trio.to_thread.run_sync(self._survey)

    async def delete_data(self, kind: str) -> DataReply:
        chosen = data.find_kind(self._paths, kind)
        await trio.to_thread.run_sync(data.delete, self._paths, [chosen])
        return await self.data()

    def _survey(self) -> DataReply:
        return DataReply(kinds=[_data_view(one) for one in data.survey(self._paths)])

    # --- jobs -------------------------------------------------------------------------------

    async def jobs(self) -> JobsReply:
        transfers = [unit for unit in self._backend.units().units if unit.role == "borrowing"]
        return await trio.to_thread.run_sync(self._list_jobs, transfers)

    async def job(self, job_id: str) -> JobReply:
        return await trio.to_thread.run_sync(self._look_at_job, job_id)

    async def cancel_job(self, job_id: str) -> bool:
        def cancel() -> bool:
            return Job.open(self._paths.jobs_dir, job_id).cancel()

        return await trio.to_thread.run_sync(cancel, abandon_on_cancel=True)

    def _list_jobs(self, transfers: list[UnitView]) -> JobsReply:
        # Looking makes no directory.
        found = list_jobs(self._paths.jobs_dir) if self._paths.jobs_dir.is_dir() else []
        newest = found[::-1][:_MAX_JOBS]
        return JobsReply(jobs=[_summary(job.view()) for job in newest], transfers=transfers)

    def _look_at_job(self, job_id: str) -> JobReply:
        job = Job.open(self._paths.jobs_dir, job_id)
        events = list(job.follow().poll())[-_MAX_LINES:]
        shards = job.manifest.shards[:_MAX_RESULTS]
        places = [Path(s.output) if s.output else job.result_file(k) for k, s in enumerate(shards)]
        return JobReply(
            job=_summary(job.view()),
            directory=os.fspath(job.directory),
            lines=[_job_line(job, msgspec.to_builtins(event)) for event in events],
            results=[
                JobResult(name=shard.name, place=os.fspath(place), size_bytes=_size(place))
                for shard, place in zip(shards, places, strict=True)
            ],
        )

    # --- logs, events, figures --------------------------------------------------------------

    def log(self) -> LogReply:
        return LogReply(level=logs.level(), events=logs.tally())

    def set_log_level(self, level: str) -> LogReply:
        logs.set_level(cast(logs.Level, level))
        return self.log()

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[bytes]]:
        lines = follow(self._backend.status, self._backend.units, self._gpus)
        async with aclosing(lines):
            yield lines

    async def metrics(self) -> bytes:
        # Imported here: a node that nobody scrapes does without.
        from nextgpu_node.daemon.metrics import as_text

        gpus = (await self._gpus()).gpus
        return as_text(self._backend.status(), self._backend.units().units, gpus, logs.tally())

    # --- dashboard and audit ----------------------------------------------------------------

    def web(self) -> WebReply:
        return self._web.view()

    async def set_web(self, enabled: bool) -> WebReply:
        return self._web.open() if enabled else self._web.close()

    def audit(self) -> AuditReply:
        return self._audit

    def start_audit(self) -> AuditReply:
        if self._audit.state == "running":
            raise Refused("An audit is running already.")
        self._audit = AuditReply(state="running", began_at_ms=now_ms())
        self._wanted.set()
        return self._audit

    async def _run_audits(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            self._audit = await _run_audit(self._audit.began_at_ms)


async def _run_audit(began_at_ms: int) -> AuditReply:
    """`nextgpu privacy audit` as a process of its own: it needs torch, which no daemon loads."""
    why = "It took too long."
    with trio.move_on_after(_AUDIT_S):
        done = await trio.run_process(_AUDIT, capture_stdout=True, capture_stderr=True, check=False)
        lines = done.stdout.decode(errors="replace").splitlines()
        try:
            report = json.loads(lines[-1])
        except (IndexError, ValueError):
            report = {}
        if "places" in report:
            plain = msgspec.Raw(msgspec.json.encode(report))
            return AuditReply(state="done", began_at_ms=began_at_ms, report=plain)
        why = str(report.get("error", f"It ended with code {done.returncode}."))
    return AuditReply(state="failed", began_at_ms=began_at_ms, why=why)


def _data_view(holding: Holding) -> DataKindView:
    kind = holding.kind
    return DataKindView(
        kind=kind.name,
        what=kind.what,
        why=kind.why,
        kept=kind.kept,
        place=os.fspath(holding.place),
        files=holding.files,
        size_bytes=holding.size_bytes,
        personal=kind.personal,
        deleting=kind.deleting,
    )


def _summary(view: JobView) -> JobSummary:
    names = JobSummary.__struct_fields__
    return JobSummary(**{name: getattr(view, name) for name in names})


def _job_line(job: Job, event: dict[str, object]) -> JobLine:
    told = {key: value for key, value in event.items() if key not in _UNREAD and value != ""}
    shard = told.get("shard")
    if isinstance(shard, int):
        told["shard"] = job.manifest.shards[shard].name
    text = ", ".join(f"{key} {value}" for key, value in told.items())
    return JobLine(at_ms=int(str(event["at_ms"])), event=str(event["event"]), text=text)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
