"""The daemon's side of the sandbox: supervise the zygote, spawn, limit, kill, wipe.

    run()     zygote up -> ready -> … -> dies -> its workers die too -> a new one, after a while
    spawn()   socketpair -> request -> pidfd -> HELLO with the worker's one-time key
    Worker    a stream, an exit, and finish(): kill, reap, verify

The daemon sees ciphertext alone on a worker's stream, and never takes a descriptor from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import struct
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from nextgpu_node.errors import SandboxError
from nextgpu_node.frames import widen
from nextgpu_node.sandbox import cgroups, control, wipe
from nextgpu_node.sandbox.policy import (
    HostLayout,
    Plan,
    Tier,
    WorkerPolicy,
    decode_layout,
    encode_plan,
    plan_worker,
)
from nextgpu_node.sandbox.slots import Slot, Task, WorkerExit
from nextgpu_node.sandbox.wipe import WipeReport
from nextgpu_node.sandbox.zygote_link import ZygoteLink
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import HEAD_BYTES, FrameDecoder, FrameKind, encode_frame

log = structlog.get_logger()

KEY_BYTES: Final = 32
# Importing torch from a cold disk took up to 15 s on the slowest machine we tried.
_PRELOAD_DEADLINE_S: Final = 120.0
_HELLO_DEADLINE_S: Final = 10.0
_WIPE_DEADLINE_S: Final = 10.0
# Two starts of CUDA, and all of a card's memory written once and read twice.  A submitter waits
# 30 s for its receipt (protocol spec, 30-framing).
_CARD_DEADLINE_S: Final = 15.0
_CARD_ANSWER: Final = struct.Struct(">QQ")  # as worker/card.py
_NICER_BY: Final = 5
_NICEST: Final = 19
_FIRST_BACKOFF_S: Final = 0.2
_LONGEST_BACKOFF_S: Final = 30.0
# A zygote that lived this long was sound: the next back-off starts small again.
_SOUND_AFTER_S: Final = 60.0
# Ids that Debian Policy 9.2.2 leaves to no account.  One for each live worker: the kernel counts
# threads per id.
_SPARE_UIDS: Final = range(64000, 65000)


class Worker:
    """One confined process, for one unit.  Made by Launcher.spawn; the owner calls `finish`."""

    def __init__(
        self,
        launcher: Launcher,
        slot: Slot,
        stream: trio.abc.Stream,
        public_key: bytes,
    ) -> None:
        self._launcher = launcher
        self._slot = slot
        self.pid = slot.pid
        self.public_key = public_key
        self.layers = slot.layers
        self.stream = stream

    async def wait(self) -> WorkerExit:
        """Until the process has ended and was reaped."""
        return await self._slot.wait_exit()

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to be gone; nothing more can be sent to it then."""
        return self._slot.ended.is_set()

    def ask_to_give_back(self) -> None:
        """Tell the worker that the owner is back.  It may not hear it: `finish` follows."""
        self._slot.tell(signal.SIGUSR1)

    def restart_clock(self, wall_s: float) -> None:
        """Count the wall time limit from now: a pooled worker has been idle until its unit."""
        self._slot.wall_scope.deadline = trio.current_time() + wall_s

    async def finish(self) -> WipeReport:
        """Kill the whole tree, reap it, verify that nothing is left.  Idempotent, shielded."""
        return await self._launcher.finish_slot(self._slot)


class _WorkerStream(trio.abc.Stream):
    """The worker's socket; bytes that came behind HELLO are given out first.

    It gets no byte before it is in its cgroup: in v1 that may take longer than its birth.
    """

    def __init__(self, stream: trio.SocketStream, pending: bytes, slot: Slot) -> None:
        self._stream = stream
        self._pending = pending
        self._slot = slot

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._slot.wait_joined()
        if self._slot.refusal is not None:
            raise trio.BrokenResourceError(self._slot.refusal)
        self._slot.was_given_bytes = True
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._pending:
            return bytes(await self._stream.receive_some(max_bytes))
        await trio.lowlevel.checkpoint()
        end = len(self._pending) if max_bytes is None else max_bytes
        given, self._pending = self._pending[:end], self._pending[end:]
        return given

    async def aclose(self) -> None:
        await self._stream.aclose()


