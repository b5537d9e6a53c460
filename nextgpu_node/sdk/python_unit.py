"""Python units: functions on a peer whose owner named this submitter.  Spec: 65-python.md

Pickles go one way only.  What comes back is plain data (graph/values.py), text and files: a hostile
peer can lie about a result, never run anything here.
"""

from __future__ import annotations

import inspect
import struct
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import msgpack

from nextgpu_node.errors import JobFailed, Refused, UsageError
from nextgpu_node.sdk.events import CallResult, FileReceived, LogText, UnitEvent
from nextgpu_node.sdk.inbox import Inbox
from nextgpu_node.sdk.unit import RemoteUnit
from nextgpu_node.worker.versions import mismatch, python_runtime
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.program import Graph, ProgramSpec
from nextgpu_protocol.records import Record, RecordKind, UnitManifest

_FUNCTION: Final = b"\x00"
_SCRIPT: Final = b"\x01"
_RESULT: Final = 0
_RAISED: Final = 1
_NAME: Final = struct.Struct(">H")
# cloudpickle's list of such modules is one for the process.
_pickling: Final = threading.Lock()
_NO_PROGRAM: Final = ProgramSpec(min_table_version=1, step=Graph((), ()))


class RemoteTraceback(Exception):
    """The traceback of what a function raised on its peer, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def encode_function(function: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    """The body of a CALL.  UsageError for what can not be pickled, and where cloudpickle is not."""
    try:
        import cloudpickle
    except ImportError as exc:
        raise UsageError(
            "Functions need cloudpickle: pip install 'nextgpu-node[worker,python]'."
        ) from exc
    try:
        with _own_code_by_value(function):
            data: bytes = cloudpickle.dumps((function, tuple(args), dict(kwargs)))
    # Pickling runs the objects' own code, which may raise anything.
    except Exception as exc:
        raise UsageError(
            f"The function or its arguments can not be pickled: {_first_line(exc)}. "
            "Open files, locks and connections stay here; pass what is in them."
        ) from exc
    return _FUNCTION + data


@contextmanager
def _own_code_by_value(function: Any) -> Iterator[None]:
    """A module of the caller's own project is not installed there: its functions travel whole."""
    import cloudpickle

    module = inspect.getmodule(inspect.unwrap(function))
    if module is None or module.__name__ == "__main__" or _is_installed(module):
        yield
        return
    with _pickling:
        cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            cloudpickle.unregister_pickle_by_value(module)


def _is_installed(module: ModuleType) -> bool:
    """Of Python itself or of a package: the peer has it, or its error says that it has not."""
    file = getattr(module, "__file__", None)
    if file is None:
        return True
    homes = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    ours = module.__name__.partition(".")[0] in ("nextgpu_node", "nextgpu_protocol")
    return ours or any(Path(file).is_relative_to(home) for home in homes)


def encode_script(name: str, source: str, arguments: Iterable[str]) -> bytes:
    """The body of a CALL that runs a script as `python NAME ARGUMENTS…`."""
    packed: bytes = msgpack.packb([name, source, list(arguments)], use_bin_type=True)
    return _SCRIPT + packed


def result_of(event: CallResult) -> Any:
    """The function's result.  JobFailed, with its traceback as the cause, where it raised."""
    if event.outcome == _RESULT:
        return event.value
    match event.value:
        case (str(kind), str(message), str(trace)):
            error = JobFailed(f"{_printable(kind)}: {_printable(message)}")
            raise error from RemoteTraceback(_printable(trace, keep="\n"))
    raise JobFailed("The function raised on the peer.")


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0].rstrip(".")


def _printable(text: str, *, keep: str = "") -> str:
    """What a peer says reaches terminals: no control characters."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text)[: 64 * 1024]


class PythonUnit(RemoteUnit):
    """A unit that takes calls instead of a program and its steps."""

    kind = "python"

    def _check_runtime(self, runtime: str) -> None:
        # Before the header: nothing of the function has left this process yet.
        difference = mismatch(python_runtime(), runtime)
        if difference:
            raise Refused(f"The peer's versions differ: {_printable(difference)}.")

    async def start_calls(self) -> None:
        manifest = UnitManifest(checkpoint_ms=0, checkpoint_steps=0, return_carry=False)
        await self._write(RecordKind.MANIFEST, [encode_message(manifest)])
        await self._flush(final=False)

    async def send_calls(self, bodies: Iterable[bytes]) -> None:
        """Several at once, as `encode_function` and `encode_script` make them."""
        for body in bodies:
            await self._write(RecordKind.CALL, [body])
        await self._flush(final=False)

    def _make_inbox(self) -> Inbox:
        return PythonInbox(_NO_PROGRAM, max_bytes=self.offer.output_bytes)


class PythonInbox(Inbox):
    """The records of a Python unit, put together."""

    def __init__(self, spec: ProgramSpec, *, max_bytes: int) -> None:
        super().__init__(spec, max_bytes=max_bytes)
        self._body = bytearray()

    def take_untrusted(self, record: Record) -> Iterable[UnitEvent]:
        if record.kind in (RecordKind.RESULT, RecordKind.CHECKPOINT, RecordKind.FINAL):
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, record.kind.name)
        if record.kind not in (RecordKind.LOG, RecordKind.VALUE, RecordKind.FILE):
            return super().take_untrusted(record)
        self._continue_untrusted(record)
        if len(self._body) + len(record.body) > self._max_bytes:
            raise RemoteProtocolError(ErrorCode.TOO_LARGE, record.kind.name)
        self._body += record.body
        if record.more:
            return []
        body, self._body = bytes(self._body), bytearray()
        return [self._event_untrusted(record.kind, body)]

    def _event_untrusted(self, kind: RecordKind, body: bytes) -> UnitEvent:
        match kind:
            case RecordKind.LOG:
                text = body[1:].decode("utf-8", "replace")
                return LogText(stream=2 if body[:1] == b"\x02" else 1, text=text)
            case RecordKind.VALUE:
                return self._value_untrusted(body)
            case _:
                return _file_untrusted(body)

    def _value_untrusted(self, body: bytes) -> CallResult:
        from nextgpu_node.graph.values import decode_with_tensors_untrusted

        if body[:1] not in (b"\x00", b"\x01"):
            raise RemoteProtocolError(ErrorCode.MALFORMED, "VALUE")
        value = decode_with_tensors_untrusted(body[1:])
        self._results += 1
        return CallResult(
            index=self._results - 1, outcome=body[0], value=value, size_bytes=len(body)
        )


def _file_untrusted(body: bytes) -> FileReceived:
    if len(body) < _NAME.size:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "FILE")
    (length,) = _NAME.unpack_from(body)
    end = _NAME.size + length
    try:
        name = body[_NAME.size : end].decode()
    except UnicodeDecodeError as exc:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "FILE name") from exc
    if len(body) < end:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "FILE")
    check_name_untrusted(name)
    return FileReceived(name=name, content=body[end:])


def check_name_untrusted(name: str) -> None:
    """Raise RemoteProtocolError unless `name` stays below the directory it is written to.

    Parts of letters that can be shown, none of them empty, "." or ".."; so neither an absolute path
    nor a way up, and nothing that a terminal or a shell's glob would be surprised by.
    """
    parts = name.split("/")
    bad = (
        len(name.encode()) > 1024
        or len(parts) > 32
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        or not name.isprintable()
        or "\\" in name
    )
    if bad:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "FILE name")
