"""Pictures of the dashboard for docs/web.md: python tests/web/screenshots.py DIRECTORY.

Two nodes on loopback lend to each other: the one whose dashboard is open runs a unit of the other,
and has run jobs on it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
import trio
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from nextgpu_node.cli.processes import DaemonProcess, run_cli, wait_until
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import StepResult
from tests.support.nodes import LENDING, has_peer
from tests.web.scene import chromium, drive, open_dashboard, sharing

_SETTLE_MS = 700
_HISTORY_S = 12


# A picture of each page takes a while on a busy machine, and a unit runs meanwhile.
_SETTINGS = {**LENDING, "sharing.max_unit_seconds": "900", "sharing.max_concurrent_units": "2"}


def main() -> None:
    directory = Path(sys.argv[1]).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="ngpu-shots-"))
    try:
        with ExitStack() as stack:
            first = DaemonProcess(work / "home", settings={**_SETTINGS, "web.port": "0"})
            bootstrap = [stack.enter_context(first).wait_ready().address]
            other = DaemonProcess(work / "other", bootstrap=bootstrap, settings=_SETTINGS)
            stack.enter_context(other).wait_ready()
            wait_until(lambda: sharing(first)["active"] and has_peer(first), 90, "both nodes")
            wait_until(lambda: has_peer(other), 90, "both nodes")
            program = export(torch.nn.Linear(4, 3), (torch.ones(2, 4),))
            _run_jobs(first, work, program)
            trio.run(_while_a_unit_runs, first, other, program, directory)
    finally:
        shutil.rmtree(work)


def _run_jobs(node: DaemonProcess, work: Path, program: Program) -> None:
    program.save(work / "classify.ngp")
    inputs = work / "pictures"
    inputs.mkdir()
    for name in ("harbour", "market", "station", "garden"):
        save_file({program.spec.xs[0].name: torch.rand(2, 4)}, inputs / f"{name}.safetensors")
    program_file, results = str(work / "classify.ngp"), str(work / "results")
    run_cli(node.home, "map", program_file, "--inputs", str(inputs), "--outputs", results)
    one, out = str(inputs / "garden.safetensors"), str(work / "garden.safetensors")
    run_cli(node.home, "run", program_file, "--input", one, "--output", out)


async def _while_a_unit_runs(
    first: DaemonProcess, other: DaemonProcess, program: Program, directory: Path
) -> None:
    seen, url = trio.Event(), open_dashboard(first)
    step = {program.spec.xs[0].name: torch.ones(2, 4)}

    async def steps() -> AsyncIterator[Mapping[str, torch.Tensor]]:
        yield step
        await seen.wait()

    async with open_client(other.paths) as client, client.run(program, steps()) as events:
        async for event in events:
            if isinstance(event, StepResult):
                await trio.to_thread.run_sync(_take, url, directory)
                seen.set()


def _take(url: str, directory: Path) -> None:
    report = drive(
        url, chromium(), shots=str(directory), settle_ms=_SETTLE_MS, first_ms=_HISTORY_S * 1000
    )
    for what in ("errors", "violations", "foreign", "overflows", "unnamed", "contrast"):
        if report[what]:
            print(what, report[what])


if __name__ == "__main__":
    main()
