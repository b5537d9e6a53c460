"""Working at a job: everything that is missing, until it is done, cancelled or given up.

    lock ─► journal ─► shards that are not done ─► MapRun ─► results/K ─► their outputs ─► JobEnded

A result is on the disk before the journal says so, and at its output before its copy here goes; so
at whatever byte the process dies, the next one finds each result once, or does that shard again.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from nextgpu_node.clock import now_ms
from nextgpu_node.core.choice import Preferences
from nextgpu_node.core.job_state import JobBegan, JobEnded, JobEvent, JobState
from nextgpu_node.core.schedule import ScheduleLimits
from nextgpu_node.errors import (
    JobCancelled,
    JobFailed,
    JobInterrupted,
    JobStoreError,
    NextGPUError,
    ProgramError,
    UsageError,
)
from nextgpu_node.files import write_whole
from nextgpu_node.paths import Paths
from nextgpu_node.sdk.attempt import Position, Steps, Tensors
from nextgpu_node.sdk.audit import Audit
from nextgpu_node.sdk.client import open_client
from nextgpu_node.sdk.events import UnitEvent
from nextgpu_node.sdk.jobs import Job, JobOptions, ShardSpec
from nextgpu_node.sdk.journal import JournalWriter
from nextgpu_node.sdk.mapping import MapOptions, MapRun, Shard, ShardOutcome
from nextgpu_node.sdk.results import file_digest, key_of_file, read_result, result_image
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.tokens import parse_token_untrusted

if TYPE_CHECKING:
    from nextgpu_node.graph.artifact import Program

Load = Callable[["Program", ShardSpec], Steps]
Listener = Callable[[JobEvent], None]


class JobRun:
    """Works at one job in this process.

    `load` reads the input of a shard; `on_event` hears every JobEvent, `on_unit_event` every event
    of the unit of a "run"; `program` is given where it is loaded already, `carry` where shards
    do not begin with the program's own state.  After `run`, `outcomes`
    has the outcome of each shard of a "run".
    """

    def __init__(
        self,
        job: Job,
        paths: Paths,
        load: Load,
        on_event: Listener,
        on_unit_event: Callable[[UnitEvent], None] | None = None,
        program: Program | None = None,
        carry: Tensors | None = None,
    ) -> None:
        self._carry = carry
        self._program = program
        self._job = job
        self._paths = paths
        self._load = load
        self._on_event = on_event
        self._on_unit_event = on_unit_event or (lambda event: None)
        self._errors: dict[int, NextGPUError] = {}
        self.outcomes: dict[int, ShardOutcome] = {}

    async def run(self) -> JobState:
        """Until it ends.  SIGTERM ends it early: cancelled if that was asked for, else to be
        gone on with.

        Raises what the end is: JobCancelled, the error of the only shard, JobFailed for several,
        JobStoreError, DaemonUnreachable, …
        """
        with self._job.locked(), JournalWriter(self._job.journal_file) as journal:
            self._journal = journal
            self._state = self._job.state()
            self._note(JobBegan(at_ms=now_ms(), pid=os.getpid()))
            try:
                await self._work_until_told()
                self._raise_what_failed()
            except JobInterrupted:
                journal.sync()
                raise
            except NextGPUError as exc:
                self._end(exc)
                raise
            self._note(JobEnded(at_ms=now_ms(), status="done"))
            await trio.to_thread.run_sync(journal.sync)
            return self._state

    def _end(self, error: NextGPUError) -> None:
        status = "cancelled" if isinstance(error, JobCancelled) else "failed"
        ended = JobEnded(at_ms=now_ms(), status=status, why=str(error), exit_code=error.exit_code)
        try:
            self._note(ended)
            self._journal.sync()
        except JobStoreError:
            # A full disk: the job stays open in the journal, and so "interrupted".
            self._on_event(ended)

    def _note(self, event: JobEvent) -> None:
        try:
            self._journal.append(event)
        except JobStoreError as exc:
            why = exc.__cause__.strerror if isinstance(exc.__cause__, OSError) else "it is full"
            raise self._job.not_written(why) from exc
        self._state.apply(event)
        self._on_event(event)

    async def _work_until_told(self) -> None:
        failure: NextGPUError | None = None
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._await_signal, signals, nursery.cancel_scope)
                try:
                    await self._work()
                except NextGPUError as exc:
                    failure = exc  # as it is: the nursery would make a group of it
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if self._told:
            if self._job.is_cancelled:
                raise JobCancelled
            raise JobInterrupted

    _told = False

    async def _await_signal(self, signals: Any, scope: trio.CancelScope) -> None:
        async for _ in signals:
            self._told = True
            scope.cancel()

    async def _work(self) -> None:
        manifest = self._job.manifest
        program = self._program
        if program is None:
            program = await trio.to_thread.run_sync(load_checked_program, self._job)
        sink = _JobSink(self._job, self._journal, self._note, self._errors, self.outcomes)
        missing = await trio.to_thread.run_sync(self._find_missing)
        shards: dict[int, Shard] = {
            k: _FileShard(program, manifest.shards[k], self._load) for k in missing
        }
        positions = await trio.to_thread.run_sync(self._read_positions, missing)
        async with open_client(self._paths) as client:
            run = MapRun(
                client,
                program,
                shards,
                _map_options(manifest.options, kind=manifest.kind, stack=manifest.steps_axis),
                sink,
                history=client.history,
                positions=positions,
                on_unit_event=lambda shard, event: self._on_unit_event(event),
            )
            await run.run()
        await sink.publish_all()

    def _find_missing(self) -> list[int]:
        """The shards without a result that can be read: what the journal says, held against the
        disk."""
        missing = []
        for k, shard in enumerate(self._state.shards):
            spec = self._job.manifest.shards[k]
            if shard.status != "done" or not has_result(self._job, k, spec):
                missing.append(k)
        return missing

    def _read_positions(self, missing: Sequence[int]) -> dict[int, Position]:
        found = {k: Position(carry=self._carry) for k in missing if self._carry is not None}
        for k in missing:
            file = self._job.checkpoint_file(k)
            if file.exists():
                found[k] = read_position(file)
        return found

    def _raise_what_failed(self) -> None:
        if not self._errors:
            return
        if len(self._job.manifest.shards) == 1:
            raise self._errors[0]
        kinds = {type(error): error for error in self._errors.values()}
        done = len(self._job.manifest.shards) - len(self._errors)
        words = (
            f"{len(self._errors)} of {len(self._job.manifest.shards)} shards failed, {done} are "
            f"done. See `nextgpu show {self._job.job_id}`; "
            f"`nextgpu retry {self._job.job_id}` does those again."
        )
        if len(kinds) == 1 and not done:
            (kind, error), *_ = kinds.items()
            raise kind(f"{error} {words}") from error
        raise JobFailed(words)


class _FileShard:
    """A shard whose input is a file, which must be what it was when the job was made."""

    def __init__(self, program: Program, spec: ShardSpec, load: Load) -> None:
        self._program = program
        self._spec = spec
        self._load = load

    @property
    def name(self) -> str:
        return self._spec.name

    def load(self) -> Steps:
        if self._spec.input and self._spec.digest:
            try:
                digest = file_digest(Path(self._spec.input))
            except OSError as exc:
                raise UsageError(f"{self._spec.input}: can not be read: {exc.strerror}.") from exc
            if digest != self._spec.digest:
                raise UsageError(f"{self._spec.input}: has changed since the job was made.")
        return self._load(self._program, self._spec)


class _JobSink:
    """Results into the job's directory and on to their outputs; JobEvents into its journal."""

    def __init__(
        self,
        job: Job,
        journal: JournalWriter,
        note: Listener,
        errors: dict[int, NextGPUError],
        outcomes: dict[int, ShardOutcome],
    ) -> None:
        self._job = job
        self._journal = journal
        self.note = note
        self._errors = errors
        self._outcomes = outcomes
        self._hold = bool(job.manifest.options.audit_share or job.manifest.options.canaries)
        self._appended = self._synced = 0
        self._syncing = trio.Lock()

    async def store(self, shard: int, result: ShardOutcome) -> None:
        spec = self._job.manifest.shards[shard]
        self._errors.pop(shard, None)
        if self._job.manifest.kind == "run":
            self._outcomes[shard] = result
        await trio.to_thread.run_sync(self._write, shard, spec, result)

    def _write(self, shard: int, spec: ShardSpec, result: ShardOutcome) -> None:
        try:
            image = result_image(result.tensors, spec.key)
            write_whole(self._job.result_file(shard), image, force=True)
        except NextGPUError as exc:
            why = exc.__cause__.strerror if isinstance(exc.__cause__, OSError) else str(exc)
            raise self._job.not_written(why) from exc
        if not self._hold:
            # A place that is taken meanwhile costs no result: it waits here for `publish_all`.
            with suppress(UsageError):
                publish(self._job, shard)
        self._job.checkpoint_file(shard).unlink(missing_ok=True)

    async def drop(self, shard: int) -> None:
        self._outcomes.pop(shard, None)
        self._job.result_file(shard).unlink(missing_ok=True)

    async def fail(self, shard: int, error: NextGPUError) -> None:
        self._errors[shard] = error

    async def save_position(self, shard: int, position: Position) -> None:
        await trio.to_thread.run_sync(write_position, self._job.checkpoint_file(shard), position)

    async def flush(self) -> None:
        """One fdatasync for all that wait for one."""
        self._appended += 1
        wanted = self._appended
        async with self._syncing:
            if self._synced < wanted:
                reached = self._appended
                await trio.to_thread.run_sync(self._journal.sync)
                self._synced = reached

    async def publish_all(self) -> None:
        """Every result that is still here goes to its output."""
        for shard in range(len(self._job.manifest.shards)):
            if self._job.result_file(shard).exists() and shard not in self._errors:
                await trio.to_thread.run_sync(publish, self._job, shard)


