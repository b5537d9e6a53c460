"""Maps over providers in this process: many, full, lost, back again, or all of them saying no."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from nextgpu_node.core.schedule import ScheduleLimits
from nextgpu_node.errors import Refused
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.sdk.map_stream import ShardResult, map_stream
from nextgpu_node.sdk.mapping import MapOptions
from nextgpu_protocol.errors import ErrorCode
from tests.support.farm import FarmPeer, open_farm


@pytest.fixture(scope="module")
def twice() -> Program:
    return export(lambda x: x * 2, (torch.ones(2),))


async def collect(
    directory: Path,
    peers: list[FarmPeer],
    program: Program,
    count: int,
    options: MapOptions | None = None,
    on_result: Callable[[ShardResult], None] = lambda result: None,
    **more: Any,
) -> list[ShardResult]:
    name = program.spec.xs[0].name
    shards = [{name: torch.full((2,), float(k))} for k in range(count)]
    found = []
    with trio.fail_after(60):
        async with open_farm(peers, directory) as farm:
            client: Any = SimpleNamespace(
                api=SimpleNamespace(peers=farm.ask),
                paths=SimpleNamespace(units_socket=farm.socket_path),
            )
            async with map_stream(client, program, shards, options, **more) as results:
                async for result in results:
                    on_result(result)
                    found.append(result)
    return found


def assert_right(results: list[ShardResult], count: int) -> None:
    assert [result.index for result in results] == list(range(count))
    assert [result.tensors["output"].tolist() for result in results] == [
        [2.0 * k, 2.0 * k] for k in range(count)
    ]


async def test_peers_that_die_and_come_back_cost_no_result(tmp_path: Path, twice: Program) -> None:
    peers = [FarmPeer(slots=2, delay_s=0.01) for _ in range(6)]

    def disturb(result: ShardResult) -> None:
        if result.index in (20, 40):
            peers[result.index // 20].kill()
        if result.index in (60, 80):
            peers[result.index // 20 - 2].up = True

    results = await collect(tmp_path, peers, twice, 120, on_result=disturb)
    assert_right(results, 120)


async def test_a_map_over_many_peers_has_a_bounded_number_of_units_open(
    tmp_path: Path, twice: Program
) -> None:
    peers = [FarmPeer(slots=4) for _ in range(40)]
    most = 0

    def count(_: ShardResult) -> None:
        nonlocal most
        most = max(most, sum(peer.open_units for peer in peers))

    options = MapOptions(limits=ScheduleLimits(at_once=16))
    results = await collect(tmp_path, peers, twice, 150, options, count)
    assert_right(results, 150)
    assert 8 <= most <= 16


async def test_two_thousand_peers_that_refuse_cost_the_patience_and_one_sentence(
    tmp_path: Path, twice: Program
) -> None:
    peers = [FarmPeer(refuse=ErrorCode.NOT_ALLOWED) for _ in range(2000)]
    options = MapOptions(limits=ScheduleLimits(patience_s=2, first_patience_s=2))
    began_s = time.monotonic()
    results = await collect(tmp_path, peers, twice, 50, options, return_exceptions=True)
    assert time.monotonic() - began_s < 20
    assert [result.index for result in results] == list(range(50))
    for result in results:
        assert isinstance(result.error, Refused)
        assert "2000 known" in str(result.error)
        assert "does not serve this submitter" in str(result.error)
        assert len(str(result.error)) < 300
