"""Logs: events with facts, for one line each.  Only a program's main calls `configure`.

    log = structlog.get_logger().bind(unit_id=…)
    log.info("unit.result_sent", size_bytes=n)

What never reaches the output, whatever the call site does: content, bytes, paths, addresses,
lists of peers, and the messages of exceptions, which quote whatever was at hand.  An exception
is logged as its type and our own frames (module:function:line), without local variables.  A
library's record is logged as its level and place: its text is not ours to judge.
"""

from __future__ import annotations

import enum
import logging
import re
import sys
import threading
import types
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import PurePath
from typing import Any, ClassVar, Literal, TextIO

import structlog
from structlog.types import Processor

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# A second net below the rule that call sites do not pass these at all: the last word of a key.
_REDACTED_KEY = re.compile(
    r"(.*_)?("
    r"addr|addrs|address|addresses|announce|host|hostname|ip|listen|multiaddrs?|peers|bootstrap|url"
    r"|cwd|directory|files?|filename|home|paths?"
    r"|argv|env|environ|user|username"
    r"|body|carry|constants|content|data|inputs?|message|outputs?|payload|plaintext|program|prompt"
    r"|results?|sentences?|text"
    r"|keys?|password|secret|seed|tokens?"
    r")",
    re.IGNORECASE,
)

MAX_VALUE_CHARS = 200
MAX_ITEMS = 32
_EVENT_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+")
# Paths and multiaddrs begin with a slash; then IPv4, and IPv6, anywhere in a text.
_PLACE = re.compile(
    r"(^|[\s'\"=(])[~.]{0,2}/\S"
    r"|\b\d{1,3}(\.\d{1,3}){3}\b"
    r"|(?i:(?<![\w:.])([0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:]))"
)
_OUR_PACKAGES = ("nextgpu_node", "nextgpu_protocol")
_MAX_FRAMES = 8
_MAX_CAUSES = 4


def configure(level: Level, format: Format, stream: TextIO) -> None:  # noqa: A002
    """Send this process's events to `stream`.  May be called again, to change the level.

    "auto" is "console" on a terminal and "json" elsewhere.  Also takes over what Python prints
    by itself on an uncaught exception, and the standard library's logging.
    """
    sink = _Sink(stream)
    structlog.configure(
        processors=[*_processors(), _renderer(format, stream)],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sink),  # type: ignore[arg-type]
        # Module-level loggers must see a change of level at run time.
        cache_logger_on_first_use=False,
    )
    _now.level = level
    _route_libraries()
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def set_level(level: Level) -> None:
    """From now on, until the process ends."""
    wrapper = structlog.make_filtering_bound_logger(LEVELS[level])
    structlog.configure(wrapper_class=wrapper)
    _now.level = level


def level() -> str:
    """The least important events that are written now."""
    return _now.level


def tally() -> dict[str, int]:
    """How often each event was written since this process began.  Names are fixed words."""
    return dict(sorted(_now.counts.items()))


class _Now:
    """What this process's main has configured, and what has come through since."""

    level: str = "info"
    counts: ClassVar[Counter[str]] = Counter()


_now = _Now()


def _count(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    _now.counts[event["event"]] += 1
    return event


def _processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        describe_exception,
        redact,
        _count,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]


def _renderer(format: Format, stream: TextIO) -> Processor:  # noqa: A002
    terminal = stream.isatty()
    if format == "console" or (format == "auto" and terminal):
        return structlog.dev.ConsoleRenderer(
            colors=terminal,
            timestamp_key="time",
            exception_formatter=structlog.dev.plain_traceback,
        )
    return structlog.processors.JSONRenderer(default=_type_name)


class _Sink:
    """The stream, minus its errors: a full disk or a closed pipe must not stop the node."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            return

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


# --- exceptions -------------------------------------------------------------------------------


def describe_exception(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replace exc_info by `raised` (types, outermost first) and `at` (our own frames)."""
    exc_info = event.pop("exc_info", None)
    event.pop("stack_info", None)
    exc = _exception_of(exc_info)
    if exc is not None:
        event["raised"] = [_exception_name(e) for e in _chain(exc)]
        event["at"] = _own_frames(_chain(exc))
    return event


