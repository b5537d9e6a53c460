"""What the owner's desk tells of jobs and data, from real directories."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
import trio

from nextgpu_node.api.web import Web
from nextgpu_node.api_types import GpusReply
from nextgpu_node.core.job_state import JobBegan, JobEnded
from nextgpu_node.daemon import desk as desk_module
from nextgpu_node.daemon.desk import OwnersDesk
from nextgpu_node.errors import Refused, UsageError
from nextgpu_node.paths import Paths
from nextgpu_node.sdk.jobs import Job, JobOptions, Manifest, ShardSpec
from nextgpu_node.sdk.journal import JournalWriter
from tests.unit.api.backend import MemoryBackend


async def no_gpus() -> GpusReply:
    return GpusReply(gpus=[])


@pytest.fixture
def paths() -> Iterator[Paths]:
    with TemporaryDirectory(prefix="ngpu-") as directory:
        yield Paths.under(Path(directory))


@pytest.fixture
def desk(paths: Paths) -> OwnersDesk:
    web = Web(lambda _host: None, 0, paths.web_token_file)  # type: ignore[arg-type,return-value]
    return OwnersDesk(MemoryBackend(), no_gpus, paths, web, open_web=False)


def make_job(paths: Paths, job_id: str, output: Path) -> Job:
    paths.jobs_dir.mkdir(parents=True, mode=0o700, exist_ok=True)
    paths.data_dir.chmod(0o700)
    shards = [ShardSpec(name="one", output=str(output)), ShardSpec(name="two")]
    manifest = Manifest(
        job_id=job_id,
        kind="map",
        created_ms=int(job_id[:2], 16),
        program="/somewhere/p.ngp",
        program_digest="",
        shards=shards,
        options=JobOptions(),
    )
    return Job.create(paths.jobs_dir, manifest)


async def test_looking_at_jobs_where_there_are_none_makes_nothing(
    desk: OwnersDesk, paths: Paths
) -> None:
    assert (await desk.jobs()).jobs == []
    assert not paths.jobs_dir.exists()


async def test_jobs_are_told_newest_first_with_their_log_and_places(
    desk: OwnersDesk, paths: Paths, tmp_path: Path
) -> None:
    output = tmp_path / "one.safetensors"
    make_job(paths, "0aaaaaaaaaaa", output)
    job = make_job(paths, "0bbbbbbbbbbb", output)
    secret = b"plaintext that stays where it is"
    output.write_bytes(secret)
    with JournalWriter(job.journal_file) as journal:
        journal.append(JobBegan(at_ms=5, pid=1))
        journal.append(JobEnded(at_ms=9, status="done"))
    told = await desk.jobs()
    assert [one.job_id for one in told.jobs] == ["0bbbbbbbbbbb", "0aaaaaaaaaaa"]
    assert told.jobs[0].status == "done"
    one = await desk.job("0bbbbbbbbbbb")
    assert [line.at_ms for line in one.lines] == [5, 9]
    assert [(r.name, r.size_bytes) for r in one.results] == [("one", len(secret)), ("two", -1)]
    assert secret not in msgspec.json.encode(one)
    assert await desk.cancel_job("0bbbbbbbbbbb") is False
    with pytest.raises(UsageError):
        await desk.job("0ccccccccccc")


async def test_data_is_counted_and_deleted_by_kind(
    desk: OwnersDesk, paths: Paths, tmp_path: Path
) -> None:
    make_job(paths, "0aaaaaaaaaaa", tmp_path / "x")
    sizes = {kind.kind: kind.files for kind in (await desk.data()).kinds}
    assert sizes["jobs"] == 1
    told = await desk.delete_data("jobs")
    assert {kind.kind: kind.files for kind in told.kinds}["jobs"] == 0
    with pytest.raises(UsageError, match="no kind of data"):
        await desk.delete_data("../..")


@pytest.mark.parametrize(
    ("said", "state", "why"),
    [
        ('{"schema": 1, "found": 0, "places": []}', "done", ""),
        ('{"schema": 1, "error": "This machine can not lend."}', "failed", "can not lend"),
        ("no json", "failed", "ended with code"),
    ],
)
async def test_an_audit_runs_as_a_process_once_at_a_time(
    desk: OwnersDesk,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    state: str,
    why: str,
) -> None:
    code = f"import sys; sys.stdin.read(); print({said!r})"
    monkeypatch.setattr(desk_module, "_AUDIT", [sys.executable, "-I", "-c", code])
    await nursery.start(desk.run)
    assert desk.start_audit().state == "running"
    with pytest.raises(Refused, match="already"):
        desk.start_audit()
    with trio.fail_after(20):
        while desk.audit().state == "running":  # noqa: ASYNC110  a process ends
            await trio.sleep(0.01)
    assert desk.audit().state == state
    assert why in desk.audit().why
    nursery.cancel_scope.cancel()


async def test_keys_that_a_killed_daemon_left_are_gone_with_the_next_start(
    desk: OwnersDesk, paths: Paths, nursery: trio.Nursery
) -> None:
    paths.runtime_dir.mkdir(mode=0o700, parents=True)
    for left in (paths.web_token_file, paths.web_page_file):
        left.write_text("an old key")
    await nursery.start(desk.run)
    assert list(paths.runtime_dir.iterdir()) == []
    nursery.cancel_scope.cancel()
