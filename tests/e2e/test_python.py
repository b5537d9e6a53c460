"""Functions and scripts on a peer whose owner named this submitter, and on one that did not."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nextgpu_node.errors import JobFailed, Refused, UsageError
from nextgpu_node.sdk.executor import Executor
from nextgpu_node.sdk.python_unit import RemoteTraceback
from nextgpu_protocol.errors import ErrorCode
from tests.support.nodes import Swarm, Trio, swarm
from tests.support.raw_peer import RawPeer

pytest.importorskip("cloudpickle")


@pytest.fixture(scope="module")
def allowing() -> Iterator[Swarm]:
    with swarm(1, {"sharing.requests_per_minute": "10000"}, allow_python=True) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def said() -> list[tuple[int, str]]:
    return []


@pytest.fixture(scope="module")
def executor(allowing: Swarm, said: list[tuple[int, str]]) -> Iterator[Executor]:
    def on_log(stream: int, text: str) -> None:
        said.append((stream, text))

    with Executor(paths=allowing.submitter.paths, on_log=on_log, patience_s=40) as executor:
        yield executor


def test_a_function_runs_there_and_what_it_prints_appears_here(
    executor: Executor, said: list[tuple[int, str]]
) -> None:
    offset = 5

    def work(x: torch.Tensor, *, scale: int) -> dict[str, Any]:
        print("on the peer")
        print("a warning", file=sys.stderr)
        return {"sum": x.sum() * scale + offset, "more": (1, 2.5, None, b"x", {3}, 2**80)}

    result = executor.submit(work, torch.ones(3), scale=2).result(90)
    assert result == {"sum": torch.tensor(11.0), "more": (1, 2.5, None, b"x", {3}, 2**80)}
    assert (1, "on the peer\n") in said
    assert (2, "a warning\n") in said


def test_what_it_raises_comes_back_with_its_traceback(executor: Executor) -> None:
    def breaks() -> None:
        raise KeyError("mine")

    future = executor.submit(breaks)
    with pytest.raises(JobFailed, match="KeyError: 'mine'") as caught:
        future.result(60)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in breaks" in str(caught.value.__cause__)
    assert executor.submit(len, [1, 2]).result(60) == 2  # and harms nobody else


def test_a_result_that_is_not_plain_data_is_said_to_be(executor: Executor) -> None:
    with pytest.raises(JobFailed, match=r"TypeError: .*not plain data"):
        executor.submit(lambda: object()).result(60)


def test_sys_exit_ends_the_call_alone(executor: Executor) -> None:
    with pytest.raises(JobFailed, match="SystemExit"):
        executor.submit(sys.exit, 3).result(60)


def test_a_worker_that_dies_is_the_fault_of_its_call(executor: Executor) -> None:
    def dies() -> None:
        import os

        os._exit(0)

    bad = executor.submit(dies)
    good = [executor.submit(abs, -i) for i in range(5)]
    assert [future.result(90) for future in good] == [0, 1, 2, 3, 4]
    assert isinstance(bad.exception(90), JobFailed)


def test_map_over_functions(executor: Executor) -> None:
    assert list(executor.map(lambda a, b: a * b, range(50), range(50))) == [
        i * i for i in range(50)
    ]


def test_what_can_not_be_pickled_is_said_here(executor: Executor) -> None:
    lock = threading.Lock()
    with pytest.raises(UsageError, match="can not be pickled"):
        executor.submit(lambda: lock)
    with pytest.raises(UsageError, match="can not be called"):
        executor.submit("text")


def test_grid_search_of_scikit_learn_runs_on_the_peer(executor: Executor) -> None:
    """Through joblib: its fits are functions, estimators and arrays."""
    joblib = pytest.importorskip("joblib")
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsClassifier

    from nextgpu_node.sdk.adapters.joblib import register

    register()
    x, y = load_iris(return_X_y=True)
    grid = {"n_neighbors": [1, 5, 15], "weights": ["uniform", "distance"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = GridSearchCV(KNeighborsClassifier(), grid, cv=3).fit(x, y)
        with joblib.parallel_backend("nextgpu", executor=executor):
            there = GridSearchCV(KNeighborsClassifier(), grid, cv=3, n_jobs=-1).fit(x, y)
    assert there.best_params_ == here.best_params_
    scores = "mean_test_score"
    assert there.cv_results_[scores].tolist() == here.cv_results_[scores].tolist()


def test_dask_delayed_functions_run_on_the_peer(executor: Executor) -> None:
    dask = pytest.importorskip("dask")

    def double(x: int) -> int:
        return 2 * x

    total = dask.delayed(sum)([dask.delayed(double)(i) for i in range(5)])
    assert dask.compute(total, scheduler=executor) == (20,)


# --- what the code may not do -----------------------------------------------------------------


def attack() -> dict[str, str]:  # noqa: C901  one function, since it travels alone
    """Each attempt's outcome: the name of the error that stopped it, or OPEN."""
    import ctypes
    import os
    import signal
    import socket
    import subprocess
    from pathlib import Path

    import nextgpu_node

    def connect() -> None:
        with socket.socket() as sock:
            sock.connect(("127.0.0.1", 22))

    def unix() -> None:
        socket.socket(socket.AF_UNIX)

    def pair() -> None:
        socket.socketpair()

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    def run() -> None:
        subprocess.run(["/bin/true"], check=True)

    def execute() -> None:
        os.execv("/bin/true", ["true"])

    def read_passwd() -> None:
        Path("/etc/passwd").read_text()

    def read_home() -> None:
        list(Path("~root").expanduser().iterdir())

    def read_proc() -> None:
        Path("/proc/1/environ").read_bytes()

    def write_package() -> None:
        (Path(nextgpu_node.__file__).parent / "planted.py").write_text("")

    def write_root() -> None:
        Path("/planted").write_text("")

    def kill() -> None:
        os.kill(os.getppid() or -1, signal.SIGKILL)

    def ptrace() -> None:
        if ctypes.CDLL(None, use_errno=True).ptrace(16, 1, 0, 0) == -1:
            raise OSError(ctypes.get_errno(), "ptrace")

    def namespaces() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == -1:
            raise OSError(ctypes.get_errno(), "unshare")

    def become_root() -> None:
        os.setuid(0)

    def environment() -> None:
        # What the host has; imports set variables of their own (scikit-learn: KMP_…).
        if not {"PATH", "HOME", "PWD", "LANG", "USER"} & os.environ.keys():
            raise PermissionError("nothing of the host")

    attempts = (connect, unix, pair, fork, run, execute, read_passwd, read_home, read_proc)
    attempts += (write_package, write_root, kill, ptrace, namespaces, become_root, environment)
    outcomes = {}
    for attempt in attempts:
        try:
            attempt()
            outcomes[attempt.__name__] = "OPEN"
        except BaseException as exc:
            outcomes[attempt.__name__] = type(exc).__name__
    return outcomes


