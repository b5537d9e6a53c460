"""The owner's data: counted, copied, deleted; whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from nextgpu_node import data
from nextgpu_node.data import DataInUse
from nextgpu_node.errors import NextGPUError, UsageError
from nextgpu_node.paths import PATH_REGISTRY, Paths


@pytest.fixture
def paths() -> Iterator[Paths]:
    with TemporaryDirectory(prefix="ngpu-") as directory:
        paths = Paths.under(Path(directory))
        for folder in (paths.data_dir, paths.state_dir, paths.runtime_dir, paths.jobs_dir):
            folder.mkdir(mode=0o700, parents=True)
        paths.identity_file.write_bytes(b"k" * 32)
        paths.peer_history_file.write_text("{}")
        paths.peer_history_file.with_suffix(".lock").touch()
        for job in ("aaa", "bbb"):
            (paths.jobs_dir / job / "results").mkdir(parents=True)
            (paths.jobs_dir / job / "lock").touch()
            (paths.jobs_dir / job / "results" / "0.safetensors").write_bytes(b"r" * 100)
        yield paths


def sizes(paths: Paths) -> dict[str, tuple[int, int]]:
    return {one.kind.name: (one.files, one.size_bytes) for one in data.survey(paths)}


def delete(paths: Paths, *names: str) -> None:
    data.delete(paths, [data.find_kind(paths, name) for name in names])


@pytest.fixture
def daemon(paths: Paths) -> Iterator[socket.socket]:
    """A process that answers where a running node does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(paths.units_socket))
        listener.listen()
        yield listener


def test_every_kind_is_counted(paths: Paths) -> None:
    found = sizes(paths)
    assert found["identity"] == (1, 32)
    assert found["peer-history"] == (2, 2)
    assert found["jobs"] == (4, 200)
    assert found["tokens"] == (0, 0)


def test_names_of_kinds_are_unique_and_say_what_deleting_them_takes(paths: Paths) -> None:
    names = [kind.name for kind in PATH_REGISTRY]
    assert len(set(names)) == len(names)
    with pytest.raises(UsageError, match="peer-history"):
        data.find_kind(paths, "peers")


def test_a_path_belongs_to_its_kind_and_an_unknown_one_to_none(paths: Paths) -> None:
    def kind(path: Path) -> str | None:
        found = data.kind_of(path, paths)
        return found.name if found else None

    assert kind(paths.jobs_dir / "aaa" / "results" / "0.safetensors") == "jobs"
    assert kind(paths.state_dir / "tokens.sqlite3-journal") == "tokens"
    assert kind(paths.config_file.with_name(".config.toml.abc")) == "config"
    assert kind(paths.state_dir) == "state"
    assert kind(paths.state_dir / "notes.txt") is None
    assert kind(paths.data_dir / "identity.key.bak") is None
    assert kind(Path("/tmp/elsewhere")) is None


def test_an_export_is_private_whole_and_says_what_it_holds(paths: Paths, tmp_path: Path) -> None:
    archive = tmp_path / "copy.tar"
    os.umask(os.umask(0))
    data.export(paths, data.kinds(paths), archive, force=False)
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as tar:
        manifest = json.load(tar.extractfile("MANIFEST.json"))  # type: ignore[arg-type]
        members = {member.name: member for member in tar if member.name != "MANIFEST.json"}
        hashes = {n: h for kind in manifest["kinds"] for n, h in kind["sha256"].items()}
        assert hashes.keys() == members.keys()
        assert "jobs/aaa/results/0.safetensors" in members
        for name, member in members.items():
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            assert hashlib.sha256(content).hexdigest() == hashes[name]
            assert (member.mode, member.uname) == (0o600, "")
    with pytest.raises(UsageError, match="exists already"):
        data.export(paths, data.kinds(paths), archive, force=False)
    assert list(tmp_path.iterdir()) == [archive]


def test_an_export_that_can_not_be_read_leaves_nothing(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(data, "_add", broken)
    with pytest.raises(NextGPUError, match="Nothing is left"):
        data.export(paths, data.kinds(paths), tmp_path / "copy.tar", force=True)
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_changes_while_it_is_copied_is_refused(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite3.connect(paths.tokens_file) as database:
        database.execute("CREATE TABLE t (x)")
    added = data._add

    def written_meanwhile(*arguments: object) -> str:
        with paths.tokens_file.open("ab") as file:
            file.write(b"x")
        return added(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(data, "_add", written_meanwhile)
    with pytest.raises(NextGPUError, match="changed while it was copied"):
        data.export(paths, [data.find_kind(paths, "tokens")], tmp_path / "copy.tar", force=False)
    assert list(tmp_path.iterdir()) == []


def test_deleting_one_kind_leaves_the_others(paths: Paths) -> None:
    delete(paths, "jobs")
    found = sizes(paths)
    assert found["jobs"] == (0, 0)
    assert found["identity"] == (1, 32)
    assert sorted(path.name for path in paths.data_dir.iterdir()) == ["identity.key", "jobs"]
    delete(paths, "peer-history", "identity")
    assert all(files == 0 for files, _ in sizes(paths).values())
    data.remove_empty_directories(paths)
    assert not paths.data_dir.exists()


@pytest.mark.usefixtures("daemon")
def test_under_a_running_node_its_own_files_stay_and_nothing_else_goes_either(
    paths: Paths,
) -> None:
    with pytest.raises(DataInUse, match="Stop nextgpud first"):
        delete(paths, "jobs", "identity")
    assert sizes(paths)["jobs"] == (4, 200)
    delete(paths, "jobs")
    assert sizes(paths)["jobs"] == (0, 0)


def test_jobs_that_are_being_worked_at_stay(paths: Paths) -> None:
    with (paths.jobs_dir / "bbb" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataInUse, match="nextgpu cancel bbb"):
            delete(paths, "jobs")
    assert sizes(paths)["jobs"] == (4, 200)


def test_where_one_entry_can_not_be_moved_all_go_back(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def stuck(self: Path, target: Path) -> Path:
        if self.name == "bbb":
            raise PermissionError(1, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(NextGPUError, match="Nothing was changed"):
        delete(paths, "jobs")
    assert sizes(paths)["jobs"] == (4, 200)
    assert sorted(path.name for path in paths.data_dir.iterdir()) == ["identity.key", "jobs"]


def test_what_a_crash_left_of_a_deletion_counts_to_its_kind_and_goes_with_it(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(data, "_remove", lambda trash: None)
        delete(paths, "jobs")
    assert sizes(paths)["jobs"] == (4, 200)
    assert list(paths.jobs_dir.iterdir()) == []
    delete(paths, "jobs")
    assert sizes(paths)["jobs"] == (0, 0)


def test_a_job_kept_elsewhere_goes_with_its_link(paths: Paths, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "lock").touch()
    (paths.jobs_dir / "ccc").symlink_to(place)
    delete(paths, "jobs")
    assert list(tmp_path.iterdir()) == []
    assert list(paths.jobs_dir.iterdir()) == []
