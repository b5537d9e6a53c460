"""The node's identity: one Ed25519 key, whose public half is the peer ID.
Spec: protocol/spec/10-identity.md, 15-succession.md

    identity.key   the Ed25519 seed, plain or sealed (keyfile.py); 0600 in a 0700 directory
    successions    the encoded Successions that lead to this key; public

Every change is one rename(2) under the directory's lock: the old key or the new one is there,
never half of one.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nacl.signing import SigningKey

from nextgpu_node import keyfile
from nextgpu_node.errors import ConfigError, IdentityError
from nextgpu_node.keyfile import SEED_BYTES, SealedKey
from nextgpu_node.passphrases import Passphrase
from nextgpu_node.paths import Paths, ensure_private_dir
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.errors import RemoteProtocolError
from nextgpu_protocol.ids import PeerId, PeerKey, peer_id_from_public_key
from nextgpu_protocol.limits import MAX_MESSAGE_BYTES, MAX_SUCCESSIONS
from nextgpu_protocol.messages import Succession, Successions
from nextgpu_protocol.succession import (
    make_succession,
    open_succession_untrusted,
    predecessors_untrusted,
)


class SecretKey(SigningKey):  # type: ignore[misc]  # PyNaCl carries no types
    """A signing key that neither prints nor pickles what it holds."""

    def __repr__(self) -> str:
        return "SecretKey(..)"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is not pickled or copied")


class Identity:
    """Who this node is.

    `public_key` is 32 bytes; `peer_id` is its libp2p text ("12D3KooW…").  Signing is
    `nextgpu_protocol.envelope`'s, which takes `signing_key` and one domain per purpose.
    """

    __slots__ = ("former_keys", "peer_id", "public_key", "signing_key", "successions")

    def __init__(self, signing_key: SecretKey, successions: Successions | None = None) -> None:
        """Raises RemoteProtocolError where `successions` do not lead to this key."""
        self.signing_key = signing_key
        self.public_key = bytes(signing_key.verify_key)
        self.peer_id: PeerId = peer_id_from_public_key(self.public_key)
        # What others are shown, and the keys that it proves: oldest first.
        self.successions = encode_message(successions or Successions(()))
        self.former_keys = predecessors_untrusted(self.successions, self.public_key)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id}, SecretKey(..))"

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes, for libp2p's own key object and for nothing else."""
        return bytes(self.signing_key)

    @classmethod
    def ephemeral(cls) -> Identity:
        """A new identity that no file remembers."""
        return cls(SecretKey(os.urandom(SEED_BYTES)))


def load_or_create(paths: Paths, passphrase: Passphrase | None = None) -> Identity:
    """The identity in `paths.identity_file`, made at the first start.

    `passphrase` is asked where the key is sealed.  Raises IdentityError where the file or its
    directory is open to others, is not ours, is a link, or does not hold a key; the message names
    the command that repairs it.
    """
    with _opened(paths) as store:
        key = store.read()
        if key is None:
            store.put(paths.identity_file, os.urandom(SEED_BYTES), replace=False)
            key = store.read()
        if key is None:
            raise IdentityError(f"{paths.identity_file}: vanished while it was being made.")
        return store.identity(_open(key, passphrase))


def from_key_file(data: bytes, paths: Paths, passphrase: Passphrase) -> Identity:
    """The identity in the content of a key file: a systemd credential.  Its successions, where
    there are any, are in the data directory as ever."""
    try:
        key = keyfile.parse(data)
    except IdentityError as exc:
        raise IdentityError(f"The credential {exc}") from exc
    with _opened(paths) as store:
        return store.identity(_open(key, passphrase))


@dataclass(frozen=True, slots=True)
class IdentityFacts:
    """What can be said of an identity without opening it."""

    peer_id: PeerId
    sealed: bool
    former_ids: tuple[PeerId, ...]  # oldest first


def inspect(paths: Paths) -> IdentityFacts | None:
    """The identity's facts, or None where there is none yet.  Needs no passphrase."""
    if not paths.identity_file.parent.is_dir():
        return None
    with _opened(paths) as store:
        key = store.read()
        if key is None:
            return None
        sealed = isinstance(key, SealedKey)
        public_key = key.public_key if isinstance(key, SealedKey) else _public(key)
        former = predecessors_untrusted(
            encode_message(store.successions_of(public_key)), public_key
        )
        ids = tuple(map(peer_id_from_public_key, former))
        return IdentityFacts(peer_id_from_public_key(public_key), sealed, ids)


