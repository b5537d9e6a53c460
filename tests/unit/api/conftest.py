from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import trio

from nextgpu_node.api import server
from tests.unit.api.backend import MemoryBackend


@pytest.fixture
def socket_path() -> Iterator[Path]:
    # Not tmp_path: pytest's own directories are too long for the address of a unix socket.
    with TemporaryDirectory(prefix="ngpu-") as directory:
        yield Path(directory) / "run" / "api.sock"


@pytest.fixture
async def backend(nursery: trio.Nursery, socket_path: Path) -> MemoryBackend:
    """Served on `socket_path` until the test ends."""
    backend = MemoryBackend()
    await nursery.start(server.run, backend, socket_path)
    return backend


@pytest.fixture
async def http(backend: MemoryBackend, socket_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(socket_path)), base_url="http://nextgpu"
    ) as client:
        yield client
