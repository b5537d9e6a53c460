"""DHT nodes of an earlier run, one multiaddr a line, if the owner lets us remember them.

With them a node finds the network again although its bootstrap nodes have gone.  They are servers
of the DHT, a public part of the network; whom this node lent to or borrowed from is not in here.
"""

from __future__ import annotations

import random
from pathlib import Path

import structlog
import trio

from nextgpu_node.errors import NextGPUError
from nextgpu_node.files import write_whole
from nextgpu_node.p2p.network import Network

log = structlog.get_logger()

_MAX_PEERS = 100
_MAX_FILE_BYTES = 64 * 1024
_SAVE_S = 600.0
_FIRST_SAVE_S = 60.0
_lots = random.SystemRandom()


def load_known_peers(path: Path, *, allowed: bool) -> tuple[str, ...]:
    """What an earlier run left.  Where the owner does not want it, it is deleted."""
    try:
        if not allowed:
            path.unlink(missing_ok=True)
            return ()
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ()
    return tuple(line for line in text.splitlines() if line)[:_MAX_PEERS]


async def save_known_peers_forever(network: Network, path: Path) -> None:
    """Write them down now and then, until cancelled."""
    await trio.sleep(_FIRST_SAVE_S)
    while True:
        save_known_peers(network, path)
        await trio.sleep(_SAVE_S)


def save_known_peers(network: Network, path: Path) -> None:
    """Replace the file, unless there is nobody: an isolated node keeps what it knew."""
    known = network.known_peers()
    if not known:
        return
    chosen = _lots.sample(known, min(len(known), _MAX_PEERS))
    try:
        write_whole(path, ["\n".join([*chosen, ""]).encode()], force=True)
    except NextGPUError:
        log.warning("known_peers.not_saved")
