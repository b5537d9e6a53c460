"""What this machine has, and what machines with cards would have."""

from __future__ import annotations

import inspect
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pynvml
import pytest

from nextgpu_node.hostinfo import devices
from nextgpu_node.hostinfo.devices import (
    Device,
    choose_device,
    cpu_name,
    list_devices,
    memory_limit_bytes,
    nvml_state,
    usage,
)
from tests.unit.hostinfo.fake_nvml import Card, FakeNvml

GIB = 1024**3


def cuda_devices() -> list[Device]:
    return [device for device in list_devices(max_age_s=0) if device.kind == "cuda"]


def test_the_fake_has_the_real_functions_and_arguments() -> None:
    names = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(names) > 10
    for name in names:
        fake = list(inspect.signature(getattr(FakeNvml, name)).parameters)[1:]
        real = list(inspect.signature(getattr(pynvml, name)).parameters)
        assert len(fake) == len(real), name
    assert pynvml.NVML_TEMPERATURE_GPU == FakeNvml.NVML_TEMPERATURE_GPU
    assert pynvml.NVML_ERROR_NOT_FOUND == FakeNvml.NVML_ERROR_NOT_FOUND


def test_the_cpu_of_this_machine_is_always_there() -> None:
    cpu = list_devices(max_age_s=0)[-1]
    assert (cpu.kind, cpu.label, cpu.compute_capability, cpu.driver) == ("cpu", "cpu", "", "")
    assert 0 < cpu.free_memory_bytes <= cpu.total_memory_bytes <= psutil.virtual_memory().total
    assert cpu.name


def test_no_driver_is_no_device_and_no_error(install: Callable[..., FakeNvml]) -> None:
    install(Card(), loaded=False)
    assert cuda_devices() == []
    assert nvml_state().problem == "Driver Not Loaded"
    missing = Device("cuda", 0, "gone", GIB, GIB, uuid="GPU-0")
    assert usage(missing) == devices.Usage(None, None, None)


def test_a_missing_library_is_no_error(
    install: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(Card())

    def not_there() -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(fake, "nvmlInit", not_there)
    assert cuda_devices() == []


def test_a_card_is_described_and_its_uuid_not_shown(install: Callable[..., FakeNvml]) -> None:
    install(Card(uuid="GPU-secret"))
    (card,) = cuda_devices()
    assert (card.name, card.compute_capability, card.driver) == ("NVIDIA RTX 4090", "8.9", "570.86")
    assert (card.total_memory_bytes, card.free_memory_bytes) == (24 * GIB, 20 * GIB)
    assert (card.label, card.uuid) == ("cuda:0", "GPU-secret")
    assert "secret" not in repr(card)
    assert usage(card) == devices.Usage(utilisation=0.4, temperature_c=61.0, power_w=200.5)


def test_a_card_in_mig_mode_is_its_instances(install: Callable[..., FakeNvml]) -> None:
    slices: list[Card | None] = [
        Card("NVIDIA A100 MIG 1g.5gb", "MIG-a", 5 * GIB, GIB, (8, 0), busy_percent=None),
        None,
        Card("NVIDIA A100 MIG 2g.10gb", "MIG-b", 10 * GIB, GIB, (8, 0), milliwatts=None),
    ]
    install(Card("A100", mig_enabled=True, total=None, instances=slices), Card(uuid="GPU-1"))
    found = cuda_devices()
    assert [device.uuid for device in found] == ["MIG-a", "MIG-b", "GPU-1"]
    assert [device.label for device in found] == ["cuda:0", "cuda:1", "cuda:2"]
    assert usage(found[0]).utilisation is None
    assert usage(found[1]).power_w is None


def test_a_broken_card_does_not_hide_the_others(install: Callable[..., FakeNvml]) -> None:
    install(None, Card(total=None), Card(uuid="GPU-2", capability=None, mig_enabled=None))
    (card,) = cuda_devices()
    assert (card.uuid, card.compute_capability) == ("GPU-2", "")


def test_memory_is_asked_once_per_second_and_nvml_started_once(
    install: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card()
    fake = install(card)
    clock = iter([100.0, 100.9, 101.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    free = []
    for step in range(3):
        card.free = step * GIB
        free.append(list_devices()[0].free_memory_bytes // GIB)
    assert free == [0, 0, 2]
    assert fake.starts == 1


def test_auto_takes_the_largest_card_then_the_cpu() -> None:
    cpu = Device("cpu", 0, "cpu", 512 * GIB, 1)
    small, large = (Device("cuda", i, "card", (8 + i) * GIB, 1) for i in range(2))
    assert choose_device([small, large, cpu], "auto") == large
    assert choose_device([cpu], "auto") == cpu
    assert choose_device([small, large, cpu], "cuda:0") == small
    assert choose_device([small, large, cpu], "cpu") == cpu
    assert choose_device([cpu], "cuda:0") is None


def test_utilisation_is_measured_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = list_devices()[-1]
    monkeypatch.setattr(devices, "_cpu_before", None)
    times = psutil.cpu_times()
    assert usage(cpu).utilisation is None
    busy = times._replace(user=times.user + 1e6, idle=times.idle + 1e6)
    monkeypatch.setattr(psutil, "cpu_times", lambda: busy)
    assert usage(cpu).utilisation == pytest.approx(0.5, abs=0.01)
    assert usage(cpu).utilisation is None


def test_the_cpus_name_comes_from_the_kernel_or_is_the_architecture(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD  Ryzen 9\nmodel name\t: other\n")
    assert cpu_name(cpuinfo) == "AMD Ryzen 9"
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert cpu_name(cpuinfo) == platform.machine()
    assert cpu_name(tmp_path / "missing") == platform.machine()


def test_a_containers_memory_limit_is_the_tightest_above(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "a" / "b").mkdir(parents=True)
    own.write_text("1:name=systemd:/x\n0::/a/b\n")
    assert memory_limit_bytes(own, root) is None
    (root / "a" / "b" / "memory.max").write_text("max\n")
    (root / "a" / "memory.max").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.max").write_text("1\n")
    assert memory_limit_bytes(own, root) == 2 * GIB
    own.write_text("5:memory:/a\n")
    assert memory_limit_bytes(own, root) is None


def test_looking_at_the_machine_loads_neither_torch_nor_trio() -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nextgpu_node.hostinfo.checks import check_host\n"
        "from nextgpu_node.paths import Paths\n"
        "checks = check_host(Paths.under(Path(sys.argv[1])))\n"
        "assert {c.name for c in checks} >= {'torch', 'driver'}\n"
        "print(*{'torch', 'numpy', 'trio', 'libp2p'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "/nowhere"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere"},
    )
    assert done.stdout.strip() == ""
