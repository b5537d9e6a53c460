"""Tier B: workers from systemd, one service instance each (systemd/nextgpu-worker@.service).

    connect to the socket -> systemd starts an instance: fresh user, own namespaces, its limits
    -> its main process is a zygote that holds torch -> it forks the one worker -> both end

For hosts that refuse user namespaces to our own processes: systemd needs none.  An instance takes
seconds to import torch, so one is always connected ahead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import structlog
import trio

from nextgpu_node.errors import SandboxError
from nextgpu_node.sandbox import cgroups, wipe
from nextgpu_node.sandbox.launcher import Launcher
from nextgpu_node.sandbox.policy import Plan, Tier
from nextgpu_node.sandbox.slots import Slot, Task
from nextgpu_node.sandbox.surroundings import Surroundings, read_surroundings
from nextgpu_node.sandbox.zygote_link import ZygoteLink
from nextgpu_node.sandbox.zygote_process import connect_to_service

log = structlog.get_logger()

_RETRY_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.01


class ServiceLauncher(Launcher):
    """Launcher whose zygotes are service instances.  `spawn` waits for the one that is ahead."""

    def __init__(self, *, runtime_dir: Path) -> None:
        super().__init__(runtime_dir=runtime_dir, tier="B")
        self._offer, self._take = trio.open_memory_channel[ZygoteLink](0)
        self._own = read_surroundings()

    def _claim_hierarchy(self) -> cgroups.Hierarchy | None:
        return None  # the service manager's limits hold

    async def _wait_zygote(self) -> ZygoteLink:
        if self._closed:
            raise SandboxError("The sandbox is shutting down.")
        zygote = await self._take.receive()
        self._zygote_up = trio.Event()
        return zygote

    def _open_slot(self, plan: Plan, zygote: ZygoteLink, task: Task | None = None) -> Slot:
        slot = super()._open_slot(plan, zygote, task)
        slot.layers = (*slot.layers, *_around(slot).layers(self._own))
        assert self._nursery is not None
        self._nursery.start_soon(self._follow, zygote, slot)
        return slot

    async def _follow(self, zygote: ZygoteLink, slot: Slot) -> None:
        """What this worker's zygote says, to its end."""
        while (message := await zygote.receive()) is not None:
            self._dispatch(*message)
        slot.on_lost()

    async def _supervise(self, task_status: trio.TaskStatus[None]) -> SandboxError:
        try:
            while True:
                try:
                    zygote = await self._connect()
                except SandboxError as exc:
                    if self._runtime is None:
                        return exc
                    log.error("worker_service.failed", reason=str(exc))
                    await trio.sleep(_RETRY_S)
                    continue
                if not self._started:
                    self._started = True
                    task_status.started()
                try:
                    await self._offer.send(zygote)
                except trio.Cancelled:
                    await zygote.end()
                    raise
        finally:
            with trio.CancelScope(shield=True):
                for slot in list(self._slots.values()):
                    slot.kill("killed")
                await self._await_orphans()

    _started = False

    async def _connect(self) -> ZygoteLink:
        """A fresh instance that has said it is ready, and has the walls that make tier B."""
        try:
            zygote = ZygoteLink(connect_to_service())
        except OSError as exc:
            raise SandboxError(f"The worker service can not be reached: {exc.strerror}.") from exc
        try:
            head = await self._await_ready(zygote)
            around = Surroundings(**head["surroundings"])
            missing = around.missing(self._own)
            if missing:
                raise SandboxError(f"The worker service lacks layers: {', '.join(missing)}.")
        except BaseException:
            await zygote.end()
            raise
        zygote.around = around
        return zygote

    def _expected_remains(self, slot: Slot) -> wipe.Steps:
        return (("service-ended", False),)

    async def _remove_remains(self, slot: Slot) -> wipe.Steps:
        """The instance ends with its connection; its group goes when no process is left in it."""
        await slot.zygote.end()
        group = Path(_around(slot).cgroup)
        while group.name and group.exists():  # noqa: ASYNC110, ASYNC240  the kernel tells nobody
            await trio.sleep(_LOOK_AGAIN_S)
        return (("service-ended", bool(group.name)),)

    def _swap_is_forbidden(self, slot: Slot) -> bool:
        group = Path(_around(slot).cgroup)
        return cgroups.Group(2, group).swap_forbidden()


def _around(slot: Slot) -> Surroundings:
    assert slot.zygote.around is not None
    return slot.zygote.around


def launcher_for(tier: Tier, runtime_dir: Path) -> Launcher:
    """The launcher of this tier for the daemon's workers."""
    if tier == "B":
        return ServiceLauncher(runtime_dir=runtime_dir)
    return Launcher(runtime_dir=runtime_dir, tier=tier)
