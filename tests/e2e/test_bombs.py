"""A machine that lends to somebody malicious stays its owner's."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from nextgpu_node.sdk.client import open_client
from tests.support.bombs import run_function, status_under_bombs
from tests.support.nodes import Swarm, swarm

pytest.importorskip("cloudpickle")

_SETTINGS = {
    "sharing.max_memory": "512 MiB",
    "sharing.max_unit_seconds": "2",
    "sharing.max_concurrent_units": "5",
    "sharing.warm_workers": "0",
}
# Measured by scripts/bench; here it only has to answer, on a machine with a test run beside it.
_PATIENCE_S = 3.0


def test_the_daemon_answers_while_five_bombs_go_off_and_the_next_unit_runs() -> None:
    with swarm(1, _SETTINGS, allow_python=True) as nodes:
        taken, endings = trio.run(status_under_bombs, nodes)
        assert len(taken) > 5
        assert max(taken) < _PATIENCE_S
        # Each by the limit that it met, and none because it was not let in.
        assert {name: said.partition(":")[0] for name, said in endings.items()} == {
            "processor": "JobTimeout",
            "memory": "JobTimeout",
            "threads": "JobTimeout",
            "disk": "JobTimeout",
            "output": "Refused",
        }
        trio.run(partial(_next_unit_runs, nodes))


async def _next_unit_runs(nodes: Swarm) -> None:
    async with open_client(nodes.submitter.paths) as client:
        assert await run_function(client, abs, -1) == "done"
