"""The main job on a real card.  Skipped, with the reason, where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import trio

from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import run_local
from nextgpu_node.hostinfo.devices import list_devices
from nextgpu_node.sandbox.policy import WorkerPolicy
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import Offered, ReceiptVerified, StepResult
from nextgpu_protocol.framing import FrameKind, encode_frame
from tests.support.card_worker import TEXT
from tests.support.nodes import network_of_three
from tests.support.sandbox import read_frame, running_launcher

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
                if isinstance(event, ReceiptVerified):
                    wiped = {step.name: step.held for step in event.receipt.wipe}
                    assert wiped["gpu-memory-cleared"]
                if isinstance(event, StepResult):
                    for output, value in event.tensors.items():
                        # TF32 and other sums: close, not equal.
                        torch.testing.assert_close(value, here[output], rtol=1e-3, atol=1e-3)


async def test_what_a_unit_left_on_the_card_is_not_found_by_the_next_process(
    tmp_path: Path,
) -> None:
    """Killed with 64 MiB of a text on the card.  The driver clears as well: both are tested."""
    policy = WorkerPolicy(device="cuda:0", device_node=0)
    async with running_launcher(tmp_path, "tests.support.card_worker") as launcher:
        worker = await launcher.spawn(policy)
        await worker.stream.send_all(encode_frame(FrameKind.DATA, b"write"))
        with trio.fail_after(120):
            assert await read_frame(worker.stream) == (FrameKind.DATA, b"written")
        steps = dict((await worker.finish()).steps)
    assert steps["gpu-memory-cleared"]
    search = [sys.executable, "-m", "nextgpu_node.privacy.gpu_memory"]
    told = await trio.run_process(
        search, stdin=json.dumps([TEXT.decode()]).encode(), capture_stdout=True
    )
    found = json.loads(told.stdout)
    assert found["searched_bytes"] > 0
    assert found["found"] == 0
