"""The worker: one process, one unit, no network.  Runs inside the sandbox.

    daemon ──ASSIGN──► derive keys          DATA* END ──► open, check, run ──► seal ──► DATA* END
    daemon ◄──HELLO── one-time key

`preload` runs once in the launcher, before any unit and any secret; `serve` runs in each fork.
Everything that comes over the socket comes from a stranger.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping

import numpy as np
import torch

from nextgpu_node.worker.channel import Channel, ChannelClosed
from nextgpu_node.worker.unit import Unit, UnitLimits, WorkerExitCode
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.sealing import KeyPair


def preload() -> str:
    """Load and warm what every unit needs.  Returns the runtime's name for offers."""
    torch.set_num_threads(1)
    _warm_up()
    return f"torch {torch.__version__}"


def reseed() -> None:
    """Forked workers share the launcher's random state: give this one its own."""
    random.seed(os.urandom(16))
    np.random.seed(int.from_bytes(os.urandom(4)))
    torch.manual_seed(int.from_bytes(os.urandom(8)) >> 1)


def serve(sock: socket.socket, limits: Mapping[str, int | str]) -> int:
    """Run one unit over `sock` and return the exit code that tells the daemon how it ended.

    The daemon learns nothing else: what went wrong is said inside the seal.
    """
    channel = Channel(sock)
    key_pair = KeyPair(os.urandom(32))
    try:
        channel.send_hello(key_pair.public)
        unit_limits = UnitLimits.from_mapping(limits)
        torch.set_num_threads(unit_limits.threads)
        return Unit(channel, key_pair, unit_limits).run()
    except ChannelClosed:
        return WorkerExitCode.ABANDONED
    except RemoteProtocolError:
        # Before the seal exists there is nobody who could be told why.
        return WorkerExitCode.PROTOCOL_ERROR


def _warm_up() -> None:
    """Touch the lazy paths once, on one thread: a fork must not inherit a thread pool."""
    KeyPair(bytes(32))
    torch.manual_seed(0)
    with torch.inference_mode():
        x = torch.ones(8, 8)
        torch.nn.functional.linear(x, x).softmax(-1).sum().item()
