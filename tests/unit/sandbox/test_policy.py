"""The plan reads like the policy."""

from __future__ import annotations

import dataclasses
from typing import Any

from nextgpu_node.sandbox.policy import (
    EXTRA_THREADS,
    MIB,
    SHARED_UID_SLACK,
    HostLayout,
    Mount,
    Plan,
    Tier,
    WorkerPolicy,
    decode_layout,
    decode_plan,
    encode_plan,
    plan_worker,
)

LAYOUT = HostLayout(
    stdlib=("/opt/python/lib/python3.11",),
    site_packages=("/opt/venv/lib/python3.11/site-packages",),
    packages=("/src/nextgpu_node", "/opt/venv/lib/python3.11/site-packages/nextgpu_protocol"),
    gpu_devices=("/dev/nvidia0", "/dev/nvidiactl"),
    gpu_libraries=("/usr/lib/x86_64-linux-gnu/libcuda.so.1",),
    uid=0,
    landlock_abi=7,
)
POLICY = WorkerPolicy(memory_bytes=100 * MIB, tmpfs_bytes=8 * MIB, tmpfs_inodes=64, max_threads=4)


def _plan(tier: Tier = "A", **changes: object) -> Plan:
    layout = dataclasses.replace(LAYOUT, **changes)  # type: ignore[arg-type]
    return plan_worker(POLICY, layout, tier)


def _sources(plan: Plan) -> set[str]:
    return {mount.source for mount in plan.mounts if mount.source}


def test_root_holds_the_interpreter_the_packages_and_three_devices() -> None:
    assert _sources(_plan()) == {
        "/opt/python/lib/python3.11",
        "/opt/venv/lib/python3.11/site-packages",
        "/src/nextgpu_node",
        "/dev/null",
        "/dev/zero",
        "/dev/urandom",
    }


def test_cpu_worker_has_no_proc_and_no_gpu_device() -> None:
    targets = {mount.target for mount in _plan().mounts}
    assert not any(target.startswith(("/proc", "/sys", "/dev/nvidia")) for target in targets)


def test_gpu_worker_gets_the_nodes_and_libraries_of_the_driver_and_proc() -> None:
    plan = plan_worker(dataclasses.replace(POLICY, device="cuda:0"), LAYOUT)
    assert {*LAYOUT.gpu_devices, *LAYOUT.gpu_libraries} <= _sources(plan)
    assert Mount("/proc", kind="proc") in plan.mounts
    assert plan.extra_address_space_bytes == 0


CARDS = dataclasses.replace(
    LAYOUT,
    gpu_devices=(
        *("/dev/dri/renderD128", "/dev/dri/renderD129", "/dev/kfd"),
        *("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm"),
    ),
)


def _devices(layout: HostLayout, **changes: Any) -> set[str]:
    plan = plan_worker(dataclasses.replace(POLICY, **changes), layout)
    return {m.source for m in plan.mounts if m.kind == "device"} - {
        *("/dev/null", "/dev/zero", "/dev/urandom")
    }


def test_a_gpu_worker_gets_one_card_and_calls_it_its_first() -> None:
    assert _devices(CARDS, device="cuda:1", device_node=1) == {
        *("/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm")
    }
    plan = plan_worker(dataclasses.replace(POLICY, device="cuda:1", device_node=1), CARDS)
    assert dict(plan.limits)["device"] == "cuda:0"
    assert ("/dev/nvidia0", "device") not in plan.landlock


def test_amd_and_intel_workers_get_render_nodes_and_never_a_display() -> None:
    without_nvidia = tuple(path for path in CARDS.gpu_devices if "nvidia" not in path)
    amd = dataclasses.replace(CARDS, gpu_devices=without_nvidia)
    assert _devices(amd, device="cuda:0", device_node=128) == {"/dev/kfd", "/dev/dri/renderD128"}
    assert _devices(CARDS, device="xpu:0", device_node=129) == {"/dev/dri/renderD129"}


def test_a_cpu_worker_gets_no_card_where_there_are_many() -> None:
    assert _devices(CARDS) == set()


