"""What a submitter's program imports.  Loaded on first use: importing this is light.

from nextgpu_node.sdk import export, open_client
import nextgpu_node as nextgpu              # nextgpu.export, nextgpu.open_client, …
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextgpu_node.core.choice import Preferences
    from nextgpu_node.errors import (
        DaemonUnreachable,
        IntegrityError,
        JobFailed,
        JobTimeout,
        NextGPUError,
        NoPeerFound,
        OutOfMemory,
        PeerLost,
        ProgramError,
        Refused,
    )
    from nextgpu_node.graph.artifact import Program
    from nextgpu_node.graph.export import export
    from nextgpu_node.graph.generation import generate_program, generation_steps
    from nextgpu_node.graph.local import run_local
    from nextgpu_node.graph.optimizers import (
        SGD,
        Adam,
        AdamW,
        Constant,
        WarmupCosine,
        WarmupLinear,
    )
    from nextgpu_node.graph.trained import load_carry_into
    from nextgpu_node.graph.training import train_step
    from nextgpu_node.sdk.audit import Audit
    from nextgpu_node.sdk.client import Client, open_client
    from nextgpu_node.sdk.executor import Executor, RemoteFuture
    from nextgpu_node.sdk.map_stream import ShardResult
    from nextgpu_node.sdk.mapping import Canary, MapOptions
    from nextgpu_node.sdk.sync import run, run_events, run_steps
    from nextgpu_node.sdk.unit import Needs, RemoteUnit

# One name a line, so that two changes meet seldom.
__all__ = [
    "Adam",
    "AdamW",
    "Audit",
    "Canary",
    "Client",
    "Constant",
    "DaemonUnreachable",
    "Executor",
    "IntegrityError",
    "JobFailed",
    "JobTimeout",
    "MapOptions",
    "Needs",
    "NextGPUError",
    "NoPeerFound",
    "OutOfMemory",
    "PeerLost",
    "Preferences",
    "Program",
    "ProgramError",
    "Refused",
    "RemoteFuture",
    "RemoteUnit",
    "SGD",
    "WarmupCosine",
    "WarmupLinear",
    "ShardResult",
    "export",
    "generate_program",
    "generation_steps",
    "load_carry_into",
    "open_client",
    "run",
    "run_events",
    "run_local",
    "run_steps",
    "train_step",
]

_ERRORS = (
    *("DaemonUnreachable", "IntegrityError", "JobFailed", "JobTimeout", "NextGPUError"),
    *("NoPeerFound", "OutOfMemory", "PeerLost", "ProgramError", "Refused"),
)
_HOME_OF = {
    **dict.fromkeys(_ERRORS, "nextgpu_node.errors"),
    "Adam": "nextgpu_node.graph.optimizers",
    "AdamW": "nextgpu_node.graph.optimizers",
    "Audit": "nextgpu_node.sdk.audit",
    "Canary": "nextgpu_node.sdk.mapping",
    "Client": "nextgpu_node.sdk.client",
    "Constant": "nextgpu_node.graph.optimizers",
    "Executor": "nextgpu_node.sdk.executor",
    "export": "nextgpu_node.graph.export",
    "generate_program": "nextgpu_node.graph.generation",
    "generation_steps": "nextgpu_node.graph.generation",
    "load_carry_into": "nextgpu_node.graph.trained",
    "Needs": "nextgpu_node.sdk.unit",
    "open_client": "nextgpu_node.sdk.client",
    "Program": "nextgpu_node.graph.artifact",
    "RemoteFuture": "nextgpu_node.sdk.executor",
    "RemoteUnit": "nextgpu_node.sdk.unit",
    "MapOptions": "nextgpu_node.sdk.mapping",
    "Preferences": "nextgpu_node.core.choice",
    "ShardResult": "nextgpu_node.sdk.map_stream",
    "run": "nextgpu_node.sdk.sync",
    "run_events": "nextgpu_node.sdk.sync",
    "run_local": "nextgpu_node.graph.local",
    "run_steps": "nextgpu_node.sdk.sync",
    "SGD": "nextgpu_node.graph.optimizers",
    "train_step": "nextgpu_node.graph.training",
    "WarmupCosine": "nextgpu_node.graph.optimizers",
    "WarmupLinear": "nextgpu_node.graph.optimizers",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
