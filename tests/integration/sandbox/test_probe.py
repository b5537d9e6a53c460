"""The probe says what is so, and what is missing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nextgpu_node.sandbox import probe as probe_module
from nextgpu_node.sandbox.policy import HostLayout, Plan, Tier, WorkerPolicy, plan_worker
from nextgpu_node.sandbox.probe import probe

pytestmark = pytest.mark.sandbox


def _weakened(monkeypatch: pytest.MonkeyPatch, *tiers: Tier, **changes: Any) -> None:
    """Plans of `tiers` are changed before they are tried."""

    def plan(policy: WorkerPolicy, layout: HostLayout, tier: Tier) -> Plan:
        made = plan_worker(policy, layout, tier)
        return dataclasses.replace(made, **changes) if tier in tiers else made

    monkeypatch.setattr(probe_module, "plan_worker", plan)


def test_full_host_is_tier_a() -> None:
    report = probe()
    assert report.tier == "A"
    assert {"pid-namespace", "seccomp", "private-root"} <= set(report.layers)


def test_host_that_refuses_the_root_falls_to_tier_c(monkeypatch: pytest.MonkeyPatch) -> None:
    # A mount of what does not exist fails, as mounts do where a policy forbids them.
    nowhere = plan_worker(WorkerPolicy(), HostLayout(("/nowhere",), (), ())).mounts
    _weakened(monkeypatch, "A", mounts=nowhere)
    report = probe()
    assert report.tier == "C"
    assert "private-root" in [layer for layer, _ in report.missing]
    assert all(remedy for _, remedy in report.missing)


def test_wall_that_does_not_hold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that came up without an error and confines nothing is still noticed."""
    _weakened(monkeypatch, "A", "C", seccomp=())
    report = probe()
    assert report.tier == "none"
    assert any("new processes" in layer for layer, _ in report.missing)


def test_host_without_landlock_is_below_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    _weakened(monkeypatch, "A", "C", landlock=(("/no/such/path", "read"),))
    report = probe()
    assert report.tier == "none"
    assert "landlock" in [layer for layer, _ in report.missing]
