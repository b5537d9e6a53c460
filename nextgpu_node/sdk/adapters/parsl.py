"""Parsl apps on peers.

    config = parsl.Config(executors=[NextGPUExecutor(label="peers")])
    embed = model_app(model, executors=["peers"])
    with parsl.load(config):
        futures = [embed(batch) for batch in batches]

Parsl's data flow (futures as arguments, retries, checkpoints) works as ever; the calls are data.
Source: parsl.executors.base.ParslExecutor
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from parsl import python_app
from parsl.executors.base import ParslExecutor

from nextgpu_node.errors import UsageError
from nextgpu_node.sdk.executor import Executor


class NextGPUExecutor(ParslExecutor):  # type: ignore[misc]  # parsl has no types
    """`options` are those of nextgpu's Executor, which lives from `start` to `shutdown`."""

    def __init__(self, label: str = "nextgpu", **options: Any) -> None:
        super().__init__()
        self.label = label
        self._options = options
        self._executor: Executor | None = None

    def start(self) -> None:
        self._executor = Executor(**self._options)

    def submit(
        self,
        func: Callable[..., Any],
        resource_specification: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Future[Any]:
        assert self._executor is not None
        if resource_specification:
            raise UsageError("Say what peers must have in NextGPUExecutor(gpu=...), for all calls.")
        return self._executor.submit(getattr(func, "nextgpu_model", func), *args, **kwargs)

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
        super().shutdown()

    def monitor_resources(self) -> bool:
        """There is no process of ours to look at."""
        return False


def model_app(model: Any, **options: Any) -> Callable[..., Future[Any]]:
    """A Parsl app that calls `model`, an nn.Module or a Program; `options` are python_app's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise UsageError("This app runs on a NextGPUExecutor only: name it in executors=[…].")

    call.__name__ = type(model).__name__
    call.nextgpu_model = model  # type: ignore[attr-defined]
    app: Callable[..., Future[Any]] = python_app(call, **options)
    return app
