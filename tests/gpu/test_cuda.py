"""The main job on a real card.  Skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch

from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import run_local
from nextgpu_node.hostinfo.devices import list_devices
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import Offered, StepResult
from tests.support.nodes import network_of_three

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        all(device.kind != "cuda" for device in list_devices()), reason="no CUDA device here"
    ),
]


async def test_a_program_runs_on_the_card_and_agrees_with_the_processor() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    program = export(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU()), (x,))
    (name,) = (spec.name for spec in program.spec.xs)
    here = run_local(program, x)
    with network_of_three({"sharing.device": "cuda:0"}) as nodes:
        async with (
            open_client(nodes.submitter.paths) as client,
            client.run(program, [{name: x}]) as events,
        ):
            async for event in events:
                if isinstance(event, Offered):
                    assert event.offer.device.kind == "cuda"
                if isinstance(event, StepResult):
                    for output, value in event.tensors.items():
                        # TF32 and other sums: close, not equal.
                        torch.testing.assert_close(value, here[output], rtol=1e-3, atol=1e-3)
