"""Commands about jobs: jobs, show, logs, results, cancel, retry, rm."""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec
import trio
from cyclopts import Parameter

from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.detaching import Began, supervise
from nextgpu_node.cli.files import check_writable
from nextgpu_node.cli.output import human_seconds
from nextgpu_node.core.job_state import JobEvent, JobState, ShardKept
from nextgpu_node.errors import JobFailed, JobStoreError, NextGPUError, UsageError
from nextgpu_node.sdk.jobs import Job, JobView, list_jobs

JobId = Annotated[str, Parameter(name="ID")]

_POLL_S: Final = 0.1
_SHORT_ID: Final = 12


def jobs(*, ctx: Ctx) -> int:
    """Every job of yours, the oldest first."""
    views = [job.view() for job in list_jobs(ctx.paths.jobs_dir)]
    if ctx.out.json:
        ctx.out.print_json(jobs=[msgspec.to_builtins(view) for view in views])
    elif not views:
        ctx.out.say("There are no jobs. `nextgpu run` and `nextgpu map` make some.")
    else:
        ctx.out.table(("JOB", "KIND", "STATUS", "DONE", "FAILED", "AGE"), [_row(v) for v in views])
    return 0


def _row(view: JobView) -> tuple[str, ...]:
    age_s = max(0.0, time.time() - view.created_ms / 1000)
    return (
        view.job_id,
        view.kind,
        view.status,
        f"{view.done} of {view.shards}",
        str(view.failed),
        human_seconds(age_s),
    )


def show(job_id: JobId, /, *, ctx: Ctx) -> int:
    """One job: what it runs, how far it is, and why shards failed."""
    job = Job.open(ctx.paths.jobs_dir, job_id)
    state = job.state()
    view = job.view(state)
    if ctx.out.json:
        shards = [
            {"name": spec.name, "output": spec.output, **_plain_shard(state, k)}
            for k, spec in enumerate(job.manifest.shards)
        ]
        ctx.out.print_json(
            **msgspec.to_builtins(view),
            directory=str(job.directory),
            program=job.manifest.program,
            distrusted=state.distrusted,
            shard_states=shards,
        )
        return 0
    facts = {
        "job": view.job_id,
        "kind": view.kind,
        "status": view.status + (f": {view.why}" if view.why else ""),
        "program": job.manifest.program,
        "shards": f"{view.done} of {view.shards} done, {view.failed} failed",
        "directory": str(job.directory),
    }
    ctx.out.facts(facts)
    for peer_id, why in state.distrusted.items():
        ctx.out.say(f"not trusted: {peer_id}: {why}")
    for k in state.indexes("failed"):
        ctx.out.say(f"failed: {job.manifest.shards[k].name}: {state.shards[k].why}")
    return 0


def _plain_shard(state: JobState, k: int) -> dict[str, object]:
    shard = state.shards[k]
    return {
        "status": shard.status,
        "peer_id": shard.peer_id,
        "why": shard.why,
        "seconds": shard.seconds,
        "attempts_lost": shard.attempts_lost,
        "confirmed": shard.confirmed,
    }


def logs(
    job_id: JobId,
    /,
    *,
    follow: Annotated[
        bool, Parameter(name=("--follow", "-f"), negative="", help="Until the job ends.")
    ] = False,
    ctx: Ctx,
) -> int:
    """What happened to a job, event by event."""
    job = Job.open(ctx.paths.jobs_dir, job_id)
    follower = job.follow()
    state = JobState([])
    while True:
        # Asked before the reading: whatever the process wrote before it ended is then read.
        works = job.worker_pid() is not None
        for event in follower.poll():
            state.apply(event)
            _print_event(ctx, job, event)
        if not follow or not works:
            break
        time.sleep(_POLL_S)
    return 0


def _print_event(ctx: Context, job: Job, event: JobEvent) -> None:
    plain = msgspec.to_builtins(event)
    if ctx.out.json:
        ctx.out.print_json(**plain)
        return
    at = datetime.fromtimestamp(plain.pop("at_ms") / 1000, tz=UTC).astimezone()
    name = plain.pop("event")
    if "shard" in plain:
        plain = {"shard": job.manifest.shards[plain.pop("shard")].name, **plain}
    if isinstance(event, ShardKept):
        plain.pop("digest")
    told = "  ".join(f"{key}={value}" for key, value in plain.items() if value != "")
    ctx.out.say(f"{at:%H:%M:%S}  {name:<17}  {told}")


