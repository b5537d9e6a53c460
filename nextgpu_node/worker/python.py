"""The worker of Python units: a process of its own kind, started from a launcher of its own.

Only for submitters that the owner named (`sharing.python_allow`).  Confined as every worker is:
namespaces, private root, Landlock, seccomp, no network, no new process, one unit and gone.  The
worker of programs imports nothing of this file, and its launcher has no cloudpickle in memory.

    MANIFEST  CALL CALL …  END        each CALL ──► LOG* FILE* VALUE

What a function prints travels as LOG records while it runs.  What it gives back travels as plain
data (graph/values.py): the submitter never unpickles.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import cloudpickle
import msgpack
import torch

from nextgpu_node.graph.values import encode_with_tensors
from nextgpu_node.worker import main as program_worker
from nextgpu_node.worker.channel import Channel, ChannelClosed
from nextgpu_node.worker.outbox import Outbox
from nextgpu_node.worker.preemption import Preemption
from nextgpu_node.worker.unit import Unit, UnitLimits, WorkerExitCode
from nextgpu_node.worker.versions import python_runtime
from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.limits import MAX_MANIFEST_BYTES
from nextgpu_protocol.records import Record, RecordKind, UnitManifest, UnitSummary
from nextgpu_protocol.sealing import KeyPair

FUNCTION: Final = 0
SCRIPT: Final = 1
RESULT: Final = 0
RAISED: Final = 1
STDOUT: Final = 1
STDERR: Final = 2
# A line that does not end is sent in pieces of this size.
_LINE_BYTES: Final = 8192
_NAME: Final = struct.Struct(">H")
_MOST_FILES: Final = 1000
_OUTPUT_DIRECTORY: Final = "output"

reseed = program_worker.reseed


def preload() -> str:
    """As the worker of programs, with cloudpickle in reach.  The runtime's name for offers."""
    program_worker.preload()
    return python_runtime()


def serve(sock: socket.socket, limits: Mapping[str, int | str]) -> int:
    """`worker.main.serve`, for calls."""
    channel = Channel(sock)
    key_pair = KeyPair(os.urandom(32))
    preemption = Preemption()
    preemption.install()
    try:
        channel.send_hello(key_pair.public)
        unit_limits = UnitLimits.from_mapping(limits)
        torch.set_num_threads(unit_limits.threads)
        program_worker.limit_vram(unit_limits)
        return Unit(channel, key_pair, unit_limits, Calls, preemption).run()
    except ChannelClosed:
        return WorkerExitCode.ABANDONED
    except RemoteProtocolError:
        return WorkerExitCode.PROTOCOL_ERROR


