"""`nextgpud`: the daemon's entry point.

nextgpud [--home DIR] [--config FILE] [--set section.key=value]… [--ready-fd N]
         [--passphrase-fd N]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import structlog
import trio

from nextgpu_node import logs, passphrases
from nextgpu_node.config import Config, load_config
from nextgpu_node.daemon.node import Node
from nextgpu_node.daemon.sdnotify import Notifier
from nextgpu_node.errors import NextGPUError, UsageError
from nextgpu_node.identity import Identity, from_key_file, load_or_create
from nextgpu_node.keyfile import SEALED_BYTES
from nextgpu_node.paths import Paths, find_paths

log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns the exit code."""
    arguments = _parser().parse_args(argv)
    notifier = Notifier(os.environ)
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        os.environ.pop(name, None)
    exit_code = 0
    try:
        paths, config = _settings(arguments)
        logs.configure(config.log.level, config.log.format, sys.stderr)
        identity = _identity(config, paths, arguments.passphrase_fd)
        trio.run(_run, Node(config, paths, identity), identity, notifier, arguments.ready_fd)
    except* NextGPUError as group:
        error = _first(group)
        print(f"nextgpud: {error}", file=sys.stderr)
        exit_code = error.exit_code
    return exit_code


async def _run(node: Node, identity: Identity, notifier: Notifier, ready_fd: int | None) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(node.run)
            nursery.start_soon(notifier.run_watchdog)
            # What start-up left behind is never looked at again: keep the collector off it.
            gc.collect()
            gc.freeze()
            notifier.ready("serving")
            _report_ready(ready_fd, identity.peer_id, addresses)
            log.info("node.started", peer_id=identity.peer_id)
            async for _ in signals:
                break
            log.info("node.stopping")
            notifier.stopping()
            await node.stop_lending()
            nursery.cancel_scope.cancel()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nextgpud", description="The NextGPU daemon. Use `nextgpu up` to start it by hand."
    )
    parser.add_argument("--version", action="version", version=version("nextgpu-node"))
    parser.add_argument("--home", type=Path, help="keep every file below this directory")
    parser.add_argument("--config", type=Path, help="settings file to use")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting"
    )
    parser.add_argument(
        "--passphrase-fd", type=int, metavar="N", help="read the key's passphrase from here"
    )
    parser.add_argument("--ready-fd", type=int, help="write one line of JSON here when ready")
    return parser


def _settings(arguments: argparse.Namespace) -> tuple[Paths, Config]:
    paths = find_paths(os.environ, home=arguments.home)
    if arguments.config is not None:
        if not arguments.config.is_file():
            raise UsageError(f"{arguments.config}: there is no such settings file.")
        paths = replace(paths, config_file=arguments.config)
    overrides = dict(_override(text) for text in arguments.set)
    return paths, load_config(paths, overrides=overrides, environ=os.environ)


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: write it as section.key=value.")
    return key, value


def _identity(config: Config, paths: Paths, passphrase_fd: int | None) -> Identity:
    if config.node.identity == "ephemeral":
        return Identity.ephemeral()
    passphrase = passphrases.for_daemon(passphrase_fd, os.environ)
    credential = passphrases.read_credential(
        os.environ, passphrases.IDENTITY_CREDENTIAL, SEALED_BYTES
    )
    if credential is not None:
        return from_key_file(credential, paths, passphrase)
    return load_or_create(paths, passphrase)


def _report_ready(ready_fd: int | None, peer_id: str, addresses: list[str]) -> None:
    if ready_fd is None:
        return
    with os.fdopen(ready_fd, "w") as pipe:
        pipe.write(json.dumps({"peer_id": peer_id, "addresses": addresses}) + "\n")


def _first(group: BaseExceptionGroup[NextGPUError]) -> NextGPUError:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, NextGPUError)
    return inner


if __name__ == "__main__":
    sys.exit(main())