def results(
    job_id: JobId,
    /,
    *,
    output: Annotated[
        Path | None, Parameter(help="Copy them there: a file for a run, a directory for a map.")
    ] = None,
    force: Annotated[bool, Parameter(negative="", help="Replace existing files.")] = False,
    ctx: Ctx,
) -> int:
    """Where the results of a job are, or a copy of them.

    The exit code is 0 where all of them are there, else 1.
    """
    job = Job.open(ctx.paths.jobs_dir, job_id)
    state = job.state()
    found = _find_results(job, state)
    if output is not None:
        _copy_results(job, found, output, force=force)
    status = job.status(state)
    if ctx.out.json:
        ctx.out.print_json(
            job_id=job.job_id,
            status=status,
            results={job.manifest.shards[k].name: str(file) for k, file in found.items()},
            missing=len(job.manifest.shards) - len(found),
        )
    else:
        ctx.out.say(*(f"{job.manifest.shards[k].name}  {file}" for k, file in found.items()))
        if len(found) < len(job.manifest.shards):
            ctx.out.note(f"{len(found)} of {len(job.manifest.shards)} are there; job {status}.")
    return 0 if len(found) == len(job.manifest.shards) else 1


def _find_results(job: Job, state: JobState) -> dict[int, Path]:
    found = {}
    for k in state.indexes("done"):
        output = job.manifest.shards[k].output
        for file in (job.result_file(k), Path(output) if output else None):
            if file is not None and file.exists():
                found[k] = file
                break
    return found


def _copy_results(job: Job, found: dict[int, Path], output: Path, *, force: bool) -> None:
    if job.manifest.kind == "run":
        targets = dict.fromkeys(found, output)
    else:
        output.mkdir(exist_ok=True)
        targets = {k: output / job.manifest.shards[k].name for k in found}
    for target in targets.values():
        check_writable(target, force=force)
    for k, target in targets.items():
        part = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(found[k], part)
            part.replace(target)
        except OSError as exc:
            raise NextGPUError(f"{target}: can not be written: {exc.strerror}.") from exc
        finally:
            part.unlink(missing_ok=True)
        found[k] = target


def cancel(job_id: JobId, /, *, ctx: Ctx) -> int:
    """End a job, or a work unit that is here: its worker is killed and wiped.

    Parameters
    ----------
    job_id
        As `nextgpu jobs` shows it, or the id of a unit as `nextgpu units` does.
    """
    try:
        job = Job.open(ctx.paths.jobs_dir, job_id)
    except UsageError:
        from nextgpu_node.cli.network import cancel_unit

        return trio.run(cancel_unit, ctx, job_id)
    if not job.cancel():
        raise JobFailed(f"Job {job.job_id} is not at work: {job.view().status}.")
    if ctx.out.json:
        ctx.out.print_json(cancelled=True, job_id=job.job_id)
    else:
        ctx.out.say(f"Cancelled {job.job_id}.")
    return 0


def retry(
    job_id: JobId,
    /,
    *,
    detach: Annotated[
        bool, Parameter(name=("--detach", "-d"), negative="", help="Go on in the background.")
    ] = False,
    quiet: Annotated[bool, Parameter(negative="", help="No progress on stderr.")] = False,
    ctx: Ctx,
) -> int:
    """Go on with a job: what failed, what was cancelled and what is missing, nothing else."""
    job = Job.open(ctx.paths.jobs_dir, job_id)
    if job.worker_pid() is not None:
        raise UsageError(f"Job {job.job_id} is at work. See `nextgpu logs -f {job.job_id}`.")
    if job.state().ended == "done":
        ctx.out.note(f"Job {job.job_id} is done; there is nothing to do again.")
        return 0
    job.allow_again()

    def work(began: Began) -> int:
        from nextgpu_node.cli.mapping import work_at_map
        from nextgpu_node.cli.running import work_at_run

        if job.manifest.kind == "map":
            return work_at_map(ctx, job, began, quiet=quiet)
        return work_at_run(ctx, job, began, quiet=quiet)

    return supervise(work, detach=detach, out=ctx.out)


def rm(
    job_ids: Annotated[tuple[str, ...], Parameter(name="ID")] = (),
    /,
    *,
    finished: Annotated[
        bool, Parameter(negative="", help="Every job that is done, failed or cancelled.")
    ] = False,
    force: Annotated[bool, Parameter(negative="", help="Cancel it first where it runs.")] = False,
    ctx: Ctx,
) -> int:
    """Delete jobs with everything that is in them.  Files at --output stay.

    Parameters
    ----------
    job_ids
        As `nextgpu jobs` shows them.
    """
    chosen = [Job.open(ctx.paths.jobs_dir, one) for one in job_ids]
    if finished:
        chosen += [job for job in list_jobs(ctx.paths.jobs_dir) if job.state().ended]
    if not chosen and not finished:
        raise UsageError("Which job? `nextgpu jobs` lists them.")
    removed = []
    for job in {job.job_id: job for job in chosen}.values():
        if force:
            job.cancel()
        elif job.worker_pid() is not None:
            raise JobStoreError(f"Job {job.job_id} is at work. Cancel it, or say --force.")
        job.remove(ctx.paths.jobs_dir)
        removed.append(job.job_id)
    if ctx.out.json:
        ctx.out.print_json(removed=removed)
    else:
        ctx.out.say(*(f"Removed {job_id}." for job_id in removed))
    return 0
