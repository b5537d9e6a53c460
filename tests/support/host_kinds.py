"""Kinds of hosts, simulated on this one: what a daemon meets where less is allowed than here."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from nextgpu_node.sandbox import syscalls
from tests.support.systemd_container import WORKER_GROUP

REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534
_INTERPRETER = Path(sys.base_prefix).resolve()
_NAMESPACE_FLAGS = 0x7E020000  # every CLONE_NEW… of clone(2)
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


def refuse_namespaces() -> None:
    """To this process and all its children, as distributions do to unprivileged users.  x86_64."""
    program = [
        (0x20, 0, 0, 0),  # the call's number
        (0x15, 6, 0, 435),  # clone3: as where a filter can not look into its arguments
        (0x15, 4, 0, 272),  # unshare
        (0x15, 0, 2, 56),  # clone
        (0x20, 0, 0, 16),  # its flags
        (0x45, 1, 0, _NAMESPACE_FLAGS),  # any of them set
        (0x06, 0, 0, _ALLOW),
        (0x06, 0, 0, _EPERM),
        (0x06, 0, 0, _ENOSYS),
    ]
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    packed = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    syscalls.install_seccomp_filter(packed)


def passable_homes(hold: str) -> str:
    """Shell lines, in a mount namespace of their own: what this interpreter and this repository
    need below root's closed home can be passed by other users.  `hold` is a fresh directory."""
    closed = [home for home in (_INTERPRETER, REPOSITORY) if home.is_relative_to("/root")]
    lines = []
    for number, home in enumerate(closed):
        lines.append(f"mkdir {hold}/{number}; mount --bind {home} {hold}/{number}")
    if closed:
        lines.append("mount -t tmpfs -o mode=755 none /root")
    for number, home in enumerate(closed):
        lines.append(f"mkdir -p {home}; mount --bind {hold}/{number} {home}")
    return "\n".join(lines)


def as_nobody(script: str) -> list[str]:
    """The command that runs a Python file without any privilege, as a member of the group that
    may ask for workers."""
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", f"--groups={WORKER_GROUP}"]
    return ["setpriv", *user, "--no-new-privs", sys.executable, "-I", script]


def worker_service_units(worker_module: str) -> dict[str, str]:
    """systemd's files for a container: as shipped, with this installation in the placeholder's
    place."""
    shipped = {
        name: (REPOSITORY / "systemd" / name).read_text()
        for name in ("nextgpu-worker.socket", "nextgpu-worker@.service")
    }
    here = f"""[Service]
ExecStart=
ExecStart={sys.executable} -I -m nextgpu_node.sandbox.zygote \\
  --worker-module {worker_module} --control-fd 3 --single
TemporaryFileSystem=/work:ro
BindReadOnlyPaths={_INTERPRETER} {REPOSITORY}
"""
    return {**shipped, "nextgpu-worker@.service.d/here.conf": here}
