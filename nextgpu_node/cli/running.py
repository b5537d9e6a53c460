"""`nextgpu run`: one program on one peer, and its results in a file.  Also `demo`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import trio
from cyclopts import Parameter

from nextgpu_node.api_types import DeviceView, PeerView
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.detaching import Began, supervise
from nextgpu_node.cli.files import check_writable, write_whole
from nextgpu_node.cli.job_flags import CommonFlags, new_manifest, shard_spec
from nextgpu_node.cli.network import Kind, device_name
from nextgpu_node.cli.output import SCHEMA, human_bytes
from nextgpu_node.cli.progress import Progress
from nextgpu_node.cli.sizes import gigabytes, size
from nextgpu_node.cli.tokens import load_token
from nextgpu_node.config import load_config
from nextgpu_node.core.job_state import JobBegan
from nextgpu_node.errors import NextGPUError, UsageError
from nextgpu_node.sdk.events import (
    Checkpoint,
    Finished,
    InputSent,
    Offered,
    PeerChosen,
    ReceiptVerified,
    Started,
    StepResult,
    UnitEvent,
)
from nextgpu_node.sdk.job_run import JobRun, load_checked_program
from nextgpu_node.sdk.jobs import Job, JobOptions
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.ids import public_key_from_peer_id
from nextgpu_protocol.messages import Offer, Receipt
from nextgpu_protocol.records import UnitSummary

if TYPE_CHECKING:
    from nextgpu_node.cli.checkpoints import CheckpointFile, Resumed
    from nextgpu_node.cli.inputs import StepInputs
    from nextgpu_node.graph.artifact import Program


def run(
    program: Annotated[Path, Parameter(name="PROGRAM")],
    /,
    *arguments: Annotated[str, Parameter(name="ARGS", help="Of a script, behind --.")],
    output: Annotated[
        Path | None,
        Parameter(
            help="Results, in safetensors; without, the job keeps them. Of a script a new "
            "directory."
        ),
    ] = None,
    input_: Annotated[
        Path | None, Parameter(name="--input", help="Inputs by name, in safetensors.")
    ] = None,
    kind: Annotated[Kind | None, Parameter(help="Which devices.")] = None,
    vram: Annotated[str, Parameter(help='Device memory at least: 16 (GB) or "16GiB".')] = "0",
    memory: Annotated[
        str | None, Parameter(help='Memory of the worker: "2GB". Without: what the peer allows.')
    ] = None,
    max_seconds: Annotated[
        int | None, Parameter(help="Wall time. Without: what the peer allows.")
    ] = None,
    peer: Annotated[str | None, Parameter(help="Only the peer with this ID.")] = None,
    token: Annotated[
        str | None, Parameter(help="A capability token, a file that holds one, or -.")
    ] = None,
    steps_axis: Annotated[
        bool, Parameter(negative="", help="Inputs have a leading axis of steps.")
    ] = False,
    steps: Annotated[int | None, Parameter(help="So many steps.")] = None,
    receipt: Annotated[Path | None, Parameter(help="Save the receipt, in JSON.")] = None,
    checkpoint_out: Annotated[
        Path | None, Parameter(help="Keep the program's state here, the latest one, whole.")
    ] = None,
    checkpoint_every: Annotated[
        str | None, Parameter(help="How often: 30s, 5m, 100steps. Without: at the end.")
    ] = None,
    resume_from: Annotated[
        Path | None, Parameter(help="Go on from such a file, with the steps that are left.")
    ] = None,
    force: Annotated[bool, Parameter(negative="", help="Replace existing files.")] = False,
    quiet: Annotated[bool, Parameter(negative="", help="No progress on stderr.")] = False,
    common: CommonFlags | None = None,
    ctx: Ctx,
) -> int:
    """Run a program, or a script of yours, on a peer's device.

    Sealed from here to the worker process that runs it.  Results are written only when all of
    them are here and the peer's signed receipt for them is verified.  A peer that is lost costs
    what was done since the last checkpoint; the work goes on at another one.
    """
    needs = gather_needs(ctx, kind, vram, memory, max_seconds, peer)
    if token is not None:
        needs = replace(needs, token=load_token(token)[0])
    if program.suffix == ".py":
        from nextgpu_node.cli.scripts import run_script

        if output is None:
            raise UsageError("A script needs a new directory for what it writes: --output.")
        return trio.run(run_script, ctx, program, output, needs, arguments)
    if arguments:
        raise UsageError("Only scripts (.py) take arguments.")
    for file in (output, receipt):
        if file is not None:
            check_writable(file, force=force)
    if checkpoint_every is not None and checkpoint_out is None:
        raise UsageError("--checkpoint-every needs a file for the checkpoints: --checkpoint-out.")
    common = common or CommonFlags()
    options = common.options(
        ctx,
        needs,
        force=force,
        receipt=receipt,
        checkpoint_out=checkpoint_out,
        checkpoint_every=checkpoint_every,
        resume_from=resume_from,
    )

    def work(began: Began) -> int:
        from nextgpu_node.cli.checkpoints import check_checkpoint_out
        from nextgpu_node.cli.inputs import load_program, prepare_steps

        loaded = load_program(program)
        inputs = prepare_steps(loaded.spec, input_, steps_axis=steps_axis, steps=steps)
        state = _State.of(loaded, options)
        inputs = state.since.rest_of(inputs)
        if checkpoint_out is not None:
            check_checkpoint_out(checkpoint_out, resume_from, force=force)
        spec = shard_spec(program, input_, output, steps_axis=steps_axis, steps=steps)
        manifest = new_manifest("run", program, [spec], options, steps_axis=steps_axis, steps=steps)
        job = Job.create(ctx.paths.jobs_dir, manifest, common.job_dir)
        return _work(ctx, job, began, loaded, inputs, state, quiet=quiet)

    return supervise(work, detach=common.detach, out=ctx.out)


def work_at_run(ctx: Context, job: Job, began: Began, *, quiet: bool) -> int:
    """Go on with `job`, which another process began, in this one."""
    from nextgpu_node.cli.inputs import prepare_steps

    program, manifest = load_checked_program(job), job.manifest
    (shard,) = manifest.shards
    source = Path(shard.input) if shard.input else None
    inputs = prepare_steps(
        program.spec, source, steps_axis=manifest.steps_axis, steps=manifest.steps
    )
    state = _State.of(program, manifest.options)
    return _work(ctx, job, began, program, state.since.rest_of(inputs), state, quiet=quiet)


def _work(
    ctx: Context,
    job: Job,
    began: Began,
    program: Program,
    inputs: StepInputs,
    state: _State,
    *,
    quiet: bool,
) -> int:
    """The one unit of `job`, in this process, with its progress and its report."""
    with Progress(ctx.out, quiet=quiet) as progress:
        progress.enter("queued", "looking for a peer")
        receipt = job.manifest.options.receipt
        unit = _UnitRun(
            progress,
            len(inputs),
            Path(receipt) if receipt else None,
            state.file,
            force=job.manifest.options.force,
        )
        runner = JobRun(
            job,
            ctx.paths,
            lambda program, spec: inputs,
            lambda event: began(job.directory) if isinstance(event, JobBegan) else None,
            unit.take,
            program=program,
            carry=state.since.carry,
        )
        try:
            trio.run(runner.run)
        except NextGPUError:
            state.tell_how_to_go_on(ctx)
            if unit.offer is None:
                job.remove(ctx.paths.jobs_dir)  # nobody took it: there is nothing to go on with
            raise
        where = job.manifest.shards[0].output or str(job.result_file(0))
        progress.enter("done", where)
    _report(ctx, job, unit, progress, where)
    return 0


@dataclass(frozen=True, slots=True)
class _State:
    """What the run begins from, and where its own state is kept."""

    since: Resumed
    file: CheckpointFile | None

    @classmethod
    def of(cls, program: Program, options: JobOptions) -> _State:
        from nextgpu_node.cli import checkpoints

        since, file = checkpoints.Resumed(), None
        if (options.checkpoint_out or options.resume_from) and not program.spec.carry:
            raise UsageError("This program keeps no state from step to step: no checkpoints.")
        if options.resume_from:
            since = checkpoints.load_checkpoint(Path(options.resume_from), program.spec)
        if options.checkpoint_out:
            file = checkpoints.CheckpointFile(Path(options.checkpoint_out), program.spec, since)
        return cls(since, file)

    def tell_how_to_go_on(self, ctx: Context) -> None:
        if self.file is not None and self.file.steps is not None:
            ctx.out.note(
                f"{self.file.path} holds the state after {self.file.steps} steps. "
                f"Go on with --resume-from {self.file.path}."
            )


def demo(*, ctx: Ctx) -> int:
    """Lend and borrow on this machine, end to end: three nodes, a real model, real text."""
    from nextgpu_node.cli.demo import run as run_demo

    return run_demo(ctx.out.json)


def gather_needs(
    ctx: Context,
    kind: Kind | None,
    vram: str,
    memory: str | None,
    max_seconds: int | None,
    peer: str | None,
) -> Needs:
    """Flags, then the owner's own settings; what nobody decided is left to the peer's limits."""
    config = load_config(ctx.paths, overrides={}, environ=ctx.environ)

    def decided(key: str, value: int) -> int | None:
        return None if config.origins[key] == "default" else value

    submit = config.submit
    if max_seconds is not None and max_seconds < 1:
        raise UsageError("--max-seconds takes a whole number from 1 on.")
    if peer is not None:
        check_peer_id(peer)
    return Needs(
        kind=kind or submit.device,
        device_memory_bytes=gigabytes("--vram", vram),
        memory_bytes=size("--memory", memory)
        if memory is not None
        else decided("submit.max_memory", submit.max_memory_bytes),
        max_seconds=max_seconds or decided("submit.max_unit_seconds", submit.max_unit_seconds),
        output_bytes=decided("submit.max_output", submit.max_output_bytes),
        peer_id=peer,
    )


def check_peer_id(text: str) -> None:
    try:
        public_key_from_peer_id(text)
    except ValueError as exc:
        raise UsageError(f"--peer takes a peer ID as `nextgpu peers` shows it: {exc}.") from exc


class _UnitRun:
    """What is known of the unit so far; `take` moves the progress with each event."""

    def __init__(
        self,
        progress: Progress,
        steps: int,
        receipt_file: Path | None,
        checkpoint_file: CheckpointFile | None,
        *,
        force: bool,
    ) -> None:
        self._checkpoint_file = checkpoint_file
        self._progress = progress
        self._steps = steps
        self._receipt_file = receipt_file
        self._force = force
        self.peer: PeerView | None = None
        self.offer: Offer | None = None
        self.unit_id = ""
        self._results = 0
        self.summary: UnitSummary | None = None
        self.receipt: Receipt | None = None

    def take(self, event: UnitEvent) -> None:
        match event:
            case PeerChosen(peer=peer):
                self.peer, self._results = peer, 0
                self._progress.enter("queued", f"asking {peer.peer_id}")
            case Offered(offer=offer, unit_id=unit_id):
                self.offer, self.unit_id = offer, unit_id
                self._progress.enter("transferring", f"unit {unit_id}")
            case InputSent(sent_bytes=sent_bytes):
                self._progress.enter("starting", f"{human_bytes(sent_bytes)} sent")
            case Started():
                self._progress.enter("running", self._count())
            case StepResult():
                self._results += 1
                self._result_arrived()
            case Checkpoint(steps=steps, carry=carry):
                if self._checkpoint_file is not None:
                    self._checkpoint_file.write(steps, carry)
                self._progress.advance(f"checkpoint after {steps} steps")
            case Finished(summary=summary):
                self.summary = summary
            case ReceiptVerified(receipt=receipt, peer_id=peer_id):
                self.receipt = receipt
                self._save_receipt(receipt, peer_id)

    def _result_arrived(self) -> None:
        if self._results == self._steps:
            self._progress.enter("returning", self._count())
        else:
            self._progress.advance(self._count())

    def _count(self) -> str:
        return f"{self._results} of {self._steps} steps"

    def _save_receipt(self, receipt: Receipt, peer_id: str) -> None:
        """Also of a unit that failed: that is when somebody may want to read it."""
        if self._receipt_file is not None:
            facts = {"schema": SCHEMA, "peer_id": peer_id, "receipt": _plain(receipt)}
            text = json.dumps(facts, indent=2) + "\n"
            write_whole(self._receipt_file, [text.encode()], force=self._force)
            # A second peer's receipt, after the first was lost, takes the place of the first's.
            self._force = True


def _report(ctx: Context, job: Job, unit: _UnitRun, progress: Progress, output: str) -> None:
    if unit.peer is None or unit.offer is None or unit.receipt is None or unit.summary is None:
        if ctx.out.json:
            ctx.out.print_json(job_id=job.job_id, output=output, receipt_verified=False)
        else:
            ctx.out.say("Ran here, without any peer.", f"Wrote {output}.")
        return
    if ctx.out.json:
        ctx.out.print_json(
            job_id=job.job_id,
            peer_id=unit.peer.peer_id,
            unit_id=unit.unit_id,
            device=_plain(unit.offer.device),
            runtime=unit.offer.runtime,
            isolation=list(unit.receipt.isolation),
            steps=unit.summary.steps,
            stopped_early=unit.summary.stopped_early,
            receipt=_plain(unit.receipt),
            receipt_verified=True,
            output=output,
            seconds={name: round(seconds, 3) for name, seconds in progress.seconds.items()},
        )
        return
    metering = unit.receipt.metering
    ctx.out.say(
        f"Ran on {unit.peer.peer_id}: {_device(unit.offer)}, {metering.wall_ms / 1000:.2f} s, "
        f"{unit.summary.steps} steps.",
        f"Receipt verified: {unit.receipt.status}, {_wiped(unit.receipt)}.",
        f"Wrote {output}.",
    )


def _device(offer: Offer) -> str:
    view = DeviceView(**{f: getattr(offer.device, f) for f in DeviceView.__struct_fields__})
    return device_name(view, where="there")


def _wiped(receipt: Receipt) -> str:
    """In the words of the receipt: a claim that the peer signed, no proof."""
    failed = [step.name for step in receipt.wipe if not step.held]
    if failed or not receipt.wipe:
        return "the peer does not claim that the worker's state is gone"
    return "the peer signs that the worker and its scratch space are gone"


def _plain(message: Any) -> Any:
    """A message of the protocol as JSON can say it; bytes in hexadecimal."""
    return _hex(msgspec.to_builtins(message, builtin_types=(bytes,)))


def _hex(plain: Any) -> Any:
    match plain:
        case bytes():
            return plain.hex()
        case dict():
            return {key: _hex(value) for key, value in plain.items()}
        case list() | tuple():
            return [_hex(item) for item in plain]
        case _:
            return plain
