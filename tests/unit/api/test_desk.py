from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trio

from nextgpu_node.api import server
from tests.unit.api.backend import MemoryBackend
from tests.unit.api.desk import JOB, MemoryDesk


@pytest.fixture
def desk() -> MemoryDesk:
    return MemoryDesk()


@pytest.fixture
async def http(
    nursery: trio.Nursery, socket_path: Path, desk: MemoryDesk
) -> AsyncIterator[httpx.AsyncClient]:
    await nursery.start(server.run, MemoryBackend(), socket_path, desk)
    async with httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(socket_path)), base_url="http://nextgpu"
    ) as client:
        yield client


async def test_every_path_answers(http: httpx.AsyncClient, desk: MemoryDesk) -> None:
    assert (await http.get("/v1/data")).json()["kinds"][0]["kind"] == "jobs"
    assert (await http.post("/v1/data/jobs/delete")).status_code == 200
    assert (await http.post("/v1/data/identity/delete")).status_code == 403
    assert desk.deleted == ["jobs"]
    assert (await http.get("/v1/jobs")).json()["jobs"][0]["job_id"] == JOB.job_id
    assert (await http.get(f"/v1/jobs/{JOB.job_id}")).json()["lines"][0]["event"] == "shard_kept"
    assert (await http.post(f"/v1/jobs/{JOB.job_id}/cancel")).json()["cancelled"] is True
    assert (await http.put("/v1/log", json={"level": "debug"})).json()["level"] == "debug"
    assert (await http.get("/v1/log")).json()["events"] == {"node.started": 1}
    assert (await http.put("/v1/web", json={"enabled": True})).json()["url"].startswith("http://")
    assert (await http.post("/v1/audit")).json()["state"] == "running"
    assert (await http.get("/v1/audit")).json()["report"] is None


async def test_events_are_lines_of_json(http: httpx.AsyncClient) -> None:
    reply = await http.get("/v1/events")
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.json()["event"] == "node.status"


async def test_figures_are_told_as_prometheus_wants_them(http: httpx.AsyncClient) -> None:
    reply = await http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/log", {"level": "loud"}),
        ("PUT", "/v1/log", {}),
        ("PUT", "/v1/web", {"enabled": 1}),
        ("GET", "/v1/jobs/..", None),
        ("GET", "/v1/jobs/" + "a" * 65, None),
        ("GET", "/v1/jobs/abc", None),
    ],
)
async def test_a_bad_request_is_refused_with_a_sentence(
    http: httpx.AsyncClient, desk: MemoryDesk, method: str, path: str, body: object
) -> None:
    reply = await http.request(method, path, json=body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"].endswith(".")
    assert desk.level == "info"
