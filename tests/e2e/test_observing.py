"""A real node is looked at: figures, events, reports; what it uses can not be deleted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import aclosing

from nextgpu_node.cli.processes import run_cli
from nextgpu_node.sdk.api_client import ApiClient
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
