"""One key, known to nobody else."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from pathlib import Path

import base58
import pytest

from nextgpu_node.errors import IdentityError
from nextgpu_node.identity import Identity, SecretKey, load_or_create
from nextgpu_node.paths import Paths


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.under(tmp_path / "home")


def test_the_first_start_makes_a_private_key_and_the_next_finds_it(paths: Paths) -> None:
    first = load_or_create(paths)
    assert paths.identity_file.stat().st_mode & 0o7777 == 0o600
    assert paths.identity_file.parent.stat().st_mode & 0o7777 == 0o700
    assert paths.identity_file.read_bytes() == first.seed
    second = load_or_create(paths)
    assert (second.public_key, second.peer_id) == (first.public_key, first.peer_id)
    assert [p.name for p in paths.data_dir.iterdir()] == ["identity.key"]


def test_the_umask_does_not_widen_or_break_the_key(paths: Paths) -> None:
    old = os.umask(0)
    try:
        load_or_create(paths)
    finally:
        os.umask(old)
    assert paths.identity_file.stat().st_mode & 0o7777 == 0o600


def test_the_peer_id_is_libp2ps_text_of_the_key() -> None:
    identity = Identity(SecretKey(bytes(range(32))))
    assert base58.b58decode(identity.peer_id) == bytes.fromhex("002408011220") + identity.public_key
    assert identity.peer_id.startswith("12D3KooW")
    assert identity.signing_key.verify_key.verify(identity.signing_key.sign(b"x")) == b"x"


def test_ephemeral_identities_differ_and_leave_no_file(paths: Paths) -> None:
    assert Identity.ephemeral().peer_id != Identity.ephemeral().peer_id
    assert not paths.data_dir.exists()


def test_neither_repr_nor_pickle_nor_copy_gives_the_secret_away() -> None:
    identity = Identity.ephemeral()
    shown = f"{identity!r} {identity} {identity.signing_key!r} {identity.signing_key}"
    assert "SecretKey(..)" in shown
    assert identity.seed.hex() not in shown
    assert repr(identity.seed) not in shown
    for spread in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            spread(identity.signing_key)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602, 0o620, 0o700])
def test_a_looser_mode_is_refused_with_the_chmod(paths: Paths, mode: int) -> None:
    load_or_create(paths)
    paths.identity_file.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {paths.identity_file}"):
        load_or_create(paths)
    assert paths.identity_file.stat().st_mode & 0o777 == mode


def test_a_directory_open_to_others_is_refused(paths: Paths) -> None:
    load_or_create(paths)
    paths.data_dir.chmod(0o755)
    with pytest.raises(IdentityError, match="chmod 700"):
        load_or_create(paths)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_key_is_refused(paths: Paths) -> None:
    load_or_create(paths)
    os.chown(paths.identity_file, 12345, -1)
    with pytest.raises(IdentityError, match="belongs to user 12345"):
        load_or_create(paths)


def test_a_link_is_refused_even_to_a_good_key(paths: Paths) -> None:
    load_or_create(paths)
    elsewhere = paths.data_dir / "elsewhere"
    paths.identity_file.rename(elsewhere)
    paths.identity_file.symlink_to(elsewhere)
    with pytest.raises(IdentityError, match="is a link"):
        load_or_create(paths)


def test_a_dangling_link_is_refused_and_not_written_through(paths: Paths, tmp_path: Path) -> None:
    paths.data_dir.mkdir(parents=True, mode=0o700)
    paths.identity_file.symlink_to(tmp_path / "victim")
    with pytest.raises(IdentityError, match="is a link"):
        load_or_create(paths)
    assert not (tmp_path / "victim").exists()


def test_a_fifo_or_a_directory_is_refused_without_waiting(paths: Paths) -> None:
    paths.data_dir.mkdir(parents=True, mode=0o700)
    os.mkfifo(paths.identity_file, 0o600)
    with pytest.raises(IdentityError, match="not a regular file"):
        load_or_create(paths)
    paths.identity_file.unlink()
    paths.identity_file.mkdir(mode=0o600)
    with pytest.raises(IdentityError, match="not a regular file"):
        load_or_create(paths)


@pytest.mark.parametrize("length", [0, 31, 33, 4096])
def test_a_wrong_length_is_refused_and_never_replaced(paths: Paths, length: int) -> None:
    load_or_create(paths)
    paths.identity_file.write_bytes(b"k" * length)
    with pytest.raises(IdentityError, match="does not hold a key"):
        load_or_create(paths)
    assert paths.identity_file.stat().st_size == length


def test_what_a_crash_left_behind_does_not_stop_the_next_start(paths: Paths) -> None:
    paths.data_dir.mkdir(parents=True, mode=0o700)
    (paths.data_dir / "identity.key.new").write_bytes(b"half")
    load_or_create(paths)
    assert [p.name for p in paths.data_dir.iterdir()] == ["identity.key"]


def test_first_starts_at_the_same_moment_agree_on_one_key(paths: Paths) -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(load_or_create(paths).peer_id)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
