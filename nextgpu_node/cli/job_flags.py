"""The flags that `run` and `map` share, and the manifest that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter

from nextgpu_node.cli.context import Context
from nextgpu_node.clock import now_ms
from nextgpu_node.config import load_config
from nextgpu_node.errors import UsageError
from nextgpu_node.sdk.jobs import JobOptions, Manifest, ShardSpec, new_job_id
from nextgpu_node.sdk.results import file_digest, shard_key
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.tokens import format_token

# A carry is as large as the model that is trained: more often costs more than it saves.
_CHECKPOINT_MS: Final = 30_000


@Parameter(name="*")
@dataclass(frozen=True)
class CommonFlags:
    """Who may run it, how it is checked, and where the job lives."""

    detach: Annotated[
        bool, Parameter(name=("--detach", "-d"), negative="", help="Go on in the background.")
    ] = False
    job_dir: Annotated[Path | None, Parameter(help="Keep the job here, in a new directory.")] = None
    trusted_only: Annotated[
        bool, Parameter(negative="", help="Only peers in the setting submit.trusted.")
    ] = False
    local: Annotated[
        bool, Parameter(negative="", help="Run it in a process here; no peer is asked.")
    ] = False
    max_price: Annotated[
        int | None, Parameter(help="Reserved: every price is 0 in this version.")
    ] = None
    wait: Annotated[int, Parameter(help="Seconds to wait for a peer where none is there.")] = 0

    def options(
        self,
        ctx: Context,
        needs: Needs,
        *,
        force: bool,
        receipt: Path | None = None,
        checkpoint_out: Path | None = None,
        checkpoint_every: str | None = None,
        resume_from: Path | None = None,
        peers: Sequence[str] = (),
        in_flight: int = 4,
        audit_share: float = 0.0,
        canaries: int = 0,
    ) -> JobOptions:
        """Everything that was decided, for the manifest.  Raises UsageError."""
        trusted = load_config(ctx.paths, overrides={}, environ=ctx.environ).submit.trusted
        if self.trusted_only and not trusted:
            raise UsageError(
                "--trusted-only, but you trust nobody yet: "
                "nextgpu config set submit.trusted PEER,PEER"
            )
        if self.wait < 0 or (self.max_price is not None and self.max_price < 0):
            raise UsageError("--wait and --max-price take whole numbers from 0 on.")
        ms, steps = _CHECKPOINT_MS, 0
        if checkpoint_every is not None:
            from nextgpu_node.cli.checkpoints import parse_interval

            interval = parse_interval(checkpoint_every)
            ms, steps = interval.ms, interval.steps
        return JobOptions(
            kind=needs.kind,
            device_memory_bytes=needs.device_memory_bytes,
            memory_bytes=needs.memory_bytes,
            max_seconds=needs.max_seconds,
            output_bytes=needs.output_bytes,
            peers=[*peers, *([needs.peer_id] if needs.peer_id else [])],
            trusted=list(trusted),
            trusted_only=self.trusted_only,
            here=self.local,
            in_flight=in_flight,
            audit_share=audit_share,
            canaries=canaries,
            checkpoint_ms=ms,
            checkpoint_steps=steps,
            checkpoint_out=_absolute(checkpoint_out),
            resume_from=_absolute(resume_from),
            wait_s=self.wait,
            force=force,
            receipt=_absolute(receipt),
            token=format_token(needs.token) if needs.token is not None else "",
        )


def _absolute(path: Path | None) -> str:
    return str(path.absolute()) if path is not None else ""


def new_manifest(
    kind: str,
    program: Path,
    shards: list[ShardSpec],
    options: JobOptions,
    *,
    steps_axis: bool,
    steps: int | None,
) -> Manifest:
    """Raises UsageError where the program can not be read."""
    return Manifest(
        job_id=new_job_id(),
        kind=kind,
        created_ms=now_ms(),
        program=str(program.absolute()),
        program_digest=digest_of(program),
        shards=shards,
        steps_axis=steps_axis,
        steps=steps,
        options=options,
    )


def shard_spec(
    program: Path,
    input_: Path | None,
    output: Path | None,
    *,
    steps_axis: bool,
    steps: int | None,
    name: str = "",
    program_digest: str = "",
) -> ShardSpec:
    """One input and its output by path and hash.  An input that can not be read has no hash."""
    digest = ""
    if input_ is not None:
        try:
            digest = file_digest(input_)
        except OSError:
            digest = ""  # the shard itself will say why
    how = f"steps_axis={steps_axis} steps={steps}"
    readable = input_ is None or digest
    return ShardSpec(
        name=name or (input_.name if input_ else program.name),
        input=str(input_.absolute()) if input_ else "",
        digest=digest,
        key=shard_key(program_digest or digest_of(program), digest, how) if readable else "",
        output=str(output.absolute()) if output else "",
    )


def digest_of(program: Path) -> str:
    """Raises UsageError, which names the file."""
    try:
        return file_digest(program)
    except OSError as exc:
        raise UsageError(f"{program}: can not be read: {exc.strerror}.") from exc
