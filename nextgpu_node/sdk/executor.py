"""`Executor`: a concurrent.futures.Executor over the peers that lend now.

    your threads ──submit──► inbox ──► one trio thread: Dispatcher ──► open units on peers
                 ◄──Future── answers, in that thread

One background thread runs everything; no call waits for another thread than that one.  A model is
exported in a second one, once for each shape of its inputs.  docs/executor.md
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import trio

from nextgpu_node.config import load_config, parse_size
from nextgpu_node.errors import Refused, UsageError
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.calls import tensor_leaves
from nextgpu_node.graph.local import match_inputs
from nextgpu_node.paths import Paths, find_paths
from nextgpu_node.sdk.api_client import ApiClient
from nextgpu_node.sdk.dispatch import Dispatcher, Limits
from nextgpu_node.sdk.modules import ExportedModule, ModuleCache, check_inputs
from nextgpu_node.sdk.peer_book import PeerBook
from nextgpu_node.sdk.peer_history import PeerHistory
from nextgpu_node.sdk.pool import PythonWork, Step, Work, Xs, Ys
from nextgpu_node.sdk.python_unit import encode_function, result_of
from nextgpu_node.sdk.unit import Needs
from nextgpu_protocol.messages import DEVICE_KINDS

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# At the end of the interpreter, what is still under way gets this long; then it is cancelled.
_EXIT_GRACE_S: Final = 5.0
_AFTER_FORK: Final = (
    "This Executor belongs to the process that this one was forked from. "
    "Make a new one here, after the fork."
)


class RemoteFuture(futures.Future[_T]):
    """A concurrent.futures.Future whose `cancel` also works while the call runs on its peer.

    The peer is told where nobody else's call shares the unit; otherwise the answer is dropped.
    """

    def __init__(self, answering: threading.Thread | None = None) -> None:
        super().__init__()
        self._answering = answering
        self._drop: Callable[[], None] | None = None

    def result(self, timeout: float | None = None) -> _T:
        self._check_thread()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check_thread()
        return super().exception(timeout)

    def _check_thread(self) -> None:
        if threading.current_thread() is self._answering and not self.done():
            raise RuntimeError(
                "A done-callback waits for another call. Callbacks run in the thread that brings "
                "the answers; wait in a thread of your own."
            )

    def on_cancel(self, drop: Callable[[], None]) -> None:
        """Call `drop` when the future is cancelled, or now where it is."""
        with self._condition:
            self._drop = drop
            cancelled = self._state == "CANCELLED_AND_NOTIFIED"
        if cancelled:
            drop()

    def cancel(self) -> bool:
        """False only where the call is done already."""
        with self._condition:
            if self._state == "FINISHED":
                return False
            first = self._state in ("PENDING", "RUNNING")
            if first:
                self._state = "CANCELLED_AND_NOTIFIED"
                for waiter in self._waiters:
                    waiter.add_cancelled(self)
                self._condition.notify_all()
        if first:
            self._invoke_callbacks()  # type: ignore[attr-defined]  # as the class's own cancel does
            if self._drop is not None:
                self._drop()
        return True

    def begin(self) -> bool:
        """Note that the call is sent.  False where it was cancelled."""
        with self._condition:
            if self._state == "PENDING":
                self._state = "RUNNING"
            return self._state == "RUNNING"

    def settle(self, result: _T | None, error: BaseException | None) -> None:
        """The outcome, unless the call was cancelled meanwhile."""
        try:
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(result)  # type: ignore[arg-type]  # there is one without an error
        except futures.InvalidStateError:
            return  # cancelled

    def abandon_after_fork(self) -> None:
        """In a forked child: nobody will answer.  Its locks may belong to threads that are gone."""
        self._condition = threading.Condition()
        if self._state in ("PENDING", "RUNNING"):
            self._exception = RuntimeError(_AFTER_FORK)
            self._state = "FINISHED"


class _Call:
    """A future on its way through the dispatcher: `dispatch.Job`."""

    def __init__(
        self, steps: Sequence[Step], finish: Callable[[list[Any]], Any], future: RemoteFuture[Any]
    ) -> None:
        self.steps = steps
        self.future = future
        self._finish = finish

    def start(self) -> bool:
        return self.future.begin()

    def succeed(self, results: list[Any]) -> None:
        try:
            result = self._finish(results)
        except Exception as exc:
            self.future.settle(None, exc)
            return
        self.future.settle(result, None)

    def fail(self, error: Exception) -> None:
        if isinstance(error, Refused) and self.steps and isinstance(self.steps[0], bytes):
            # Why each of them said no is the cause; what to do is the same for all.
            error, cause = Refused(_NOBODY_RUNS_PYTHON), error
            error.__cause__ = cause
        self.future.settle(None, error)


class _Engine:
    """The trio thread.  Holds no reference to its Executor, so that one can be forgotten."""

    def __init__(self, paths: Paths, needs: Needs, limits: Limits) -> None:
        self._paths = paths
        self._needs = needs
        self._limits = limits
        config = load_config(paths, overrides={}, environ=os.environ)
        self._remembers = config.submit.remember_peers
        self._inbox: deque[Callable[[], None]] = deque()
        self._token: trio.lowlevel.TrioToken | None = None
        self._up = threading.Event()
        self._scope = trio.CancelScope()
        self._finishing = trio.Event()
        self._dispatcher: Dispatcher | None = None
        # Apart: who refuses functions is still asked for programs.
        self._python_dispatcher: Dispatcher | None = None
        self.unfinished: weakref.WeakSet[RemoteFuture[Any]] = weakref.WeakSet()
        self.broken: BaseException | None = None
        self.pid = os.getpid()
        self.thread = threading.Thread(target=self._run, name="nextgpu-executor", daemon=True)
        _engines.add(self)

    # --- from any thread ----------------------------------------------------------------------

    def start(self) -> None:
        """Idempotent; the caller holds the executor's lock."""
        if self.thread.ident is None:
            self.thread.start()
            self._up.wait()
        if self.broken is not None:
            raise _broken(self.broken)

    def submit(self, program: Program | Work, call: _Call) -> None:
        self.unfinished.add(call.future)
        self._post(lambda: self._hand_over(program, call))

    def finish_if_running(self) -> None:
        """End once everything is answered.  Returns at once."""
        if self.thread.ident is not None and self.pid == os.getpid():
            self._post(self._finishing.set)

    def stop(self) -> None:
        """End now; what is unanswered is cancelled.  Returns at once."""
        if self.thread.is_alive() and self.pid == os.getpid():
            self._post(self._cancel_all)

    def join(self, timeout: float | None = None) -> None:
        if self.thread.is_alive() and threading.current_thread() is not self.thread:
            self.thread.join(timeout)

    def abandon(self) -> None:
        """In a forked child."""
        for future in list(self.unfinished):
            future.abandon_after_fork()

    def _post(self, what: Callable[[], None]) -> None:
        """Have the trio thread do `what`; once that has ended, nobody does."""
        self._inbox.append(what)
        assert self._token is not None
        try:
            self._token.run_sync_soon(self._drain, idempotent=True)
        except trio.RunFinishedError:
            self._settle_rest()

    # --- in the trio thread -------------------------------------------------------------------

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _cancel_all(self) -> None:
        for future in list(self.unfinished):
            future.cancel()
        self._scope.cancel()

    def _hand_over(self, program: Program | Work, call: _Call) -> None:
        if call.future.cancelled():
            return
        assert self._dispatcher is not None
        assert self._python_dispatcher is not None
        is_python = isinstance(program, PythonWork)
        dispatcher = self._python_dispatcher if is_python else self._dispatcher
        drop = dispatcher.submit(program, call)
        call.future.on_cancel(lambda: self._post(drop))

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as exc:  # whatever it was: nobody may be left waiting
            self.broken = exc
            log.error("executor.broken cause=%s", type(exc).__name__)
        finally:
            self._up.set()
            self._settle_rest()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with ApiClient(self._paths.api_socket) as api:
            history = PeerHistory(self._paths.peer_history_file if self._remembers else None)
            book = PeerBook(api.peers, self._needs, history=history)
            units_socket = self._paths.units_socket
            self._dispatcher = Dispatcher(units_socket, book, self._needs, self._limits)
            python_book = PeerBook(api.peers, self._needs)
            self._python_dispatcher = Dispatcher(
                units_socket, python_book, self._needs, self._limits
            )
            with self._scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._dispatcher.run)
                    await nursery.start(self._python_dispatcher.run)
                    self._up.set()
                    await self._finishing.wait()
                    await self._dispatcher.close()
                    await self._python_dispatcher.close()
                    nursery.cancel_scope.cancel()
            book.save()

    def _settle_rest(self) -> None:
        """The thread has ended: what is not answered never will be."""
        self._inbox.clear()
        for future in list(self.unfinished):
            if self.broken is not None:
                future.settle(None, _broken(self.broken))
            else:
                future.cancel()


