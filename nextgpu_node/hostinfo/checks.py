"""The doctor's checks of the machine: each answers with one line, and one remedy if it fails.

Every check takes what it judges as arguments and is tested on made-up machines; `check_host`
collects the facts of this one.  Nothing here imports torch: its files are only looked at.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nextgpu_node.hostinfo.devices import Device, NvmlState, list_devices, nvml_state
from nextgpu_node.paths import Paths

_GIB = 1024**3
MIN_FREE_DISK_BYTES = 1 * _GIB
# A DHT server keeps some hundred connections, each unit a handful of descriptors.
MIN_OPEN_FILES = 1024
_NVIDIA_PCI_VENDOR = "0x10de"
# A clock before the day this was written is wrong for certain.
_EPOCH = datetime(2026, 11, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `nextgpu doctor`.

    `ok` is True, False, or None where nothing is wrong but something is missing or unknown.
    `remedy` is a sentence with the command to run; "" where there is nothing to do.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class TorchInstall:
    """The torch that is installed; `cuda` is the CUDA release it was built for, "" without."""

    version: str
    cuda: str


def check_host(paths: Paths) -> list[Check]:
    """Every check of this machine, in the order to read them.  Blocks some milliseconds."""
    devices = list_devices(max_age_s=0)
    return [
        check_driver(devices, nvml_state(), nvidia_card_present(Path("/sys/bus/pci/devices"))),
        check_torch(find_torch(), devices),
        check_disk(free_disk_bytes(paths.state_dir)),
        check_clock(datetime.now(UTC), synchronised=clock_synchronised()),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_idle_source(find_idle_sources(Path("/"))),
    ]


def check_remains() -> list[Check]:
    """What this machine may keep of a unit after its worker's end."""
    return [
        check_freed_memory(_read(Path("/proc/cmdline"))),
        check_swap(max(0, len(_read(Path("/proc/swaps")).splitlines()) - 1)),
    ]


# --- judging ----------------------------------------------------------------------------------


def check_driver(devices: Sequence[Device], nvml: NvmlState, card_present: bool) -> Check:
    """Whether an NVIDIA card, if there is one, can be used."""
    cards = [device for device in devices if device.kind == "cuda"]
    if cards:
        names = ", ".join(device.name for device in cards)
        return Check("driver", True, f"NVIDIA {cards[0].driver}: {names}")
    if not card_present:
        return Check("driver", None, "no NVIDIA GPU in this machine; it can lend its CPU")
    if nvml.driver:
        return Check(
            "driver",
            False,
            f"NVIDIA {nvml.driver} is loaded, but no card answers",
            "See `dmesg | grep -i nvrm`; a card in MIG mode needs an instance: nvidia-smi mig -cgi",
        )
    return Check(
        "driver",
        False,
        f"an NVIDIA GPU is here, its driver is not ({nvml.problem})",
        "Install the driver and load it: apt install nvidia-driver, then reboot.",
    )


def check_torch(torch: TorchInstall | None, devices: Sequence[Device]) -> Check:
    """Whether torch is there, and fits the devices.  Only lending and exporting need it."""
    if torch is None:
        return Check(
            "torch",
            None,
            "not installed: this node can not lend, nor export programs",
            "pip install 'nextgpu-node[worker]'",
        )
    has_card = any(device.kind == "cuda" for device in devices)
    if has_card and not torch.cuda:
        return Check(
            "torch",
            False,
            f"{torch.version} was built without CUDA, so the GPU stays unused",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126",
        )
    built = f"CUDA {torch.cuda}" if torch.cuda else "CPU only"
    return Check("torch", True, f"{torch.version} ({built})")


def check_disk(free_bytes: int) -> Check:
    """Room for the node's own state; work units never touch the disk."""
    free = f"{free_bytes / _GIB:.1f} GiB free for the state directory"
    if free_bytes >= MIN_FREE_DISK_BYTES:
        return Check("disk", True, free)
    return Check("disk", False, free, "Free at least 1 GiB there, or move it with --home.")


