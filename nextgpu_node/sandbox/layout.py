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
_PCI_VENDORS: Final = ("0x10de", "0x1002", "0x8086")  # NVIDIA, AMD, Intel
_PCI_DISPLAY: Final = "0x03"
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
        gpu_sys_trees=_gpu_sys_trees(),
        uid=os.geteuid(),
        landlock_abi=syscalls.landlock_abi(),
    )


def _package_directory(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0]))


def _gpu_devices() -> tuple[str, ...]:
    """Compute nodes of every vendor: NVIDIA's without modeset and caps, AMD's kfd, render nodes.
    Never a display's (card*); policy.py takes from them what one worker's driver needs."""
    names = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "kfd")
    nodes = [
        *Path("/dev").glob("nvidia[0-9]*"),
        *Path("/dev/dri").glob("renderD*"),
        *(Path("/dev") / name for name in names),
    ]
    return tuple(sorted(str(node) for node in nodes if node.is_char_device()))


def _gpu_sys_trees() -> tuple[str, ...]:
    """How the driver finds its cards and counts processors and memory nodes; nothing of disks,
    network interfaces or firmware."""
    cards = [path for path in Path("/sys/bus/pci/devices").glob("*") if _is_card(path)]
    if not cards:
        return ()
    trees = {str(card.resolve()) for card in cards}
    trees |= {"/sys/bus/pci/devices", "/sys/devices/system/cpu", "/sys/devices/system/node"}
    trees |= {"/sys/devices/system/memory", "/sys/module/nvidia", "/sys/module/nvidia_uvm"}
    trees |= {"/sys/class/kfd", "/sys/class/drm", "/sys/module/amdgpu"}
    return tuple(sorted(path for path in trees if Path(path).is_dir()))


def _is_card(device: Path) -> bool:
    try:
        vendor = (device / "vendor").read_text().strip()
        kind = (device / "class").read_text()
    except OSError:
        return False
    return vendor in _PCI_VENDORS and kind.startswith(_PCI_DISPLAY)


def _gpu_libraries() -> tuple[str, ...]:
    found = [
        str(path)
        for directory in _LIBRARY_DIRECTORIES
        for pattern in ("libcuda.so*", "libnvidia-*.so*", "libdrm*.so*")
        for path in Path(directory).glob(pattern)
    ]
    return tuple(sorted(found))
