"""Units that do their worst until they are ended, and what their host's daemon answers meanwhile.

Functions, since a program can not: its calls are bounded before they run (graph/bounds.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import trio

from nextgpu_node.errors import NextGPUError
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sdk.client import Client, open_client
from nextgpu_node.sdk.python_unit import PythonUnit, encode_function
from nextgpu_node.sdk.unit import Needs, open_unit
from tests.support.nodes import Swarm

POLL_S: Final = 0.02


def _processor() -> None:
    """As many threads as there may be, none of which ever waits."""
    import threading

    def spin() -> None:
        import torch

        x = torch.rand(256, 256)
        while True:
            x = (x @ x).tanh()

    for _ in range(64):
        try:
            threading.Thread(target=spin, daemon=True).start()
        except RuntimeError:
            break
    spin()


def _memory() -> None:
    """All that there is, written to, let go of, and again."""
    while True:
        held = []
        try:
            while True:
                held.append(bytearray(b"\1") * (16 << 20))
        except MemoryError:
            held.clear()


def _threads() -> None:
    """Threads that end at once, so that there are always new ones."""
    import threading

    while True:
        try:
            threading.Thread(target=int).start()
        except RuntimeError:
            continue


def _disk() -> None:
    """The scratch filled to its last byte and its last file, emptied, and again."""
    from pathlib import Path

    files = [Path(f"/tmp/bomb-{number}") for number in range(2000)]
    while True:
        try:
            for file in files:
                file.write_bytes(b"\1" * (1 << 20))
        except OSError:
            for file in files:
                file.unlink(missing_ok=True)


def _output() -> None:
    """Lines without end."""
    line = "\1" * 65536
    while True:
        print(line)


BOMBS: Final[dict[str, Callable[[], None]]] = {
    "processor": _processor,
    "memory": _memory,
    "threads": _threads,
    "disk": _disk,
    "output": _output,
}


async def status_under_bombs(nodes: Swarm) -> tuple[list[float], dict[str, str]]:
    """(seconds that each `status` of the provider took, how each bomb ended for its submitter)."""
    endings: dict[str, str] = {}
    taken: list[float] = []

    async def one(name: str, function: Callable[[], None]) -> None:
        endings[name] = await run_function(client, function)

    async with (
        open_client(nodes.submitter.paths) as client,
        ApiClient(nodes.providers[0].paths.api_socket) as api,
        trio.open_nursery() as nursery,
    ):
        await _until_functions_run(client)
        for name, function in BOMBS.items():
            nursery.start_soon(one, name, function)
        while len(endings) < len(BOMBS):
            taken.append(await time_status(api))
            await trio.sleep(POLL_S)
    return taken, endings


async def _until_functions_run(client: Client) -> None:
    """The launcher of functions imports torch once programs are lent already."""
    with trio.fail_after(120):
        while await run_function(client, abs, -1) != "done":  # noqa: ASYNC110  another process
            await trio.sleep(1)


async def time_status(api: ApiClient) -> float:
    """Seconds from the question to the answer."""
    began_s = time.perf_counter()
    await api.status()
    return time.perf_counter() - began_s


async def run_function(client: Client, function: Callable[..., Any], *args: Any) -> str:
    """The name of the error with which its unit ended, or "done"."""
    (peer,) = await client.find_peers(Needs())
    sock = client.paths.units_socket
    try:
        async with open_unit(sock, peer, Needs(), table_version=1, unit_class=PythonUnit) as unit:
            assert isinstance(unit, PythonUnit)
            await unit.start_calls()
            await unit.send_calls([encode_function(function, args, {})])
            await unit.close_input()
            async for _ in unit.events():
                pass
    except NextGPUError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "done"
