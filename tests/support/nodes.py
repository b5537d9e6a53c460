"""A small real network for end-to-end tests: three daemons as processes, on loopback."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

from nextgpu_node.cli.processes import DaemonProcess, run_cli, wait_until
from nextgpu_node.sdk.api_client import ApiClient

LENDING = {
    "sharing.enabled": "true",
    "sharing.max_memory": "1 GiB",
    "sharing.max_input": "64 MiB",
    "sharing.max_output": "64 MiB",
    "sharing.max_unit_seconds": "60",
    "sharing.requests_per_minute": "10000",
    "log.level": "debug",
}


@dataclass(frozen=True, slots=True)
class Trio:
    """A DHT node, a provider and a submitter; `log` is what all three wrote."""

    first: DaemonProcess
    provider: DaemonProcess
    submitter: DaemonProcess
    log: Path

    async def wait_idle(self) -> None:
        """Until nothing is lent and every slot is free: what the owner is told, asked for anew.

        Where lending was off, a launcher imports torch first.
        """
        with trio.fail_after(60):
            async with ApiClient(self.provider.paths.api_socket) as api:
                # Another process's state: there is no event of ours to wait for.
                while not await _is_idle(api):  # noqa: ASYNC110
                    await trio.sleep(0.02)

    async def wait_gone(self, worker_pid: int) -> None:
        """Until the launcher has reaped that worker."""
        with trio.fail_after(5):
            while worker_pid in self.worker_pids():  # noqa: ASYNC110  as above
                await trio.sleep(0.02)

    def worker_pids(self) -> set[int]:
        """The processes below the provider's launcher."""
        (launcher,) = psutil.Process(self.provider.pid).children()
        return {child.pid for child in launcher.children(recursive=True)}


async def _is_idle(api: ApiClient) -> bool:
    return not (await api.units()).units and (await api.status()).sharing.free_slots > 0


@contextmanager
def network_of_three(
    settings: Mapping[str, str] | None = None, borrowing: Mapping[str, str] | None = None
) -> Iterator[Trio]:
    """Started, connected, and the provider lending.  `settings` are its own, besides LENDING."""
    work = Path(tempfile.mkdtemp(prefix="nextgpu-test-"))
    try:
        with ExitStack() as stack:
            log = stack.enter_context((work / "log").open("wb"))
            first = stack.enter_context(DaemonProcess(work / "dht", log=log))
            bootstrap = [first.wait_ready().address]
            lending = {**LENDING, **(settings or {})}
            provider = DaemonProcess(work / "lend", bootstrap=bootstrap, settings=lending, log=log)
            stack.enter_context(provider)
            submitter = DaemonProcess(
                work / "borrow", bootstrap=bootstrap, settings=borrowing, log=log
            )
            stack.enter_context(submitter)
            provider.wait_ready()
            submitter.wait_ready()
            nodes = Trio(first, provider, submitter, work / "log")
            wait_until(lambda: has_peer(submitter), 180, "the provider to be found")
            yield nodes
    finally:
        shutil.rmtree(work)


@dataclass(frozen=True, slots=True)
class Swarm:
    """A DHT node that also submits, and several providers."""

    submitter: DaemonProcess
    providers: list[DaemonProcess]

    async def wait_idle(self) -> None:
        """Until no provider that lives lends anything."""
        for provider in self.providers:
            if provider.returncode is None:
                with trio.fail_after(15):
                    async with ApiClient(provider.paths.api_socket) as api:
                        while not await _is_idle(api):  # noqa: ASYNC110  as above
                            await trio.sleep(0.02)


@contextmanager
def swarm(
    providers: int,
    settings: Mapping[str, str] | None = None,
    *,
    log_file: Path | None = None,
    allow_python: bool = False,
    special: Mapping[int, Mapping[str, str]] | None = None,
    modules: Mapping[int, str] | None = None,
) -> Iterator[Swarm]:
    """Started, connected, and all providers known to the submitter, whose Python they may run.

    `special` settings and other `modules` to run are by the provider's index.
    """
    special, modules = special or {}, modules or {}
    work = Path(tempfile.mkdtemp(prefix="nextgpu-test-"))
    try:
        with ExitStack() as stack:
            log = stack.enter_context((log_file or work / "log").open("wb"))
            submitter = stack.enter_context(DaemonProcess(work / "borrow", log=log))
            bootstrap = [submitter.wait_ready().address]
            lending = {**LENDING, **(settings or {})}
            if allow_python:
                lending["sharing.python_allow"] = submitter.ready.peer_id
            lenders = [
                DaemonProcess(
                    work / f"lend{i}",
                    bootstrap=bootstrap,
                    settings=lending | dict(special.get(i, {})),
                    log=log,
                    module=modules.get(i, "nextgpu_node.daemon.main"),
                )
                for i in range(providers)
            ]
            for lender in lenders:
                # One after the other: each imports torch, and a small machine has few cores.
                stack.enter_context(lender)
                lender.wait_ready()
            wait_until(lambda: count_peers(submitter) == providers, 180, "the providers")
            yield Swarm(submitter, lenders)
    finally:
        shutil.rmtree(work)


def count_peers(submitter: DaemonProcess) -> int:
    """How many providers the submitter finds now."""
    peers = run_cli(submitter.home, "peers", check=False).get("peers")
    return len(peers) if isinstance(peers, list) else 0


def has_peer(submitter: DaemonProcess) -> bool:
    return bool(run_cli(submitter.home, "peers", check=False).get("peers"))
