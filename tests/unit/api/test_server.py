from __future__ import annotations

import stat
from pathlib import Path

import httpx
import pytest
import structlog
import trio
import trio.testing

from nextgpu_node.api import server
from nextgpu_node.errors import IntegrityError, NoPeerFound, Refused
from nextgpu_protocol.ids import peer_id_from_public_key
from tests.unit.api.backend import UNIT_ID, MemoryBackend

JSON = {"content-type": "application/json"}


async def test_every_path_answers(http: httpx.AsyncClient, backend: MemoryBackend) -> None:
    status = (await http.get("/v1/status")).json()
    assert (status["schema"], status["peer_id"]) == (1, "12D3KooWTest")
    assert (await http.get("/v1/units")).json()["units"][0]["unit_id"] == UNIT_ID
    assert (await http.post(f"/v1/units/{UNIT_ID}/cancel")).json()["cancelled"] is True
    assert (await http.post(f"/v1/units/{UNIT_ID}/cancel")).json()["cancelled"] is False
    sharing = (await http.put("/v1/sharing", json={"enabled": True})).json()
    assert sharing["schema"] == 1
    assert sharing["active"] is True
    assert backend.sharing is True


async def test_the_owners_word_reaches_the_backend(
    http: httpx.AsyncClient, backend: MemoryBackend
) -> None:
    assert (await http.post("/v1/sharing/pause", json={"seconds": 3600})).status_code == 200
    assert (await http.post("/v1/sharing/pause", json={})).status_code == 200
    assert (await http.post("/v1/sharing/resume", json={})).status_code == 200
    assert (await http.post("/v1/sharing/drain", json={})).json()["state"] == "draining"
    assert backend.pauses == [3600, 0, -1]
    limits = (await http.put("/v1/limits", json={"changes": {"max_temperature": "80C"}})).json()
    assert {"key": "max_temperature", "value": "80"} in [
        {"key": one["key"], "value": one["value"]} for one in limits["limits"]
    ]
    assert (await http.get("/v1/limits")).json()["limits"] == limits["limits"]
    peer = peer_id_from_public_key(bytes(range(32)))
    denied = (await http.put(f"/v1/serving/{peer}", json={"rule": "deny"})).json()
    assert denied["peers"] == [{"peer_id": peer, "rule": "deny", "terms": {}, "used_s": 61}]
    assert (await http.get("/v1/gpus")).json()["gpus"][0]["temperature_c"] == 61.0
    assert len((await http.get("/v1/history?limit=5")).json()["units"]) == 1
    assert (await http.put("/v1/history", json={"enabled": False})).json()["enabled"] is False
    assert (await http.delete("/v1/history")).json()["units"] == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/sharing/pause", {"seconds": -1}),
        ("POST", "/v1/sharing/pause", {"seconds": 10**12}),
        ("POST", "/v1/sharing/pause", {"hours": 1}),
        ("POST", "/v1/sharing/resume", {"x": 1}),
        ("PUT", "/v1/limits", {"changes": {"max_temperature": "hot"}}),
        ("PUT", "/v1/limits", {"changes": {"max_temp": "80"}}),
        ("PUT", "/v1/limits", {"changes": {"hours": "25:00-26:00"}}),
        ("PUT", "/v1/serving/12D3KooWNobody", {"rule": "deny"}),
        (
            "PUT",
            f"/v1/serving/{peer_id_from_public_key(bytes(range(32)))}",
            {"rule": "allow", "terms": {"units": "0"}},
        ),
        ("PUT", "/v1/serving/x", {"rule": "perhaps"}),
        ("PUT", "/v1/history", {"enabled": "no"}),
    ],
)
async def test_a_word_that_can_not_hold_changes_nothing(
    http: httpx.AsyncClient, backend: MemoryBackend, method: str, path: str, body: object
) -> None:
    before = (backend.config, backend.records)
    reply = await http.request(method, path, json=body)
    assert (reply.status_code, reply.json()["exit_code"]) == (400, 2)
    assert (backend.config, backend.records, backend.pauses) == (*before, [])