def _exception_of(exc_info: object) -> BaseException | None:
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple) and len(exc_info) > 1:
        return exc_info[1] if isinstance(exc_info[1], BaseException) else None
    return sys.exc_info()[1] if exc_info else None


def _chain(exc: BaseException) -> list[BaseException]:
    """The exception, what is inside it where it is a group, and what caused it; bounded."""
    chain: list[BaseException] = []
    pending = [exc]
    while pending and len(chain) < _MAX_CAUSES:
        current = pending.pop(0)
        if current in chain:
            continue
        chain.append(current)
        if isinstance(current, BaseExceptionGroup):
            pending.extend(current.exceptions)
        cause = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
        if cause is not None:
            pending.append(cause)
    return chain


def _exception_name(exc: BaseException) -> str:
    """The type, with the protocol's error code where it has one: both are ours or a library's
    fixed names, never built from data."""
    code = getattr(exc, "code", None)
    name = type(exc).__qualname__
    return f"{name}({code.name})" if isinstance(code, enum.Enum) else name


def _own_frames(chain: Iterable[BaseException]) -> list[str]:
    frames: list[str] = []
    for exc in chain:
        frames += _frames_of(exc.__traceback__)
    return frames[-_MAX_FRAMES:]


def _frames_of(traceback: types.TracebackType | None) -> list[str]:
    frames = []
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in _OUR_PACKAGES:
            frames.append(f"{module}:{traceback.tb_frame.f_code.co_name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return frames


def _log_uncaught(
    kind: type[BaseException], exc: BaseException, _traceback: types.TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    structlog.get_logger().error("process.crashed", exc_info=exc)


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        structlog.get_logger().error("thread.crashed", exc_info=args.exc_value)


def _log_unraisable(args: Any) -> None:
    structlog.get_logger().error("object.cleanup_failed", exc_info=args.exc_value)


# --- the second net ---------------------------------------------------------------------------


def redact(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Drop what must not be there and shorten the rest to plain facts."""
    name = event.pop("event", "")
    clean: dict[str, Any] = {"event": name if _is_event_name(name) else "log.unnamed_event"}
    clean.update(_clean_mapping(event))
    return clean


def _is_event_name(name: object) -> bool:
    """A fixed name, `noun.verb_past`.  An f-string would smuggle values past the keys."""
    return isinstance(name, str) and _EVENT_NAME.fullmatch(name) is not None


def _clean_mapping(values: Mapping[Any, Any]) -> dict[str, Any]:
    clean = {}
    for key, value in list(values.items())[:MAX_ITEMS]:
        if isinstance(key, str) and key.isidentifier() and not _REDACTED_KEY.fullmatch(key):
            clean[key] = _clean_value(value)
    return clean


def _clean_value(value: Any) -> Any:
    match value:
        case None | bool() | float():
            return value
        case enum.Enum():
            return value.name
        case int():
            return value
        case bytes() | bytearray() | memoryview():
            return f"<{memoryview(value).nbytes} bytes>"
        case str():
            return _clean_text(value)
        case BaseException():
            return _exception_name(value)
        case PurePath():
            return "<path>"
        case Mapping():
            return _clean_mapping(value)
        case list() | tuple() | set() | frozenset():
            return [_clean_value(item) for item in list(value)[:MAX_ITEMS]]
        case _:
            return _type_name(value)


def _clean_text(text: str) -> str:
    if _PLACE.search(text):
        return "<redacted>"
    # Line breaks and escape sequences are left to the renderers: both write them as escapes.
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "…"


def _type_name(value: object) -> str:
    return f"<{type(value).__qualname__}>"


# --- the standard library's logging -----------------------------------------------------------


class _LibraryHandler(logging.Handler):
    """A library's record becomes one event of ours that says where, not what.

    Libraries format addresses, paths and received bytes into their texts before we could see
    which is which; module, function and line find the statement just as well.
    """

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        report = log.error if record.levelno >= logging.ERROR else log.warning
        report(
            "library.reported",
            logger=record.name,
            statement=f"{record.module}:{record.funcName}:{record.lineno}",
            exc_info=record.exc_info,
        )


def _route_libraries() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler())
    root.setLevel(logging.WARNING)
    # A library that sets its own logger to DEBUG would pass the root's level.
    logging.disable(logging.INFO)
    logging.captureWarnings(capture=True)
