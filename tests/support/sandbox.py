"""Helpers of the sandbox tests: a launcher in a nursery, orders to the attack worker."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from nextgpu_node.sandbox.launcher import Launcher, Worker
from nextgpu_node.sandbox.policy import MIB, SHARED_UID_SLACK, Tier, WorkerPolicy
from nextgpu_protocol.framing import FrameDecoder, FrameKind, encode_frame

ECHO_WORKER = "tests.support.sandbox_worker"
ATTACK_WORKER = "tests.support.attack_worker"
TORCH_WORKER = "tests.support.torch_worker"

SMALL = WorkerPolicy(
    memory_bytes=192 * MIB,
    tmpfs_bytes=8 * MIB,
    tmpfs_inodes=64,
    max_threads=6,
    wall_s=60,
    cpu_s=30,
)


@asynccontextmanager
async def running_launcher(
    directory: Path, module: str = ECHO_WORKER, **options: Any
) -> AsyncIterator[Launcher]:
    launcher = Launcher(runtime_dir=directory, worker_module=module, **options)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            await nursery.start(launcher.run)
        yield launcher
        nursery.cancel_scope.cancel()


async def read_frame(stream: trio.abc.ReceiveStream) -> tuple[FrameKind, bytes]:
    decoder = FrameDecoder()
    while data := await stream.receive_some():
        decoder.feed(data)
        for frame in decoder:
            return frame
    raise EOFError


async def order(worker: Worker, attack: str, facts: dict[str, Any]) -> None:
    body = json.dumps({"attack": attack, "facts": facts}).encode()
    await worker.stream.send_all(encode_frame(FrameKind.ASSIGN, body))


async def verdict(worker: Worker, attack: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What came of one attack; a worker that died of it says {"open": False, "died": True}."""
    await order(worker, attack, facts)
    try:
        with trio.fail_after(30):
            _, body = await read_frame(worker.stream)
    except (EOFError, trio.BrokenResourceError):
        return {"open": False, "died": True, "detail": "the worker died"}
    answer: dict[str, Any] = json.loads(body)
    return answer


@contextmanager
def attacked_host(
    directory: Path, *, filtered: bool = True, thread_slack: int = 0
) -> Iterator[dict[str, Any]]:
    """A host with something to find: a secret file, listeners of three kinds.  Yields the facts."""
    secret = directory / "secret"
    secret.write_text("canary-5d1f")
    secret.chmod(0o600)
    abstract = f"nextgpu-test-{os.getpid()}"
    unix_path = str(directory / "listener")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        named.bind(unix_path)
        named.listen()
        hidden.bind("\0" + abstract)
        hidden.listen()
        yield {
            "secret_path": str(secret),
            "scratch_path": str(directory / "planted"),
            "daemon_pid": os.getpid(),
            "tcp_port": tcp.getsockname()[1],
            "unix_path": unix_path,
            "abstract_name": abstract,
            "filtered": filtered,
            "host_name": socket.gethostname(),
            "site_packages": str(Path(trio.__file__).parents[1]),
            "max_threads": SMALL.max_threads,
            "thread_slack": thread_slack,
            "memory_bytes": SMALL.memory_bytes,
            "tmpfs_bytes": SMALL.tmpfs_bytes,
            "tmpfs_inodes": SMALL.tmpfs_inodes,
        }


async def attack_all(
    directory: Path, *, tier: Tier = "A", policy: WorkerPolicy = SMALL
) -> dict[str, dict[str, Any]]:
    """The verdict on every attack that leaves its worker alive, under one profile."""
    # A worker that shares its owner's uid is held less exactly.
    slack = SHARED_UID_SLACK if tier == "C" and os.geteuid() != 0 else 0
    with attacked_host(directory, thread_slack=slack) as facts:
        async with running_launcher(directory, ATTACK_WORKER, tier=tier) as launcher:
            return await attack_with(launcher, facts, policy)


async def attack_with(
    launcher: Launcher, facts: dict[str, Any], policy: WorkerPolicy = SMALL
) -> dict[str, dict[str, Any]]:
    """One worker after the other: an attack that kills its own does not end the suite."""
    from tests.support import attack_worker

    verdicts = {}
    worker = await launcher.spawn(policy)
    for name in attack_worker.ATTACKS:
        verdicts[name] = await verdict(worker, name, facts)
        if verdicts[name].get("died"):
            await worker.finish()
            worker = await launcher.spawn(policy)
    await worker.finish()
    return verdicts
