"""The Executor as CPython tests its own (Lib/test/test_concurrent_futures), on a real provider."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch

from nextgpu_node.errors import (
    DaemonUnreachable,
    JobFailed,
    NextGPUError,
    NoPeerFound,
    ProgramError,
    UsageError,
)
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.sdk.executor import Executor, parse_needs
from nextgpu_node.sdk.unit import Needs
from tests.support.nodes import Trio

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
X = torch.arange(4.0)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Nested(torch.nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        return {"sum": x.sum() * scale, "parts": (x + 1, [x - 1])}


class Pick(torch.nn.Module):
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(index, torch.arange(12.0).reshape(6, 2))


class Busy(torch.nn.Module):
    """About a second of work for n = 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            x = torch.tanh(x @ x)
        return x


BIG = torch.full((400, 400), 0.001)


@pytest.fixture(scope="module")
def twice() -> Program:
    return export(Twice(), (X,))


@pytest.fixture(scope="module")
def busy() -> Program:
    return export(Busy(), (BIG,))


@pytest.fixture(scope="module")
def executor(nodes: Trio) -> Iterator[Executor]:
    with Executor(paths=nodes.submitter.paths) as executor:
        yield executor


@pytest.fixture
def own(nodes: Trio) -> Iterator[Executor]:
    """One that the test may shut down."""
    with Executor(paths=nodes.submitter.paths, idle_s=0.2) as executor:
        yield executor


# --- submit and map ---------------------------------------------------------------------------


def test_a_program_gives_its_outputs_by_name(executor: Executor, twice: Program) -> None:
    assert executor.submit(twice, X).result(30)["output"].tolist() == [0, 2, 4, 6]
    assert executor.submit(twice, x=X).result(30)["output"].tolist() == [0, 2, 4, 6]


def test_a_module_gives_what_it_would_give_here(executor: Executor) -> None:
    model = Nested()
    result = executor.submit(model, X, scale=3.0).result(60)
    assert result["sum"] == 18.0
    assert result["parts"][0].tolist() == [1, 2, 3, 4]
    assert result["parts"][1][0].tolist() == [-1, 0, 1, 2]
    # A number is a part of the program: another one is another program.
    assert executor.submit(model, X, scale=1.0).result(60)["sum"] == 6.0


def test_weights_that_were_changed_are_sent_anew(executor: Executor) -> None:
    model = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    assert executor.submit(model, X).result(60).item() == 6.0
    with torch.no_grad():
        model.weight.mul_(2.0)
    assert executor.submit(model, X).result(60).item() == 12.0


def test_map_keeps_the_order(executor: Executor, twice: Program) -> None:
    inputs = [torch.full((4,), float(i)) for i in range(200)]
    for chunksize in (1, 7):
        results = executor.map(twice, inputs, chunksize=chunksize)
        assert [r["output"][0].item() for r in results] == [2.0 * i for i in range(200)]


def test_map_over_several_inputs_ends_with_the_shortest(executor: Executor) -> None:
    add = export(lambda a, b: a + b, (X, X + 1))
    results = list(executor.map(add, [X, X, X], [X, X + 1]))
    assert [r["output"][0].item() for r in results] == [0.0, 1.0]


def test_map_reads_no_further_than_its_buffer(executor: Executor, twice: Program) -> None:
    read = []

    def inputs() -> Iterator[torch.Tensor]:
        for index in range(50):
            read.append(index)
            yield X

    results = executor.map(twice, inputs(), buffersize=3)
    assert len(read) == 3
    next(results)
    assert len(read) == 4
    results.close()  # type: ignore[attr-defined]


def test_map_times_out_and_cancels_the_rest(executor: Executor, busy: Program) -> None:
    results = executor.map(busy, [BIG] * 3, timeout=0.01)
    with pytest.raises(futures.TimeoutError):
        list(results)


def test_an_empty_map_is_empty(executor: Executor, twice: Program) -> None:
    assert list(executor.map(twice, [])) == []


def test_modules_of_changing_shapes_in_one_map(executor: Executor) -> None:
    model = Twice()
    inputs = [torch.ones(2), torch.ones(2), torch.ones(3)]
    results = list(executor.map(model, inputs, chunksize=10))
    assert [tuple(r.shape) for r in results] == [(2,), (2,), (3,)]


def test_many_threads_share_one_executor(executor: Executor, twice: Program) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for i in range(20):
            got = executor.submit(twice, torch.full((4,), float(number * 100 + i))).result(60)
            if got["output"][0].item() != 2.0 * (number * 100 + i):
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- futures ----------------------------------------------------------------------------------


def test_wait_and_as_completed_take_its_futures(executor: Executor, twice: Program) -> None:
    mine = [executor.submit(twice, X) for _ in range(5)]
    assert set(futures.as_completed(mine, timeout=30)) == set(mine)
    done, pending = futures.wait(mine, timeout=30)
    assert (len(done), len(pending)) == (5, 0)
    bad = executor.submit(export(Pick(), (torch.tensor([0]),)), torch.tensor([99]))
    done, _ = futures.wait([bad, *mine], timeout=30, return_when=futures.FIRST_EXCEPTION)
    assert bad in done