async def test_a_page_elsewhere_can_not_resume(
    http: httpx.AsyncClient, backend: MemoryBackend
) -> None:
    for path in ("resume", "drain", "pause"):
        assert (await http.post(f"/v1/sharing/{path}", content=b"{}")).status_code == 415
    assert backend.pauses == []


async def test_the_query_reaches_the_backend(
    http: httpx.AsyncClient, backend: MemoryBackend
) -> None:
    await http.get("/v1/peers?kind=cuda&memory_bytes=1000&limit=3")
    await http.get("/v1/peers")
    first, second = backend.needs
    assert (first.kind, first.memory_bytes, first.limit) == ("cuda", 1000, 3)
    assert (second.kind, second.memory_bytes, second.limit) == ("any", 0, 20)


@pytest.mark.parametrize(
    "query",
    [
        "kind=tpu",
        "limit=0",
        "limit=-1",
        "limit=201",
        "limit=+1",
        "limit=1e3",
        "limit=\N{ARABIC-INDIC DIGIT ONE}",
        "memory_bytes=" + "9" * 5000,
        "memory=1",
        "limit=1&limit=2",
    ],
)
async def test_a_bad_query_is_refused_with_a_sentence(
    http: httpx.AsyncClient, backend: MemoryBackend, query: str
) -> None:
    reply = await http.get("/v1/peers?" + query)
    assert reply.status_code == 400
    assert reply.json()["exit_code"] == 2
    assert reply.json()["error"].endswith(".")
    assert backend.needs == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"enabled": 1}', b"{}", b'{"enabled": true, "x": 1}', b"\xff\xfe"]
)
async def test_a_bad_body_is_refused_and_changes_nothing(
    http: httpx.AsyncClient, backend: MemoryBackend, body: bytes
) -> None:
    reply = await http.put("/v1/sharing", content=body, headers=JSON)
    assert reply.status_code == 400
    assert reply.json()["exit_code"] == 2
    assert backend.sharing is False


async def test_a_body_that_is_too_large_is_refused(http: httpx.AsyncClient) -> None:
    padding = b" " * server.MAX_BODY_BYTES
    reply = await http.put("/v1/sharing", content=b'{"enabled": true}' + padding, headers=JSON)
    assert reply.status_code == 413
    assert (await http.get("/v1/status")).json()["sharing"]["enabled"] is False


async def test_a_form_is_refused(http: httpx.AsyncClient, backend: MemoryBackend) -> None:
    """What a page elsewhere can send without asking the browser's leave."""
    reply = await http.put("/v1/sharing", content=b'{"enabled": true}')
    assert reply.status_code == 415
    assert backend.sharing is False


@pytest.mark.parametrize("host", ["localhost", "evil.example", "nextgpu:80", "nextgpu.example", ""])
async def test_another_host_name_is_refused(
    http: httpx.AsyncClient, backend: MemoryBackend, host: str
) -> None:
    reply = await http.put("/v1/sharing", json={"enabled": True}, headers={"host": host})
    assert reply.status_code == 421
    assert backend.sharing is False


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/units/", 404),
        ("GET", "/v1/../v1/status", 404),
        ("POST", "/v1/status", 405),
        ("GET", "/v1/sharing", 405),
        ("POST", "/v1/units/a-b/cancel", 400),
        ("POST", f"/v1/units/{'a' * 65}/cancel", 400),
    ],
)
async def test_unknown_paths_and_methods_are_errors_with_a_sentence(
    backend: MemoryBackend, socket_path: Path, method: str, path: str, status: int
) -> None:
    # By hand: httpx would tidy the path up.
    stream = await trio.open_unix_socket(str(socket_path))
    async with stream:
        head = f"{method} {path} HTTP/1.1\r\nHost: nextgpu\r\nConnection: close\r\n\r\n"
        await stream.send_all(head.encode())
        reply = b"".join([bytes(part) async for part in stream])
    assert reply.startswith(f"HTTP/1.1 {status} ".encode())
    assert b'"error":"' in reply


