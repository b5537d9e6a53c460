"""Canaries: a marked text goes through the real path; afterwards it must be nowhere.

Searched: the files of both nodes, everything they logged at debug level, and the memory of both
daemons and of the provider's launcher.  The same search is shown to find a planted mark.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch
import trio

from nextgpu_node.graph.export import export
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import StepResult
from tests.support.nodes import Trio

CHUNK_BYTES = 1 << 20


def memory_of(pid: int) -> Iterator[bytes]:
    """Every readable byte of a process, region by region."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode = line.split()[:2]
            if not mode.startswith("r") or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(edge, 16) for edge in span.split("-"))
            yield from read_region(memory, start, end)


def read_region(memory: object, start: int, end: int) -> Iterator[bytes]:
    overlap = b""
    for place in range(start, end, CHUNK_BYTES):
        try:
            memory.seek(place)  # type: ignore[attr-defined]
            data = memory.read(min(CHUNK_BYTES, end - place))  # type: ignore[attr-defined]
        except OSError:
            return
        yield overlap + data
        overlap = data[-64:]


def count_in_memory(pid: int, mark: bytes) -> int:
    return sum(len(re.findall(re.escape(mark), part)) for part in memory_of(pid))


def count_in_files(top: Path, mark: bytes) -> int:
    return sum(file.read_bytes().count(mark) for file in top.rglob("*") if file.is_file())


class Shift(torch.nn.Module):
    """Gives the marked bytes back, shifted: the result holds a mark of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def mark() -> bytes:
    """32 random letters: nothing else on this machine holds them."""
    return bytes(ord("a") + byte % 25 for byte in os.urandom(32))


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root")
async def test_a_unit_leaves_no_trace_in_files_logs_or_memory(nodes: Trio) -> None:
    planted = mark()
    shifted = bytes(byte + 1 for byte in planted)
    many = torch.tensor(list(planted * 500), dtype=torch.uint8)
    program = export(Shift(), (many,))
    step = {program.spec.xs[0].name: many}
    places: dict[str, int] = {}

    async def one_then_wait() -> AsyncIterator[Mapping[str, torch.Tensor]]:
        yield step
        await seen.wait()

    seen = trio.Event()
    async with (
        open_client(nodes.submitter.paths) as client,
        client.run(program, one_then_wait()) as events,
    ):
        async for event in events:
            if isinstance(event, StepResult):
                (y,) = event.tensors.values()
                assert bytes(y.tolist()) == shifted * 500
                # While the unit still runs: the worker has the text, nobody else may.
                places |= search_memory(nodes, "during", planted, shifted)
                seen.set()
    await nodes.wait_idle()
    places |= search_memory(nodes, "after", planted, shifted)
    for node in (nodes.first, nodes.provider, nodes.submitter):
        for what in (planted, shifted):
            places[f"files of {node.home.name}"] = count_in_files(node.home, what)
    places["logs"] = nodes.log.read_bytes().count(planted) + nodes.log.read_bytes().count(shifted)
    assert {place: count for place, count in places.items() if count} == {}


def search_memory(nodes: Trio, when: str, *marks: bytes) -> dict[str, int]:
    (launcher,) = psutil.Process(nodes.provider.pid).children()
    processes = {
        "provider's daemon": nodes.provider.pid,
        "submitter's daemon": nodes.submitter.pid,
        "launcher": launcher.pid,
    }
    return {
        f"{name} {when}": sum(count_in_memory(pid, what) for what in marks)
        for name, pid in processes.items()
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root")
async def test_the_search_finds_a_mark_that_is_there() -> None:
    planted = mark()
    kept = bytearray(planted * 3)
    assert count_in_memory(os.getpid(), planted) >= 3
    assert kept


async def test_logs_at_debug_level_hold_no_addresses_and_no_paths(nodes: Trio) -> None:
    text = nodes.log.read_text()
    assert "node.started" in text
    assert "/ip4/" not in text
    assert "127.0.0.1" not in text
    assert str(nodes.provider.home) not in text
