"""What a hostile peer can do to a submitter of functions: lie, and nothing more."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import nextgpu_node
import nextgpu_protocol
from nextgpu_node.cli.scripts import check_directory, write_directory
from nextgpu_node.errors import IntegrityError, JobFailed, Refused, UsageError
from nextgpu_node.graph.values import decode_with_tensors_untrusted, encode_with_tensors
from nextgpu_node.sdk.events import CallResult, FileReceived, LogText
from nextgpu_node.sdk.python_unit import (
    _NO_PROGRAM,
    PythonInbox,
    PythonUnit,
    check_name_untrusted,
    result_of,
)
from nextgpu_node.sdk.unit import Needs, open_unit
from nextgpu_node.worker.versions import mismatch, python_runtime
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.records import Record, RecordKind
from tests.support.farm import FarmPeer, open_farm

pytest.importorskip("cloudpickle")


class Trap:
    """Unpickling this would make a file."""

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {TRAP_FILE}",))


LOADERS = ("cloudpickle.load", "cloudpickle.loads", "torch.load", "cloudpickle.pickle")
TRAP_FILE = "/tmp/nextgpu-trap-was-sprung"


def take(kind: RecordKind, body: bytes, *, more: bool = False) -> Any:
    inbox = PythonInbox(_NO_PROGRAM, max_bytes=MIB)
    return list(inbox.take_untrusted(Record(kind, memoryview(body), more)))


def encoded(value: Any) -> bytes:
    return b"".join(bytes(piece) for piece in encode_with_tensors(value))


# --- values -----------------------------------------------------------------------------------


def test_a_pickle_in_place_of_a_value_is_not_opened() -> None:
    Path(TRAP_FILE).unlink(missing_ok=True)
    trap = pickle.dumps(Trap())
    for body in (b"\x00" + trap, b"\x01" + trap, b"\x00" + len(trap).to_bytes(4) + trap):
        with pytest.raises(RemoteProtocolError):
            take(RecordKind.VALUE, body)
    # As bytes it is a value like any other, and stays bytes.
    (event,) = take(RecordKind.VALUE, b"\x00" + encoded(trap))
    assert result_of(event) == trap
    assert not Path(TRAP_FILE).exists()


def test_the_submitters_side_can_not_unpickle() -> None:
    """No module of the SDK, of the protocol or of values names a loader of pickles."""
    rooms = [Path(nextgpu_node.__file__).parent / room for room in ("sdk", "graph", "cli")]
    files = [file for room in rooms for file in room.rglob("*.py")]
    files += Path(nextgpu_protocol.__path__[0]).glob("*.py")
    assert len(files) > 40
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            bad = {"pickle", "_pickle", "dill", "marshal", "shelve", "joblib.numpy_pickle"}
            loader = isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS
            if bad & set(names) or loader:
                found[file.name] = ast.unparse(node)
    assert found == {}


def test_the_worker_of_programs_has_no_unpickler_of_ours() -> None:
    code = (
        "import sys, nextgpu_node.worker.main as worker; worker.preload();"
        "print('cloudpickle' in sys.modules, 'nextgpu_node.worker.python' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        np.arange(6.0).reshape(3, 2).T,
        np.float32(2.5),
        np.array(7),
        {"scores": np.array([0.1, 0.2]), "n": np.int64(3), "ok": np.bool_(True)},
        [torch.tensor([]), (np.zeros((0, 3)),)],
    ],
)
def test_tensors_and_arrays_come_back_as_what_they_were(value: Any) -> None:
    back = decode_with_tensors_untrusted(encoded(value))
    assert repr(back) == repr(value)
    assert type(back) is type(value)


@settings(max_examples=300)
@given(st.binary(max_size=300), st.integers(0, 400), st.booleans())
def test_changed_values_are_errors_or_plain_data(noise: bytes, at: int, keep: bool) -> None:
    good = encoded({"t": torch.ones(3), "a": [np.ones(2), 1, "x"]})
    body = good[:at] + noise + (good[at + len(noise) :] if keep else b"")
    try:
        value = decode_with_tensors_untrusted(body)
    except RemoteProtocolError:
        return
    plain = (dict, list, tuple, set, frozenset, str, bytes, int, float, complex, bool)
    assert value is None or isinstance(value, (*plain, torch.Tensor, np.ndarray, np.generic))


def test_a_value_that_names_huge_tensors_allocates_nothing() -> None:
    header = b'{"0":{"dtype":"F32","shape":[100000,100000],"data_offsets":[0,40000000000]}}'
    tree = b"\x92\xa1t\x00"
    body = len(tree).to_bytes(4) + tree + len(header).to_bytes(8, "little") + header
    with pytest.raises(RemoteProtocolError):
        decode_with_tensors_untrusted(body)


def test_more_than_the_unit_may_send_is_not_collected() -> None:
    inbox = PythonInbox(_NO_PROGRAM, max_bytes=1024)
    piece = Record(RecordKind.VALUE, memoryview(bytes(1000)), True)
    list(inbox.take_untrusted(piece))
    with pytest.raises(RemoteProtocolError):
        list(inbox.take_untrusted(piece))


def test_records_of_programs_do_not_belong_here() -> None:
    for kind in (RecordKind.RESULT, RecordKind.CHECKPOINT, RecordKind.FINAL, RecordKind.CALL):
        with pytest.raises(RemoteProtocolError):
            take(kind, b"")


def test_what_a_peer_says_of_an_error_holds_no_control_characters() -> None:
    told = ("Err\x1b[2J", "a\x07\nb", "line\n\x1b]0;title\x07")
    event = CallResult(index=0, outcome=1, value=told, size_bytes=1)
    with pytest.raises(JobFailed) as caught:
        result_of(event)
    assert str(caught.value).isprintable()
    assert "\x1b" not in str(caught.value.__cause__)
    (log,) = take(RecordKind.LOG, b"\x02caf\xc3\xa9 \xff")
    assert log == LogText(stream=2, text="café \ufffd")


# --- files ------------------------------------------------------------------------------------

BAD_NAMES = [
    *("", "/etc/passwd", "../up", "a/../../up", "a//b", "a/", "./a", "a/.", "..", ".", "a\0b"),
    *("a\nb", "\x1b[2J", "a\\b", "C:\\x", "/".join("a" * 40), "x" * 256, "é" * 128, "a/" * 600),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_lead_out_is_refused(name: str) -> None:
    encoded_name = name.encode()
    body = len(encoded_name).to_bytes(2) + encoded_name + b"content"
    with pytest.raises(RemoteProtocolError):
        take(RecordKind.FILE, body)


def test_names_that_are_cut_or_not_text_are_refused() -> None:
    for body in (b"", b"\0", b"\0\x05abc", b"\0\x02\xff\xfe"):
        with pytest.raises(RemoteProtocolError):
            take(RecordKind.FILE, body)


@given(st.text(max_size=60))
def test_every_accepted_name_stays_below(name: str) -> None:
    try:
        check_name_untrusted(name)
    except RemoteProtocolError:
        return
    root = "/somewhere/below"
    assert os.path.normpath(f"{root}/{name}").startswith(f"{root}/")
    assert os.path.normpath(f"{root}/{name}") == f"{root}/{name}"


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/b", "a/b")])
def test_a_name_twice_leaves_nothing(tmp_path: Path, names: tuple[str, str]) -> None:
    files = [FileReceived(name=name, content=b"x") for name in names]
    with pytest.raises(IntegrityError):
        write_directory(tmp_path / "out", files)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_link_or_full_is_refused_before_work_begins(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file").touch()
    for name in ("link", "full", "file"):
        with pytest.raises(UsageError):
            check_directory(tmp_path / name)
    check_directory(tmp_path / "elsewhere")
    check_directory(tmp_path / "new")
    write_directory(tmp_path / "elsewhere", [FileReceived(name="d/f", content=b"1")])
    assert (tmp_path / "elsewhere" / "d" / "f").read_bytes() == b"1"


# --- versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "same"),
    [
        ("python 3.11.2, torch 2.13.0, cloudpickle 3.1.3", True),
        ("python 3.12.7, torch 2.13.0, cloudpickle 3.1.3", False),
        ("python 3.11.7, torch 2.12.0, cloudpickle 3.1.3", False),
        ("python 3.11.7, torch 2.13.0, cloudpickle 3.0.0", False),
        ("torch 2.13.0", False),
        ("", False),
    ],
)
def test_versions_are_matched(there: str, same: bool) -> None:
    here = "python 3.11.7, torch 2.13.0, cloudpickle 3.1.3"
    assert (mismatch(here, there) == "") is same


async def test_other_versions_are_refused_before_a_header_or_anything_is_sent(
    tmp_path: Path,
) -> None:
    """The farm's offers name another runtime; its conversation ends where a header is due."""
    peer = FarmPeer()
    assert python_runtime().startswith("python 3.")
    async with open_farm([peer], tmp_path) as farm:
        opening = open_unit(
            farm.socket_path, peer.view(), Needs(), table_version=1, unit_class=PythonUnit
        )
        with trio.fail_after(10), pytest.raises(Refused, match="versions differ"):
            async with opening:
                pass
    assert peer.headers == 0
