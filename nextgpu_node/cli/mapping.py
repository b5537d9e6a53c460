"""`nextgpu map`: one program over a directory of inputs, on every peer that fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import trio
from cyclopts import Parameter

from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.detaching import Began, supervise
from nextgpu_node.cli.job_flags import CommonFlags, digest_of, new_manifest, shard_spec
from nextgpu_node.cli.map_progress import MapProgress, counted
from nextgpu_node.cli.network import Kind
from nextgpu_node.cli.running import check_peer_id, gather_needs
from nextgpu_node.core.job_state import JobBegan, JobEvent
from nextgpu_node.errors import JobStoreError, NextGPUError, UsageError
from nextgpu_node.sdk.attempt import Steps
from nextgpu_node.sdk.job_run import JobRun, Load
from nextgpu_node.sdk.jobs import Job, ShardSpec
from nextgpu_node.sdk.results import key_of_file

if TYPE_CHECKING:
    from nextgpu_node.graph.artifact import Program

_SUFFIX = ".safetensors"
_SHOWN = 3


def map_(
    program: Annotated[Path, Parameter(name="PROGRAM")],
    /,
    *,
    inputs: Annotated[Path, Parameter(help="A directory of .safetensors files, one each shard.")],
    outputs: Annotated[Path, Parameter(help="Where each result goes, under its input's name.")],
    kind: Annotated[Kind | None, Parameter(help="Which devices.")] = None,
    vram: Annotated[str, Parameter(help='Device memory at least: 16 (GB) or "16GiB".')] = "0",
    memory: Annotated[
        str | None, Parameter(help='Memory of each worker: "2GB". Without: what the peer allows.')
    ] = None,
    max_seconds: Annotated[
        int | None, Parameter(help="Wall time of a unit. Without: what the peer allows.")
    ] = None,
    peer: Annotated[tuple[str, ...], Parameter(help="Only this peer; may be repeated.")] = (),
    steps_axis: Annotated[
        bool, Parameter(negative="", help="Inputs have a leading axis of steps.")
    ] = False,
    steps: Annotated[int | None, Parameter(help="So many steps of each input.")] = None,
    in_flight: Annotated[int, Parameter(help="Shards that one peer has at a time, at most.")] = 4,
    audit: Annotated[
        str, Parameter(help='Run this share of the shards twice and compare: "5%".')
    ] = "0%",
    canaries: Annotated[
        int, Parameter(help="Known answers, computed here, that each peer gets among its shards.")
    ] = 0,
    force: Annotated[bool, Parameter(negative="", help="Replace existing outputs.")] = False,
    quiet: Annotated[bool, Parameter(negative="", help="No progress on stderr.")] = False,
    common: CommonFlags | None = None,
    ctx: Ctx,
) -> int:
    """Run a program on every file of a directory, over all peers that fit.

    A second run does only what is missing: a result knows the program and the input that it was
    made of.  A shard that fails is listed, and the others go on.
    """
    common = common or CommonFlags()
    for one in peer:
        check_peer_id(one)
    needs = gather_needs(ctx, kind, vram, memory, max_seconds, None)
    options = common.options(
        ctx,
        needs,
        force=force,
        peers=peer,
        in_flight=_at_least("--in-flight", in_flight, 1),
        audit_share=parse_share(audit),
        canaries=_at_least("--canaries", canaries, 0),
    )
    digest = digest_of(program)
    files = _find_inputs(inputs)
    is_new = _prepare_outputs(inputs, outputs)
    specs = [
        shard_spec(
            program,
            file,
            outputs / file.name,
            steps_axis=steps_axis,
            steps=steps,
            program_digest=digest,
        )
        for file in files
    ]
    missing = _missing(specs, force=force)
    if not missing:
        _say_nothing_to_do(ctx, len(specs))
        return 0

    def work(began: Began) -> int:
        manifest = new_manifest(
            "map", program, missing, options, steps_axis=steps_axis, steps=steps
        )
        job = Job.create(ctx.paths.jobs_dir, manifest, common.job_dir)
        skipped = len(specs) - len(missing)
        try:
            return work_at_map(ctx, job, began, quiet=quiet, skipped=skipped)
        finally:
            if is_new and not job.directory.exists():
                outputs.rmdir()  # nobody took anything: as before

    return supervise(work, detach=common.detach, out=ctx.out)


def work_at_map(ctx: Context, job: Job, began: Began, *, quiet: bool, skipped: int = 0) -> int:
    """Every missing shard of `job`, in this process, with its progress and its summary."""
    with MapProgress(ctx.out, job, quiet=quiet) as progress:

        def take(event: JobEvent) -> None:
            if isinstance(event, JobBegan):
                began(job.directory)
            progress.take(event)

        runner = JobRun(job, ctx.paths, load_shard_of(job), take)
        try:
            trio.run(runner.run)
        except NextGPUError as exc:
            if not progress.has_begun and not isinstance(exc, JobStoreError):
                job.remove(ctx.paths.jobs_dir)  # nobody took anything: nothing to go on with
            else:
                progress.stop()
                progress.list_failures()
            raise
    progress.report(skipped)
    return 0


def load_shard_of(job: Job) -> Load:
    """What reads the input of each shard as the job's flags say."""
    from nextgpu_node.cli.inputs import prepare_steps

    def load(program: Program, spec: ShardSpec) -> Steps:
        manifest = job.manifest
        source = Path(spec.input) if spec.input else None
        return prepare_steps(
            program.spec, source, steps_axis=manifest.steps_axis, steps=manifest.steps
        )

    return load


