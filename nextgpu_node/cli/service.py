"""`nextgpu service`: the node as a systemd service, of the machine or of one user.

What is written, and where, is cli/service_plan.py's; the units themselves explain each line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import platformdirs
from cyclopts import Parameter

from nextgpu_node.cli import service_plan
from nextgpu_node.cli.context import Context, Ctx
from nextgpu_node.cli.service_plan import MADE, MARK, SERVICE, SOCKET, File, Options
from nextgpu_node.errors import DaemonUnreachable, NextGPUError, UsageError
from nextgpu_node.paths import Paths
from nextgpu_node.runtime_dir import answers

_SHOWN: Final = (
    *("LoadState", "UnitFileState", "ActiveState", "SubState", "NRestarts", "StatusText"),
    "ActiveEnterTimestamp",
)
_NAMES: Final = ("installed", "enabled", "state", "detail", "restarts", "says", "since")

User = Annotated[bool | None, Parameter(help="Of this user; default where you are not root.")]
Root = Annotated[
    Path | None, Parameter(help="Below DIR, for images and packages; nothing is started.")
]


def install(
    *,
    user: User = None,
    root: Root = None,
    start: Annotated[bool, Parameter(help="Start it now.")] = True,
    workers: Annotated[
        bool, Parameter(negative="", help="Also units that start workers (sandbox tier B).")
    ] = False,
    credential: Annotated[
        Path | None, Parameter(help="The key's passphrase, encrypted by systemd-creds.")
    ] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Print the files, write none.")] = False,
    ctx: Ctx,
) -> int:
    """Install nextgpud as a service that starts with the machine, or with this user."""
    options = _options(user, workers=workers, credential=credential)
    files = service_plan.plan(options)
    if dry_run:
        for file in files:
            ctx.out.say(f"# {_below(root, file.path)}")
            print(file.text)
        return 0
    if options.scope == "system" and root is None:
        service_plan.check_program(service_plan.program())
    manager = Manager(options, root)
    for file in files:
        _write(_below(root, file.path), file.text)
    if options.workers and root is None:
        _run(["systemd-sysusers"])
    manager.reload()
    for unit in (*([SOCKET] if options.workers else []), SERVICE):
        manager.enable(unit, start=start)
    _say_installed(ctx, files, root, options)
    return 0


def uninstall(
    *,
    user: User = None,
    root: Root = None,
    purge: Annotated[
        bool, Parameter(negative="", help="Also the key, settings, records, jobs: everything.")
    ] = False,
    yes: Annotated[bool, Parameter(negative="", help="Purge without being asked.")] = False,
    ctx: Ctx,
) -> int:
    """Stop the service and remove it; with --purge also all that it has kept."""
    options = _options(user)
    if purge and not yes:
        _consent()
    manager = Manager(options, root)
    known = [_below(root, path) for path in service_plan.known_files(options)]
    there = [path for path in known if _ours(path)]
    if there:
        for unit in (SERVICE, SOCKET):
            manager.disable(unit)
    made = [directory for path in there for directory in _made_directories(path)]
    for path in there:
        path.unlink()
    manager.reload()
    removed = [os.fspath(path) for path in there]
    if purge:
        removed += _purge(options, root, ctx)
    _remove_empty(made)
    if ctx.out.json:
        ctx.out.print_json(removed=removed)
    elif not removed:
        ctx.out.say("Nothing of the service is here.")
    else:
        ctx.out.say(*(f"Removed {path}" for path in removed))
        if purge:
            ctx.out.say(
                "What systemd's journal holds of nextgpud goes with its age, or now with all of "
                "the journal: journalctl --rotate --vacuum-time=1s"
            )
    return 0


def status(*, user: User = None, ctx: Ctx) -> int:
    """Whether the service is installed, runs, and how often it was restarted.

    Ends with 3 where it does not run.
    """
    manager = Manager(_options(user), None)
    facts = manager.show(_SHOWN)
    runs = facts["ActiveState"] == "active"
    if ctx.out.json:
        ctx.out.print_json(running=runs, **{key: facts[key] for key in _SHOWN})
    else:
        shown = dict(zip(_NAMES, (facts[key] or "-" for key in _SHOWN), strict=True))
        ctx.out.facts(shown | {"installed": "yes" if facts["LoadState"] == "loaded" else "no"})
    return 0 if runs else DaemonUnreachable.exit_code


class Manager:
    """systemctl, of the machine, of a user, or on the files below a root that does not run."""

    def __init__(self, options: Options, root: Path | None) -> None:
        if shutil.which("systemctl") is None:
            raise UsageError("There is no systemd here; start the node with `nextgpu up`.")
        if root is not None and options.scope == "user":
            raise UsageError("--root is for the machine's service.")
        self._offline = root is not None
        self._command = ["systemctl", "--no-pager"]
        self._command += ["--user"] if options.scope == "user" else []
        self._command += [f"--root={root}"] if root is not None else []

    def reload(self) -> None:
        if not self._offline:
            _run([*self._command, "daemon-reload"])

    def enable(self, unit: str, *, start: bool) -> None:
        now = ["--now"] if start and not self._offline else []
        _run([*self._command, "enable", *now, unit])

    def disable(self, unit: str) -> None:
        """Stopped, and started by nothing any more; a unit that is not there is no error."""
        now = [] if self._offline else ["--now"]
        subprocess.run([*self._command, "disable", *now, unit], capture_output=True, check=False)

    def show(self, properties: Sequence[str]) -> dict[str, str]:
        said = _run([*self._command, "show", SERVICE, f"--property={','.join(properties)}"])
        return dict.fromkeys(properties, "") | dict(
            line.split("=", 1) for line in said.splitlines() if "=" in line
        )


def _options(
    user: bool | None, *, workers: bool = False, credential: Path | None = None
) -> Options:
    if credential is not None:
        credential = credential.absolute()
        if not credential.is_file():
            raise UsageError(f"{credential}: there is no such file.")
    if user is None:
        user = os.geteuid() != 0
    if user:
        if workers:
            raise UsageError("--workers is for the machine's service.")
        return service_plan.user_options(platformdirs.user_config_path(), credential=credential)
    return service_plan.system_options(workers=workers, credential=credential)


def _run(command: Sequence[str]) -> str:
    """Its output.  What it says when it fails is the user's to read."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NextGPUError(f"{' '.join(command)}: {said[-1] if said else done.returncode}")
    return done.stdout


