"""What is around a node, small and real: it keeps what it was told and answers from it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nextgpu_node.api.web import Web
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
from nextgpu_node.errors import Refused, UsageError

JOB = JobSummary(
    job_id="0123456789ab",
    kind="map",
    status="running",
    shards=3,
    done=1,
    failed=0,
    created_ms=1,
    ended_ms=0,
    why="",
)


class MemoryDesk:
    """`web` is given where a test serves the dashboard."""

    def __init__(self, web: Web | None = None) -> None:
        self.level = "info"
        self.deleted: list[str] = []
        self.cancelled: list[str] = []
        self.audits = 0
        self._web = web

    async def data(self) -> DataReply:
        kind = DataKindView(
            kind="jobs",
            what="jobs",
            why="yours",
            kept="until `nextgpu rm`",
            place="/home/you/jobs",
            files=2,
            size_bytes=300,
            personal=True,
            deleting="allowed",
        )
        return DataReply(kinds=[kind])

    async def delete_data(self, kind: str) -> DataReply:
        if kind != "jobs":
            raise Refused("The node is using it.")
        self.deleted.append(kind)
        return await self.data()

    async def jobs(self) -> JobsReply:
        return JobsReply(jobs=[JOB], transfers=[])

    async def job(self, job_id: str) -> JobReply:
        if job_id != JOB.job_id:
            raise UsageError("There is no such job.")
        line = JobLine(at_ms=1, event="shard_kept", text="shard one")
        result = JobResult(name="one", place="/home/you/one", size_bytes=5)
        return JobReply(job=JOB, directory="/home/you", lines=[line], results=[result])

    async def cancel_job(self, job_id: str) -> bool:
        self.cancelled.append(job_id)
        return True

    def log(self) -> LogReply:
        return LogReply(level=self.level, events={"node.started": 1})

    def set_log_level(self, level: str) -> LogReply:
        self.level = level
        return self.log()

    def web(self) -> WebReply:
        return WebReply(enabled=False)

    async def set_web(self, enabled: bool) -> WebReply:
        if self._web is None:
            return WebReply(enabled=enabled, url="http://127.0.0.1:1/#token=x" if enabled else "")
        return self._web.open() if enabled else self._web.close()

    def audit(self) -> AuditReply:
        return AuditReply(state="none")

    def start_audit(self) -> AuditReply:
        self.audits += 1
        return AuditReply(state="running", began_at_ms=1)

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[bytes]]:
        async def lines() -> AsyncIterator[bytes]:
            yield b'{"schema":1,"event":"node.status"}\n'

        yield lines()

    async def metrics(self) -> bytes:
        return b"nextgpu_up 1\n"
