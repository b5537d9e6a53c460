"""Where this host keeps what a worker reads: the one look at the host that a plan needs."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Final

from nextgpu_node.sandbox import syscalls
from nextgpu_node.sandbox.policy import HostLayout

_OUR_PACKAGES: Final = ("nextgpu_node", "nextgpu_protocol")
_LIBRARY_DIRECTORIES: Final = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
)


def read_layout() -> HostLayout:
    """The layout of the interpreter that runs this."""
    stdlib = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    site = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return HostLayout(
        stdlib=tuple(sorted(path for path in stdlib if Path(path).is_dir())),
        site_packages=tuple(path for path in site if Path(path).is_dir()),
        packages=tuple(_package_directory(name) for name in _OUR_PACKAGES),
        gpu_devices=_gpu_devices(),
        gpu_libraries=_gpu_libraries(),
        uid=os.geteuid(),
        landlock_abi=syscalls.landlock_abi(),
    )


def _package_directory(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0]))


def _gpu_devices() -> tuple[str, ...]:
    """NVIDIA's compute nodes; never modeset, caps or the display's."""
    names = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
    nodes = [*Path("/dev").glob("nvidia[0-9]*"), *(Path("/dev") / name for name in names)]
    return tuple(sorted(str(node) for node in nodes if node.is_char_device()))


def _gpu_libraries() -> tuple[str, ...]:
    found = [
        str(path)
        for directory in _LIBRARY_DIRECTORIES
        for pattern in ("libcuda.so*", "libnvidia-*.so*")
        for path in Path(directory).glob(pattern)
    ]
    return tuple(sorted(found))
