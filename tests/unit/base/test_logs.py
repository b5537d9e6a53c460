"""What the logs say, and what they never say."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from nextgpu_node import logs
from nextgpu_node.errors import JobFailed
from nextgpu_node.logs import LEVELS, Format, Level, configure
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import FrameDecoder

CANARY = "c4n4ry-7f3a-do-not-log"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    logging.disable(disabled)
    root.handlers[:], root.level = handlers, level
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks


def started(level: Level = "debug", shape: Format = "json") -> io.StringIO:
    stream = io.StringIO()
    configure(level, shape, stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail_with_canary() -> None:
    hidden_in_a_local = f"local {CANARY}"
    raise ValueError(f"message {CANARY} {hidden_in_a_local}")


def test_an_event_carries_its_facts() -> None:
    stream = started()
    log = structlog.get_logger().bind(unit_id="u1", peer_id="12D3KooWabc")
    log.info("unit.result_sent", size_bytes=7, seconds=0.5, layers=("landlock", "seccomp"))
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "unit.result_sent",
        "level": "info",
        "unit_id": "u1",
        "peer_id": "12D3KooWabc",
        "size_bytes": 7,
        "seconds": 0.5,
        "layers": ["landlock", "seccomp"],
    }


def test_the_level_holds_and_changes_at_run_time() -> None:
    log = structlog.get_logger()
    for level in LEVELS:
        stream = started(level)  # type: ignore[arg-type]
        for name in LEVELS:
            getattr(log, name)(f"test.{name}_sent")
        expected = [name for name in LEVELS if LEVELS[name] >= LEVELS[level]]
        assert [line["level"] for line in lines(stream)] == expected


@pytest.mark.parametrize("shape", ["json", "console"])
@pytest.mark.parametrize("level", list(LEVELS))
def test_an_exception_shows_its_type_and_never_its_message_or_locals(
    level: Level, shape: Format
) -> None:
    stream = started(level, shape)
    try:
        try:
            fail_with_canary()
        except ValueError as exc:
            raise JobFailed(f"wrapped {CANARY}") from exc
    except JobFailed as exc:
        log = structlog.get_logger()
        log.exception("unit.failed")
        log.error("unit.failed", exc_info=exc, error=exc)
        log.error("unit.failed", error=ExceptionGroup(CANARY, [exc]), stack_info=True)
        for name in LEVELS:
            getattr(log, name)("unit.failed", exc_info=True)
    assert "JobFailed" in stream.getvalue()
    assert "ValueError" in stream.getvalue()
    assert CANARY not in stream.getvalue()


def test_an_exception_shows_our_own_frames_and_the_protocols_code() -> None:
    stream = started()
    try:
        decoder = FrameDecoder()
        decoder.feed(b"\xff" * 64)
        list(decoder)
    except RemoteProtocolError as exc:
        structlog.get_logger().error("stream.failed", exc_info=exc, error=exc)
    (line,) = lines(stream)
    assert line["raised"] == [f"RemoteProtocolError({ErrorCode.TOO_LARGE.name})"]
    assert line["error"] == "RemoteProtocolError(TOO_LARGE)"
    assert line["at"][-1].startswith("nextgpu_protocol.framing:")
    assert all(frame.split(":")[0].startswith("nextgpu_") for frame in line["at"])


def test_groups_name_what_is_inside_and_loops_end() -> None:
    stream = started()
    inner = KeyError(CANARY)
    inner.__context__ = inner
    structlog.get_logger().error("node.failed", exc_info=ExceptionGroup(CANARY, [inner, inner]))
    assert lines(stream)[0]["raised"] == ["ExceptionGroup", "KeyError"]


@pytest.mark.parametrize(
    "facts",
    [
        {"path": CANARY},
        {"Address": CANARY},
        {"peer_addr": CANARY},
        {"peers": [CANARY]},
        {"content": CANARY},
        {"prompt": CANARY},
        {"nested": {"deep": {"token": CANARY}}},
        {"value": CANARY.encode()},
        {"value": bytearray(CANARY.encode())},
        {"value": memoryview(CANARY.encode())},
        {"value": [CANARY.encode()]},
        {"value": Path(CANARY)},
        {"value": f"/home/{CANARY}"},
        {"value": f"failed on ./{CANARY}"},
        {"value": f"at 203.0.113.7 {CANARY}"},
        {"value": f"2001:db8::1 {CANARY}"},
        {"value": f"/ip4/203.0.113.7/tcp/1/{CANARY}"},
        {"value": ValueError(CANARY)},
        {"value": type("Thing", (), {"__repr__": lambda _: CANARY})()},
        {"value": "x" * 1000 + CANARY},
        {CANARY: 1},
    ],
)
@pytest.mark.parametrize("shape", ["json", "console"])
def test_what_slips_past_a_call_site_is_caught(shape: Format, facts: dict[str, Any]) -> None:
    stream = started("debug", shape)
    structlog.get_logger().warning("unit.failed", **facts)
    structlog.contextvars.bind_contextvars(**facts)
    structlog.get_logger().warning("unit.failed")
    structlog.contextvars.clear_contextvars()
    assert stream.getvalue().count("unit.failed") == 2
    assert CANARY not in stream.getvalue()


def test_an_event_name_built_from_data_is_replaced() -> None:
    stream = started()
    structlog.get_logger().info(f"unit failed: {CANARY}")
    assert lines(stream)[0]["event"] == "log.unnamed_event"
    assert CANARY not in stream.getvalue()


@pytest.mark.parametrize("shape", ["json", "console"])
def test_a_peers_words_can_not_forge_a_line(shape: Format) -> None:
    stream = started("debug", shape)
    structlog.get_logger().info("peer.spoke", agent="x\n2026 [error] owned\x1b[2J\u2028\x9b31m")
    assert stream.getvalue().count("\n") == 1
    assert not set("\x1b\u2028\x9b") & set(stream.getvalue().rstrip("\n"))


def test_libraries_are_capped_and_their_texts_are_not_taken_over() -> None:
    stream = started()
    library = logging.getLogger("some.library")
    library.setLevel(logging.DEBUG)
    library.debug(CANARY)
    library.info(CANARY)
    library.warning(f"formatted {CANARY}")
    library.error("args %s", CANARY)
    try:
        fail_with_canary()
    except ValueError:
        library.exception(CANARY)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn(CANARY, stacklevel=1)
        logging.captureWarnings(capture=False)
    assert CANARY not in stream.getvalue()
    assert [line["logger"] for line in lines(stream)] == ["some.library"] * 3 + ["py.warnings"]
    assert [line["level"] for line in lines(stream)] == ["warning", "error", "error", "warning"]
    assert lines(stream)[0]["statement"].startswith("test_logs:test_libraries_are_capped")
    assert lines(stream)[2]["raised"] == ["ValueError"]
    library.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    "crash",
    [
        "raise ValueError(canary)",
        "import threading; t = threading.Thread(target=crash); t.start(); t.join()",
        "import trio; trio.run(trio.to_thread.run_sync, crash)",
        "class A:\n    def __del__(self): crash()\nA()",
    ],
)
def test_an_uncaught_exception_reaches_neither_stream(crash: str) -> None:
    program = (
        "import sys\nfrom nextgpu_node.logs import configure\n"
        "configure('debug', 'json', sys.stderr)\n"
        "canary = sys.argv[1]\n"
        "def crash():\n    local = canary\n    raise ValueError(local)\n" + crash
    )
    done = subprocess.run(
        [sys.executable, "-c", program, CANARY],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert CANARY not in done.stdout + done.stderr
    assert "ValueError" in json.loads(done.stderr)["raised"]


def test_a_full_disk_does_not_stop_the_program() -> None:
    class FullDisk(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    stream = FullDisk()
    configure("debug", "json", stream)
    structlog.get_logger().info("node.started")
    assert "node.started" in stream.getvalue()
    stream.close()
    structlog.get_logger().info("node.started")


def test_the_level_changes_while_the_program_runs_and_events_are_counted() -> None:
    stream = io.StringIO()
    logs.configure("warning", "json", stream)
    log = structlog.get_logger()
    before = logs.tally().get("thing.happened", 0)
    log.info("thing.happened")
    assert stream.getvalue() == ""
    logs.set_level("info")
    log.info("thing.happened")
    log.info(f"thing {before} with a value")
    assert stream.getvalue().count("thing.happened") == 1
    assert logs.level() == "info"
    assert logs.tally()["thing.happened"] == before + 1
    assert all(re.fullmatch(r"[a-z0-9_.]+", name) for name in logs.tally())