def test_the_proc_of_a_gpu_worker_is_masked_where_it_is_dangerous() -> None:
    plan = plan_worker(dataclasses.replace(POLICY, device="cuda:0"), LAYOUT)
    masked = {mount.target for mount in plan.mounts if mount.kind == "masked"}
    for name in ("kcore", "kmsg", "keys", "sysrq-trigger", "kallsyms", "timer_list", "bus", "fs"):
        assert f"/proc/{name}" in masked
    assert Mount("/proc/sys", kind="frozen") in plan.mounts
    order = [mount.target for mount in plan.mounts]
    assert order.index("/proc") < order.index("/proc/kcore")
    assert ("/proc", "names") in plan.landlock


def test_the_only_writable_mount_is_a_bounded_scratch() -> None:
    scratch = [mount for mount in _plan().mounts if mount.kind == "scratch"]
    assert scratch == [
        Mount("/tmp", kind="scratch", options=f"size={8 * MIB},nr_inodes=64,mode=700")
    ]


def test_a_project_below_the_scratch_is_mounted_after_it() -> None:
    layout = dataclasses.replace(LAYOUT, packages=("/tmp/project/nextgpu_node",))
    targets = [mount.target for mount in plan_worker(POLICY, layout).mounts]
    assert targets.index("/tmp") < targets.index("/tmp/project/nextgpu_node")


def test_root_daemon_needs_no_user_namespace_and_leaves_root() -> None:
    plan = _plan()
    assert plan.namespaces == ("mount", "pid", "network", "ipc", "uts", "cgroup")
    assert plan.drop_user
    assert not plan.map_user


def test_unprivileged_daemon_starts_from_a_user_namespace() -> None:
    plan = _plan(uid=1000)
    assert plan.namespaces[0] == "user"
    assert plan.map_user
    assert not plan.drop_user


def test_tier_c_has_no_namespace_no_root_and_nothing_writable() -> None:
    plan = _plan("C", uid=1000)
    assert plan.namespaces == ()
    assert plan.mounts == ()
    assert not any(access == "write" for _, access in plan.landlock)
    assert "RLIMIT_NPROC" not in dict(plan.rlimits)
    assert dict(plan.rlimits)[EXTRA_THREADS] == POLICY.max_threads + SHARED_UID_SLACK


def test_limits_come_from_the_policy() -> None:
    plan = _plan()
    limits = dict(plan.rlimits)
    assert limits["RLIMIT_CORE"] == 0
    assert limits["RLIMIT_NPROC"] == POLICY.max_threads
    assert limits["RLIMIT_CPU"] == POLICY.cpu_s
    assert limits["RLIMIT_FSIZE"] == POLICY.tmpfs_bytes
    assert plan.extra_data_bytes == POLICY.memory_bytes
    assert plan.extra_address_space_bytes > POLICY.memory_bytes
    assert plan.cgroup_memory_bytes > POLICY.memory_bytes + POLICY.tmpfs_bytes


def test_worker_module_is_told_its_limits() -> None:
    told = dataclasses.asdict(POLICY)
    del told["device_node"]
    assert dict(_plan().limits) == told


def test_layers_name_what_is_in_force_and_nothing_else() -> None:
    plan = _plan()
    assert {"pid-namespace", "private-root", "landlock-7", "seccomp"} <= set(plan.layers())
    weak = dataclasses.replace(plan, seccomp=(), landlock=(), mounts=(), namespaces=())
    assert set(weak.layers()) == {
        "tier-A",
        "spare-uid",
        "no-capabilities",
        "no-new-privileges",
        "non-dumpable",
        "rlimits",
    }


def test_plan_and_layout_survive_the_way_to_the_zygote() -> None:
    for policy in (POLICY, dataclasses.replace(POLICY, device="cuda:0")):
        plan = plan_worker(policy, LAYOUT)
        assert decode_plan(encode_plan(plan)) == plan
    as_json = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(LAYOUT).items()
    }
    assert decode_layout(as_json) == LAYOUT