def publish(job: Job, shard: int) -> None:
    """Give the result its place at the output, whole; without one it stays in the job.

    Raises UsageError where another file has taken the place: nothing is ever overwritten that this
    job was not told to replace.
    """
    spec, source = job.manifest.shards[shard], job.result_file(shard)
    if not spec.output:
        return
    output = Path(spec.output)
    try:
        ours = output.exists() and bool(spec.key) and key_of_file(output) == spec.key
        _place(source, output, replace=ours or job.manifest.options.force)
        source.unlink()
    except FileExistsError as exc:
        raise UsageError(
            f"{output}: exists by now. Move it away and `nextgpu retry {job.job_id}`."
        ) from exc
    except OSError as exc:
        raise JobStoreError(
            f"{output}: can not be written: {exc.strerror}. The result is kept in the job: "
            f"`nextgpu retry {job.job_id}` goes on once it can."
        ) from exc


def _place(source: Path, output: Path, *, replace: bool) -> None:
    """Another name for the same file, or, on another disk, a copy; it appears whole."""
    part = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
        if replace:
            part.replace(output)
        else:
            # link(2) fails where the name is taken; rename(2) would replace what is there.
            os.link(part, output)
    finally:
        part.unlink(missing_ok=True)


def has_result(job: Job, shard: int, spec: ShardSpec) -> bool:
    """Whether the result is in the job or at its output, and is this shard's."""
    if not spec.key:
        return False
    for file in (job.result_file(shard), Path(spec.output) if spec.output else None):
        try:
            if file is not None and file.exists() and key_of_file(file) == spec.key:
                return True
        except OSError:
            continue
    return False


