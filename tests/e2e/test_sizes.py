"""Large units stream: what a daemon holds does not grow with what passes through it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nextgpu_node.api_types import InviteRequest
from nextgpu_node.graph.export import export
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import ReceiptVerified, Started, StepResult
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.limits import GIB, MIB
from nextgpu_protocol.messages import HeldToken, Receipt
from nextgpu_protocol.tokens import parse_token_untrusted
from tests.support.nodes import Trio


class First(torch.nn.Module):
    """Much in, little out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1] + 0


class Repeat(torch.nn.Module):
    """Little in, much out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(self.size) + 0


def status_bytes(pid: int, field: str) -> int:
    """A line of /proc/PID/status (proc(5)), in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


@contextmanager
def growth_of(pids: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """How far each process's peak rises above where it stands now, once the block is left."""
    before = {}
    for name, pid in pids.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is now (proc(5))
        before[name] = status_bytes(pid, "VmRSS")
    growth: dict[str, int] = {}
    yield growth
    growth |= {name: status_bytes(pid, "VmHWM") - before[name] for name, pid in pids.items()}


async def token_for(nodes: Trio) -> HeldToken:
    wanted = InviteRequest(gpu_seconds=4000, expires_s=3600, memory_bytes=4 * GIB)
    async with ApiClient(nodes.provider.paths.api_socket) as api:
        return parse_token_untrusted((await api.invite(wanted)).token)[0]


async def pass_through(
    nodes: Trio, module: torch.nn.Module, x: torch.Tensor
) -> tuple[dict[str, int], Receipt]:
    """One step of `module` on x; growth of the daemons and of this process, and the receipt."""
    program = export(module, (x,))
    step = {program.spec.xs[0].name: x}
    needs = Needs(token=await token_for(nodes))
    pids = {
        "submitter's daemon": nodes.submitter.pid,
        "provider's daemon": nodes.provider.pid,
        "this process": os.getpid(),
    }
    receipt = None
    async with open_client(nodes.submitter.paths) as client:
        gc.collect()
        async with client.run(program, [step], needs) as events:
            async for event in events:
                if isinstance(event, Started):
                    measuring = growth_of(pids)
                    growth = measuring.__enter__()
                if isinstance(event, StepResult):
                    measuring.__exit__(None, None, None)
                if isinstance(event, ReceiptVerified):
                    receipt = event.receipt
    assert receipt is not None
    assert receipt.status == "done"
    return growth, receipt


@pytest.mark.parametrize(
    ("size", "daemon_bound", "end_bound"),
    [
        (256 * MIB, 32 * MIB, 32 * MIB),
        pytest.param(2 * GIB, 64 * MIB, 64 * MIB, marks=pytest.mark.slow),
    ],
    ids=["256-mib", "2-gib"],
)
async def test_what_goes_out_is_held_nowhere_but_at_its_ends(
    tokens_only: Trio, size: int, daemon_bound: int, end_bound: int
) -> None:
    x = torch.ones(size, dtype=torch.uint8)
    growth, receipt = await pass_through(tokens_only, First(), x)
    print(growth, receipt.metering)
    assert growth["submitter's daemon"] < daemon_bound
    assert growth["provider's daemon"] < daemon_bound
    # x itself was here before.
    assert growth["this process"] < end_bound
    # The worker holds the tensor once: torch and the launcher's pages are below 400 MiB.
    assert receipt.metering.peak_memory_bytes < size + 400 * MIB


@pytest.mark.parametrize(
    ("size", "daemon_bound"),
    [
        (256 * MIB, 32 * MIB),
        pytest.param(2 * GIB, 64 * MIB, marks=pytest.mark.slow),
    ],
    ids=["256-mib", "2-gib"],
)
async def test_what_comes_back_is_held_nowhere_but_at_its_ends(
    tokens_only: Trio, size: int, daemon_bound: int
) -> None:
    growth, receipt = await pass_through(
        tokens_only, Repeat(size), torch.ones(1, dtype=torch.uint8)
    )
    print(growth, receipt.metering)
    assert growth["submitter's daemon"] < daemon_bound
    assert growth["provider's daemon"] < daemon_bound
    assert growth["this process"] < size + 64 * MIB
    assert receipt.metering.peak_memory_bytes < size + 400 * MIB
