"""Events follow what changes; figures have numbers and fixed words only."""

from __future__ import annotations

import json
import re

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from nextgpu_node.api_types import GpusReply, GpuView
from nextgpu_node.daemon.events import follow
from nextgpu_node.daemon.metrics import as_text
from tests.unit.api.backend import UNIT_ID, MemoryBackend

GPU = GpuView(
    label="cuda:0",
    kind="cuda",
    name="Somebody's Card",
    memory_total_bytes=8,
    memory_free_bytes=4,
    utilisation=0.5,
    temperature_c=61.0,
)


async def gpus() -> GpusReply:
    return GpusReply(gpus=[GPU])


async def test_events_tell_all_at_first_and_then_what_changes(autojump_clock: object) -> None:
    backend = MemoryBackend()
    lines = follow(backend.status, backend.units, gpus)
    first = [json.loads(await anext(lines)) for _ in range(4)]
    assert [line["event"] for line in first] == [
        "node.status",
        "sharing.changed",
        "units.changed",
        "devices.sampled",
    ]
    assert all(line["schema"] == 1 for line in first)
    backend.set_sharing(True)
    changed = json.loads(await anext(lines))
    assert (changed["event"], changed["sharing"]["active"]) == ("sharing.changed", True)
    backend.unit_ids.clear()
    gone = json.loads(await anext(lines))
    assert (gone["event"], gone["units"]["units"]) == ("units.changed", [])
    assert json.loads(await anext(lines))["event"] == "devices.sampled"
    await lines.aclose()


def test_figures_are_valid_and_name_nobody() -> None:
    backend = MemoryBackend()
    status = msgspec.structs.replace(backend.status(), sharing=backend.set_sharing(True))
    text = as_text(status, backend.units().units, [GPU], {"unit.finished": 3}).decode()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["nextgpu_sharing_active",] == 1
    assert found["nextgpu_units", "lending", "running"] == 1
    assert found["nextgpu_device_temperature_celsius", "cuda:0"] == 61
    assert ("nextgpu_device_power_watts", "cuda:0") not in found
    assert found["nextgpu_log_events_total", "unit.finished"] == 3
    for secret in (UNIT_ID, status.peer_id, GPU.name, "/ip4", "127.0.0.1"):
        assert secret not in text
    labels = set(re.findall(r'(\w+)="', text))
    assert labels <= {"version", "tier", "role", "state", "device", "event"}
