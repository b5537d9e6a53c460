"""A job is a directory of the user's own (0700): what to run, and everything that came of it.

    ID/job.json                what to run: program, inputs and outputs by path and hash, options
    ID/journal                 what happened, line by line (sdk/journal.py)
    ID/results/K.safetensors   results that are not at their output yet
    ID/checkpoints/K.…         where shard K goes on
    ID/lock                    held, with its pid inside, by the one process that works at the job
    ID/cancel                  somebody asked for its end

Everything here is plaintext and stays with the user.  The daemon reads job.json and journal when
the owner looks at the dashboard, and nothing else of it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from nextgpu_node.core.job_state import JobState, replay
from nextgpu_node.errors import ConfigError, JobStoreError, UsageError
from nextgpu_node.files import write_whole
from nextgpu_node.paths import ensure_private_dir
from nextgpu_node.sdk.journal import JournalFollower, read_journal

_MAX_MANIFEST_BYTES: Final = 256 * 1024 * 1024
_CANCEL_DEADLINE_S: Final = 15.0
_POLL_S: Final = 0.05
_TRASH: Final = ".removed-"


class ShardSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`digest`: BLAKE2b-256 of the input file, empty where it could not be read; `key`: what the
    result depends on, as one hash; `output`: where the result goes, empty for the job itself."""

    name: str
    input: str = ""
    digest: str = ""
    key: str = ""
    output: str = ""


class JobOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Flags of the command line, resolved; sizes in bytes."""

    kind: str = "any"
    device_memory_bytes: int = 0
    memory_bytes: int | None = None
    max_seconds: int | None = None
    output_bytes: int | None = None
    peers: list[str] = []
    trusted: list[str] = []
    trusted_only: bool = False
    here: bool = False
    in_flight: int = 4
    audit_share: float = 0.0
    canaries: int = 0
    checkpoint_ms: int = 0
    checkpoint_steps: int = 0
    checkpoint_out: str = ""
    resume_from: str = ""
    patience_s: float = 60.0
    wait_s: float = 0.0
    # Its text: whoever can read the job can spend it.
    token: str = ""
    force: bool = False
    receipt: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What to run.  Written once; never changed."""

    version: int = 1
    job_id: str
    kind: str  # "run" or "map"
    created_ms: int
    program: str
    program_digest: str
    shards: list[ShardSpec]
    steps_axis: bool = False
    steps: int | None = None
    options: JobOptions


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job in one line."""

    job_id: str
    kind: str
    status: str
    shards: int
    done: int
    failed: int
    created_ms: int
    ended_ms: int
    why: str
    exit_code: int


def new_job_id() -> str:
    """Twelve characters: enough that nobody meets the same one twice."""
    return secrets.token_hex(6)


class Job:
    """One job directory.  `Job.create` and `Job.open` make one."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def create(cls, jobs_dir: Path, manifest: Manifest, directory: Path | None = None) -> Job:
        """Make the directory; with `directory` that one, and a link to it where jobs are.

        Raises UsageError where it exists, ConfigError where it may not be ours, JobStoreError for
        what the disk says.
        """
        ensure_private_dir(jobs_dir)
        home = jobs_dir / manifest.job_id
        place = directory.expanduser().absolute() if directory else home
        try:
            place.mkdir(mode=0o700, parents=False)
            if place != home:
                home.symlink_to(place)
            for name in ("results", "checkpoints"):
                (place / name).mkdir(mode=0o700)
        except FileExistsError as exc:
            raise UsageError(f"{place}: exists already. Choose another directory.") from exc
        except OSError as exc:
            raise JobStoreError(f"{place}: can not be made: {exc.strerror}.") from exc
        write_whole(place / "job.json", [msgspec.json.encode(manifest)], force=False)
        return cls(place, manifest)

    @classmethod
    def open(cls, jobs_dir: Path, job_id: str) -> Job:
        """The job whose id begins with `job_id`.  Raises UsageError where there is not just one."""
        found = [name for name in _names(jobs_dir) if name.startswith(job_id)] if job_id else []
        if job_id in found:
            found = [job_id]
        if not found:
            raise UsageError(f"There is no job {job_id!r}. `nextgpu jobs` lists them.")
        if len(found) > 1:
            raise UsageError(f"{job_id!r} could be {found[0]} or {found[1]}. Write more of it.")
        return cls.at((jobs_dir / found[0]).resolve())

    @classmethod
    def at(cls, directory: Path) -> Job:
        """The job in `directory`.  Raises JobStoreError where there is none that can be read."""
        try:
            with (directory / "job.json").open("rb") as file:
                manifest = msgspec.json.decode(file.read(_MAX_MANIFEST_BYTES), type=Manifest)
        except OSError as exc:
            raise JobStoreError(f"{directory}: holds no job: {exc.strerror}.") from exc
        except msgspec.DecodeError as exc:
            raise JobStoreError(f"{directory / 'job.json'}: is damaged: {exc}.") from exc
        for spec in manifest.shards:
            # Results are copied to files of these names.
            if Path(spec.name).name != spec.name or spec.name in ("", ".."):
                raise JobStoreError(f"{directory / 'job.json'}: {spec.name!r} is no file's name.")
        return cls(directory, manifest)

    @property
    def job_id(self) -> str:
        return self.manifest.job_id

    @property
    def journal_file(self) -> Path:
        return self.directory / "journal"

    def result_file(self, shard: int) -> Path:
        return self.directory / "results" / f"{shard}.safetensors"

    def checkpoint_file(self, shard: int) -> Path:
        return self.directory / "checkpoints" / f"{shard}.safetensors"

    def state(self) -> JobState:
        """What the journal says now."""
        return replay(read_journal(self.journal_file).events, len(self.manifest.shards))

    def follow(self) -> JournalFollower:
        return JournalFollower(self.journal_file)

    def view(self, state: JobState | None = None) -> JobView:
        state = state or self.state()
        counts = state.counts()
        return JobView(
            job_id=self.job_id,
            kind=self.manifest.kind,
            status=self.status(state),
            shards=len(state.shards),
            done=counts["done"],
            failed=counts["failed"],
            created_ms=self.manifest.created_ms,
            ended_ms=state.ended_ms,
            why=state.why,
            exit_code=state.exit_code,
        )

    def status(self, state: JobState) -> str:
        """As the journal has it; an open job that no process works at is "interrupted"."""
        if state.ended or self.worker_pid() is not None:
            return state.status
        # The lock may have been let go since the journal was read: the end is written before.
        ended = self.state().ended
        if ended:
            return ended
        return "interrupted" if state.began_ms else "queued"

    # --- the one process that works at it ---------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """This process works at the job.  Raises UsageError where another one does."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise UsageError(
                    f"Job {self.job_id} is being worked at already. "
                    f"See `nextgpu logs -f {self.job_id}`."
                ) from exc
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            except OSError as exc:
                raise self.not_written(exc.strerror) from exc
            yield
        finally:
            os.close(descriptor)

    def not_written(self, why: str | None) -> JobStoreError:
        """The error for a directory that takes no more."""
        return JobStoreError(
            f"{self.directory}: can not be written: {why}. What is done stays done: make room, "
            f"then `nextgpu retry {self.job_id}`."
        )

    def worker_pid(self) -> int | None:
        """The process that works at it, or None."""
        try:
            descriptor = os.open(self.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0)
            return int(text) if text.isdigit() else None
        finally:
            os.close(descriptor)
        return None

    @property
    def is_cancelled(self) -> bool:
        return (self.directory / "cancel").exists()

    def cancel(self) -> bool:
        """Ask the process that works at it to end, and wait until it has.  False where none does.

        Raises JobStoreError where it does not end in time.
        """
        pid = self.worker_pid()
        if pid is None:
            return False
        (self.directory / "cancel").touch(mode=0o600)
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            return True
        deadline_s = time.monotonic() + _CANCEL_DEADLINE_S
        while self.worker_pid() is not None:
            if time.monotonic() > deadline_s:
                raise JobStoreError(f"Job {self.job_id} was told to end and has not yet.")
            time.sleep(_POLL_S)
        return True

    def allow_again(self) -> None:
        """Take the request to cancel back."""
        (self.directory / "cancel").unlink(missing_ok=True)

    def remove(self, jobs_dir: Path) -> None:
        """Delete the directory with everything in it, and the link to it.

        Raises UsageError while a process works at it.
        """
        with self.locked():
            trash = self.directory.with_name(_TRASH + self.job_id)
            try:
                self.directory.rename(trash)
                shutil.rmtree(trash)
                link = jobs_dir / self.job_id
                if link.is_symlink():
                    link.unlink()
            except OSError as exc:
                raise JobStoreError(f"{trash}: can not be removed: {exc.strerror}.") from exc


def list_jobs(jobs_dir: Path) -> list[Job]:
    """Every job that can be read, the oldest first."""
    jobs = []
    for name in _names(jobs_dir):
        try:
            jobs.append(Job.at((jobs_dir / name).resolve()))
        except JobStoreError:
            continue
    return sorted(jobs, key=lambda job: job.manifest.created_ms)


def _names(jobs_dir: Path) -> Sequence[str]:
    try:
        ensure_private_dir(jobs_dir)
        return sorted(p.name for p in jobs_dir.iterdir() if not p.name.startswith("."))
    except OSError as exc:
        raise ConfigError(f"{jobs_dir}: can not be read: {exc.strerror}.") from exc
