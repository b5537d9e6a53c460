"""One network of three daemons for the end-to-end tests, and programs to run on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.sandbox.probe import probe
from tests.support.nodes import Trio, network_of_three
from tests.support.raw_peer import RawPeer, raw_peer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the sandbox there is no provider: say so instead of failing one by one."""
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    if mine and probe().tier != "A":
        for item in mine:
            item.add_marker(pytest.mark.skip(reason="needs the full sandbox (tier A)"))


@pytest.fixture(scope="session")
def nodes() -> Iterator[Trio]:
    with network_of_three() as trio:
        yield trio


@pytest.fixture(scope="session")
def tokens_only() -> Iterator[Trio]:
    """A provider that serves those with a token, and takes large units."""
    settings = {
        "sharing.serve": "tokens",
        "sharing.max_concurrent_units": "2",
        "sharing.max_memory": "4 GiB",
        "sharing.max_input": "4 GiB",
        "sharing.max_output": "4 GiB",
        "sharing.max_unit_seconds": "600",
    }
    with network_of_three(settings) as nodes:
        yield nodes


@pytest.fixture
async def peer(nodes: Trio) -> AsyncIterator[RawPeer]:
    """A hand-driven submitter; afterwards the provider must be idle again, and serving."""
    async with raw_peer(nodes.provider.ready.peer_id, nodes.provider.ready.address) as raw:
        yield raw
    await nodes.wait_idle()


@pytest.fixture(scope="session")
def linear() -> Program:
    """y = x @ w.T + b for x of [2, 4]."""
    torch.manual_seed(0)
    return export(torch.nn.Linear(4, 3), (torch.ones(2, 4),))
