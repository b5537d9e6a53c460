"""What is known of one worker, from the request for it to the end of its wipe."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import trio

from nextgpu_node.sandbox import cgroups, control
from nextgpu_node.sandbox.policy import Plan
from nextgpu_node.sandbox.wipe import WipeReport
from nextgpu_node.sandbox.zygote_link import ZygoteLink

# What a worker is for, where it is not for a unit (zygote_process.TASK_MODULES).
Task = Literal["card"]
ExitReason = Literal["exited", "signalled", "oom", "timeout", "cpu-limit", "killed", "lost"]


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """How a worker ended.  `code` is its exit code, or None where a signal ended it.

    "killed" is `finish` by this daemon, "lost" an end that the zygote did not live to report.
    """

    reason: ExitReason
    code: int | None
    signal: int | None
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int


class Slot:
    """What the launcher keeps about one worker from the request to the end of its wipe."""

    def __init__(
        self,
        spawn_id: int,
        plan: Plan,
        group: cgroups.Group | None,
        zygote: ZygoteLink,
        task: Task | None = None,
    ) -> None:
        self.spawn_id = spawn_id
        self.task = task
        self.was_given_bytes = False
        self.plan = plan
        self.group = group
        self.zygote = zygote
        self.layers = (*plan.layers(), *([group.layer] if group else []))
        self.spare_uid = 0
        self.pid = 0
        self.pidfd: int | None = None
        self.refusal: str | None = None
        self.kill_reason: ExitReason | None = None
        self.wall_scope = trio.CancelScope()
        self.exit: WorkerExit | None = None
        self.report: WipeReport | None = None
        self.wiping = trio.Lock()
        self.answered = trio.Event()
        self.joined: trio.Event | None = None  # there while its group is, or has been, entered
        self.ended = trio.Event()
        self.stream: trio.SocketStream | None = None

    async def wait_joined(self) -> None:
        """Until it is in its group, where it has to be moved there, or could not be."""
        if self.joined is not None:
            await self.joined.wait()

    async def wait_exit(self) -> WorkerExit:
        await self.ended.wait()
        assert self.exit is not None
        return self.exit

    def kill(self, reason: ExitReason) -> None:
        """SIGKILL to the first process of its PID namespace: the kernel takes all the others."""
        if self.exit is None and self.pidfd is not None:
            self.kill_reason = self.kill_reason or reason
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return
            except PermissionError:  # tier B: another user's process, its zygote's to kill
                self.zygote.order_kill(self.spawn_id)

    def tell(self, number: signal.Signals) -> None:
        """Send a signal that the worker may handle.  Nothing where this process may not."""
        if self.exit is None and self.pidfd is not None:
            with suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self.pidfd, number)

    def on_spawned(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.answered.set()

    def on_refused(self, sentence: str) -> None:
        self.refusal = sentence
        self.exit = WorkerExit("exited", None, None, 0.0, 0.0, 0)
        self.answered.set()
        self.ended.set()

    def on_exited(self, head: control.Head) -> None:
        status = head["status"]
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        self._end(
            WorkerExit(
                self._reason(number, head["cpu_s"]),
                code,
                number,
                head["wall_s"],
                head["cpu_s"],
                head["peak_rss_bytes"],
            )
        )

    def on_lost(self) -> None:
        self._end(WorkerExit(self.kill_reason or "lost", None, None, 0.0, 0.0, 0))

    def _end(self, exit_: WorkerExit) -> None:
        if self.exit is None:
            self.exit = exit_
        self.answered.set()
        self.ended.set()
        self.wall_scope.cancel()

    def _reason(self, number: int | None, cpu_s: float) -> ExitReason:
        if number is None:
            return "exited"
        if number != signal.SIGKILL:
            return "signalled"
        if self.kill_reason is not None:
            return self.kill_reason
        if self.group is not None and self.group.out_of_memory():
            return "oom"
        cpu_limit_s = dict(self.plan.rlimits).get("RLIMIT_CPU")
        # The kernel compares whole clock ticks, which on busy cores are more than what was used.
        if cpu_limit_s is not None and cpu_s >= 0.75 * cpu_limit_s - 0.1:
            return "cpu-limit"
        return "signalled"
