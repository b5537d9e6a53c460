"""The key at rest: sealed, changed and moved without ever being half there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nextgpu_node import identity, keyfile, passphrases
from nextgpu_node.errors import IdentityError
from nextgpu_node.identity import Identity, load_or_create
from nextgpu_node.keyfile import WrongPassphrase
from nextgpu_node.paths import Paths
from nextgpu_protocol.limits import MAX_SUCCESSIONS

NOW_MS = 1_800_000_000_000


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.under(tmp_path / "home")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least work that Argon2id takes; the parameters are in the file."""
    monkeypatch.setattr(keyfile, "PASSES", 1)
    monkeypatch.setattr(keyfile, "MEMORY_BYTES", 8192)


def word(text: str) -> Callable[[], bytes]:
    return text.encode


def never() -> bytes:
    raise AssertionError("nobody should have been asked")


def sealed(paths: Paths, text: str = "correct horse") -> Identity:
    made = load_or_create(paths)
    identity.set_passphrase(paths, never, text.encode())
    return made


def test_a_sealed_key_opens_with_its_passphrase_only(paths: Paths) -> None:
    made = sealed(paths)
    content = paths.identity_file.read_bytes()
    assert made.seed not in content
    assert paths.identity_file.stat().st_mode & 0o7777 == 0o600
    assert load_or_create(paths, word("correct horse")).peer_id == made.peer_id
    with pytest.raises(WrongPassphrase, match="Nothing was changed"):
        load_or_create(paths, word("correct horsE"))
    with pytest.raises(IdentityError, match="sealed"):
        load_or_create(paths)
    assert paths.identity_file.read_bytes() == content