class Calls:
    """Runs calls, record by record: what `worker.unit.Scan` is to programs."""

    def __init__(self, outbox: Outbox, limits: UnitLimits) -> None:
        self._outbox = outbox
        self._limits = limits
        self._body = bytearray()
        self._awaited = RecordKind.MANIFEST
        self._continued = False
        self._calls = 0
        self._run_s = 0.0
        self._unflushed = False
        self.stopped = False

    def take_untrusted(self, record: Record) -> None:
        if record.kind is not self._awaited:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, record.kind.name)
        limit = (
            MAX_MANIFEST_BYTES if record.kind is RecordKind.MANIFEST else self._limits.live_bytes
        )
        if len(self._body) + len(record.body) > limit:
            raise RemoteProtocolError(ErrorCode.TOO_LARGE, record.kind.name)
        self._body += record.body
        self._continued = record.more
        if not record.more:
            body, self._body = bytes(self._body), bytearray()
            self._complete(record.kind, body)

    def _complete(self, kind: RecordKind, body: bytes) -> None:
        if kind is RecordKind.MANIFEST:
            decode_message_untrusted(UnitManifest, body)
            self._awaited = RecordKind.CALL
            self._outbox.write(RecordKind.STARTED)
            self._outbox.flush()
            return
        began_s = time.monotonic()
        self._call(body)
        self._calls += 1
        self._run_s += time.monotonic() - began_s
        self._unflushed = True
        self.flush_results(idle=False)

    def flush_results(self, *, idle: bool) -> None:
        if self._unflushed and (idle or self._outbox.flush_is_due):
            self._outbox.flush()
            self._unflushed = False

    def save(self) -> None:
        """A call has no state that could be kept: those that were answered are sent."""
        self._outbox.flush()

    def finish(self) -> UnitSummary:
        if self._continued or self._awaited is not RecordKind.CALL:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, f"{self._awaited.name} is missing")
        return UnitSummary(self._calls, 0, round(self._run_s * 1000), stopped_early=False)

    # --- one call -----------------------------------------------------------------------------

    def _call(self, body: bytes) -> None:
        with _Streams(self._outbox):
            outcome, pieces = self._outcome(body)
        self._outbox.write(RecordKind.VALUE, [bytes([outcome]), *pieces])

    def _outcome(self, body: bytes) -> tuple[int, list[bytes | memoryview]]:
        """The function's result, or what it raised, as pieces of a VALUE."""
        try:
            return RESULT, list(encode_with_tensors(self._run(body)))
        except MemoryError:
            raise
        except LocalProtocolError as exc:
            told = ("TypeError", f"The result can not be sent back: {exc}.", "")
        # The submitter's code may raise anything, SystemExit too: it ends its own call.
        except BaseException as exc:
            lines = traceback.format_exception(exc)
            told = (type(exc).__name__, str(exc), "".join(lines)[-64 * 1024 :])
        return RAISED, list(encode_with_tensors(told))

    def _run(self, body: bytes) -> Any:
        match body[:1]:
            case b"\x00":
                function, args, kwargs = cloudpickle.loads(body[1:])
                return function(*args, **kwargs)
            case b"\x01":
                return self._run_script(*msgpack.unpackb(body[1:]))
        raise RemoteProtocolError(ErrorCode.MALFORMED, "CALL")

    def _run_script(self, name: str, source: str, arguments: list[str]) -> int:
        """As `python NAME ARGUMENTS…`, in an empty directory whose files go back; the exit code."""
        directory = Path.cwd() / _OUTPUT_DIRECTORY
        directory.mkdir()
        os.chdir(directory)
        sys.argv = [name, *arguments]
        space = {"__name__": "__main__", "__file__": name, "__builtins__": __builtins__}
        code = 0
        try:
            exec(compile(source, name, "exec"), space)  # noqa: S102  what the owner allowed
        except SystemExit as exc:
            code = _exit_code(exc)
        except Exception:
            traceback.print_exc()
            code = 1
        self._send_files(directory)
        return code

    def _send_files(self, directory: Path) -> None:
        for count, path in enumerate(_files_below(directory)):
            if count == _MOST_FILES:
                raise RuntimeError(f"The script left more than {_MOST_FILES} files.")
            name = str(path.relative_to(directory)).encode()
            self._outbox.write(RecordKind.FILE, [_NAME.pack(len(name)) + name, path.read_bytes()])


def _exit_code(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print(ending.code, file=sys.stderr)
    return 1


def _files_below(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path


class _Streams:
    """stdout and stderr of one call as LOG records; stdin is empty."""

    def __init__(self, outbox: Outbox) -> None:
        self._mine = tuple(_LogStream(number, outbox) for number in (STDOUT, STDERR))

    def __enter__(self) -> None:
        sys.stdout, sys.stderr = self._mine
        sys.stdin = io.StringIO()

    def __exit__(self, *_: object) -> None:
        for stream in self._mine:
            stream.flush()


class _LogStream(io.TextIOBase):
    def __init__(self, number: int, outbox: Outbox) -> None:
        self._number = number
        self._outbox = outbox
        self._text = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._text += text
        if "\n" in text or len(self._text) > _LINE_BYTES:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._text = self._text, ""
        if text:
            data = bytes([self._number]) + text.encode("utf-8", "replace")
            self._outbox.write(RecordKind.LOG, [data])
            self._outbox.flush()
