"""What `nextgpu service install` writes, and what `uninstall` takes away.  Nothing here is done.

system    /etc/systemd/system/nextgpud.service, nextgpu.slice; state by systemd below /var
user      ~/.config/systemd/user/nextgpud.service, nextgpu.slice; state where `nextgpu up` has it
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final, Literal

import nextgpu_node
from nextgpu_node.errors import UsageError
from nextgpu_node.paths import APP, Paths

Scope = Literal["system", "user"]
SERVICE: Final = "nextgpud.service"
SLICE: Final = "nextgpu.slice"
SOCKET: Final = "nextgpu-worker.socket"
# The first line of every file of ours: what does not begin so was not written by us.
MARK: Final = (
    "# Written by `nextgpu service install`; `systemctl edit` changes it in a file of its own.\n"
)
MADE: Final = "# Directories that were made for it: "

_SYSTEM_UNITS: Final = Path("/etc/systemd/system")
_EXAMPLE: Final = "/opt/nextgpu/.venv"
# What the service's own walls hide: ProtectHome=, PrivateTmp=, InaccessiblePaths=.
_HIDDEN: Final = (
    *("/home", "/root", "/run/user", "/boot", "/media", "/mnt", "/srv"),
    *("/tmp", "/var/tmp"),  # noqa: S108
)


@dataclass(frozen=True, slots=True)
class File:
    """A file to write.  `path` is absolute, as the machine that runs it will see it."""

    path: Path
    text: str


@dataclass(frozen=True, slots=True)
class Options:
    """`workers`: also the units that start workers (tier B); `credential`: the passphrase's file,
    encrypted by systemd-creds."""

    scope: Scope
    units: Path  # the directory of units
    workers: bool = False
    credential: Path | None = None


def system_options(*, workers: bool = False, credential: Path | None = None) -> Options:
    return Options("system", _SYSTEM_UNITS, workers, credential)


def user_options(config_home: Path, *, credential: Path | None = None) -> Options:
    return Options("user", config_home / "systemd/user", credential=credential)


def plan(options: Options) -> list[File]:
    """Every file, the service itself last: half an installation starts nothing."""
    files = [File(options.units / SLICE, _ours("nextgpu.slice"))]
    if options.workers:
        files += [
            File(options.units / SOCKET, _ours(SOCKET)),
            File(options.units / "nextgpu-worker@.service", _ours("nextgpu-worker@.service")),
            File(options.units / f"{SERVICE}.d/worker.conf", _ours("nextgpud-worker.conf")),
            File(
                Path("/etc/sysusers.d/nextgpu-worker.conf"), _ours("nextgpu-worker.sysusers.conf")
            ),
        ]
    if options.credential is not None:
        drop_in = f"[Service]\nLoadCredentialEncrypted=nextgpu.passphrase:{options.credential}\n"
        files.append(File(options.units / f"{SERVICE}.d/credential.conf", MARK + drop_in))
    source = SERVICE if options.scope == "system" else "nextgpud-user.service"
    return [*files, File(options.units / SERVICE, _ours(source))]


def known_files(options: Options) -> list[Path]:
    """Every file that any installation of this scope may have written, the service first."""
    everything = Options(options.scope, options.units, options.scope == "system", Path("/"))
    return [file.path for file in plan(everything)][::-1]


def state_directories(scope: Scope, paths: Paths) -> list[Path]:
    """What the service and its owner have gathered: the key, settings, records, caches.

    With DynamicUser= the state is a link in /var/lib to a directory in /var/lib/private
    (systemd.exec(5)); both go.  Whatever is not called "nextgpu" is not ours.
    """
    if scope == "system":
        var = [Path(f"/var/{kind}{private}/{APP}") for kind in ("lib", "cache")
               for private in ("", "/private")]  # fmt: skip
        return [*var, Path(f"/etc/{APP}"), Path(f"/run/{APP}")]
    found = [paths.data_dir, paths.state_dir, paths.cache_dir, paths.runtime_dir]
    return [path for path in (*found, paths.config_file.parent) if path.name == APP]


def check_program(program: Path) -> None:
    """Raises UsageError where the service, inside its walls, could not start `program`."""
    if not program.is_file():
        raise UsageError(f"{program}: is not there. Install nextgpu-node with its scripts.")
    for hidden in _HIDDEN:
        if program.is_relative_to(hidden):
            raise UsageError(
                f"{program}: the service sees nothing below {hidden}. Install it elsewhere "
                f"(python3 -m venv /opt/nextgpu/.venv), or for yourself: "
                "nextgpu service install --user"
            )


def program() -> Path:
    """The nextgpud of this installation."""
    return Path(sys.prefix) / "bin/nextgpud"


def _ours(name: str) -> str:
    """A unit with this installation in place of the example."""
    text = _template(name)
    bound = " ".join(f"-{path}" for path in _installation())
    text = text.replace("BindReadOnlyPaths=-/etc/ld.so.cache -/opt/nextgpu",
                        f"BindReadOnlyPaths=-/etc/ld.so.cache {bound}")  # fmt: skip
    return MARK + text.replace(_EXAMPLE, sys.prefix)


def _template(name: str) -> str:
    """From the package, or from a checkout."""
    packaged = resources.files(nextgpu_node) / "systemd" / name
    if packaged.is_file():
        return packaged.read_text()
    return (Path(nextgpu_node.__file__).parents[1] / "systemd" / name).read_text()


def _installation() -> list[Path]:
    """Directories with the interpreter and all packages, none inside another."""
    own = Path(nextgpu_node.__file__).parents[1]
    found = {Path(sys.prefix), Path(sys.base_prefix), own} - {Path("/usr")}
    return sorted(path for path in found if not _inside(path, found))


def _inside(path: Path, others: Iterable[Path]) -> bool:
    return any(path != other and path.is_relative_to(other) for other in others)