def _below(root: Path | None, path: Path) -> Path:
    return path if root is None else root / path.relative_to("/")


def _ours(path: Path) -> bool:
    """Whether there is a file that `install` wrote; another one is its writer's to remove."""
    try:
        return path.read_text().startswith(MARK)
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    """Raises UsageError where a file of somebody else has that name."""
    if path.exists() and not _ours(path):
        raise UsageError(f"{path}: exists and was not written by us. Move it away.")
    made: list[Path] = []
    try:
        for directory in (*reversed(path.parent.parents), path.parent):
            if not directory.exists():
                directory.mkdir()
                made.append(directory)
        earlier = _made_directories(path) if path.exists() else []
        kept = [os.fspath(directory) for directory in (*earlier, *made)]
        text += MADE + " ".join(kept) + "\n" if kept else ""
        path.write_text(text)
        path.chmod(0o644)
    except OSError as exc:
        raise UsageError(f"{path}: can not be written: {exc.strerror}. Are you root?") from exc


def _made_directories(path: Path) -> list[Path]:
    """Directories that `install` made for that file, as the file itself remembers."""
    last = path.read_text().splitlines()[-1]
    return [Path(word) for word in last.removeprefix(MADE).split()] if MADE in last else []


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in sorted(set(directories), key=lambda path: -len(path.parts)):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _consent() -> None:
    question = (
        "This deletes the identity key, settings, history, tokens and jobs of this node for good. "
    )
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question}Say --yes if that is what you want.")
    sys.stderr.write(f"{question}Go on? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("Nothing was removed.")


def _purge(options: Options, root: Path | None, ctx: Context) -> list[str]:
    paths = Paths.of_user(ctx.environ)
    own = Paths.of_system_service() if options.scope == "system" else paths
    if root is None and answers(own.api_socket):
        raise UsageError("A node is still running: end it first, then purge.")
    removed = []
    for directory in service_plan.state_directories(options.scope, paths):
        path = _below(root, directory)
        if not os.path.lexists(path):
            continue
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
        removed.append(os.fspath(path))
    if root is None and options.scope == "system" and shutil.which("groupdel"):
        subprocess.run(["groupdel", "nextgpu-worker"], capture_output=True, check=False)
    return removed


def _say_installed(
    ctx: Context, files: Sequence[File], root: Path | None, options: Options
) -> None:
    written = [os.fspath(_below(root, file.path)) for file in files]
    if ctx.out.json:
        ctx.out.print_json(written=written)
        return
    ctx.out.say(*(f"Wrote {path}" for path in written))
    if options.scope == "user":
        ctx.out.say("To keep it running while you are logged out: loginctl enable-linger")
    ctx.out.say("Lending stays off until you say: nextgpu share on")
