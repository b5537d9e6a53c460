"""Requests and replies of the local API around the node: data, jobs, logs, events, the dashboard.

As api_types, whose rules hold here: JSON, sizes in bytes, `schema` in every reply.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from nextgpu_node.api_types import SCHEMA, UnitView


class DataKindView(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of file that the software writes.  `deleting`: "allowed", "refused" (while the node
    runs) or "never"."""

    kind: str
    what: str
    why: str
    kept: str
    place: str
    files: int
    size_bytes: int
    personal: bool
    deleting: str


class DataReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/data; the reply to POST /v1/data/{kind}/delete."""

    schema: int = SCHEMA
    kinds: list[DataKindView]


class JobSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A job of the user's in one line."""

    job_id: str
    kind: str
    status: str
    shards: int
    done: int
    failed: int
    created_ms: int
    ended_ms: int
    why: str


class JobsReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/jobs, the newest first.  `transfers` are the units that are borrowed now."""

    schema: int = SCHEMA
    jobs: list[JobSummary]
    transfers: list[UnitView]


class JobLine(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a job's journal."""

    at_ms: int
    event: str
    text: str


class JobResult(msgspec.Struct, frozen=True, kw_only=True):
    """Where a result is, or will be; -1 bytes: it is not there."""

    name: str
    place: str
    size_bytes: int


class JobReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/jobs/{id}: the last lines of its log, its first results.  Never what they hold."""

    schema: int = SCHEMA
    job: JobSummary
    directory: str
    lines: list[JobLine]
    results: list[JobResult]


class LogRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PUT /v1/log"""

    level: str


class LogReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET and PUT /v1/log: the level now, and how often each event was logged since the start."""

    schema: int = SCHEMA
    level: str
    events: dict[str, int]


class WebRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PUT /v1/web: serve the dashboard on loopback, or do not."""

    enabled: bool


class WebReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET and PUT /v1/web.  `url` has the token in its fragment; empty while it is not served."""

    schema: int = SCHEMA
    enabled: bool
    url: str = ""


class AuditReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET and POST /v1/audit: "none", "running", "done" or "failed".

    `report` is what `nextgpu privacy audit --json` printed, `why` its sentence where it failed.
    """

    schema: int = SCHEMA
    state: str
    began_at_ms: int = 0
    report: msgspec.Raw = msgspec.Raw(b"null")
    why: str = ""


class Desk(Protocol):
    """What the daemon gives its owner beside `api_types.Backend`."""

    async def data(self) -> DataReply: ...

    async def delete_data(self, kind: str) -> DataReply: ...

    async def jobs(self) -> JobsReply: ...

    async def job(self, job_id: str) -> JobReply: ...

    async def cancel_job(self, job_id: str) -> bool: ...

    def log(self) -> LogReply: ...

    def set_log_level(self, level: str) -> LogReply: ...

    def web(self) -> WebReply: ...

    async def set_web(self, enabled: bool) -> WebReply: ...

    def audit(self) -> AuditReply: ...

    def start_audit(self) -> AuditReply: ...

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Lines of JSON, the first one with everything, until the caller leaves."""

    async def metrics(self) -> bytes:
        """Prometheus' text format."""