def check_clock(now: datetime, *, synchronised: bool | None) -> Check:
    """Messages expire, so a clock that is minutes off refuses everyone."""
    remedy = "timedatectl set-ntp true (or install chrony)"
    if now < _EPOCH:
        return Check("clock", False, f"the date is {now:%Y-%m-%d}, which has passed", remedy)
    if synchronised is None:
        return Check("clock", None, "the kernel does not say whether the clock is synchronised")
    if synchronised:
        return Check("clock", True, "synchronised")
    # No failure: a virtual machine's clock often follows its host without the kernel knowing.
    return Check("clock", None, "not synchronised by this kernel; peers allow 5 minutes", remedy)


def check_open_files(soft: int, hard: int) -> Check:
    """RLIMIT_NOFILE of this process; -1 is no limit."""
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
        return Check("open files", True, f"limit {shown}")
    can_raise = hard == resource.RLIM_INFINITY or hard >= MIN_OPEN_FILES
    remedy = f"ulimit -n {MIN_OPEN_FILES}" if can_raise else f"LimitNOFILE={MIN_OPEN_FILES}"
    return Check("open files", False, f"limit {soft}, {MIN_OPEN_FILES} are needed", f"Set {remedy}")


def check_freed_memory(kernel_command_line: str) -> Check:
    """Whether the kernel clears memory as it is freed; otherwise when somebody else gets it."""
    if "init_on_free=1" in kernel_command_line.split():
        return Check("freed memory", True, "cleared at once by the kernel")
    return Check(
        "freed memory",
        None,
        "cleared by the kernel only when another process gets it",
        "To clear it at once, for 3 to 5 % of speed: boot with init_on_free=1 (/etc/default/grub).",
    )


def check_swap(devices: int) -> Check:
    """Whether plaintext of a unit could be written to a disk by the kernel."""
    if not devices:
        return Check("swap", True, "none: a worker's memory stays in memory")
    return Check(
        "swap",
        None,
        "on: without a cgroup of its own, a worker's memory could be written to it",
        "Start nextgpud by systemd with Delegate=memory, or encrypt the swap, or: swapoff -a",
    )


def check_idle_source(sources: Sequence[str]) -> Check:
    """Whether anything here tells when the owner is at the machine; unknown counts as active."""
    if sources:
        return Check("idle source", True, ", ".join(sources))
    return Check(
        "idle source",
        None,
        "none: `only when idle` would never share on this machine",
        "Install systemd-logind (apt install libpam-systemd), or share by schedule.",
    )


# --- looking ----------------------------------------------------------------------------------


def nvidia_card_present(pci_devices: Path) -> bool:
    """Whether a display or 3D controller of NVIDIA is on the PCI bus, driver or not."""
    for device in pci_devices.glob("*"):
        vendor, kind = _read(device / "vendor"), _read(device / "class")
        # PCI class code 0x03: display controllers; the card's audio function is 0x04.
        if vendor == _NVIDIA_PCI_VENDOR and kind.startswith("0x03"):
            return True
    return False


def find_torch() -> TorchInstall | None:
    """The installed torch, found without importing it (an import takes 2 s and 200 MB)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return TorchInstall(version, torch_cuda_release(Path(spec.origin).with_name("version.py")))


def torch_cuda_release(version_file: Path) -> str:
    """The CUDA release in torch's generated version.py (`cuda: Optional[str] = '12.6'`)."""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", _read(version_file), re.MULTILINE)
    return match[1] if match else ""


def free_disk_bytes(directory: Path) -> int:
    """Free bytes where `directory` is or will be made."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2): only `modes` is written and nothing read but the return; the
    rest is room for what the kernel fills in (208 bytes on 64-bit Linux)."""

    _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_byte * 508))


_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def clock_synchronised() -> bool | None:
    """What the kernel knows about its clock; None where it may not be asked (ProtectClock=)."""
    libc = ctypes.CDLL(None, use_errno=True)
    state: int = libc.adjtimex(ctypes.byref(_Timex(modes=0)))
    if state < 0:
        # timesyncd's own mark, readable without the system call.
        return True if Path("/run/systemd/timesync/synchronized").exists() else None
    return state != _TIME_ERROR


def find_idle_sources(root: Path) -> list[str]:
    """What could tell about the owner's input: logind, an X server, virtual consoles."""
    sources = []
    if (root / "run/systemd/seats").is_dir() and (root / "run/dbus/system_bus_socket").exists():
        sources.append("logind")
    if any((root / "tmp/.X11-unix").glob("X*")):
        sources.append("X11")
    if any((root / "dev").glob("tty[0-9]*")):
        sources.append("tty")
    return sources


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
