"""Endpoints around the node: data, jobs, logs, events, metrics, audit, and opening the dashboard.

GET  /v1/data                                      DataReply
POST /v1/data/{kind}/delete                        DataReply
GET  /v1/jobs                                      JobsReply
GET  /v1/jobs/{job_id}                             JobReply
POST /v1/jobs/{job_id}/cancel                      CancelReply
GET  /v1/log                                       LogReply
PUT  /v1/log              LogRequest               LogReply
GET  /v1/web                                       WebReply
PUT  /v1/web              WebRequest               WebReply
GET  /v1/audit                                     AuditReply
POST /v1/audit                                     AuditReply
GET  /v1/events                                    JSON lines, until the client leaves
GET  /metrics                                      Prometheus' text format
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from nextgpu_node.api.serving import reply as _reply
from nextgpu_node.api_types import CancelReply
from nextgpu_node.desk_types import Desk, LogRequest, WebRequest
from nextgpu_node.errors import UsageError
from nextgpu_node.logs import LEVELS

EVENTS_PATH: Final = "/v1/events"
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_MAX_ID_CHARS: Final = 64

_Body = TypeVar("_Body")


class ReadBody(Protocol):
    """Reads a request's JSON body as a type."""

    async def __call__(self, request: Request, kind: type[_Body], /) -> _Body: ...


class DeskEndpoints:
    """One method for each line of the table above."""

    def __init__(self, desk: Desk, body_untrusted: ReadBody) -> None:
        self._desk = desk
        self._body_untrusted = body_untrusted

    def routes(self) -> list[Route]:
        return [
            Route("/v1/data", self.data, methods=["GET"]),
            Route("/v1/data/{kind}/delete", self.delete_data, methods=["POST"]),
            Route("/v1/jobs", self.jobs, methods=["GET"]),
            Route("/v1/jobs/{job_id}", self.job, methods=["GET"]),
            Route("/v1/jobs/{job_id}/cancel", self.cancel_job, methods=["POST"]),
            Route("/v1/log", self.log, methods=["GET"]),
            Route("/v1/log", self.set_log, methods=["PUT"]),
            Route("/v1/web", self.web, methods=["GET"]),
            Route("/v1/web", self.set_web, methods=["PUT"]),
            Route("/v1/audit", self.audit, methods=["GET"]),
            Route("/v1/audit", self.start_audit, methods=["POST"]),
            Route(EVENTS_PATH, self.events, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def data(self, request: Request) -> Response:
        return _reply(await self._desk.data())

    async def delete_data(self, request: Request) -> Response:
        return _reply(await self._desk.delete_data(request.path_params["kind"][:_MAX_ID_CHARS]))

    async def jobs(self, request: Request) -> Response:
        return _reply(await self._desk.jobs())

    async def job(self, request: Request) -> Response:
        return _reply(await self._desk.job(_job_id_untrusted(request)))

    async def cancel_job(self, request: Request) -> Response:
        cancelled = await self._desk.cancel_job(_job_id_untrusted(request))
        return _reply(CancelReply(cancelled=cancelled))

    async def log(self, request: Request) -> Response:
        return _reply(self._desk.log())

    async def set_log(self, request: Request) -> Response:
        wanted = await self._body_untrusted(request, LogRequest)
        if wanted.level not in LEVELS:
            raise UsageError(f"level is one of {', '.join(LEVELS)}.")
        return _reply(self._desk.set_log_level(wanted.level))

    async def web(self, request: Request) -> Response:
        return _reply(self._desk.web())

    async def set_web(self, request: Request) -> Response:
        wanted = await self._body_untrusted(request, WebRequest)
        return _reply(await self._desk.set_web(wanted.enabled))

    async def audit(self, request: Request) -> Response:
        return _reply(self._desk.audit())

    async def start_audit(self, request: Request) -> Response:
        return _reply(self._desk.start_audit())

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self._lines(), media_type="application/x-ndjson")

    async def _lines(self) -> AsyncIterator[bytes]:
        async with self._desk.events() as lines:
            async for line in lines:
                yield line

    async def metrics(self, request: Request) -> Response:
        return Response(await self._desk.metrics(), headers={"content-type": METRICS_TYPE})


def _job_id_untrusted(request: Request) -> str:
    job_id: str = request.path_params["job_id"]
    if len(job_id) > _MAX_ID_CHARS or not job_id.isalnum():
        raise UsageError("That is not the id of a job; `nextgpu jobs` lists them.")
    return job_id
