"""joblib on peers.

    from nextgpu_node.sdk.adapters.joblib import register
    register()
    with joblib.parallel_backend("nextgpu"):
        results = joblib.Parallel()(joblib.delayed(model)(x) for x in batches)

A batch of joblib's is taken apart again: each of its calls is one call of the Executor.
Source: joblib.parallel.ParallelBackendBase
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from joblib import register_parallel_backend
from joblib.parallel import ParallelBackendBase

from nextgpu_node.sdk.adapters.gather import gather
from nextgpu_node.sdk.executor import Executor


def register(name: str = "nextgpu") -> None:
    """Make the backend known to joblib under `name`."""
    register_parallel_backend(name, NextGPUBackend)


class NextGPUBackend(ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """`executor` is used as it is and stays open; without one, the options are a new Executor's."""

    supports_retrieve_callback = True
    uses_threads = True  # nothing is pickled here

    def __init__(
        self,
        executor: Executor | None = None,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._given = executor
        self._options = options
        self._executor: Executor | None = None
        self._under_way: set[Future[Any]] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        most = (self._executor or self._given or self._open())._max_workers
        return most if n_jobs is None or n_jobs < 0 else min(n_jobs, most)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        self.parallel = parallel
        self._open()
        return self.effective_n_jobs(n_jobs)

    def _open(self) -> Executor:
        if self._executor is None:
            self._executor = self._given or Executor(**self._options)
        return self._executor

    def submit(
        self, func: Any, callback: Callable[[Future[Any]], Any] | None = None
    ) -> Future[Any]:
        """`func` is joblib's BatchedCalls: its items are (function, args, kwargs)."""
        executor = self._open()
        calls = [executor.submit(fn, *args, **kwargs) for fn, args, kwargs in func.items]
        whole = gather(calls, list)
        self._under_way.add(whole)
        whole.add_done_callback(self._under_way.discard)
        if callback is not None:
            whole.add_done_callback(callback)
        return whole

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        for future in list(self._under_way):
            future.cancel()
        self.terminate()
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)

    def terminate(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None and executor is not self._given:
            executor.shutdown(wait=False, cancel_futures=True)
