"""import nextgpu_node as nextgpu: the public names of nextgpu_node.sdk, loaded on first use.

Importing this package imports nothing else, or every worker and daemon would carry all of it.
"""

from importlib import import_module
from typing import Any

_SDK = "nextgpu_node.sdk"


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in import_module(_SDK).__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_SDK), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module(_SDK).__all__})
