"""The doctor: every verdict on machines made up for it, and the facts of this one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import resource
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nextgpu_node.hostinfo.checks import (
    Check,
    TorchInstall,
    check_clock,
    check_disk,
    check_driver,
    check_freed_memory,
    check_host,
    check_idle_source,
    check_open_files,
    check_swap,
    check_torch,
    clock_synchronised,
    find_idle_sources,
    find_torch,
    free_disk_bytes,
    nvidia_card_present,
    torch_cuda_release,
)
from nextgpu_node.hostinfo.devices import Device, NvmlState
from nextgpu_node.paths import Paths

GIB = 1024**3
CPU = Device("cpu", 0, "some cpu", GIB, GIB)
CARD = Device("cuda", 0, "NVIDIA RTX 4090", GIB, GIB, "8.9", "570.86")
DRIVER, NO_DRIVER = NvmlState("570.86", ""), NvmlState("", "Driver Not Loaded")
NOW = datetime(2027, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("check", "ok", "says"),
    [
        (check_driver([CARD, CPU], DRIVER, card_present=True), True, "NVIDIA RTX 4090"),
        (check_driver([CPU], NO_DRIVER, card_present=False), None, "lend its CPU"),
        (check_driver([CPU], NO_DRIVER, card_present=True), False, "Driver Not Loaded"),
        (check_driver([CPU], DRIVER, card_present=True), False, "no card answers"),
        (check_torch(None, [CPU]), None, "can not lend"),
        (check_torch(TorchInstall("2.13.0+cpu", ""), [CPU]), True, "2.13.0+cpu (CPU only)"),
        (check_torch(TorchInstall("2.13.0", "12.6"), [CARD]), True, "CUDA 12.6"),
        (check_torch(TorchInstall("2.13.0+cpu", ""), [CARD]), False, "without CUDA"),
        (check_disk(10 * GIB), True, "10.0 GiB"),
        (check_disk(GIB - 1), False, "1.0 GiB"),
        (check_clock(NOW, synchronised=True), True, "synchronised"),
        (check_clock(NOW, synchronised=False), None, "not synchronised"),
        (check_clock(NOW, synchronised=None), None, "does not say"),
        (check_clock(datetime(1970, 1, 1, tzinfo=UTC), synchronised=True), False, "1970-01-01"),
        (check_open_files(1024, 4096), True, "1024"),
        (check_open_files(256, 4096), False, "limit 256"),
        (check_open_files(256, 256), False, "limit 256"),
        (check_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), True, "unlimited"),
        (check_idle_source(["logind"]), True, "logind"),
        (check_idle_source([]), None, "none"),
    ],
)
def test_each_check_says_what_is_so(check: Check, ok: bool | None, says: str) -> None:
    assert (check.ok, says in check.detail) == (ok, True), check
    # What fails can be repaired; what is fine asks for nothing.
    assert bool(check.remedy) or check.ok is not False
    assert not (check.ok and check.remedy)
    assert "\n" not in check.detail + check.remedy


def test_a_limit_that_the_user_may_not_raise_is_raised_in_the_unit() -> None:
    assert "ulimit" in check_open_files(256, 4096).remedy
    assert "LimitNOFILE" in check_open_files(256, 256).remedy


def test_this_machine_gets_one_line_each(tmp_path: Path) -> None:
    names = [check.name for check in check_host(Paths.under(tmp_path))]
    assert names == ["driver", "torch", "disk", "clock", "open files", "idle source"]


def test_torch_is_found_where_it_is_installed() -> None:
    if importlib.util.find_spec("torch") is None:
        assert find_torch() is None
        return
    found = find_torch()
    assert found is not None
    assert found.version == importlib.metadata.version("torch")
    assert bool(found.cuda) is ("+cpu" not in found.version)


def test_torchs_cuda_release_is_read_from_its_own_file(tmp_path: Path) -> None:
    version = tmp_path / "version.py"
    version.write_text("__version__ = '2.7.0'\ncuda: Optional[str] = '12.6'\nhip = None\n")
    assert torch_cuda_release(version) == "12.6"
    version.write_text("__version__ = '2.7.0+cpu'\ncuda: Optional[str] = None\n")
    assert torch_cuda_release(version) == ""
    assert torch_cuda_release(tmp_path / "missing.py") == ""


def test_free_space_is_that_of_where_the_directory_will_be(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "not" / "yet") > 0


def test_a_card_without_a_driver_is_seen_on_the_bus(tmp_path: Path) -> None:
    def device(name: str, vendor: str, kind: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")

    device("audio", "0x10de", "0x040300")
    device("other", "0x1002", "0x030000")
    assert not nvidia_card_present(tmp_path)
    device("card", "0x10de", "0x030200")
    assert nvidia_card_present(tmp_path)
    assert not nvidia_card_present(tmp_path / "missing")


def test_the_kernel_answers_about_its_clock() -> None:
    assert clock_synchronised() in (True, False, None)


def test_idle_sources_are_what_is_there(tmp_path: Path) -> None:
    assert find_idle_sources(tmp_path) == []
    (tmp_path / "run/systemd/seats").mkdir(parents=True)
    assert find_idle_sources(tmp_path) == []
    (tmp_path / "run/dbus").mkdir(parents=True)
    (tmp_path / "run/dbus/system_bus_socket").touch()
    (tmp_path / "tmp/.X11-unix").mkdir(parents=True)
    (tmp_path / "tmp/.X11-unix/X0").touch()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/tty1").touch()
    assert find_idle_sources(tmp_path) == ["logind", "X11", "tty"]


def test_memory_that_is_cleared_late_and_swap_are_told_with_their_remedies() -> None:
    assert check_freed_memory("quiet init_on_free=1").ok
    late = check_freed_memory("quiet init_on_free=10")
    assert (late.ok, "init_on_free=1" in late.remedy) == (None, True)
    assert check_swap(0).ok
    assert check_swap(1).ok is None
    assert "swapoff" in check_swap(1).remedy
