"""The API from both ends: the client that commands use against the server that daemons run."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from nextgpu_node import errors
from nextgpu_node.api_types import PeerNeed
from nextgpu_node.errors import DaemonUnreachable, NextGPUError, UsageError
from nextgpu_node.sdk.api_client import ApiClient
from tests.unit.api.backend import GIB, UNIT_ID, MemoryBackend

_ERRORS = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, NextGPUError) and cls.__module__ == errors.__name__
]


@pytest.fixture
async def api(backend: MemoryBackend, socket_path: Path) -> AsyncIterator[ApiClient]:
    async with ApiClient(socket_path) as api:
        yield api


async def test_every_method_comes_back_typed(api: ApiClient, backend: MemoryBackend) -> None:
    assert await api.status() == backend.status()
    assert (await api.units()) == backend.units()
    need = PeerNeed(kind="cpu", memory_bytes=GIB, limit=7)
    assert (await api.peers(need)).peers[0].peer_id == "12D3KooWPeer"
    assert backend.needs == [need]
    assert await api.cancel_unit(UNIT_ID) is True
    assert await api.cancel_unit(UNIT_ID) is False
    assert (await api.set_sharing(True)).active is True


@pytest.mark.parametrize("cls", _ERRORS, ids=lambda cls: cls.__name__)
async def test_an_error_crosses_with_its_sentence_and_exit_code(
    api: ApiClient, backend: MemoryBackend, cls: type[NextGPUError]
) -> None:
    backend.failure = cls("Such and such.")
    with pytest.raises(NextGPUError, match=r"^Such and such\.$") as caught:
        await api.status()
    assert caught.value.exit_code == cls.exit_code


async def test_no_daemon_is_said_so(socket_path: Path) -> None:
    async with ApiClient(socket_path) as api:
        with pytest.raises(DaemonUnreachable, match="nextgpu up"):
            await api.status()


async def test_a_daemon_that_dies_in_the_middle_is_said_so(
    socket_path: Path, nursery: trio.Nursery
) -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.receive_some(10)
        await stream.aclose()

    await _serve(nursery, socket_path, hang_up)
    async with ApiClient(socket_path) as api:
        with pytest.raises(DaemonUnreachable, match="in the middle"):
            await api.status()


@pytest.mark.parametrize("body", [b"", b"{}", b"not json", b'{"schema": 2, "peers": []}'])
async def test_another_version_is_said_so(
    socket_path: Path, nursery: trio.Nursery, body: bytes
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some(10_000)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    await _serve(nursery, socket_path, answer)
    async with ApiClient(socket_path) as api:
        with pytest.raises(NextGPUError, match="another version"):
            await api.status()


@pytest.mark.parametrize("unit_id", ["", "../sharing", "a/b", "a?b", "a b"])
async def test_an_id_never_becomes_part_of_another_path(api: ApiClient, unit_id: str) -> None:
    with pytest.raises(UsageError):
        await api.cancel_unit(unit_id)


async def _serve(
    nursery: trio.Nursery, path: Path, handler: Callable[[trio.SocketStream], Awaitable[None]]
) -> None:
    await trio.Path(path.parent).mkdir(mode=0o700)
    listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listening.bind(str(path))
    listening.listen()
    listeners = [trio.SocketListener(listening)]
    nursery.start_soon(partial(trio.serve_listeners, handler, listeners))
