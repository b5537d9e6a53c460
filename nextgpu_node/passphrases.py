"""Where a passphrase comes from: a descriptor, a systemd credential, a terminal.

Never from an argument or the environment: other processes can read both (proc(5)).
"""

from __future__ import annotations

import getpass
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from nextgpu_node.errors import IdentityError

PASSPHRASE_CREDENTIAL: Final = "nextgpu.passphrase"  # noqa: S105  its name, not itself
IDENTITY_CREDENTIAL: Final = "nextgpu.identity"
MAX_BYTES: Final = 1024

Passphrase = Callable[[], bytes]


def from_descriptor(fd: int) -> bytes:
    """The first line that can be read from `fd`, which is closed.  Raises IdentityError."""
    data = b""
    try:
        with os.fdopen(fd, "rb", buffering=0) as pipe:
            while b"\n" not in data and len(data) <= MAX_BYTES:
                piece = pipe.read(MAX_BYTES + 1)
                if not piece:
                    break
                data += piece
    except OSError as exc:
        raise IdentityError(
            f"No passphrase can be read from descriptor {fd}: {exc.strerror}."
        ) from exc
    return _checked(data.partition(b"\n")[0], f"descriptor {fd}")


def from_credential(environ: Mapping[str, str]) -> bytes | None:
    """What systemd's LoadCredential= put down for this service, or None."""
    data = read_credential(environ, PASSPHRASE_CREDENTIAL, MAX_BYTES)
    return None if data is None else _checked(data.rstrip(b"\n"), "the credential")


def read_credential(environ: Mapping[str, str], name: str, most_bytes: int) -> bytes | None:
    """A credential of systemd.exec(5), or None.  Raises IdentityError where others can read it."""
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    if not Path(directory).is_absolute():
        return None
    path = Path(directory) / name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise IdentityError(f"The credential {name} can not be read: {exc.strerror}.") from exc
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or stat.S_IMODE(info.st_mode) & 0o077:
            raise IdentityError(
                f"The credential {name} is open to other users. Let systemd put it down: "
                f"LoadCredential={name}:/path"
            )
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise IdentityError(f"The credential {name} is too long.")
    return data


def from_terminal(prompt: str, *, twice: bool = False) -> bytes:
    """Typed at the controlling terminal, unseen.  Raises IdentityError where there is none."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as exc:
        raise IdentityError(
            "A passphrase is needed, and there is no terminal to ask at. Give it with "
            f"--passphrase-fd N, or as the systemd credential {PASSPHRASE_CREDENTIAL}."
        ) from exc
    first = _checked(getpass.getpass(prompt).encode(), "the terminal")
    if twice and getpass.getpass("Once more: ").encode() != first:
        raise IdentityError("The two passphrases differ. Nothing was changed.")
    return first


def for_daemon(fd: int | None, environ: Mapping[str, str]) -> Passphrase:
    """Asks the three places in turn, when a passphrase is needed and not before."""

    def passphrase() -> bytes:
        if fd is not None:
            return from_descriptor(fd)
        return from_credential(environ) or from_terminal("Passphrase of the identity key: ")

    return passphrase


def _checked(passphrase: bytes, source: str) -> bytes:
    if not passphrase:
        raise IdentityError(f"The passphrase from {source} is empty.")
    if len(passphrase) > MAX_BYTES:
        raise IdentityError(f"The passphrase from {source} is longer than {MAX_BYTES} bytes.")
    return passphrase
