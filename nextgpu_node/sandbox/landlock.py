"""Landlock: what a worker may open, by path; no TCP, no signals and sockets to the outside.
Source: landlock(7), the kernel's Documentation/userspace-api/landlock.rst

Every access right that the running kernel knows is handled, so what is not allowed is refused.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from nextgpu_node.sandbox import syscalls

READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
_WRITE_FILE: Final = 1 << 1
_REMOVE_DIR: Final = 1 << 4
_REMOVE_FILE: Final = 1 << 5
_MAKE_DIR: Final = 1 << 7
_MAKE_REG: Final = 1 << 8
_REFER: Final = 1 << 13
_TRUNCATE: Final = 1 << 14
_IOCTL_DEV: Final = 1 << 15

# access name of the plan -> rights
READ: Final = READ_FILE | READ_DIR
WRITE: Final = (
    READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
)
RIGHTS: Final = {
    "read": READ,
    "write": WRITE,
    # What the driver does in /proc: threads' names are written, nothing is made or removed.
    "names": READ | _WRITE_FILE,
    "device": READ_FILE | _WRITE_FILE | _IOCTL_DEV,
}
# Rights that only mean something below a directory; the kernel refuses them on a file.
_FILE_RIGHTS: Final = READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV | 1

# ABI version -> number of file rights known
_FILE_RIGHTS_BY_ABI: Final = {1: 13, 2: 14, 3: 15, 4: 15}
_ALL_FILE_RIGHTS: Final = 16
_NET_ABI: Final = 4
_SCOPE_ABI: Final = 6
_NET_BIND_CONNECT: Final = 0b11
_SCOPE_SOCKET_SIGNAL: Final = 0b11


def handled(abi: int) -> tuple[int, int, int]:
    """(file, network, scope) rights that a kernel with `abi` can handle: all of them."""
    files = (1 << _FILE_RIGHTS_BY_ABI.get(abi, _ALL_FILE_RIGHTS)) - 1
    network = _NET_BIND_CONNECT if abi >= _NET_ABI else 0
    scoped = _SCOPE_SOCKET_SIGNAL if abi >= _SCOPE_ABI else 0
    return files, network, scoped


def make_ruleset(rules: tuple[tuple[str, str], ...], abi: int) -> int:
    """The descriptor of a ruleset for `rules`: pairs of a path and an access name of RIGHTS.

    The caller enforces it with syscalls.landlock_restrict_self and closes it.
    """
    files, network, scoped = handled(abi)
    ruleset = syscalls.landlock_create_ruleset(files, network, scoped)
    try:
        for path, access in rules:
            _allow(ruleset, path, RIGHTS[access] & files)
    except OSError:
        os.close(ruleset)
        raise
    return ruleset


def _allow(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _FILE_RIGHTS
        syscalls.landlock_allow_path(ruleset, fd, access)
    finally:
        os.close(fd)
