"""Networks of those who hold a key: friends, a lab, a company.  docs/network.md

    key file   "NextGPU network key 1\n" ‖ 64 hex digits ‖ "\n"                mode 0600
    invite     "ngnet1" ‖ base64url( msgpack [key, [address, …]] ‖ SHA-256 of that, first 4 bytes )

The key is mixed into every Noise handshake (p2p/private_noise.py): who does not hold it learns
neither who is there nor anything else.  Whoever holds it can join and can hand it on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgpack

from nextgpu_node.errors import ConfigError, UsageError
from nextgpu_node.files import write_whole
from nextgpu_node.paths import ensure_private_dir

KEY_BYTES: Final = 32
INVITE_PREFIX: Final = "ngnet1"
_MAGIC: Final = "NextGPU network key 1\n"
_FILE_BYTES: Final = len(_MAGIC) + 2 * KEY_BYTES + 1
_CHECK_BYTES: Final = 4
_MAX_ADDRESSES: Final = 16
_MAX_INVITE_CHARS: Final = 8192


@dataclass(frozen=True, slots=True)
class NetworkInvite:
    """What it takes to join: the key, and where to knock.  Whoever has it is in."""

    key: bytes = field(repr=False)
    bootstrap: tuple[str, ...] = ()


def new_network_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def fingerprint(key: bytes) -> str:
    """Eight letters to compare two networks by; they tell nothing of the key."""
    digest = hashlib.sha256(b"NextGPU/1 network fingerprint\0" + key).digest()
    return base64.b32encode(digest[:5]).decode().lower()


def format_invite(invite: NetworkInvite) -> str:
    """One word that can be pasted.  It is as secret as the key that it holds."""
    body: bytes = msgpack.packb([invite.key, list(invite.bootstrap)], use_bin_type=True)
    return INVITE_PREFIX + base64.urlsafe_b64encode(body + _check(body)).decode().rstrip("=")


def parse_invite(text: str) -> NetworkInvite:
    """The invite in `text`.  Raises UsageError, which names what is wrong and not the key."""
    text = "".join(text.split())
    if not text.startswith(INVITE_PREFIX) or len(text) > _MAX_INVITE_CHARS:
        raise UsageError(f"This is no invite to a network: one begins with {INVITE_PREFIX}.")
    coded = text.removeprefix(INVITE_PREFIX)
    try:
        data = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as exc:
        raise UsageError("The invite is damaged: copy it again, whole.") from exc
    body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if check != _check(body):
        raise UsageError("The invite is damaged or cut: copy it again, whole.")
    return _read_body(body)


def _read_body(body: bytes) -> NetworkInvite:
    try:
        key, addresses = msgpack.unpackb(body, max_array_len=_MAX_ADDRESSES)
    except (ValueError, TypeError, msgpack.UnpackException) as exc:
        raise UsageError("The invite is of another version: update one of the nodes.") from exc
    texts = isinstance(addresses, list) and all(isinstance(a, str) for a in addresses)
    if not isinstance(key, bytes) or len(key) != KEY_BYTES or not texts:
        raise UsageError("The invite is of another version: update one of the nodes.")
    return NetworkInvite(key, tuple(addresses))


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]


# The key file.


def read_network_key(path: Path) -> bytes | None:
    """The key of the network that this node belongs to; None for the open one.

    Raises ConfigError where the file is not ours alone, or is no key: a node that was meant for
    a private network must not go to the open one because of it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"{path}: can not be read: {exc.strerror}.") from exc
    with os.fdopen(descriptor, "rb") as file:
        _check_file(path, os.fstat(file.fileno()))
        data = file.read(_FILE_BYTES + 1)
    text = data.decode("ascii", "replace")
    if len(data) != _FILE_BYTES or not text.startswith(_MAGIC):
        raise ConfigError(f"{path}: is no network key. Join the network again with its invite.")
    try:
        return bytes.fromhex(text.removeprefix(_MAGIC).strip())
    except ValueError as exc:
        raise ConfigError(f"{path}: is damaged. Join the network again with its invite.") from exc


def write_network_key(path: Path, key: bytes) -> None:
    """Keep the key, 0600 in a directory of 0700.  Raises UsageError where there is one already."""
    ensure_private_dir(path.parent)
    if path.exists():
        raise UsageError(
            "This node belongs to a private network already. Run `nextgpu network leave` first."
        )
    write_whole(path, [f"{_MAGIC}{key.hex()}\n".encode()], force=False)


def forget_network(paths: Sequence[Path]) -> bool:
    """Delete the key and what was remembered in its network; whether there was a key."""
    was_there = paths[0].exists()
    for path in paths:
        path.unlink(missing_ok=True)
    return was_there


def _check_file(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        raise ConfigError(f"{path}: is not a file of this user. Move it away.")
    mode = stat.S_IMODE(info.st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} lets other users in. Run: chmod 600 {path}")
