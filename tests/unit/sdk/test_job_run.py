"""Jobs worked at on this machine: what is in the directory, and what a second start makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from nextgpu_node.cli.mapping import load_shard_of
from nextgpu_node.core.job_state import JobEvent, JobState, ShardKept
from nextgpu_node.errors import JobFailed, JobStoreError, UsageError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.paths import Paths
from nextgpu_node.sdk.job_run import JobRun
from nextgpu_node.sdk.jobs import Job, JobOptions, Manifest, ShardSpec, new_job_id
from nextgpu_node.sdk.journal import JournalWriter, read_journal
from nextgpu_node.sdk.results import file_digest, shard_key

COUNT = 4


@pytest.fixture(scope="module")
def twice() -> Program:
    return export(lambda x: x * 2, (torch.ones(2),))


@dataclass(frozen=True)
class Bench:
    """A map over in/K.safetensors to out/K.safetensors, here."""

    directory: Path
    job: Job

    async def run(self) -> JobState:
        """As `nextgpu map --local` and `retry` do."""
        paths = Paths.under(self.directory / "home")
        return await JobRun(self.job, paths, load_shard_of(self.job), lambda event: None).run()

    def input(self, k: int) -> Path:
        return self.directory / "in" / f"{k}.safetensors"

    def output(self, k: int) -> Path:
        return self.directory / "out" / f"{k}.safetensors"

    def values(self) -> list[list[float]]:
        return [load_file(self.output(k))["output"].tolist() for k in range(COUNT)]

    def events(self) -> list[JobEvent]:
        return read_journal(self.job.journal_file).events

    def kept(self) -> list[int]:
        return [event.shard for event in self.events() if isinstance(event, ShardKept)]

    def rewrite_journal(self, events: list[JobEvent]) -> None:
        self.job.journal_file.unlink()
        with JournalWriter(self.job.journal_file) as journal:
            for event in events:
                journal.append(event)


RIGHT = [[2.0 * k, 2.0 * k] for k in range(COUNT)]


def put_input(program: Program, file: Path, value: float) -> None:
    save_file({program.spec.xs[0].name: torch.full((2,), value)}, file)


@pytest.fixture
def bench(tmp_path: Path, twice: Program) -> Iterator[Bench]:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    twice.save(tmp_path / "twice.ngp")
    program_digest = file_digest(tmp_path / "twice.ngp")
    specs = []
    for k in range(COUNT):
        file = tmp_path / "in" / f"{k}.safetensors"
        put_input(twice, file, float(k))
        digest = file_digest(file)
        specs.append(
            ShardSpec(
                name=file.name,
                input=str(file),
                digest=digest,
                key=shard_key(program_digest, digest, "whole"),
                output=str(tmp_path / "out" / file.name),
            )
        )
    manifest = Manifest(
        job_id=new_job_id(),
        kind="map",
        created_ms=1,
        program=str(tmp_path / "twice.ngp"),
        program_digest=program_digest,
        shards=specs,
        options=JobOptions(here=True),
    )
    umask = os.umask(0)  # what protects these files is not the user's umask
    try:
        yield Bench(tmp_path, Job.create(tmp_path / "jobs", manifest))
    finally:
        os.umask(umask)


async def test_every_file_of_a_job_is_its_owners_alone(bench: Bench) -> None:
    await bench.run()
    bench.job.cancel()
    everything = [bench.job.directory, *bench.job.directory.rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in everything if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in everything if path.is_file()} == {0o600}
    assert {path.name for path in everything} >= {"job.json", "journal", "lock", "results"}
    assert bench.output(0).stat().st_mode & 0o777 == 0o600


async def test_a_second_start_does_nothing_again(bench: Bench) -> None:
    await bench.run()
    before = [bench.output(k).stat().st_mtime_ns for k in range(COUNT)]
    await bench.run()
    assert bench.values() == RIGHT
    assert sorted(bench.kept()) == list(range(COUNT))
    assert [bench.output(k).stat().st_mtime_ns for k in range(COUNT)] == before


async def test_a_result_that_the_journal_does_not_know_is_done_again_and_is_there_once(
    bench: Bench,
) -> None:
    """Killed between the result and its line, at every such place."""
    await bench.run()
    events = bench.events()
    for index, event in enumerate(events):
        if isinstance(event, ShardKept):
            bench.rewrite_journal(events[:index])
            await bench.run()
            assert bench.values() == RIGHT
            assert sorted(bench.kept()) == list(range(COUNT))
            assert len(list((bench.directory / "out").iterdir())) == COUNT


@pytest.mark.parametrize("damage", ["gone", "of another shard", "no result"])
async def test_what_is_said_to_be_done_is_held_against_its_hash(bench: Bench, damage: str) -> None:
    await bench.run()
    match damage:
        case "gone":
            bench.output(2).unlink()
        case "of another shard":
            bench.output(2).write_bytes(bench.output(1).read_bytes())
        case _:
            bench.output(2).write_bytes(b"something else")
    if damage != "gone":  # nothing is ever overwritten without --force: the user moves it away
        with pytest.raises(UsageError, match=r"exists by now\. Move it away"):
            await bench.run()
        bench.output(2).unlink()
    await bench.run()
    assert bench.values() == RIGHT
    assert bench.kept().count(2) > 1
    assert bench.kept().count(1) == 1


async def test_an_input_that_changed_since_fails_its_shard_alone(
    bench: Bench, twice: Program
) -> None:
    put_input(twice, bench.input(1), 77.0)
    with pytest.raises(JobFailed, match="1 of 4 shards failed, 3 are done"):
        await bench.run()
    assert not bench.output(1).exists()
    assert "has changed since the job was made" in bench.job.state().shards[1].why
    put_input(twice, bench.input(1), 1.0)
    await bench.run()
    assert bench.values() == RIGHT


async def test_a_program_that_changed_since_is_not_run(bench: Bench) -> None:
    export(lambda x: x * 3, (torch.ones(2),)).save(bench.directory / "twice.ngp")
    with pytest.raises(UsageError, match="has changed since the job was made"):
        await bench.run()
    assert list((bench.directory / "out").iterdir()) == []
    assert bench.job.view().status == "failed"


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_with_a_name_that_leads_elsewhere_is_refused(bench: Bench, name: str) -> None:
    manifest = bench.job.manifest
    shards = [msgspec.structs.replace(manifest.shards[0], name=name), *manifest.shards[1:]]
    file = bench.job.directory / "job.json"
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, shards=shards)))
    with pytest.raises(JobStoreError, match="is no file's name"):
        Job.open(bench.directory / "jobs", manifest.job_id)


@pytest.mark.parametrize("job_id", ["..", "../jobs", "/", ""])
def test_an_id_that_leads_elsewhere_is_no_job(bench: Bench, job_id: str) -> None:
    with pytest.raises(UsageError, match="There is no job"):
        Job.open(bench.directory / "jobs", job_id)


async def test_two_processes_do_not_work_at_one_job(bench: Bench) -> None:
    with bench.job.locked(), pytest.raises(UsageError, match="is being worked at already"):
        await bench.run()
