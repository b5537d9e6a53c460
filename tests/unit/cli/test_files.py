from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextgpu_node.cli.files import check_writable, write_whole
from nextgpu_node.errors import NextGPUError, UsageError


def test_a_file_is_whole_and_private(tmp_path: Path) -> None:
    write_whole(tmp_path / "y", [b"a", memoryview(b"bc")], force=False)
    assert (tmp_path / "y").read_bytes() == b"abc"
    assert stat.S_IMODE((tmp_path / "y").stat().st_mode) == 0o600
    assert _names(tmp_path) == ["y"]


def test_an_error_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NextGPUError, match="y: can not be written: No space left on device") as c:
        write_whole(tmp_path / "y", pieces(), force=True)
    assert c.value.exit_code == 1
    assert (tmp_path / "y").read_bytes() == b"old"
    assert _names(tmp_path) == ["y"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A real one: a file size limit gives the write the kernel's own error."""
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        with pytest.raises(NextGPUError, match="can not be written"):
            write_whole(tmp_path / "y", [b"x" * 100_000], force=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert _names(tmp_path) == []


def test_a_name_that_was_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        (tmp_path / "y").write_bytes(b"theirs")
        yield b"ours"

    with pytest.raises(UsageError, match="--force"):
        write_whole(tmp_path / "y", pieces(), force=False)
    assert (tmp_path / "y").read_bytes() == b"theirs"
    assert _names(tmp_path) == ["y"]


def test_force_replaces(tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(b"old")
    check_writable(tmp_path / "y", force=True)
    write_whole(tmp_path / "y", [b"new"], force=True)
    assert (tmp_path / "y").read_bytes() == b"new"


def test_what_can_not_be_written_is_known_before_work_begins(tmp_path: Path) -> None:
    (tmp_path / "y").touch()
    for path, sentence in [
        (tmp_path / "y", "say --force"),
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "y", "there is no directory"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            check_writable(path, force=False)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