def test_the_real_parameters_are_those_of_rfc_9106(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    key = keyfile.parse(keyfile.seal(bytes(32), b"x"))
    assert isinstance(key, keyfile.SealedKey)
    assert (key.passes, key.memory_bytes) == (3, 64 * 2**20)
    assert key.open(b"x") == bytes(32)


def test_two_seals_of_one_key_share_nothing_that_shows_it() -> None:
    one, two = keyfile.seal(bytes(32), b"x"), keyfile.seal(bytes(32), b"x")
    assert one[-88:] != two[-88:]
    assert one[:70] == two[:70]  # the magic, the public key, the parameters


def opened(data: bytes, passphrase: bytes) -> bytes:
    key = keyfile.parse(data)
    assert isinstance(key, keyfile.SealedKey)
    return key.open(passphrase)


@pytest.mark.parametrize("at", range(0, keyfile.SEALED_BYTES, 7))
def test_no_changed_byte_opens(at: int) -> None:
    data = bytearray(keyfile.seal(bytes(32), b"x"))
    data[at] ^= 1
    with pytest.raises(IdentityError):
        opened(bytes(data), b"x")


def test_a_file_can_not_ask_for_the_machines_memory() -> None:
    data = bytearray(keyfile.seal(bytes(32), b"x"))
    at = len(keyfile.MAGIC) + 32 + 4
    data[at : at + 8] = (2**40).to_bytes(8)
    with pytest.raises(IdentityError, match="more work"):
        keyfile.parse(bytes(data))


def test_changing_and_removing_the_passphrase_keeps_the_key(paths: Paths) -> None:
    made = sealed(paths)
    identity.set_passphrase(paths, word("correct horse"), b"battery staple")
    with pytest.raises(WrongPassphrase):
        load_or_create(paths, word("correct horse"))
    assert load_or_create(paths, word("battery staple")).seed == made.seed
    before = paths.identity_file.read_bytes()
    with pytest.raises(WrongPassphrase):
        identity.set_passphrase(paths, word("wrong"), None)
    assert paths.identity_file.read_bytes() == before
    identity.set_passphrase(paths, word("battery staple"), None)
    assert paths.identity_file.read_bytes() == made.seed


def test_who_a_locked_node_is_can_be_asked_without_its_passphrase(paths: Paths) -> None:
    assert identity.inspect(paths) is None
    made = sealed(paths)
    facts = identity.inspect(paths)
    assert facts is not None
    assert (facts.peer_id, facts.sealed, facts.former_ids) == (made.peer_id, True, ())


def test_a_rotated_key_is_another_one_that_proves_the_first(paths: Paths) -> None:
    first = load_or_create(paths)
    second = identity.rotate(paths, never, now_ms=NOW_MS)
    third = identity.rotate(paths, never, now_ms=NOW_MS)
    assert len({first.peer_id, second.peer_id, third.peer_id}) == 3
    assert third.former_keys == (first.public_key, second.public_key)
    loaded = load_or_create(paths)
    assert (loaded.peer_id, loaded.successions) == (third.peer_id, third.successions)
    facts = identity.inspect(paths)
    assert facts is not None
    assert facts.former_ids == (first.peer_id, second.peer_id)
    assert sorted(p.name for p in paths.data_dir.iterdir()) == ["identity.key", "successions"]


def test_a_sealed_key_is_rotated_to_a_sealed_key(paths: Paths) -> None:
    sealed(paths)
    before = paths.identity_file.read_bytes()
    with pytest.raises(WrongPassphrase):
        identity.rotate(paths, word("wrong"), now_ms=NOW_MS)
    assert paths.identity_file.read_bytes() == before
    assert not paths.successions_file.exists()
    rotated = identity.rotate(paths, word("correct horse"), now_ms=NOW_MS)
    assert rotated.seed not in paths.identity_file.read_bytes()
    assert load_or_create(paths, word("correct horse")).peer_id == rotated.peer_id


def test_a_rotation_that_was_cut_off_leaves_the_old_node_whole(paths: Paths) -> None:
    load_or_create(paths)
    second = identity.rotate(paths, never, now_ms=NOW_MS)
    second_key = paths.identity_file.read_bytes()
    identity.rotate(paths, never, now_ms=NOW_MS)
    # The statement was written, the key was not yet: a power cut between the two renames.
    paths.identity_file.write_bytes(second_key)
    (paths.data_dir / "identity.key.new").write_bytes(b"half of a key")
    again = load_or_create(paths)
    assert again.peer_id == second.peer_id
    assert again.former_keys == second.former_keys
    fourth = identity.rotate(paths, never, now_ms=NOW_MS)
    assert fourth.former_keys == (*second.former_keys, second.public_key)


def test_the_chain_stays_bounded_however_often_a_key_changes(paths: Paths) -> None:
    load_or_create(paths)
    ids = [identity.rotate(paths, never, now_ms=NOW_MS) for _ in range(MAX_SUCCESSIONS + 2)]
    assert len(ids[-1].former_keys) == MAX_SUCCESSIONS
    assert ids[-1].former_keys[-1] == ids[-2].public_key


def test_a_damaged_or_foreign_succession_is_told_and_not_shown(
    paths: Paths, tmp_path: Path
) -> None:
    load_or_create(paths)
    other = Paths.under(tmp_path / "other")
    load_or_create(other)
    identity.rotate(other, never, now_ms=NOW_MS)
    paths.successions_file.write_bytes(other.successions_file.read_bytes())
    paths.successions_file.chmod(0o600)
    assert load_or_create(paths).former_keys == ()
    paths.successions_file.write_bytes(b"\x00damaged")
    with pytest.raises(IdentityError, match="is damaged"):
        load_or_create(paths)


def test_an_export_moves_key_and_past_to_another_machine(paths: Paths, tmp_path: Path) -> None:
    load_or_create(paths)
    rotated = identity.rotate(paths, never, now_ms=NOW_MS)
    data = identity.export(paths, never, word("journey"))
    assert rotated.seed not in data
    there = Paths.under(tmp_path / "there")
    with pytest.raises(WrongPassphrase):
        identity.import_(there, data, word("wrong"), new=None, replace=False)
    assert not there.identity_file.exists()
    moved = identity.import_(there, data, word("journey"), new=b"home", replace=False)
    assert (moved.seed, moved.former_keys) == (rotated.seed, rotated.former_keys)
    assert load_or_create(there, word("home")).peer_id == rotated.peer_id


def test_an_import_never_replaces_a_key_unasked(paths: Paths, tmp_path: Path) -> None:
    load_or_create(paths)
    data = identity.export(paths, never, word("journey"))
    there = Paths.under(tmp_path / "there")
    kept = load_or_create(there)
    with pytest.raises(IdentityError, match="--force"):
        identity.import_(there, data, word("journey"), new=None, replace=False)
    assert load_or_create(there).peer_id == kept.peer_id
    identity.import_(there, data, word("journey"), new=None, replace=True)
    assert load_or_create(there).peer_id != kept.peer_id


@pytest.mark.parametrize("cut", [0, 10, 40, 100, 200])
def test_a_damaged_export_changes_nothing(paths: Paths, tmp_path: Path, cut: int) -> None:
    load_or_create(paths)
    identity.rotate(paths, never, now_ms=NOW_MS)
    data = identity.export(paths, never, word("journey"))
    there = Paths.under(tmp_path / "there")
    with pytest.raises(IdentityError):
        identity.import_(there, data[:cut], word("journey"), new=None, replace=False)
    with pytest.raises(IdentityError, match="damaged"):
        identity.import_(there, data[:-1], word("journey"), new=None, replace=False)
    assert not there.identity_file.exists()


def test_a_link_in_the_keys_place_is_not_replaced(paths: Paths, tmp_path: Path) -> None:
    load_or_create(paths)
    paths.identity_file.rename(tmp_path / "elsewhere")
    paths.identity_file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IdentityError, match="is a link"):
        identity.set_passphrase(paths, never, b"x")
    with pytest.raises(IdentityError, match="is a link"):
        identity.rotate(paths, never, now_ms=NOW_MS)


