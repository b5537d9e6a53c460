"""One reading of a machine: this one, and ones made of files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nextgpu_node.core.owner import ForeignUse, Rules
from nextgpu_node.hostinfo.devices import list_devices
from nextgpu_node.hostinfo.sensors import CpuShare, HostSensors, on_battery, running_apps
from tests.unit.hostinfo.fake_nvml import Card, FakeNvml

GIB = 1024**3
NOBODY = 2**22 + 1  # above every process id that this kernel gives


def supply(root: Path, name: str, **facts: str) -> None:
    directory = root / "sys/class/power_supply" / name
    directory.mkdir(parents=True)
    for key, value in facts.items():
        (directory / key).write_text(value + "\n")


@pytest.mark.parametrize(
    ("supplies", "answer"),
    [
        ({}, False),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Charging"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Full"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Unknown"}}, None),
        ({"BAT0": {"type": "Battery"}}, None),
        ({"mouse": {"type": "Battery", "status": "Discharging", "scope": "Device"}}, False),
        (
            {
                "AC": {"type": "Mains", "online": "1"},
                "BAT0": {"type": "Battery", "status": "Unknown"},
            },
            False,
        ),
        (
            {
                "AC": {"type": "Mains", "online": "0"},
                "BAT0": {"type": "Battery", "status": "Discharging"},
            },
            True,
        ),
    ],
)
def test_on_battery_as_the_kernel_tells_it(
    tmp_path: Path, supplies: dict[str, dict[str, str]], answer: bool | None
) -> None:
    (tmp_path / "sys/class").mkdir(parents=True)
    for name, facts in supplies.items():
        supply(tmp_path, name, **facts)
    assert on_battery(tmp_path) is answer


def test_without_sysfs_the_power_source_is_unknown(tmp_path: Path) -> None:
    assert on_battery(tmp_path) is None


def test_exclusive_applications_are_found_by_name(tmp_path: Path) -> None:
    for pid, comm in ((1, "systemd"), (20, "blender"), (30, "a-very-long-nam")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(comm + "\n")
    assert running_apps(["blender", "doom"], tmp_path) == {"blender"}
    assert running_apps(["a-very-long-name-of-a-game"], tmp_path) == {"a-very-long-name-of-a-game"}
    assert running_apps([], tmp_path / "none") == frozenset()


def test_where_processes_are_hidden_it_is_unknown_what_runs(tmp_path: Path) -> None:
    (tmp_path / "4711").mkdir()
    assert running_apps(["blender"], tmp_path) is None


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    rules = Rules(min_free_disk_bytes=1, max_foreign_cpu=0.5, exclusive_apps=("no such program",))
    sensors, cpu = HostSensors(tmp_path), list_devices()[-1:]
    reading = sensors.read(rules, cpu, frozenset({os.getpid()}))
    assert reading.free_memory_bytes
    assert reading.free_disk_bytes
    assert reading.running == frozenset()
    assert reading.foreign_cpu is None
    assert reading.devices[0].label == "cpu"
    # Nothing that no rule asks for is read.
    assert (reading.idle_s, reading.devices[0].foreign) == (None, None)


def test_who_else_uses_a_card_is_told_by_name_and_size(
    install: Callable[..., FakeNvml], tmp_path: Path
) -> None:
    own = psutil.Process().name()
    card = Card(computing=[(7, 3 * GIB), (os.getpid(), GIB)], drawing=[(NOBODY, GIB // 4)])
    install(card)
    (device, _cpu) = list_devices(max_age_s=0)
    rules = Rules(max_foreign_vram_bytes=1, max_power_w=300)
    (reading,) = HostSensors(tmp_path).read(rules, [device], frozenset({7})).devices
    assert set(reading.foreign or ()) == {
        ForeignUse(own, GIB),
        ForeignUse("another program", GIB // 4),
    }
    assert (reading.temperature_c, reading.power_w) == (61.0, 200.5)

    card.computing = [(NOBODY, None)]
    (reading,) = HostSensors(tmp_path).read(rules, [device], frozenset()).devices
    assert reading.foreign is None
    card.computing = None
    (reading,) = HostSensors(tmp_path).read(rules, [device], frozenset()).devices
    assert reading.foreign is None


def test_how_busy_others_keep_a_card_leaves_us_out(
    install: Callable[..., FakeNvml], tmp_path: Path
) -> None:
    later = 10**17  # microseconds, after every reading of this test
    card = Card(samples=[(later, 7, 90), (later - 1, 8, 80), (later, 8, 30), (later, 9, 10)])
    install(card)
    (device, _cpu) = list_devices(max_age_s=0)
    sensors, rules = HostSensors(tmp_path), Rules(max_foreign_gpu=0.2)
    (reading,) = sensors.read(rules, [device], frozenset({7})).devices
    assert reading.foreign_utilisation == pytest.approx(0.4)
    card.samples = []
    (reading,) = sensors.read(rules, [device], frozenset({7})).devices
    assert reading.foreign_utilisation == 0.0
    card.samples = None
    (reading,) = sensors.read(rules, [device], frozenset({7})).devices
    assert reading.foreign_utilisation is None


def test_a_card_that_is_gone_is_unknown_and_no_error(
    install: Callable[..., FakeNvml], tmp_path: Path
) -> None:
    install(Card())
    (device, _cpu) = list_devices(max_age_s=0)
    install(loaded=False)
    rules = Rules(max_foreign_vram_bytes=1, max_foreign_gpu=0.1)
    (reading,) = HostSensors(tmp_path).read(rules, [device], frozenset()).devices
    assert reading.label == "cuda:0"
    known = (reading.temperature_c, reading.foreign, reading.foreign_utilisation)
    assert known == (None, None, None)


def test_own_processor_time_is_not_anybody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    share = CpuShare()
    times = psutil.cpu_times()
    assert share.foreign([]) is None
    busy = times._replace(user=times.user + 1e6, idle=times.idle + 1e6)
    monkeypatch.setattr(psutil, "cpu_times", lambda: busy)
    assert share.foreign([]) == pytest.approx(0.5, abs=0.01)
    assert share.foreign([]) is None
