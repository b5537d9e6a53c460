"""A real node is looked at: figures, events, reports; what it uses can not be deleted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

import torch
import trio

from nextgpu_node.api_types import UnitView
from nextgpu_node.cli.processes import run_cli
from nextgpu_node.graph.artifact import Program
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import StepResult
from tests.support.nodes import Trio


async def test_events_of_a_node_tell_everything_first(nodes: Trio) -> None:
    told: dict[str, object] = {}
    async with (
        ApiClient(nodes.provider.paths.api_socket) as api,
        aclosing(api.events()) as lines,
    ):
        async for line in lines:
            event = json.loads(line)
            told[event["event"]] = event
            if "devices.sampled" in told:
                break
    assert told.keys() >= {"node.status", "sharing.changed", "units.changed", "devices.sampled"}


async def test_figures_of_a_node_name_nobody(nodes: Trio) -> None:
    async with ApiClient(nodes.provider.paths.api_socket) as api:
        text = await api.metrics()
    assert "nextgpu_sharing_active 1.0" in text
    assert "nextgpu_log_events_total" in text
    for secret in secrets_of(nodes):
        assert secret not in text


async def test_the_level_of_the_log_changes_at_run_time(nodes: Trio) -> None:
    async with ApiClient(nodes.submitter.paths.api_socket) as api:
        before = (await api.log()).level
        assert (await api.set_log_level("error")).level == "error"
        assert (await api.log()).level == "error"
        await api.set_log_level(before)


def test_a_bugreport_of_a_running_node_has_no_ids_paths_or_addresses(nodes: Trio) -> None:
    text = json.dumps(run_cli(nodes.provider.home, "bugreport"))
    assert json.loads(text)["daemon"]["sharing"]["enabled"] is True
    for secret in secrets_of(nodes):
        assert secret not in text, secret


def secrets_of(nodes: Trio) -> list[str]:
    three = (nodes.first, nodes.provider, nodes.submitter)
    ids = [node.ready.peer_id for node in three]
    homes = [str(node.home) for node in three]
    return [*ids, *homes, "12D3KooW", "127.0.0.1", "/ip4/", socket.gethostname()]


def test_what_a_running_node_uses_is_not_deleted(nodes: Trio) -> None:
    command = [sys.executable, "-m", "nextgpu_node.cli", "--home", str(nodes.provider.home)]
    done = subprocess.run(
        [*command, "data", "delete", "--all", "--yes"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    assert "Stop nextgpud first" in done.stderr
    assert nodes.provider.paths.identity_file.stat().st_size > 0


async def test_the_owner_sees_how_much_memory_a_lent_unit_holds(
    nodes: Trio, linear: Program
) -> None:
    seen = trio.Event()
    step = {linear.spec.xs[0].name: torch.ones(2, 4)}

    async def steps() -> AsyncIterator[Mapping[str, torch.Tensor]]:
        yield step
        await seen.wait()

    async with (
        open_client(nodes.submitter.paths) as client,
        ApiClient(nodes.provider.paths.api_socket) as api,
        client.run(linear, steps()) as events,
    ):
        async for event in events:
            if isinstance(event, StepResult):
                (unit,) = (await api.units()).units
                assert 10_000_000 < unit.memory_bytes < 2_000_000_000
                seen.set()
    await nodes.wait_idle()
    assert (await api_units(nodes)) == []


async def api_units(nodes: Trio) -> list[UnitView]:
    async with ApiClient(nodes.provider.paths.api_socket) as api:
        return (await api.units()).units