# --- where a passphrase comes from ------------------------------------------------------------


def pipe_with(data: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return reader


def test_a_descriptor_gives_its_first_line() -> None:
    assert passphrases.from_descriptor(pipe_with(b"two words\nmore")) == b"two words"
    assert passphrases.from_descriptor(pipe_with(b"no newline")) == b"no newline"


@pytest.mark.parametrize("data", [b"", b"\n", b"x" * 2000])
def test_a_useless_descriptor_is_an_error(data: bytes) -> None:
    with pytest.raises(IdentityError):
        passphrases.from_descriptor(pipe_with(data))
    with pytest.raises(IdentityError, match="descriptor 987"):
        passphrases.from_descriptor(987)


def test_a_credential_of_systemd_is_read_where_only_we_can(tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert passphrases.from_credential(environ) is None
    assert passphrases.from_credential({}) is None
    file = tmp_path / "nextgpu.passphrase"
    file.write_bytes(b"from systemd\n")
    file.chmod(0o400)
    assert passphrases.from_credential(environ) == b"from systemd"
    file.chmod(0o444)
    with pytest.raises(IdentityError, match="open to other users"):
        passphrases.from_credential(environ)


def test_a_daemon_asks_the_descriptor_first(tmp_path: Path) -> None:
    (tmp_path / "nextgpu.passphrase").write_bytes(b"second")
    (tmp_path / "nextgpu.passphrase").chmod(0o400)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert passphrases.for_daemon(pipe_with(b"first"), environ)() == b"first"
    assert passphrases.for_daemon(None, environ)() == b"second"


def test_a_key_as_a_credential_keeps_its_past(paths: Paths) -> None:
    load_or_create(paths)
    rotated = identity.rotate(paths, never, now_ms=NOW_MS)
    content = paths.identity_file.read_bytes()
    paths.identity_file.unlink()
    loaded = identity.from_key_file(keyfile.seal(content, b"x"), paths, word("x"))
    assert (loaded.peer_id, loaded.former_keys) == (rotated.peer_id, rotated.former_keys)
    assert not paths.identity_file.exists()
    with pytest.raises(IdentityError, match="The credential does not hold a key"):
        identity.from_key_file(b"short", paths, never)
