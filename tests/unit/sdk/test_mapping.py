"""Maps over providers in this process: many, full, lost, back again, or all of them saying no."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from nextgpu_node.core.choice import PeerRecord
from nextgpu_node.core.schedule import ScheduleLimits
from nextgpu_node.errors import Refused
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.sdk.audit import Audit
from nextgpu_node.sdk.map_stream import ShardResult, map_stream
from nextgpu_node.sdk.mapping import MapOptions
from nextgpu_node.sdk.peer_history import PeerHistory
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
    with trio.fail_after(120):  # what any of these may cost
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
    results = await collect(tmp_path, peers, twice, 50, options, return_exceptions=True)
    assert [result.index for result in results] == list(range(50))
    for result in results:
        assert isinstance(result.error, Refused)
        assert "2000 known" in str(result.error)
        assert "does not serve this submitter" in str(result.error)
        assert len(str(result.error)) < 300


# --- peers that lie ---------------------------------------------------------------------------


def honest_and_liar() -> list[FarmPeer]:
    return [FarmPeer(delay_s=0.002), FarmPeer(delay_s=0.002), FarmPeer(delay_s=0.002, lies=True)]


@pytest.mark.parametrize("audit", [Audit(share=1.0), Audit(canaries=1, seed=1)], ids=str)
async def test_a_liar_is_found_and_none_of_its_results_is_handed_out(
    tmp_path: Path, twice: Program, audit: Audit
) -> None:
    peers = honest_and_liar()
    history = PeerHistory(tmp_path / "history.json")
    options = MapOptions(audit=audit)
    results = await collect(tmp_path, peers, twice, 30, options, ordered=False, history=history)
    assert peers[2].headers, "it was never asked"
    assert_right(sorted(results, key=lambda result: result.index), 30)
    assert peers[2].peer_id not in {result.peer_id for result in results}
    assert {peer for peer, one in history.records().items() if one.distrusted} == {peers[2].peer_id}


async def test_a_liar_that_is_known_is_not_asked_by_a_later_map(
    tmp_path: Path, twice: Program
) -> None:
    history = PeerHistory(tmp_path / "history.json")
    peers = honest_and_liar()
    history.add({peers[2].peer_id: PeerRecord(distrusted=True)})
    assert_right(await collect(tmp_path, peers, twice, 30, history=history), 30)
    assert not peers[2].headers


async def test_without_an_audit_a_liar_is_believed(tmp_path: Path, twice: Program) -> None:
    """Its seals and receipts are in order: this is what an audit is for."""
    peers = honest_and_liar()
    results = await collect(tmp_path, peers, twice, 30)
    lies = [result for result in results if result.tensors["output"][0] != 2.0 * result.index]
    assert {result.peer_id for result in lies} == {peers[2].peer_id}