@pytest.mark.parametrize(
    ("error", "status"), [(NoPeerFound(), 404), (Refused("Not now."), 403), (IntegrityError(), 502)]
)
async def test_an_error_of_ours_keeps_its_sentence_and_exit_code(
    http: httpx.AsyncClient,
    backend: MemoryBackend,
    error: NoPeerFound | Refused | IntegrityError,
    status: int,
) -> None:
    backend.failure = error
    reply = await http.get("/v1/peers")
    assert reply.status_code == status
    assert reply.json() == {"schema": 1, "error": str(error), "exit_code": error.exit_code}


async def test_a_fault_shows_and_logs_no_message(
    http: httpx.AsyncClient, backend: MemoryBackend
) -> None:
    backend.failure = ValueError("the secret")
    with structlog.testing.capture_logs() as logs:
        reply = await http.get("/v1/status")
        # The reply goes out first.
        await trio.testing.wait_all_tasks_blocked()
    assert (reply.status_code, reply.json()["exit_code"]) == (500, 1)
    assert "secret" not in reply.text
    assert logs == [
        {
            "event": "api.request_failed",
            "log_level": "error",
            "endpoint": "status",
            "error": "ValueError",
        }
    ]
    assert (await http.get("/v1/status")).status_code == 200


async def test_a_slow_answer_ends_at_the_deadline(
    socket_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(MemoryBackend):
        async def peers(self, need: object) -> None:  # type: ignore[override]
            await trio.sleep_forever()

    monkeypatch.setattr(server, "REQUEST_DEADLINE_S", 0.05)
    await nursery.start(server.run, Stuck(), socket_path)
    transport = httpx.AsyncHTTPTransport(uds=str(socket_path))
    async with httpx.AsyncClient(transport=transport, base_url="http://nextgpu") as http:
        reply = await http.get("/v1/peers")
    assert (reply.status_code, reply.json()["exit_code"]) == (504, 6)


async def test_garbage_on_the_socket_ends_that_connection_only(
    http: httpx.AsyncClient, socket_path: Path
) -> None:
    stream = await trio.open_unix_socket(str(socket_path))
    async with stream:
        await stream.send_all(bytes(range(256)) * 256)
        with trio.fail_after(5):
            assert b"".join([bytes(part) async for part in stream]).startswith(b"HTTP/1.1 400")
    assert (await http.get("/v1/status")).status_code == 200


async def test_a_websocket_is_refused(backend: MemoryBackend, socket_path: Path) -> None:
    stream = await trio.open_unix_socket(str(socket_path))
    async with stream:
        await stream.send_all(
            b"GET /v1/status HTTP/1.1\r\nHost: nextgpu\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        with trio.fail_after(5):
            assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 403")


async def test_only_the_owner_can_open_the_socket(
    backend: MemoryBackend, socket_path: Path
) -> None:
    info, directory = [await trio.Path(p).stat() for p in (socket_path, socket_path.parent)]
    assert stat.S_IMODE(info.st_mode) == 0o600
    assert stat.S_IMODE(directory.st_mode) == 0o700


async def test_the_socket_file_goes_with_the_server(socket_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, MemoryBackend(), socket_path)
        assert await trio.Path(socket_path).is_socket()
        nursery.cancel_scope.cancel()
    assert not await trio.Path(socket_path).exists()


async def test_cancelling_in_the_middle_of_a_request_leaves_nothing(socket_path: Path) -> None:
    entered = trio.Event()

    class Waiting(MemoryBackend):
        async def peers(self, need: object) -> None:  # type: ignore[override]
            entered.set()
            await trio.sleep_forever()

    async def ask() -> None:
        stream = await trio.open_unix_socket(str(socket_path))
        async with stream:
            await stream.send_all(b"GET /v1/peers HTTP/1.1\r\nHost: nextgpu\r\n\r\n")
            await stream.receive_some(1)

    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, Waiting(), socket_path)
        nursery.start_soon(ask)
        with trio.fail_after(5):
            await entered.wait()
        nursery.cancel_scope.cancel()
    assert not await trio.Path(socket_path).exists()