class Launcher:
    """Spawns confined workers.  `run` must be running; `runtime_dir` is private to this user."""

    def __init__(
        self,
        *,
        runtime_dir: Path,
        worker_module: str = "nextgpu_node.worker.main",
        tier: Tier = "A",
    ) -> None:
        self._directory = runtime_dir / "sandbox"
        self._worker_module = worker_module
        self._tier: Tier = tier
        self._name = secrets.token_hex(4)
        self._spawn_count = 0
        self._slots: dict[int, Slot] = {}
        self._zygote: ZygoteLink | None = None
        self._zygote_up = trio.Event()
        self._layout: HostLayout | None = None
        self._runtime: str | None = None
        self._hierarchy: cgroups.Hierarchy | None = None
        self._nursery: trio.Nursery | None = None
        self._closed = False
        self._card_wipe = trio.Lock()
        self._spare_uids = random.sample(_SPARE_UIDS, len(_SPARE_UIDS))

    @property
    def runtime(self) -> str:
        """What the worker module runs on, such as "torch 2.13.0"; known once `run` has started."""
        assert self._runtime is not None
        return self._runtime

    @property
    def pids(self) -> frozenset[int]:
        """The zygote's and its workers' process ids."""
        found = {slot.pid for slot in self._slots.values() if slot.exit is None}
        return frozenset((found | {self.zygote_pid or 0}) - {0})

    @property
    def zygote_pid(self) -> int | None:
        """The process id of the zygote, None while it is being restarted."""
        return self._zygote.pid if self._zygote else None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a zygote until cancelled; started once the first one is ready.

        Raises SandboxError where the first one can not be had.
        """
        self._hierarchy = self._claim_hierarchy()
        await self._remove_leftovers()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                trouble = await self._supervise(task_status)
            finally:
                self._nursery, self._closed = None, True
                self._zygote_up.set()  # who waits for it is told
                with trio.move_on_after(_WIPE_DEADLINE_S, shield=True):
                    await self._end_everything()
        raise trouble  # here, so that it comes without a nursery's group around it

    async def spawn(self, policy: WorkerPolicy) -> Worker:
        """A fresh confined worker whose HELLO was read.

        Waits while the zygote restarts.  Raises SandboxError where a layer is refused or the
        worker ends before its HELLO.
        """
        await self._wait_zygote()
        assert self._layout is not None
        return await self.spawn_planned(
            plan_worker(policy, self._layout, self._tier), wall_s=policy.wall_s
        )

    async def spawn_planned(self, plan: Plan, *, wall_s: float, task: Task | None = None) -> Worker:
        """`spawn` under a plan that the caller has made; for a unit, or for a task of ours."""
        zygote = await self._wait_zygote()
        slot = self._open_slot(plan, zygote, task)
        try:
            await self._request(zygote, slot)
            worker = await self._greet(slot)
        except BaseException:
            with trio.move_on_after(_WIPE_DEADLINE_S, shield=True):
                await slot.answered.wait()
                await self.finish_slot(slot)
            raise
        worker.restart_clock(wall_s)
        if self._nursery is None:
            await self.finish_slot(slot)
            raise SandboxError("The sandbox is shutting down.")
        self._nursery.start_soon(self._enforce_wall_limit, slot)
        return worker

    async def _wait_zygote(self) -> ZygoteLink:
        while self._zygote is None and not self._closed:
            await self._zygote_up.wait()
        if self._zygote is None:
            raise SandboxError("The sandbox is shutting down.")
        return self._zygote

    def _open_slot(self, plan: Plan, zygote: ZygoteLink, task: Task | None = None) -> Slot:
        if not self._spare_uids:
            raise SandboxError("Too many workers are alive at once.")
        self._spawn_count += 1
        group = None
        if self._hierarchy is not None:
            try:
                group = self._hierarchy.create(
                    f"{cgroups.owner_name()}-{self._name}-{self._spawn_count}",
                    memory_bytes=plan.cgroup_memory_bytes,
                    pids=plan.cgroup_pids,
                    cpus=plan.cgroup_cpus,
                )
            except OSError as exc:
                raise SandboxError(f"cgroup: {exc.strerror}. The worker was not started.") from exc
        slot = Slot(self._spawn_count, plan, group, zygote, task)
        slot.spare_uid = self._spare_uids.pop()
        self._slots[slot.spawn_id] = slot
        return slot

    async def _request(self, zygote: ZygoteLink, slot: Slot) -> None:
        head: control.Head = {"spawn": slot.spawn_id, "spare_uid": slot.spare_uid}
        if slot.task is not None:
            head["task"] = slot.task
        fds: list[int] = []
        try:
            ours, theirs = socket.socketpair()
            widen(ours)
            widen(theirs)
            fds.append(theirs.detach())
            slot.stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            if slot.group is not None:
                fds += slot.group.open_for_birth()
            await zygote.send(head, encode_plan(slot.plan), fds)
        except BaseException as exc:
            slot.on_lost()  # nothing was asked for
            if isinstance(exc, OSError):
                raise SandboxError(f"The worker could not be asked for: {exc.strerror}.") from exc
            raise
        finally:
            for fd in fds:
                os.close(fd)
        await slot.answered.wait()
        if slot.refusal is not None:
            raise SandboxError(f"The worker could not be confined: {slot.refusal}.")
        if slot.exit is None and slot.group and self._nursery:
            slot.joined = trio.Event()
            self._nursery.start_soon(self._join_group, slot, slot.group)

    async def _greet(self, slot: Slot) -> Worker:
        stream = slot.stream
        assert stream is not None
        try:
            with trio.fail_after(_HELLO_DEADLINE_S):
                kind, body, rest = await _read_frame(stream)
        except trio.TooSlowError as exc:
            raise SandboxError("The worker did not say hello in time.") from exc
        except (trio.BrokenResourceError, RemoteProtocolError, EOFError) as exc:
            raise SandboxError("The worker ended before it said hello.") from exc
        if kind is FrameKind.ERROR:
            sentence = body.decode("utf-8", "replace")[:200]
            raise SandboxError(f"The worker could not be confined: {sentence}.")
        if kind is not FrameKind.HELLO or len(body) != KEY_BYTES:
            raise SandboxError("The worker's first frame was no hello.")
        _step_back(slot.pid)
        return Worker(self, slot, _WorkerStream(stream, rest, slot), body)

    async def _join_group(self, slot: Slot, group: cgroups.Group) -> None:
        """At the same time as the worker starts: the kernel makes us wait, milliseconds, in v1."""
        assert slot.joined is not None
        try:
            await group.adopt(slot.pid)
        except OSError as exc:
            slot.refusal = f"cgroup: {exc.strerror}"
            if not slot.ended.is_set():
                log.error("cgroup.not_joined", worker_pid=slot.pid, reason=exc.strerror)
                slot.kill("killed")
        finally:
            slot.joined.set()

    async def _enforce_wall_limit(self, slot: Slot) -> None:
        with slot.wall_scope:
            await slot.ended.wait()
        if slot.exit is None:
            log.info("worker.timed_out", worker_pid=slot.pid)
            slot.kill("timeout")

    async def finish_slot(self, slot: Slot) -> WipeReport:
        """Worker.finish: one wipe per worker, whoever asks."""
        with trio.CancelScope(shield=True):
            async with slot.wiping:
                if slot.report is None:
                    slot.report = await self._wipe(slot)
                    self._close_slot(slot)
        assert slot.report is not None
        return slot.report

    async def _wipe(self, slot: Slot) -> WipeReport:
        slot.kill("killed")
        reaped, remains = slot.pidfd is None, self._expected_remains(slot)
        no_swap: wipe.Answer = "yes" if self._swap_is_forbidden(slot) else wipe.swap_is_off()
        with trio.move_on_after(_WIPE_DEADLINE_S):
            await slot.ended.wait()
            if slot.pidfd is not None:
                # No event tells of a reap by another process, init's after a zygote's death.
                while not wipe.is_gone(slot.pidfd):
                    wipe.reap_if_ours(slot.pidfd)
                    await trio.sleep(0.005)
                reaped = True
            await slot.wait_joined()
            remains = await self._remove_remains(slot)
        # Not before: a worker that another process has to kill would end by itself at its end.
        if slot.stream is not None:
            await trio.aclose_forcefully(slot.stream)
        remains += await self._wipe_card(slot)
        return await trio.to_thread.run_sync(wipe.look, slot.pid, reaped, remains, no_swap)

    async def _wipe_card(self, slot: Slot) -> wipe.Steps:
        """Zeros over the free memory of the card that a unit has used; then another process looks.

        No step for a worker that has had none.
        """
        device = dict(slot.plan.limits).get("device", "cpu")
        if device == "cpu" or slot.task is not None or not slot.was_given_bytes:
            return ()
        async with self._card_wipe:
            # What is free is taken: another unit on the card would run out of memory.
            shared = any(other.was_given_bytes and not other.task for other in self._others(slot))
            cleared = not shared and await self._card_is_clear(slot.plan)
        return (("gpu-memory-cleared", cleared),)

    def _others(self, slot: Slot) -> list[Slot]:
        """Other live workers on its card."""
        return [
            other
            for other in self._slots.values()
            if other is not slot and _card_of(other) == _card_of(slot) and not other.ended.is_set()
        ]

    async def _card_is_clear(self, plan: Plan) -> bool:
        try:
            with trio.fail_after(_CARD_DEADLINE_S):
                cleared, marked = await self._ask_card(plan, b"clear")
                looked_at, left = await self._ask_card(plan, b"look")
        except (SandboxError, RemoteProtocolError, EOFError, trio.BrokenResourceError) as exc:
            log.warning("gpu.not_cleared", reason=str(exc))
            return False
        except trio.TooSlowError:
            log.warning("gpu.not_cleared", reason="it took too long")
            return False
        return cleared > 0 and looked_at > 0 and marked == left == 0

    async def _ask_card(self, plan: Plan, order: bytes) -> tuple[int, int]:
        """What one of worker/card.py's processes says: bytes, and how many of them are not 0."""
        worker = await self.spawn_planned(plan, wall_s=_CARD_DEADLINE_S, task="card")
        try:
            await worker.stream.send_all(encode_frame(FrameKind.DATA, order))
            _, body, _ = await _read_frame(worker.stream)
        finally:
            await worker.finish()
        if len(body) != _CARD_ANSWER.size:
            raise RemoteProtocolError(ErrorCode.MALFORMED, "the card's worker")
        sizes: tuple[int, int] = _CARD_ANSWER.unpack(body)
        return sizes

    def _swap_is_forbidden(self, slot: Slot) -> bool:
        return slot.group is not None and slot.group.swap_forbidden()

    def _expected_remains(self, slot: Slot) -> wipe.Steps:
        """What `_remove_remains` answers if it does not come to its end."""
        return (("cgroup-removed", slot.group is None),)

    async def _remove_remains(self, slot: Slot) -> wipe.Steps:
        """What outlives the process on the host, removed and looked up again."""
        gone = slot.group is None or await slot.group.remove()
        return (("cgroup-removed", gone),)

    def _close_slot(self, slot: Slot) -> None:
        if slot.pidfd is not None:
            os.close(slot.pidfd)
            slot.pidfd = None
        self._slots.pop(slot.spawn_id, None)
        # Last in line: the kernel drops an id's thread count a moment after the process.
        self._spare_uids.insert(0, slot.spare_uid)
        report = slot.report
        if report is not None and not report.complete:
            log.error("worker.wipe_incomplete", worker_pid=slot.pid, failed=report.failed)

    def _claim_hierarchy(self) -> cgroups.Hierarchy | None:
        hierarchy = cgroups.find_hierarchy()
        if hierarchy is not None:
            try:
                hierarchy.claim()
            except OSError as exc:
                log.warning("cgroup.not_usable", reason=exc.strerror)
                return None
        return hierarchy

    async def _supervise(self, task_status: trio.TaskStatus[None]) -> SandboxError:
        """Returns only if the first zygote could not be had, with the reason."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started = trio.current_time()
            zygote = ZygoteLink.start(self._worker_module)
            try:
                await self._serve_zygote(zygote, task_status)
            except trio.Cancelled:
                with trio.move_on_after(_WIPE_DEADLINE_S, shield=True):
                    await self._drain(zygote)
                raise
            except SandboxError as exc:
                if self._runtime is None:
                    return exc
                log.error("zygote.start_failed", reason=str(exc))
            finally:
                self._zygote, self._zygote_up = None, trio.Event()
                with trio.move_on_after(_WIPE_DEADLINE_S, shield=True):
                    await zygote.end()
                    await self._await_orphans()
            if trio.current_time() - started > _SOUND_AFTER_S:
                backoff_s = _FIRST_BACKOFF_S
            log.warning("zygote.died", restart_in_s=backoff_s)
            await trio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    async def _serve_zygote(self, zygote: ZygoteLink, task_status: trio.TaskStatus[None]) -> None:
        first = self._runtime is None
        self._write_state(zygote)
        await self._await_ready(zygote)
        self._zygote = zygote
        self._zygote_up.set()
        if first:
            task_status.started()
        while (message := await zygote.receive()) is not None:
            self._dispatch(*message)

    async def _await_ready(self, zygote: ZygoteLink) -> control.Head:
        try:
            with trio.fail_after(_PRELOAD_DEADLINE_S):
                message = await zygote.receive()
        except trio.TooSlowError as exc:
            raise SandboxError("The worker's modules took too long to load.") from exc
        if message is None:
            raise SandboxError("The sandbox launcher ended before it was ready.")
        head, _ = message
        if "failed" in head:
            raise SandboxError(str(head["failed"]))
        self._layout = decode_layout(head["layout"])
        self._runtime = head["ready"]
        log.info("zygote.started", runtime=self._runtime, zygote_pid=zygote.pid)
        return head

    def _dispatch(self, head: control.Head, fds: list[int]) -> None:
        name = next(iter(head))
        slot = self._slots.get(head[name])
        if slot is None:  # its wipe was given up on
            for fd in fds:
                os.close(fd)
        elif name == "spawned":
            if not fds:
                # This process is at its descriptor limit: the worker could not be followed.
                raise SandboxError("This daemon has no file descriptors left.")
            slot.on_spawned(head["pid"], fds[0])
        elif name == "refused":
            slot.on_refused(head["error"])
        else:
            slot.on_exited(head)

    async def _drain(self, zygote: ZygoteLink) -> None:
        """Kill all workers while their zygote can still reap them and report."""
        while any(not slot.ended.is_set() for slot in self._slots.values()):
            for slot in self._slots.values():
                slot.kill("killed")
            message = await zygote.receive()
            if message is None:
                return
            self._dispatch(*message)

    async def _await_orphans(self) -> None:
        """The kernel kills the workers of a dead zygote; make sure, and tell who waits for them."""
        for slot in list(self._slots.values()):
            if slot.pidfd is not None and slot.exit is None:
                slot.kill("lost")
                await trio.lowlevel.wait_readable(slot.pidfd)
            slot.on_lost()

    async def _end_everything(self) -> None:
        async with trio.open_nursery() as nursery:
            for slot in list(self._slots.values()):
                nursery.start_soon(self.finish_slot, slot)
        (self._directory / "state.json").unlink(missing_ok=True)

    def _write_state(self, zygote: ZygoteLink) -> None:
        """For the next daemon, should this one be killed: what may have been left behind."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        assert zygote.pid is not None
        state = {
            "boot": boot_id(),
            "zygote_pid": zygote.pid,
            "zygote_started": cgroups.start_ticks(zygote.pid),
        }
        temporary = self._directory / "state.json.new"
        temporary.write_text(json.dumps(state))
        temporary.replace(self._directory / "state.json")

    async def _remove_leftovers(self) -> None:
        """Kill and remove what a daemon that was killed has left: its zygote and its cgroups."""
        file = self._directory / "state.json"
        try:
            state: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            state = {}
        if state:
            # After a boot, its process id may be anybody's.
            if state.get("boot") == boot_id():
                await _kill_if_same(int(state["zygote_pid"]), int(state["zygote_started"]))
            log.warning("sandbox.leftovers_removed")
        for group in self._hierarchy.leftovers() if self._hierarchy else ():
            with trio.move_on_after(_WIPE_DEADLINE_S):
                await group.remove()
        for leftover in self._directory.glob("*"):
            leftover.unlink()


