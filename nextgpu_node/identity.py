"""The node's identity: one Ed25519 key, whose public half is the peer ID.
Spec: protocol/spec/10-identity.md

    identity.key   32 bytes, the Ed25519 seed (RFC 8032 section 5.1.5); 0600 in a 0700 directory
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from nacl.signing import SigningKey

from nextgpu_node.errors import ConfigError, IdentityError
from nextgpu_node.paths import Paths, ensure_private_dir
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.ids import PeerId, peer_id_from_public_key
from nextgpu_protocol.messages import Successions
from nextgpu_protocol.succession import predecessors_untrusted

SEED_BYTES = 32


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


def load_or_create(paths: Paths) -> Identity:
    """The identity in `paths.identity_file`, made at the first start.

    Raises IdentityError where the file or its directory is open to others, is not ours, is a
    link, or does not hold a key; the message names the command that repairs it.
    """
    path = paths.identity_file
    try:
        ensure_private_dir(path.parent)
    except ConfigError as exc:
        raise IdentityError(str(exc)) from exc
    try:
        with _locked_dir(path.parent) as dir_fd:
            seed = _read_seed(path, dir_fd)
            if seed is None:
                _write_seed(path, dir_fd, os.urandom(SEED_BYTES))
                seed = _read_seed(path, dir_fd)
    except OSError as exc:
        raise IdentityError(f"{path}: {exc.strerror}.") from exc
    if seed is None:
        raise IdentityError(f"{path}: vanished while it was being made.")
    return Identity(SecretKey(seed))


@contextmanager
def _locked_dir(directory: Path) -> Iterator[int]:
    """The directory's descriptor under an exclusive lock: two first starts make one key."""
    dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(dir_fd, fcntl.LOCK_EX)
        yield dir_fd
    finally:
        os.close(dir_fd)


def _read_seed(path: Path, dir_fd: int) -> bytes | None:
    """The seed, or None where there is no file.  What was checked is what is read: one open."""
    # O_NONBLOCK: a FIFO put in the key's place must not hold up the start.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path.name, flags, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    except OSError as exc:
        if path.is_symlink():
            raise IdentityError(f"{path}: is a link. Put the key file itself there.") from exc
        raise
    try:
        _check_file(path, os.fstat(fd))
        seed = os.read(fd, SEED_BYTES + 1)
    finally:
        os.close(fd)
    if len(seed) != SEED_BYTES:
        raise IdentityError(
            f"{path}: does not hold a key ({SEED_BYTES} bytes expected). Restore it from a backup, "
            f"or move it away to start with a new identity: mv {path} {path}.broken"
        )
    return seed


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


def _write_seed(path: Path, dir_fd: int, seed: bytes) -> None:
    """Put a whole key in place, or nothing.

    link() refuses an existing name, as O_EXCL does, and shows the file only once it is complete:
    a crash between open and write would otherwise leave an empty key behind.
    """
    draft = f"{path.name}.new"
    # Left over by a crash; the lock says that nobody is writing it now.
    with suppress(FileNotFoundError):
        os.unlink(draft, dir_fd=dir_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(draft, flags, 0o600, dir_fd=dir_fd)
    try:
        try:
            os.write(fd, seed)
            os.fsync(fd)
        finally:
            os.close(fd)
        with suppress(FileExistsError):
            os.link(draft, path.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    finally:
        os.unlink(draft, dir_fd=dir_fd)
    os.fsync(dir_fd)