def set_passphrase(paths: Paths, passphrase: Passphrase, new: bytes | None) -> None:
    """Seal the key under `new`, or keep it plain where that is None.  The key stays the same."""
    with _opened(paths) as store:
        seed = _open(store.expect(), passphrase)
        store.put(paths.identity_file, keyfile.seal(seed, new) if new else seed)


def check_passphrase(paths: Paths, passphrase: bytes) -> None:
    """Raises WrongPassphrase where it does not open the key."""
    with _opened(paths) as store:
        _open(store.expect(), lambda: passphrase)


def rotate(paths: Paths, passphrase: Passphrase, *, now_ms: int) -> Identity:
    """A new key in place of the old one, with both keys' word that the one follows the other.

    The new key is sealed where the old one was, under the same passphrase.
    """
    with _opened(paths) as store:
        key = store.expect()
        typed = passphrase() if isinstance(key, SealedKey) else None
        seed = _open(key, lambda: typed or b"")
        old, new = SecretKey(seed), SecretKey(os.urandom(SEED_BYTES))
        links = (
            *store.successions_of(_public(seed)).links,
            make_succession(old, new, now_ms=now_ms),
        )
        # The oldest are let go: a reader checks a bounded chain.
        successions = Successions(links[-MAX_SUCCESSIONS:])
        content = keyfile.seal(bytes(new), typed) if typed else bytes(new)
        # First the statement, then the key: a crash in between leaves the old key, whose own
        # chain is the beginning of what is written.  The other way round would lose the old key
        # before it has named its successor.
        store.put(paths.successions_file, encode_message(successions))
        store.put(paths.identity_file, content)
        return store.identity(bytes(new))


def export(paths: Paths, passphrase: Passphrase, export_passphrase: Passphrase) -> bytes:
    """The key and its successions, sealed under a passphrase of the export's own."""
    with _opened(paths) as store:
        seed = _open(store.expect(), passphrase)
        successions = encode_message(store.successions_of(_public(seed)))
        return keyfile.make_export(seed, successions, export_passphrase())


def import_(
    paths: Paths, data: bytes, export_passphrase: Passphrase, *, new: bytes | None, replace: bool
) -> Identity:
    """Be the node that `data` was exported from.

    The key is sealed under `new`, or plain where that is None.  Raises IdentityError where there
    is a key already and `replace` is false.
    """
    key, successions_data = keyfile.parse_export(data)
    seed = key.open(export_passphrase())
    try:
        successions = decode_message_untrusted(Successions, successions_data)
        predecessors_untrusted(successions_data, _public(seed))
    except RemoteProtocolError as exc:
        raise IdentityError(f"The exported identity is damaged: {exc}") from exc
    with _opened(paths) as store:
        there = store.read()
        if there is not None and not replace:
            raise IdentityError(
                f"{paths.identity_file}: there is a key already. Export it first if it is still "
                "needed, then say --force to replace it."
            )
        store.put(paths.successions_file, encode_message(successions))
        store.put(paths.identity_file, keyfile.seal(seed, new) if new else seed)
        return store.identity(seed)


def _public(seed: bytes) -> bytes:
    return bytes(SigningKey(seed).verify_key)


def _open(key: bytes | SealedKey, passphrase: Passphrase | None) -> bytes:
    if isinstance(key, bytes):
        return key
    if passphrase is None:
        raise IdentityError("The identity key is sealed under a passphrase.")
    return key.open(passphrase())


@contextmanager
def _opened(paths: Paths) -> Iterator[_Store]:
    """The identity's directory, private and locked.  Raises IdentityError for what is wrong."""
    try:
        ensure_private_dir(paths.identity_file.parent)
    except ConfigError as exc:
        raise IdentityError(str(exc)) from exc
    try:
        with _locked_dir(paths.identity_file.parent) as dir_fd:
            yield _Store(paths, dir_fd)
    except OSError as exc:
        raise IdentityError(f"{paths.identity_file}: {exc.strerror}.") from exc


