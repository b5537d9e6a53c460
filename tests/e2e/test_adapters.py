"""Other libraries' own schedulers over a real provider."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch

from nextgpu_node.errors import JobFailed, Refused
from nextgpu_node.sdk.executor import Executor
from tests.support.nodes import Trio

joblib = pytest.importorskip("joblib")
X = torch.arange(4.0)


class Shift(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x + 1 if y is None else x + y


class Pick(torch.nn.Module):
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(index, torch.arange(12.0).reshape(6, 2))


SHIFT = Shift()


@pytest.fixture(scope="module")
def executor(nodes: Trio) -> Iterator[Executor]:
    with Executor(paths=nodes.submitter.paths) as executor:
        yield executor


def test_joblib_runs_its_calls_in_order(executor: Executor) -> None:
    from nextgpu_node.sdk.adapters.joblib import register

    register()
    with joblib.parallel_backend("nextgpu", executor=executor):
        calls = (joblib.delayed(SHIFT)(X * i) for i in range(40))
        results = joblib.Parallel(verbose=0)(calls)
    assert [r[1].item() for r in results] == [i + 1.0 for i in range(40)]
    with joblib.parallel_config("nextgpu", executor=executor):
        lazily = joblib.Parallel(return_as="generator")(joblib.delayed(SHIFT)(X) for _ in range(3))
        assert [r[0].item() for r in lazily] == [1.0] * 3


def test_joblib_carries_the_error(executor: Executor) -> None:
    from nextgpu_node.sdk.adapters.joblib import register

    register()
    calls = [joblib.delayed(Pick())(torch.tensor([i])) for i in (1, 99, 2)]
    with joblib.parallel_backend("nextgpu", executor=executor), pytest.raises(JobFailed):
        joblib.Parallel()(calls)
    with (
        joblib.parallel_backend("nextgpu", executor=executor),
        pytest.raises(Refused, match=r"nextgpu\.export"),
    ):
        joblib.Parallel()([joblib.delayed(len)([1])])


def test_dask_computes_a_graph_of_model_calls(executor: Executor) -> None:
    dask = pytest.importorskip("dask")
    model = dask.delayed(SHIFT, pure=False, traverse=False)
    first = [model(X * i) for i in range(6)]
    second = [model(a, b) for a, b in itertools.pairwise(first)]
    total = dask.delayed(sum)(second)
    (result, parts) = dask.compute(total, second, scheduler=executor)
    expected = [(X * i + 1) + (X * (i + 1) + 1) for i in range(5)]
    assert torch.equal(result, sum(expected))
    assert all(map(torch.equal, parts, expected))


def test_dask_carries_the_error(executor: Executor) -> None:
    dask = pytest.importorskip("dask")
    bad = dask.delayed(Pick(), pure=False, traverse=False)(torch.tensor([99]))
    with pytest.raises(JobFailed):
        dask.compute(bad, scheduler=executor)

    def mine(x: torch.Tensor) -> torch.Tensor:
        return x

    with pytest.raises(Refused, match=r"nextgpu\.export"):
        dask.compute(dask.delayed(mine)(X), scheduler=executor)


def test_parsl_runs_apps_that_wait_for_each_other(
    nodes: Trio, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsl = pytest.importorskip("parsl")
        from nextgpu_node.sdk.adapters.parsl import NextGPUExecutor, model_app

        monkeypatch.chdir(str(tmp_path))
        peers = NextGPUExecutor("peers", paths=nodes.submitter.paths)
        config = parsl.Config(executors=[peers], run_dir=str(tmp_path), strategy="none")
        with parsl.load(config):
            shift = model_app(SHIFT, executors=["peers"])
            first, second = shift(X), shift(X * 2)
            assert shift(first, second).result(60).tolist() == [2.0, 5.0, 8.0, 11.0]
            with pytest.raises(JobFailed):
                model_app(Pick(), executors=["peers"])(torch.tensor([99])).result(60)
