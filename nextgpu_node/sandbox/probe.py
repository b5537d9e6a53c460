"""What this host can confine: found out by doing it, in a child that then attacks its walls.

Tier A   namespaces, a root of its own, Landlock, seccomp
Tier B   systemd's worker service (service_launcher.py), Landlock, seccomp
Tier C   Landlock and seccomp only, no writable directory
none     a layer of tier C is missing, or a wall did not hold: this host must not lend
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from dataclasses import dataclass
from typing import Any, Final, Literal

from nextgpu_node.sandbox import cgroups, control
from nextgpu_node.sandbox.policy import (
    MIB,
    TIERS,
    HostLayout,
    Plan,
    Tier,
    WorkerPolicy,
    decode_layout,
    encode_plan,
    plan_worker,
)
from nextgpu_node.sandbox.surroundings import Surroundings, read_surroundings
from nextgpu_node.sandbox.zygote_process import TASK_MODULES, connect_to_service, start_zygote
from nextgpu_protocol.framing import FrameDecoder, FrameKind

_DEADLINE_S: Final = 20.0
# The service imports torch before it answers.
_SERVICE_DEADLINE_S: Final = 60.0
_SPARE_UID: Final = 64999
_REQUEST: Final = {"spawn": 1, "spare_uid": _SPARE_UID, "task": "probe"}
_POLICY: Final = WorkerPolicy(
    memory_bytes=256 * MIB, tmpfs_bytes=MIB, tmpfs_inodes=16, max_threads=4, cpu_s=10
)

_REMEDIES: Final = {
    "namespaces": (
        "Allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu an AppArmor "
        "profile with `userns,`), or run nextgpud as the system service."
    ),
    "user-namespace": "Allow writing /proc/self/uid_map in a new user namespace, or run as root.",
    "private-root": "Allow mounts inside user namespaces; containers need a writable /tmp for it.",
    "worker service": (
        "Install nextgpu-worker.socket and nextgpu-worker@.service (systemd/ in the source), join "
        "the group nextgpu-worker, then: systemctl enable --now nextgpu-worker.socket"
    ),
    "landlock": "Boot Linux 5.13 or newer with `landlock` in the lsm= list.",
    "seccomp": "Boot a kernel with CONFIG_SECCOMP_FILTER.",
    "cgroup": (
        "Start nextgpud by systemd with Delegate=memory pids: memory is then limited by the "
        "kernel's own account, not by address space."
    ),
}
_OTHER_REMEDY: Final = "See `nextgpu doctor` and the kernel's log for what was refused."


@dataclass(frozen=True, slots=True)
class SandboxReport:
    """The strongest tier that held, its layers, and what a stronger one lacks: (layer, remedy)."""

    tier: Literal["A", "B", "C", "none"]
    layers: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


def probe() -> SandboxReport:
    """Try the tiers, strongest first.  Blocks for about 0.3 s where tier A holds, and for as long
    as an import of torch takes where B is tried; starts and ends its own children."""
    missing: list[tuple[str, str]] = []
    hierarchy = cgroups.find_hierarchy()
    if hierarchy is None:
        missing.append(("cgroup", _REMEDIES["cgroup"]))
    limits = () if hierarchy is None else (hierarchy.layer,)
    with _zygote() as channel:
        head, _ = control.unpack(channel.recv(control.MAX_PACKET_BYTES))
        if "layout" not in head:
            return SandboxReport("none", (), (("launcher", str(head.get("failed", ""))),))
        layout = decode_layout(head["layout"])
        for tier in TIERS:
            layers, trouble = _try_tier(tier, channel, layout)
            if trouble is None:
                around = layers if tier == "B" else (*layers, *limits)
                return SandboxReport(tier, around, tuple(missing))
            missing.append((trouble, _remedy(trouble)))
    return SandboxReport("none", (), tuple(dict.fromkeys(missing)))


def _try_tier(
    tier: Tier, channel: socket.socket, layout: HostLayout
) -> tuple[tuple[str, ...], str | None]:
    """(layers, the layer at fault or None)."""
    if tier == "B":
        return _try_service()
    plan = plan_worker(_POLICY, layout, tier)
    return plan.layers(), _try_plan(channel, plan)


def _try_service() -> tuple[tuple[str, ...], str | None]:
    try:
        channel = connect_to_service()
    except OSError:
        return (), "worker service"
    with channel:
        channel.settimeout(_SERVICE_DEADLINE_S)
        try:
            head: dict[str, Any] = _answer(channel)
        except (OSError, struct.error):  # it ended, or was too slow
            return (), "worker service"
        if "layout" not in head:
            return (), "worker service"
        around, own = Surroundings(**head["surroundings"]), read_surroundings()
        lacking = around.missing(own)
        if lacking:
            return (), f"worker service without {lacking[0]}"
        plan = plan_worker(_POLICY, decode_layout(head["layout"]), "B")
        return (*plan.layers(), *around.layers(own)), _try_plan(channel, plan)


def _remedy(trouble: str) -> str:
    return _REMEDIES.get(trouble.partition(" without ")[0], _OTHER_REMEDY)


class _zygote(contextlib.AbstractContextManager[socket.socket]):  # noqa: N801  reads as a function
    def __enter__(self) -> socket.socket:
        self._process, self._channel = start_zygote(TASK_MODULES["probe"])
        self._channel.settimeout(_DEADLINE_S)
        return self._channel

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _try_plan(channel: socket.socket, plan: Plan) -> str | None:
    """None where a worker came up under `plan` and found no way out; else the layer at fault."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(_DEADLINE_S)
        with theirs:
            request = control.pack(_REQUEST, encode_plan(plan))
            channel.sendmsg([request], control.pack_descriptors([theirs.fileno()]))
        head = _answer(channel)
        if "refused" in head:
            return _layer_of(str(head["error"]))
        trouble = _listen(ours)
    _answer(channel)  # that it has ended
    return trouble


def _answer(channel: socket.socket) -> control.Head:
    packet, ancillary, _, _ = channel.recvmsg(control.MAX_PACKET_BYTES, control.ANCILLARY_BYTES)
    for fd in control.unpack_descriptors(ancillary):
        os.close(fd)
    return control.unpack(packet)[0]


def _listen(stream: socket.socket) -> str | None:
    decoder = FrameDecoder()
    while data := stream.recv(65536):
        decoder.feed(data)
        for kind, body in decoder:
            if kind is FrameKind.ERROR:
                return _layer_of(body.decode())
            if kind is FrameKind.DATA:
                return f"open: {body.decode()}" if body else None
    return "worker ended early"


def _layer_of(sentence: str) -> str:
    return sentence.partition(":")[0]