class _Store:
    """The two files, under the lock."""

    def __init__(self, paths: Paths, dir_fd: int) -> None:
        self._paths = paths
        self._dir_fd = dir_fd

    def identity(self, seed: bytes) -> Identity:
        return Identity(SecretKey(seed), self.successions_of(_public(seed)))

    def expect(self) -> bytes | SealedKey:
        key = self.read()
        if key is None:
            raise IdentityError(
                "There is no identity key here yet; the node's first start makes it."
            )
        return key

    def read(self) -> bytes | SealedKey | None:
        """The key, or None where there is no file."""
        path = self._paths.identity_file
        data = self._read_private(path, keyfile.SEALED_BYTES)
        if data is None:
            return None
        try:
            return keyfile.parse(data)
        except IdentityError as exc:
            raise IdentityError(
                f"{path}: {exc} Restore it from a backup, "
                f"or move it away to start with a new identity: mv {path} {path}.broken"
            ) from exc

    def successions_of(self, public_key: bytes) -> Successions:
        """The links that lead to `public_key`.

        A rotation that was cut off has left one link more, which leads away from it.
        """
        path = self._paths.successions_file
        data = self._read_private(path, MAX_MESSAGE_BYTES)
        if data is None:
            return Successions(())
        try:
            links = decode_message_untrusted(Successions, data).links
            keys = [open_succession_untrusted(link) for link in links]
            return Successions(_leading_to(public_key, links, keys))
        except RemoteProtocolError as exc:
            raise IdentityError(
                f"{path}: is damaged ({exc}). Restore it from a backup, or move it away: mv {path} "
                f"{path}.broken. Without it, peers that knew an earlier key take this node for "
                "a stranger."
            ) from exc

    def put(self, path: Path, data: bytes, *, replace: bool = True) -> None:
        """Put whole content in place, or nothing.

        A crash between open and write would otherwise leave an empty key behind.  Without
        `replace`, link() refuses an existing name, as O_EXCL does.
        """
        draft, dir_fd = f"{path.name}.new", self._dir_fd
        # Left over by a crash; the lock says that nobody is writing it now.
        with suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=dir_fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(draft, flags, 0o600, dir_fd=dir_fd)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.rename(draft, path.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            else:
                with suppress(FileExistsError):
                    os.link(draft, path.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(draft, dir_fd=dir_fd)
        os.fsync(dir_fd)

    def _read_private(self, path: Path, most_bytes: int) -> bytes | None:
        """The content, or None where there is no file.  What was checked is what is read: one
        open."""
        # O_NONBLOCK: a FIFO put in the key's place must not hold up the start.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(path.name, flags, dir_fd=self._dir_fd)
        except FileNotFoundError:
            return None
        except OSError as exc:
            if path.is_symlink():
                raise IdentityError(f"{path}: is a link. Put the key file itself there.") from exc
            raise
        try:
            _check_file(path, os.fstat(fd))
            return os.read(fd, most_bytes + 1)
        finally:
            os.close(fd)


def _leading_to(
    public_key: bytes, links: tuple[Succession, ...], keys: list[tuple[PeerKey, PeerKey]]
) -> tuple[Succession, ...]:
    for count in range(len(links), 0, -1):
        if keys[count - 1][1] == public_key:
            return links[:count]
    return ()


@contextmanager
def _locked_dir(directory: Path) -> Iterator[int]:
    """The directory's descriptor under an exclusive lock: two first starts make one key."""
    dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(dir_fd, fcntl.LOCK_EX)
        yield dir_fd
    finally:
        os.close(dir_fd)


def _check_file(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise IdentityError(f"{path}: is not a regular file. Move it away.")
    if info.st_uid != os.geteuid():
        raise IdentityError(
            f"{path}: belongs to user {info.st_uid}, but this is user {os.geteuid()}. "
            f"Run: chown {os.geteuid()} {path}"
        )
    mode = stat.S_IMODE(info.st_mode)
    if mode & 0o177:
        raise IdentityError(
            f"{path}: mode {mode:04o} is looser than 0600, so other users may know this key. "
            f"Run: chmod 600 {path}"
        )