def _broken(cause: BaseException) -> futures.BrokenExecutor:
    error = futures.BrokenExecutor("The executor's thread ended by an error of its own.")
    error.__cause__ = cause
    return error


class Executor(futures.Executor):
    """Calls of models and programs on other people's devices, as concurrent futures.

    with nextgpu.Executor(gpu="vram>=12GB") as ex:
        future = ex.submit(model, x)
        results = list(ex.map(model, batches))

    `gpu` says what a peer must have: "cuda", "cpu", "any", "vram>=12GB", or several of these with
    commas between them; memory is that of the device.  `needs` says the same and more as an object
    and excludes `gpu`.  `paths` is where the nextgpud to use has its files.

    `max_units`: units open at once, over all peers.  `idle_s`: seconds that a unit waits for its
    next call before it is closed and its peer is free.  `patience_s`: seconds that calls wait while
    no peer takes them, before they fail with NoPeerFound or Refused.  `attempts`: how often a call
    is sent, each time to another peer where there is one, before the loss of a peer is its own.

    `on_log` is given (1 for stdout or 2 for stderr, text) of what functions print on their peers;
    without it, it is printed here.

    Thread-safe.  Not usable in a forked child.  Futures fail with the errors of `nextgpu`:
    NoPeerFound, Refused, PeerLost, JobFailed, OutOfMemory, JobTimeout, IntegrityError,
    DaemonUnreachable, and ProgramError where the model or its inputs can not be used.
    """

    def __init__(
        self,
        gpu: str = "any",
        *,
        needs: Needs | None = None,
        paths: Paths | Path | None = None,
        on_log: Callable[[int, str], None] | None = None,
        max_units: int = 16,
        idle_s: float = 2.0,
        patience_s: float = 15.0,
        attempts: int = 4,
    ) -> None:
        if needs is not None and gpu != "any":
            raise UsageError("Say what you need by `gpu` or by `needs`, not by both.")
        if max_units < 1 or attempts < 1 or idle_s < 0 or patience_s < 0:
            raise UsageError("max_units and attempts are 1 or more, times are not negative.")
        if isinstance(paths, Path):
            paths = Paths.under(paths)
        limits = Limits(max_units, idle_s, patience_s, attempts)
        self._max_workers = max_units  # what schedulers of others ask an executor for
        self._engine = _Engine(paths or find_paths(os.environ), needs or parse_needs(gpu), limits)
        self._modules = ModuleCache()
        self._python = PythonWork(on_log or show_log)
        self._exporter = futures.ThreadPoolExecutor(1, "nextgpu-export")
        self._lock = threading.Lock()
        self._closed = False
        self._has_exported = False
        weakref.finalize(self, self._engine.finish_if_running)

    # --- concurrent.futures.Executor ----------------------------------------------------------

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        """One call of `fn`: an nn.Module or a Program with tensors, or a Python function.

        A module's result is what the module itself would give, its tensors on the CPU; a program's
        is a dict of its outputs by name; a function's must be plain data, and runs only where an
        owner named this submitter (docs/python.md).  The future is a RemoteFuture.

        Raises ProgramError for inputs that do not fit a program and UsageError for what can not be
        called or pickled; a model that can not be exported fails its future.
        """
        if _is_dask_batch(fn):
            from nextgpu_node.sdk.adapters.dask import submit_batch

            return submit_batch(self, *args)
        return self._submit(fn, [(args, kwargs)], operator.itemgetter(0))

    def map(
        self,
        fn: Any,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Results of `fn` over the inputs, in their order.

        `timeout`: seconds until TimeoutError, from this call on.  `chunksize`: so many inputs of
        one shape go to one peer together.  `buffersize`: at most so many chunks are under way, and
        the inputs are read no further than that.
        """
        if chunksize < 1 or (buffersize is not None and buffersize < 1):
            raise ValueError("chunksize and buffersize must be 1 or more.")
        end_s = None if timeout is None else timeout + time.monotonic()
        chunks = _chunks(zip(*iterables, strict=False), chunksize)

        def submit_next() -> RemoteFuture[list[Any]] | None:
            calls = next(chunks, None)
            return None if calls is None else self._submit(fn, calls, list)

        return _results(list(_take(submit_next, buffersize)), submit_next, end_s)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; free the peers once those that there are are answered.

        `wait`: return only then.  `cancel_futures`: cancel what has not been sent to a peer.
        """
        with self._lock:
            self._closed = True
        if self._engine.pid != os.getpid():
            return
        if cancel_futures:
            for future in list(self._engine.unfinished):
                if not future.running():
                    future.cancel()
        if self._has_exported:
            # Behind the last export, whose calls are handed over by then.
            with suppress(RuntimeError):
                self._exporter.submit(self._engine.finish_if_running)
            self._exporter.shutdown(wait=False)
        else:
            self._engine.finish_if_running()
        if wait:
            self._engine.join()

    # --- on the way out -----------------------------------------------------------------------

    def _submit(
        self, fn: Any, calls: Sequence[_Arguments], gather: Callable[[list[Any]], Any]
    ) -> RemoteFuture[Any]:
        future: RemoteFuture[Any] = RemoteFuture(self._engine.thread)
        with self._lock:
            self._check_open()
            if isinstance(fn, Program):
                steps = [_steps_of(fn, call) for call in calls]
                self._engine.start()
                self._engine.submit(fn, _Call(steps, gather, future))
            elif isinstance(fn, torch.nn.Module):
                self._engine.start()
                self._submit_module(fn, calls, gather, future)
            elif callable(fn):
                # Pickled here and now: what the caller changes later is not sent.
                bodies = [encode_function(fn, *call) for call in calls]
                self._engine.start()
                self._engine.submit(self._python, _Call(bodies, _results_of(gather), future))
            else:
                raise UsageError(_NOT_CALLABLE.format(kind=type(fn).__name__))
        return future

    def _check_open(self) -> None:
        if self._engine.pid != os.getpid():
            raise RuntimeError(_AFTER_FORK)
        if self._closed:
            raise RuntimeError("This Executor is shut down; it takes no more calls.")
        if self._engine.broken is not None:
            raise _broken(self._engine.broken)

    def _submit_module(
        self,
        module: torch.nn.Module,
        calls: Sequence[_Arguments],
        gather: Callable[[list[Any]], Any],
        future: RemoteFuture[Any],
    ) -> None:
        exported = self._modules.find(module, *calls[0])
        if exported is not None:
            self._engine.submit(exported.program, _module_call(exported, calls, gather, future))
            return
        self._has_exported = True
        self._engine.unfinished.add(future)
        engine, modules = self._engine, self._modules

        def export_and_submit() -> None:
            if future.cancelled():
                return
            try:
                exported = modules.export(module, *calls[0])
                engine.submit(exported.program, _module_call(exported, calls, gather, future))
            except Exception as exc:
                future.settle(None, exc)

        self._exporter.submit(export_and_submit)


_Arguments = tuple[Sequence[Any], Mapping[str, Any]]
_NOT_CALLABLE: Final = (
    "A {kind} can not be called. Submit an nn.Module, a program (nextgpu.export) or a function."
)
_NOBODY_RUNS_PYTHON: Final = (
    "No peer runs Python functions of yours. Peers run models and programs, which are data: submit "
    "an nn.Module, or nextgpu.export(function, (example,)) where the function is one of tensors. "
    "For other functions, an owner must name your peer ID in sharing.python_allow."
)


def _results_of(gather: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda events: gather([result_of(event) for event in events])


def show_log(stream: int, text: str) -> None:
    """What a function printed on its peer, here; control characters left out."""
    shown = "".join(c for c in text if c.isprintable() or c in "\n\t")
    print(shown, end="", file=sys.stderr if stream == 2 else sys.stdout, flush=True)


def _is_dask_batch(fn: Any) -> bool:
    """Whether Dask hands over a batch of its tasks: dask.compute(..., scheduler=executor)."""
    is_named = getattr(fn, "__name__", "") == "batch_execute_tasks"
    return is_named and getattr(fn, "__module__", "") == "dask.local"


def _steps_of(program: Program, call: _Arguments) -> Xs:
    args, kwargs = call
    xs = match_inputs(program.spec, args, kwargs)
    check_inputs(program.spec, xs)
    return xs


def _module_call(
    exported: ExportedModule,
    calls: Sequence[_Arguments],
    gather: Callable[[list[Any]], Any],
    future: RemoteFuture[Any],
) -> _Call:
    steps = [exported.inputs(*call) for call in calls]
    for xs in steps:
        check_inputs(exported.program.spec, xs)

    def finish(results: list[Ys]) -> Any:
        return gather([exported.rebuild(ys) for ys in results])

    return _Call(steps, finish, future)


def parse_needs(gpu: str) -> Needs:
    """The Needs of a text such as "cuda, vram>=12GB".  Raises UsageError."""
    needs = Needs()
    for term in filter(None, (part.strip() for part in gpu.split(","))):
        name, is_memory, text = term.partition(">=")
        try:
            if is_memory and name.strip() == "vram":
                needs = replace(needs, device_memory_bytes=parse_size(text.strip()))
                continue
        except ValueError as exc:
            raise UsageError(f"{text.strip()!r} is not a size such as 12GB or 12GiB.") from exc
        if term not in DEVICE_KINDS:
            raise UsageError(f'{term!r} is neither "cuda", "cpu", "any" nor "vram>=12GB".')
        needs = replace(needs, kind=term)
    return needs


# --- map --------------------------------------------------------------------------------------


def _chunks(inputs: Iterable[tuple[Any, ...]], size: int) -> Iterator[list[_Arguments]]:
    """Neighbours of one shape, at most `size` together: one program takes them all."""
    chunk: list[_Arguments] = []
    shape: list[Any] = []
    for args in inputs:
        # A chunk of one needs no comparison.
        found = [] if size == 1 else [(t.shape, t.dtype) for _, t in tensor_leaves(args)]
        if chunk and found != shape:
            yield chunk
            chunk = []
        chunk.append((args, {}))
        shape = found
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _take(make: Callable[[], _T | None], count: int | None) -> Iterator[_T]:
    """What `make` gives until it gives None; `count` of them at most."""
    taken = 0
    while count is None or taken < count:
        one = make()
        if one is None:
            return
        taken += 1
        yield one


def _results(
    first: list[RemoteFuture[list[Any]]],
    submit_next: Callable[[], RemoteFuture[list[Any]] | None],
    end_s: float | None,
) -> Iterator[Any]:
    """In order.  Leaving early cancels the rest."""
    pending = deque(first)
    try:
        while pending:
            # Popped before it is waited for: a result that was read is not kept here.
            future = pending.popleft()
            try:
                results = future.result(None if end_s is None else end_s - time.monotonic())
            except BaseException:
                future.cancel()
                raise
            following = submit_next()
            if following is not None:
                pending.append(following)
            yield from results
    finally:
        for future in pending:
            future.cancel()


# --- the end of the process, and forks --------------------------------------------------------

_engines: weakref.WeakSet[_Engine] = weakref.WeakSet()


def _end_all() -> None:
    """At the interpreter's end: a moment for what is under way, then the end."""
    end_s = time.monotonic() + _EXIT_GRACE_S
    engines = list(_engines)
    for engine in engines:
        engine.finish_if_running()
    for engine in engines:
        engine.join(max(0.0, end_s - time.monotonic()))
    for engine in engines:
        engine.stop()
        engine.join(_EXIT_GRACE_S)


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        engine.abandon()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