def parse_share(text: str) -> float:
    """0.05 of "5%" or "0.05".  Raises UsageError."""
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f'--audit takes a share such as "5%" or 0.05, not {text!r}.')
    return share


def _at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise UsageError(f"{option} takes a whole number from {least} on.")
    return value


def _find_inputs(directory: Path) -> list[Path]:
    try:
        files = sorted(
            path
            for path in directory.iterdir()
            if path.suffix == _SUFFIX and not path.name.startswith(".")
        )
    except OSError as exc:
        raise UsageError(f"{directory}: can not be read: {exc.strerror}.") from exc
    if not files:
        raise UsageError(f"{directory}: holds no {_SUFFIX} file, so there is nothing to map.")
    return files


def _prepare_outputs(inputs: Path, outputs: Path) -> bool:
    """Make the directory where it is not there; whether it was not.

    Raises UsageError, before anything is computed that could not be stored.
    """
    is_new = not outputs.exists()
    try:
        outputs.mkdir(exist_ok=True)
        same = outputs.samefile(inputs)
    except OSError as exc:
        raise UsageError(f"{outputs}: can not be made or read: {exc.strerror}.") from exc
    if same:
        raise UsageError("--outputs is the directory of the inputs. Name another one.")
    if not os.access(outputs, os.W_OK | os.X_OK):
        raise UsageError(f"{outputs}: you may not write there. Name another --outputs.")
    return is_new


def _missing(specs: list[ShardSpec], *, force: bool) -> list[ShardSpec]:
    """The shards whose output is not there.  Raises UsageError for one of another origin."""
    missing, foreign = [], []
    for spec in specs:
        output = Path(spec.output)
        if not output.exists():
            missing.append(spec)
        elif spec.key and _key_of(output) == spec.key:
            continue
        elif force:
            missing.append(spec)
        else:
            foreign.append(output.name)
    if foreign:
        names = ", ".join(foreign[:_SHOWN]) + (", …" if len(foreign) > _SHOWN else "")
        raise UsageError(
            f"{counted(len(foreign), 'output')} exist and come from another program, input or "
            f"tool ({names}). Name another --outputs, or say --force."
        )
    return missing


def _key_of(output: Path) -> str:
    try:
        return key_of_file(output)
    except OSError as exc:
        raise UsageError(f"{output}: can not be read: {exc.strerror}.") from exc


def _say_nothing_to_do(ctx: Context, count: int) -> None:
    if ctx.out.json:
        ctx.out.print_json(status="done", shards=0, done=0, failed=0, skipped=count)
    else:
        ctx.out.say(f"Nothing to do: all {counted(count, 'output')} are there.")