async def _read_frame(stream: trio.abc.ReceiveStream) -> tuple[FrameKind, bytes, bytes]:
    """(kind, body, bytes behind it) of the first frame.  Raises EOFError at an early end."""
    decoder = FrameDecoder()
    received = b""
    while data := await stream.receive_some():
        received += data
        decoder.feed(data)
        for kind, body in decoder:
            return kind, body, received[HEAD_BYTES + len(body) :]
    raise EOFError


def _card_of(slot: Slot) -> tuple[object, ...]:
    """Tells cards apart: each worker names its own "the first", the nodes behind that differ."""
    return (dict(slot.plan.limits).get("device"), slot.plan.mounts, slot.plan.landlock)


def _step_back(pid: int) -> None:
    """From its first frame on a worker comes after the daemon and the owner's own programs."""
    # Another user's worker (tier B) has this from its service.
    with contextlib.suppress(OSError):
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, pid, min(own + _NICER_BY, _NICEST))


def boot_id() -> str:
    """Names this run of the kernel (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def _kill_if_same(pid: int, started: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if cgroups.start_ticks(pid) == started:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            with trio.move_on_after(_WIPE_DEADLINE_S):
                await trio.lowlevel.wait_readable(pidfd)
    except OSError:
        return
    finally:
        os.close(pidfd)