def load_checked_program(job: Job) -> Program:
    """The program, if it is still the one that the job was made with.  Raises UsageError."""
    from nextgpu_node.graph.artifact import Program

    path = Path(job.manifest.program)
    try:
        if file_digest(path) != job.manifest.program_digest:
            raise UsageError(f"{path}: has changed since the job was made. Make a new job.")
        return Program.load(path)
    except OSError as exc:
        raise UsageError(f"{path}: can not be read: {exc.strerror}.") from exc
    except ProgramError as exc:
        raise exc if str(path) in str(exc) else ProgramError(f"{path}: {exc}") from exc


def write_position(file: Path, position: Position) -> None:
    """A position as a safetensors file: carry/NAME, and y/STEP/NAME for each step's results."""
    from nextgpu_node.graph.tensors import encode_tensors

    tensors = {f"carry/{name}": tensor for name, tensor in (position.carry or {}).items()}
    for step, ys in enumerate(position.ys):
        tensors |= {f"y/{step}/{name}": tensor for name, tensor in ys.items()}
    write_whole(file, encode_tensors(tensors), force=True)


def read_position(file: Path) -> Position:
    """What `write_position` wrote; the beginning where it is damaged."""
    try:
        tensors = read_result(file)
    except UsageError:
        return Position()
    carry = {
        name.removeprefix("carry/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("carry/")
    }
    steps: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("y/"):
            _, step, y = name.split("/", 2)
            steps.setdefault(int(step), {})[y] = tensor
    return Position(tuple(steps[step] for step in sorted(steps)), carry or None)


def _map_options(options: JobOptions, *, kind: str, stack: bool) -> MapOptions:
    single = options.peers[0] if len(options.peers) == 1 else None
    return MapOptions(
        needs=Needs(
            kind=options.kind,
            device_memory_bytes=options.device_memory_bytes,
            memory_bytes=options.memory_bytes,
            max_seconds=options.max_seconds,
            output_bytes=options.output_bytes,
            peer_id=single,
            token=parse_token_untrusted(options.token)[0] if options.token else None,
        ),
        preferences=Preferences(
            peers=frozenset(options.peers),
            trusted=frozenset(options.trusted),
            trusted_only=options.trusted_only,
        ),
        in_flight=options.in_flight,
        audit=Audit(share=options.audit_share, canaries=options.canaries),
        checkpoint_ms=options.checkpoint_ms,
        checkpoint_steps=options.checkpoint_steps,
        return_carry=bool(options.checkpoint_out),
        here=options.here,
        stack=stack,
        fresh_units=kind == "run",
        limits=ScheduleLimits(
            patience_s=max(options.patience_s, options.wait_s), first_patience_s=options.wait_s
        ),
    )