def test_code_is_confined_as_a_program_is(executor: Executor) -> None:
    outcomes = executor.submit(attack).result(60)
    assert len(outcomes) == 16
    assert {name: end for name, end in outcomes.items() if end == "OPEN"} == {}


@pytest.mark.slow
def test_the_same_attempts_succeed_without_the_sandbox() -> None:
    """What is tried can be done: here most of it is."""
    code = (
        "import inspect, tests.e2e.test_python as t\n"
        "from unittest import mock\n"
        "import os\n"
        "source = inspect.getsource(t.attack)\n"
        "for risky in ('kill', 'execute', 'fork', 'ptrace', 'write_root', 'write_package'):\n"
        "    source = source.replace(f'{risky}, ', '').replace(f', {risky}', '')\n"
        "exec(source.replace('attack()', 'mine()', 1))\n"
        "print(sorted(n for n, end in mine().items() if end == 'OPEN'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert {"unix", "pair", "run", "read_passwd", "environment"} <= set(eval(done.stdout))


# --- whoever is not named ---------------------------------------------------------------------


def test_who_is_not_named_is_refused_and_told_what_to_do(nodes: Trio) -> None:
    with Executor(paths=nodes.submitter.paths, patience_s=0.3) as executor:
        error = executor.submit(len, [1]).exception(60)
    assert isinstance(error, Refused)
    assert "sharing.python_allow" in str(error)
    assert "nextgpu.export" in str(error)
    assert "no Python of this submitter" in str(error.__cause__)


async def test_the_refusal_has_a_code_of_its_own_and_costs_no_worker(
    nodes: Trio, peer: RawPeer
) -> None:
    before = nodes.worker_pids()
    unit = await peer.open()
    assert await unit.refusal(kind="python") is ErrorCode.PYTHON_NOT_ALLOWED
    assert nodes.worker_pids() == before


# --- scripts ----------------------------------------------------------------------------------

SCRIPT = """
import os, sys
print("arguments", sys.argv[1:])
os.makedirs("deep/er")
with open("deep/er/numbers.txt", "w") as file:
    file.write("1 2 3")
with open("empty", "w"):
    pass
sys.exit(int(sys.argv[2]))
"""


def run_script(nodes: Swarm, script: Path, output: Path, *arguments: str) -> Any:
    return subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "nextgpu_node.cli"),
            *("--home", str(nodes.submitter.home), "run", str(script), "--output", str(output)),
            *("--", *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_script_leaves_its_files_in_the_output_directory(
    allowing: Swarm, executor: Executor, tmp_path: Path
) -> None:
    executor.submit(len, []).result(90)  # the launcher is up
    script = tmp_path / "experiment.py"
    script.write_text(SCRIPT)
    done = run_script(allowing, script, tmp_path / "results", "--epochs", "0")
    assert done.returncode == 0, done.stderr
    assert "arguments ['--epochs', '0']" in done.stdout
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {"experiment.py", "results/deep/er/numbers.txt", "results/empty"}
    assert (tmp_path / "results/deep/er/numbers.txt").read_text() == "1 2 3"
    failed = run_script(allowing, script, tmp_path / "other", "--epochs", "3")
    assert failed.returncode == 1
    assert "code 3" in failed.stderr
    assert "Traceback" not in failed.stderr
