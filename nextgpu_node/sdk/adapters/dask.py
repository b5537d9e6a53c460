"""Dask's own scheduler on peers: dask.compute(..., scheduler=executor).

Dask hands an executor batches of tasks, each with the results that it depends on.  A task that
calls a model or a program goes to a peer; Dask's own glue (lists, aliases, arithmetic between
results) runs here, where its inputs already are.
Source: dask.local.get_async, dask._task_spec
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from dask._task_spec import GraphNode, Task

from nextgpu_node.sdk.adapters.gather import gather

if TYPE_CHECKING:
    from nextgpu_node.sdk.executor import Executor

# Of Dask and of Python itself: functions that put results together.
_GLUE = ("builtins", "operator", "_operator", "functools", "itertools", "dask", "tlz", "toolz")

# key, (task, data) packed, dumps, loads, get_id, pack_exception: dask.local.execute_task
_Entry = tuple[Any, Any, Callable[[Any], Any], Callable[[Any], Any], Callable[[], Any], Any]


def submit_batch(executor: Executor, batch: Sequence[_Entry]) -> Future[list[Any]]:
    """What dask.local.batch_execute_tasks gives, as a future."""
    return gather([_submit(executor, *entry) for entry in batch], list)


def _submit(
    executor: Executor,
    key: Any,
    packed: Any,
    dumps: Callable[[Any], Any],
    loads: Callable[[Any], Any],
    get_id: Callable[[], Any],
    _pack_exception: Any,
) -> Future[Any]:
    task, data = loads(packed)

    def done(results: list[Any]) -> tuple[Any, Any, bool]:
        return key, dumps((results[0], get_id())), False

    return gather([_run(executor, task, data)], done)


def _run(executor: Executor, task: GraphNode, data: Mapping[Any, Any]) -> Future[Any]:
    if isinstance(task, Task) and not _is_glue(task.func):
        # Evaluated as Dask would, but for the last step.
        probe = Task(task.key, _arguments, *task.args, **task.kwargs)
        args, kwargs = probe(data)
        return executor.submit(task.func, *args, **kwargs)
    here: Future[Any] = Future()
    here.set_running_or_notify_cancel()
    here.set_result(task(data))
    return here


def _arguments(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _is_glue(function: Any) -> bool:
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    return module.split(".")[0] in _GLUE
