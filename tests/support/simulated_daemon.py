"""`nextgpud` on a simulated machine: what its sensors say stands in HOME/machine.json.

{"on_battery": true}                          fields of core.owner.Reading
{"device": {"temperature_c": 81}}             of the DeviceReading of whatever is lent
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nextgpu_node.core.owner import DeviceReading, ForeignUse, Reading, Rules
from nextgpu_node.daemon import node
from nextgpu_node.daemon.main import main
from nextgpu_node.hostinfo.devices import Device

LEFT_ALONE = Reading(3600.0, False, 0.0, 10**12, 10**12)


class SimulatedMachine:
    """A machine whose owner has left, but for what the file says."""

    def __init__(self, state_dir: Path) -> None:
        self._file = state_dir.parent / "machine.json"

    def read(self, rules: Rules, devices: Sequence[Device], own_pids: frozenset[int]) -> Reading:
        facts: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}
        device = facts.pop("device", {})
        if "foreign" in device:
            device["foreign"] = tuple(ForeignUse(*use) for use in device["foreign"])
        if "running" in facts:
            facts["running"] = frozenset(facts["running"])
        found = tuple(DeviceReading(d.label, **{"temperature_c": 50.0, **device}) for d in devices)
        return replace(LEFT_ALONE, devices=found, **facts)


def say(home: Path, **facts: object) -> None:
    """What the machine of the daemon in `home` is like from now on."""
    draft = home / "machine.json.new"
    draft.write_text(json.dumps(facts))
    draft.replace(home / "machine.json")


if __name__ == "__main__":
    node.HostSensors = SimulatedMachine  # type: ignore[assignment,misc]
    sys.exit(main())