def test_done_callbacks_run_once_also_when_it_was_done(executor: Executor, twice: Program) -> None:
    called: list[futures.Future[Any]] = []
    event = threading.Event()
    future = executor.submit(twice, X)
    future.add_done_callback(lambda f: (called.append(f), event.set()))
    assert event.wait(30)
    future.add_done_callback(called.append)
    assert called == [future, future]


def test_a_callback_that_raises_harms_nobody(
    executor: Executor, twice: Program, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> None:
        raise ValueError("mine")

    future = executor.submit(twice, X)
    future.add_done_callback(broken)
    assert future.result(30)
    assert executor.submit(twice, X).result(30)


def test_a_callback_that_waits_for_another_call_is_told_so_instead_of_hanging(
    executor: Executor, busy: Program
) -> None:
    told: list[BaseException] = []
    event = threading.Event()

    def waits(_: object) -> None:
        try:
            executor.submit(busy, BIG).result(30)
        except RuntimeError as exc:
            told.append(exc)
        event.set()

    # A long call: one that is done already would call back in this thread, which may wait.
    executor.submit(busy, BIG).add_done_callback(waits)
    assert event.wait(30)
    assert "callback" in str(told[0])


def test_a_queued_call_can_be_cancelled(nodes: Trio, busy: Program, twice: Program) -> None:
    with Executor(paths=nodes.submitter.paths, idle_s=0.1, max_units=1) as executor:
        first = executor.submit(busy, BIG)
        queued = [executor.submit(busy, BIG) for _ in range(20)]
        until(first.running)
        assert queued[-1].cancel()
        assert queued[-1].cancelled()
        with pytest.raises(futures.CancelledError):
            queued[-1].result(0)
        done, _ = futures.wait([queued[-1]], timeout=0)
        assert queued[-1] in done
        for future in queued:
            future.cancel()
        assert first.result(60)["output"].shape == (400, 400)


def test_a_running_call_can_be_cancelled_and_its_peer_is_free(
    nodes: Trio, busy: Program, twice: Program
) -> None:
    with Executor(paths=nodes.submitter.paths, idle_s=30) as executor:
        future = executor.submit(busy, BIG)
        until(future.running)
        assert future.cancel()
        assert future.cancelled()
        began_s = time.monotonic()
        assert executor.submit(twice, X).result(30)
        assert time.monotonic() - began_s < 20
        assert executor.submit(twice, X).result(30)


def test_a_done_call_can_not_be_cancelled(executor: Executor, twice: Program) -> None:
    future = executor.submit(twice, X)
    future.result(30)
    assert not future.cancel()


async def _in_asyncio(executor: Executor, twice: Program) -> list[Any]:
    loop = asyncio.get_running_loop()
    wrapped = asyncio.wrap_future(executor.submit(twice, X))
    return await asyncio.gather(wrapped, loop.run_in_executor(executor, twice, X))


def test_asyncio_waits_for_its_calls(executor: Executor, twice: Program) -> None:
    for result in asyncio.run(_in_asyncio(executor, twice)):
        assert result["output"].tolist() == [0, 2, 4, 6]


def test_a_failed_step_carries_the_workers_words(executor: Executor) -> None:
    pick = export(Pick(), (torch.tensor([0]),))
    good, bad = (executor.submit(pick, torch.tensor([i])) for i in (3, 99))
    with pytest.raises(JobFailed, match=r"operator failed.*embedding"):
        bad.result(60)
    assert isinstance(bad.exception(), JobFailed)
    assert good.result(60)["output"].tolist() == [[6.0, 7.0]]


# --- shutdown ---------------------------------------------------------------------------------


def test_a_shut_executor_takes_nothing(own: Executor, twice: Program) -> None:
    own.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        own.submit(twice, X)
    with pytest.raises(RuntimeError, match="shut down"):
        own.map(twice, [X])
    own.shutdown()  # again does nothing


def test_shutdown_waits_for_what_was_submitted(own: Executor, twice: Program) -> None:
    mine = [own.submit(twice, X) for _ in range(10)]
    model = own.submit(Twice(), torch.ones(7))  # not even exported yet
    own.shutdown(wait=True)
    assert all(future.done() for future in (*mine, model))
    assert model.result().tolist() == [2.0] * 7


def test_shutdown_without_waiting_returns_at_once_and_loses_nothing(
    own: Executor, twice: Program
) -> None:
    mine = [own.submit(twice, X) for _ in range(10)]
    own.shutdown(wait=False)
    assert all(future.result(30)["output"].tolist() == [0, 2, 4, 6] for future in mine)


def test_shutdown_can_cancel_what_waits(nodes: Trio, busy: Program) -> None:
    executor = Executor(paths=nodes.submitter.paths, max_units=1)
    mine = [executor.submit(busy, BIG) for _ in range(12)]
    until(mine[0].running)
    executor.shutdown(wait=True, cancel_futures=True)
    assert mine[0].result(0)["output"].shape == (400, 400)
    assert mine[-1].cancelled()
    assert all(future.done() for future in mine)


def test_a_forgotten_executor_ends_its_thread(nodes: Trio, twice: Program) -> None:
    executor = Executor(paths=nodes.submitter.paths, idle_s=0.1)
    future = executor.submit(twice, X)
    thread, gone = executor._engine.thread, weakref.ref(executor)
    del executor
    assert gone() is None
    assert future.result(30)
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def program_file(twice: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("programs") / "twice.ngp"
    twice.save(file)
    return file


def run_script(
    nodes: Trio, program_file: Path, script: str, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    head = (
        "import torch, time, os\n"
        "from pathlib import Path\n"
        "from nextgpu_node.sdk import Executor, Program\n"
        f"home = Path({str(nodes.submitter.home)!r})\n"
        f"program = Program.load({str(program_file)!r})\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + script],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.slow
def test_the_interpreter_ends_without_a_shutdown_and_finishes_its_calls(
    nodes: Trio, program_file: Path
) -> None:
    done = run_script(
        nodes,
        program_file,
        "ex = Executor(paths=home)\n"
        "f = ex.submit(program, torch.ones(4))\n"
        "f.add_done_callback(lambda f: print(f.result()['output'].tolist(), flush=True))\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[2.0, 2.0, 2.0, 2.0]"
    assert done.stderr == ""


def test_the_interpreter_ends_though_nobody_takes_the_calls(
    nodes: Trio, program_file: Path
) -> None:
    done = run_script(
        nodes,
        program_file,
        "ex = Executor('vram>=900GB', paths=home, patience_s=3600)\n"
        "f = ex.submit(program, torch.ones(4))\n"
        "time.sleep(0.5)\n"
        "f.add_done_callback(lambda f: print('cancelled', f.cancelled(), flush=True))\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cancelled True"


def test_a_forked_child_is_told_and_neither_hangs(nodes: Trio, program_file: Path) -> None:
    done = run_script(
        nodes,
        program_file,
        "ex = Executor(paths=home)\n"
        "ex.submit(program, torch.ones(4)).result(30)\n"
        "pending = ex.submit(program, torch.ones(4))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    for what in (lambda: ex.submit(program, torch.ones(4)), lambda: pending.result(5)):\n"
        "        try:\n"
        "            print('no error' if what() is None else 'done before')\n"
        "        except RuntimeError as exc:\n"
        "            print('after the fork' in str(exc))\n"
        "    ex.shutdown()\n"
        "    print('child over', flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "assert ex.submit(program, torch.ones(4)).result(30)\n"
        "ex.shutdown()\n"
        "print('parent over')\n",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == "True"
    assert lines[1] in ("True", "done before")
    assert lines[2:4] == ["child over", "parent over"]


# --- bad input --------------------------------------------------------------------------------


def test_no_daemon_is_said_at_once(tmp_path: Path, twice: Program) -> None:
    with Executor(paths=tmp_path / "nobody") as executor:
        began_s = time.monotonic()
        with pytest.raises(DaemonUnreachable, match="nextgpu up"):
            executor.submit(twice, X).result(30)
        assert time.monotonic() - began_s < 10


def test_no_peer_is_said_after_a_while(nodes: Trio, twice: Program) -> None:
    with Executor("vram>=900GB", paths=nodes.submitter.paths, patience_s=0.5) as executor:
        error = executor.submit(twice, X).exception(30)
    assert isinstance(error, NoPeerFound)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((torch.ones(5),), "4 is declared, 5 came"),
        ((torch.ones(4, dtype=torch.int64),), "float32 is declared"),
        ((torch.ones(4).to_sparse(),), "dense"),
        ((), "1 more inputs are needed"),
        ((X, X), "2 were given"),
        (("text",), "1 more inputs are needed"),
    ],
)
def test_inputs_that_do_not_fit_are_told_before_anything_is_sent(
    executor: Executor, twice: Program, inputs: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(ProgramError, match=words):
        executor.submit(twice, *inputs)


def test_a_model_that_can_not_be_exported_fails_its_future(executor: Executor) -> None:
    class Weird(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ProgramError):
        executor.submit(Weird(), X).result(60)
    with pytest.raises(ProgramError, match="do not fit the model"):
        executor.submit(Twice(), X, X, X).result(60)


@pytest.mark.parametrize("gpu", ["gpu", "vram>=much", "vram>12GB", "cuda vram>=1GB", "vram<=1GB"])
def test_needs_that_make_no_sense_are_told(gpu: str) -> None:
    with pytest.raises(UsageError):
        parse_needs(gpu)


def test_needs_as_text() -> None:
    assert parse_needs("cuda, vram>=12GB") == Needs(kind="cuda", device_memory_bytes=12 * 10**9)
    assert parse_needs("vram>=2GiB").device_memory_bytes == 2 * 2**30
    assert parse_needs("any") == Needs()


def test_it_is_a_concurrent_futures_executor(executor: Executor) -> None:
    assert isinstance(executor, futures.Executor)
    assert issubclass(NextGPUError, Exception)
    assert os.getpid() == executor._engine.pid


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)
