"""Maps that can not go on as they were told: each ends in one sentence, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextgpu_node.cli.processes import run_cli, wait_until
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.graph.local import run_local
from tests.e2e.test_jobs import Work, command, inputs, nextgpu
from tests.support.nodes import Trio

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
MAP = ("map", "linear.ngp", "--inputs", "in", "--outputs", "out")
COUNT = 10


@pytest.fixture
def files(tmp_path: Path, linear: Program) -> Path:
    """linear.ngp and in/s000.safetensors … in/s009.safetensors."""
    linear.save(tmp_path / "linear.ngp")
    save_inputs(tmp_path, linear)
    return tmp_path


def save_inputs(directory: Path, program: Program, count: int = COUNT) -> None:
    (directory / "in").mkdir(exist_ok=True)
    for k, xs in enumerate(inputs(program, count)):
        save_file(xs, directory / "in" / f"s{k:03}.safetensors")


def assert_right(directory: Path, program: Program, count: int = COUNT) -> None:
    """Every output is there, nothing else is, and each is what the program gives here."""
    (y,) = program.spec.ys
    names = [f"s{k:03}.safetensors" for k in range(count)]
    assert sorted(p.name for p in (directory / "out").iterdir()) == names
    for name, xs in zip(names, inputs(program, count), strict=True):
        got = load_file(directory / "out" / name)[y.name]
        assert torch.equal(got, run_local(program, **xs)[y.name])


def last_job(nodes: Trio) -> dict[str, object]:
    jobs = run_cli(nodes.submitter.home, "jobs")["jobs"]
    assert isinstance(jobs, list)
    return dict(jobs[-1])


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Callable[[], None]]:
    """A disk of `size` at `directory`; what is given back makes room on it."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], check=True)
    try:
        yield lambda: subprocess.run(
            ["mount", "-o", "remount,size=4m", directory], check=True, capture_output=True
        )
    finally:
        subprocess.run(["umount", directory], check=True)


# --- disks and permissions --------------------------------------------------------------------


@AS_ROOT
def test_a_full_disk_at_the_outputs_costs_no_result(
    nodes: Trio, files: Path, linear: Program
) -> None:
    with small_disk(files / "out", "16k") as make_room:
        done = nextgpu(nodes, *MAP, cwd=files)
        assert done.returncode == 1
        assert "No space left on device. The result is kept in the job" in done.stderr
        job = last_job(nodes)
        assert f"nextgpu retry {job['job_id']}" in done.stderr
        assert job["status"] == "failed"
        make_room()
        again = nextgpu(nodes, "retry", str(job["job_id"]), cwd=files)
        assert again.returncode == 0, again.stderr
        assert_right(files, linear)


@pytest.mark.slow
@AS_ROOT
@pytest.mark.parametrize("size", ["4k", "8k", "12k"])  # the lock, the journal, a result
def test_a_full_disk_at_the_job_costs_no_result(
    nodes: Trio, files: Path, linear: Program, size: str
) -> None:
    with small_disk(files / "disk", size) as make_room:
        done = nextgpu(nodes, *MAP, "--job-dir", "disk/job", cwd=files)
        assert done.returncode == 1
        assert "No space left on device. What is done stays done: make room" in done.stderr
        job_id = str(last_job(nodes)["job_id"])
        assert f"nextgpu retry {job_id}" in done.stderr
        make_room()
        again = nextgpu(nodes, "retry", job_id, cwd=files)
        assert again.returncode == 0, again.stderr
        assert_right(files, linear)
        assert nextgpu(nodes, "rm", job_id, cwd=files).returncode == 0


# Root may do everything, unless this is taken from it.
_BOUND_BY_MODES = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv"
)
def test_a_directory_that_may_not_be_written_to_is_said_before_anything_is_sent(
    nodes: Trio, files: Path
) -> None:
    (files / "closed").mkdir(mode=0o555)

    def bound(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*_BOUND_BY_MODES, *command(nodes, *arguments)],
            cwd=files,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    refused = bound(*MAP[:-1], "closed")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "nextgpu: closed: you may not write there. Name another --outputs.\n"
    below = bound(*MAP[:-1], "closed/new")
    assert below.returncode == 2
    assert "closed/new: can not be made or read: Permission denied." in below.stderr


# --- what is not a map ------------------------------------------------------------------------


def test_what_is_no_map_leaves_no_job_and_no_directory(nodes: Trio, files: Path) -> None:
    (files / "empty").mkdir()
    before = run_cli(nodes.submitter.home, "jobs")["jobs"]
    for words, told in (
        (("--inputs", "empty", "--outputs", "new"), "nothing to map"),
        (("--inputs", "in", "--inputs", "empty", "--outputs", "new"), "multiple times"),
        (("--inputs", "in", "--outputs", "in"), "directory of the inputs"),
    ):
        done = nextgpu(nodes, "map", "linear.ngp", *words, cwd=files)
        assert done.returncode == 2
        assert told in done.stderr
    program = "in/s000.safetensors"
    wrong = nextgpu(nodes, "map", program, "--inputs", "in", "--outputs", "new", cwd=files)
    assert wrong.returncode == 2
    assert "in/s000.safetensors: This is not a NextGPU program file." in wrong.stderr
    assert not (files / "new").exists()
    assert run_cli(nodes.submitter.home, "jobs")["jobs"] == before


# --- the user changes their mind --------------------------------------------------------------


@pytest.fixture
def working(nodes: Trio, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`nextgpu map` over 30 shards of about a tenth of a second, of which one is done."""
    program = export(Work(), (torch.ones(2, 4),))
    program.save(tmp_path / "linear.ngp")
    save_inputs(tmp_path, program, 30)
    process = subprocess.Popen(
        command(nodes, *MAP),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out = tmp_path / "out"
    wait_until(lambda: out.exists() and any(out.iterdir()), 60, "the first result")
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_map_that_is_cancelled_elsewhere_keeps_what_is_done_and_can_go_on(
    nodes: Trio, tmp_path: Path, working: subprocess.Popen[str]
) -> None:
    job = last_job(nodes)
    assert job["status"] == "running"
    assert nextgpu(nodes, "cancel", str(job["job_id"]), cwd=tmp_path).returncode == 0
    _, told = working.communicate(timeout=30)
    assert working.returncode == 130
    assert "Traceback" not in told
    assert last_job(nodes)["status"] == "cancelled"
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert 1 <= len(done) < 30
    assert not any(name.startswith(".") for name in done)
    again = nextgpu(nodes, *MAP, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert len(after) == 30
    assert done.items() <= after.items()


@pytest.mark.slow
def test_ctrl_c_leaves_a_map_at_work_and_it_can_be_followed(
    nodes: Trio, tmp_path: Path, working: subprocess.Popen[str]
) -> None:
    os.killpg(working.pid, signal.SIGINT)
    _, told = working.communicate(timeout=30)
    assert working.returncode == 130
    job_id = str(last_job(nodes)["job_id"])
    assert f"Detached. Job {job_id} goes on" in told
    followed = nextgpu(nodes, "logs", "-f", job_id, cwd=tmp_path)
    assert "status=done" in followed.stdout.splitlines()[-1]
    assert len(list((tmp_path / "out").iterdir())) == 30
