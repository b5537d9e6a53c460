"""Runs hostile calls of every row in children that may crash.

    python -m tests.fuzz.rows SECONDS [ROW …]        mutated calls
    python -m tests.fuzz.rows valid                  each row's valid calls, once, in one process

With guard_malloc.so in LD_PRELOAD, what a kernel does outside of its tensors is seen.  Findings go
to stdout, one JSON object a line: crash, hang, exception, memory beyond the plan's promise, and
results that differ from one run to the next.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from nextgpu_node.graph.plan import Plan
from nextgpu_protocol.errors import RemoteProtocolError
from tests.fuzz.row_calls import Call, make_call, valid_calls
from tests.support.rows import rows

BATCH = 400
# Of processor time, so that a busy machine is no hang.
CALL_S = 10
# Small constants and vectors inside kernels; more than that must have been planned.
SLACK_BYTES = 64 * 1024
_CURRENT = struct.Struct("<QQQQQ")


class Guard:
    """The counters of guard_malloc.so; without it, nothing is counted."""

    def __init__(self) -> None:
        path = os.environ.get("GUARD_MALLOC")
        self._lib = ctypes.CDLL(path) if path else None
        if self._lib is not None:
            self._lib.guard_live.restype = self._lib.guard_peak.restype = ctypes.c_size_t
            self._lib.guard_limit(ctypes.c_size_t(2 * 1024**3))

    def pattern(self, byte: int) -> None:
        if self._lib is not None:
            self._lib.guard_pattern(ctypes.c_ubyte(byte))

    def reset(self) -> int:
        if self._lib is None:
            return 0
        self._lib.guard_reset()
        return int(self._lib.guard_live())

    def peak(self) -> int:
        return int(self._lib.guard_peak()) if self._lib is not None else 0


@dataclass
class Tally:
    calls: int = 0
    planned: int = 0
    ran: int = 0


def check(call: Call, guard: Guard, tally: Tally) -> dict[str, Any] | None:
    """What is wrong with how `call` went, if anything."""
    tally.calls += 1
    try:
        plan = call.plan()
    except RemoteProtocolError:
        return None
    tally.planned += 1
    given = sum(one.nbytes for one in call.inputs)
    results = []
    for pattern in (0xA5, 0x3C):
        guard.pattern(pattern)
        before = guard.reset()
        try:
            with torch.inference_mode():
                outputs = plan.run(list(call.inputs))
        except RemoteProtocolError:
            return _promise(plan, given, guard.peak() - before)
        excess = _promise(plan, given, guard.peak() - before)
        if excess:
            return excess
        results.append(_as_promised(plan, outputs))
    tally.ran += 1
    if results[0] != results[1]:
        return {"kind": "differs"}
    return None


def _as_promised(plan: Plan, outputs: list[torch.Tensor]) -> list[bytes]:
    for promised, real in zip(plan.results, outputs, strict=True):
        if promised.shape != real.shape or promised.dtype != real.dtype:
            raise AssertionError(
                f"{real.dtype}{list(real.shape)}, promised {promised.dtype}{list(promised.shape)}"
            )
    return [_bytes(one) for one in outputs]


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _promise(plan: Plan, given: int, used: int) -> dict[str, Any] | None:
    promised = plan.peak_bytes - given
    if used > promised + SLACK_BYTES:
        return {"kind": "memory", "used": used, "promised": promised}
    return None


def child(names: list[str], start: int, shared: mmap.mmap, guard: Guard, out: int) -> None:
    tally = Tally()
    for number in range(start, start + BATCH):
        name = names[number % len(names)]
        index = number // len(names)
        shared[: _CURRENT.size] = _CURRENT.pack(
            number + 1, tally.calls, tally.planned, tally.ran, 1
        )
        signal.setitimer(signal.ITIMER_PROF, CALL_S)
        call = make_call(name, index)
        try:
            found = check(call, guard, tally)
        except Exception as exc:
            found = {"kind": "exception", "what": f"{type(exc).__name__}: {exc}"[:300]}
        if found:
            line = json.dumps({"op": name, "number": index, **found, "call": call.describe()[:600]})
            os.write(out, line.encode() + b"\n")
    shared[: _CURRENT.size] = _CURRENT.pack(start + BATCH, tally.calls, tally.planned, tally.ran, 0)
    os._exit(0)


def main(seconds: float, names: list[str], start: int = 0) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import_module("torch._dynamo")  # as the worker does; the first call of some rows needs it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    guard = Guard()
    names = names or [row.op for row in rows()]
    for name in names:
        make_call(name, 0)
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    total, number, crashes = Tally(), start, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shared[: _CURRENT.size] = _CURRENT.pack(number, 0, 0, 0, 0)
        pid = os.fork()
        if pid == 0:
            try:
                child(names, number, shared, guard, 1)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        number, calls, planned, ran, busy = _CURRENT.unpack(shared[: _CURRENT.size])
        total.calls += calls
        total.planned += planned
        total.ran += ran
        if busy or status:
            crashes += 1
            name, index = names[(number - 1) % len(names)], (number - 1) // len(names)
            what = signal.Signals(status & 0x7F).name if status & 0x7F else f"exit {status >> 8}"
            kind = "hang" if what == "SIGPROF" else "crash"
            call = make_call(name, index).describe()[:600]
            print(
                json.dumps({"op": name, "number": index, "kind": kind, "what": what, "call": call}),
                flush=True,
            )
    return {
        "calls": total.calls,
        "planned": total.planned,
        "ran": total.ran,
        "crashes": crashes,
        "next": number,
    }


def valid() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    guard, tally = Guard(), Tally()
    for row in rows():
        for call in valid_calls(row.op):
            print(row.op, file=sys.stderr, flush=True)
            try:
                call.plan()
                found = check(call, guard, tally)
            except Exception as exc:
                found = {"kind": "exception", "what": f"{type(exc).__name__}: {exc}"[:300]}
            if found:
                print(json.dumps({"op": row.op, **found, "call": call.describe()[:600]}))
    print(json.dumps({"calls": tally.calls, "ran": tally.ran}))


if __name__ == "__main__" and sys.argv[1] == "valid":
    valid()
elif __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]), sys.argv[2:])), flush=True)
