"""What a submitter's program imports.  Loaded on first use: importing this is light.

from nextgpu_node.sdk import export, open_client
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextgpu_node.graph.artifact import Program
    from nextgpu_node.graph.export import export
    from nextgpu_node.graph.local import run_local
    from nextgpu_node.sdk.client import Client, open_client
    from nextgpu_node.sdk.unit import Needs, RemoteUnit

__all__ = ["Client", "Needs", "Program", "RemoteUnit", "export", "open_client", "run_local"]

_HOME_OF = {
    "Client": "nextgpu_node.sdk.client",
    "Needs": "nextgpu_node.sdk.unit",
    "Program": "nextgpu_node.graph.artifact",
    "RemoteUnit": "nextgpu_node.sdk.unit",
    "export": "nextgpu_node.graph.export",
    "open_client": "nextgpu_node.sdk.client",
    "run_local": "nextgpu_node.graph.local",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
