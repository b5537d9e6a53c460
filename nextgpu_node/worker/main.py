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
from importlib import import_module

import numpy as np
import torch

from nextgpu_node.graph.machine import Machine
from nextgpu_node.graph.tensors import TensorImageReader, encode_tensors
from nextgpu_node.worker.channel import Channel, ChannelClosed
from nextgpu_node.worker.preemption import Preemption
from nextgpu_node.worker.unit import Unit, UnitLimits, WorkerExitCode
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.program import (
    TENSOR,
    Graph,
    Node,
    ProgramSpec,
    Ref,
    TensorSpec,
    decode_program_untrusted,
    encode_program,
)
from nextgpu_protocol.sealing import KeyPair


def preload() -> str:
    """Load and warm what every unit needs.  Returns the runtime's name for offers."""
    torch.set_num_threads(1)
    # Not used here: some meta kernels (an integer tensor plus a number) import it when they are
    # first called, which would cost each unit 1.1 s.
    import_module("torch._dynamo")
    _warm_up()
    return f"torch {torch.__version__}"


def reseed() -> None:
    """Forked workers share the launcher's random state: give this one its own."""
    random.seed(os.urandom(16))
    np.random.seed(int.from_bytes(os.urandom(4)))
    # Only the CPU's generator: torch.manual_seed also asks every other backend (2 ms), and those
    # start in this process anyway.
    torch.default_generator.manual_seed(int.from_bytes(os.urandom(8)) >> 1)


def serve(sock: socket.socket, limits: Mapping[str, int | str]) -> int:
    """Run one unit over `sock` and return the exit code that tells the daemon how it ended.

    The daemon learns nothing else: what went wrong is said inside the seal.
    """
    channel = Channel(sock)
    key_pair = KeyPair(os.urandom(32))
    preemption = Preemption()
    preemption.install()
    try:
        channel.send_hello(key_pair.public)
        unit_limits = UnitLimits.from_mapping(limits)
        torch.set_num_threads(unit_limits.threads)
        limit_vram(unit_limits)
        return Unit(channel, key_pair, unit_limits, preemption=preemption).run()
    except ChannelClosed:
        return WorkerExitCode.ABANDONED
    except RemoteProtocolError:
        # Before the seal exists there is nobody who could be told why.
        return WorkerExitCode.PROTOCOL_ERROR


def limit_vram(limits: UnitLimits) -> None:
    """No more of the card than its owner gives, whatever the unit's program asks for."""
    kind = limits.device.partition(":")[0]
    if limits.vram_bytes and kind == "cuda":
        total = torch.cuda.get_device_properties(limits.device).total_memory
        fraction = min(1.0, limits.vram_bytes / total)
        torch.cuda.set_per_process_memory_fraction(fraction, limits.device)


def _warm_up() -> None:
    """Go once through everything that a unit does, on one thread, with a program of our own.

    torch imports half of itself at the first call on its meta device (0.6 s), and libsodium starts
    at the first key: paid here, both are shared by every fork.  No thread may start.
    """
    x = TensorSpec("x", "float32", (2,))
    double = Node("aten.add.Tensor", (Ref(0), Ref(0)), (), TENSOR)
    step = Graph((double,), (1,))
    y = TensorSpec("y", "float32", (2,))
    spec = ProgramSpec(min_table_version=1, step=step, xs=(x,), ys=(y,))
    image = b"".join(bytes(piece) for piece in encode_tensors({"x": torch.ones(2)}))
    reader = TensorImageReader(spec.xs, max_bytes=1024)
    reader.feed_untrusted(image)
    machine = Machine(
        decode_program_untrusted(encode_program(spec)), device="cpu", max_live_bytes=1024
    )
    machine.step(reader.finish_untrusted())
    KeyPair(bytes(32))
    torch.manual_seed(0)
