"""Where the node keeps its files.

    config_file    settings                        ~/.config/nextgpu/config.toml
    data_dir       the identity key                ~/.local/share/nextgpu
    state_dir      what a restart picks up         ~/.local/state/nextgpu
    cache_dir      what can be made again          ~/.cache/nextgpu
    runtime_dir    sockets, gone after a reboot    $XDG_RUNTIME_DIR/nextgpu

One home directory (`--home`, `NEXTGPU_HOME`) replaces all of it; systemd's variables replace
their own kind (systemd.exec(5), RuntimeDirectory=).  Directories are 0700 and ours, or refused.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from nextgpu_node.errors import ConfigError

APP = "nextgpu"
SYSTEM_CONFIG_FILE = Path("/etc/nextgpu/config.toml")

# struct sockaddr_un: sun_path has 108 bytes, one of them the closing NUL (unix(7)).
MAX_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class Paths:
    """Every place that the node reads or writes.  Nothing is created by making one.

    `config_file` may equal `system_config_file`: the system service has no second file.
    """

    config_file: Path
    system_config_file: Path
    data_dir: Path
    state_dir: Path
    cache_dir: Path
    runtime_dir: Path

    @classmethod
    def under(cls, root: Path) -> Paths:
        """Everything below one directory, the system's settings file left out."""
        root = root.expanduser().absolute()
        return cls(
            config_file=root / "config.toml",
            system_config_file=root / "config.toml",
            data_dir=root / "data",
            state_dir=root / "state",
            cache_dir=root / "cache",
            runtime_dir=root / "run",
        )

    @classmethod
    def of_user(cls, environ: Mapping[str, str]) -> Paths:
        """The XDG base directories, each replaced by systemd's variable where that is ours."""
        dirs = platformdirs.PlatformDirs(APP, appauthor=False)
        config_dir = _from_systemd(environ, "CONFIGURATION_DIRECTORY") or dirs.user_config_path
        data_dir, state_dir = dirs.user_data_path, dirs.user_state_path
        state = _from_systemd(environ, "STATE_DIRECTORY")
        if state is not None:
            data_dir, state_dir = state / "data", state / "state"
        return cls(
            config_file=config_dir / "config.toml",
            system_config_file=SYSTEM_CONFIG_FILE,
            data_dir=data_dir,
            state_dir=state_dir,
            cache_dir=_from_systemd(environ, "CACHE_DIRECTORY") or dirs.user_cache_path,
            runtime_dir=_from_systemd(environ, "RUNTIME_DIRECTORY")
            or _xdg_runtime(environ, state_dir),
        )

    @classmethod
    def of_system_service(cls) -> Paths:
        """Where systemd/nextgpud.service keeps its files, for a client outside the service."""
        state = Path("/var/lib") / APP
        return cls(
            config_file=SYSTEM_CONFIG_FILE,
            system_config_file=SYSTEM_CONFIG_FILE,
            data_dir=state / "data",
            state_dir=state / "state",
            cache_dir=Path("/var/cache") / APP,
            runtime_dir=Path("/run") / APP,
        )

    @property
    def identity_file(self) -> Path:
        return self.data_dir / "identity.key"

    @property
    def successions_file(self) -> Path:
        return self.data_dir / "successions"

    @property
    def network_key_file(self) -> Path:
        return self.data_dir / "network.key"

    @property
    def tokens_file(self) -> Path:
        return self.state_dir / "tokens.sqlite3"

    @property
    def owner_file(self) -> Path:
        return self.state_dir / "owner.json"

    @property
    def unit_history_file(self) -> Path:
        return self.state_dir / "units.sqlite3"

    @property
    def api_socket(self) -> Path:
        return self.runtime_dir / "api.sock"

    @property
    def units_socket(self) -> Path:
        return self.runtime_dir / "units.sock"

    @property
    def peer_history_file(self) -> Path:
        return self.state_dir / "peer-history.json"

    @property
    def known_peers_file(self) -> Path:
        return self.state_dir / "known-peers"

    @property
    def jobs_dir(self) -> Path:
        return self.data_dir / "jobs"

    @property
    def web_token_file(self) -> Path:
        return self.runtime_dir / "web.token"

    @property
    def web_page_file(self) -> Path:
        return self.runtime_dir / "web.html"

    @property
    def worker_dir(self) -> Path:
        """Where the launcher keeps what belongs to running workers."""
        return self.runtime_dir / "workers"


def find_paths(environ: Mapping[str, str], *, home: Path | None = None) -> Paths:
    """The node's paths: `home`, else NEXTGPU_HOME, else the user's directories.

    Raises ConfigError where a socket's path would be longer than the kernel takes.
    """
    root = home or (Path(environ["NEXTGPU_HOME"]) if environ.get("NEXTGPU_HOME") else None)
    paths = Paths.under(root) if root is not None else Paths.of_user(environ)
    for socket in (paths.api_socket, paths.units_socket):
        check_socket_path(socket)
    return paths


def check_socket_path(path: Path) -> None:
    """Raises ConfigError where `path` does not fit into a unix socket's address."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"{path}: {length} bytes are too many for a unix socket, which takes "
            f"{MAX_SOCKET_PATH_BYTES}. Use a shorter --home (or NEXTGPU_HOME)."
        )


def ensure_private_dir(path: Path) -> None:
    """`path` is afterwards a directory of ours with mode 0700; missing parents are made 0700 too.

    Raises ConfigError where it exists and is a link, another user's, or open to others.  It is
    never changed then: somebody may rely on it, and what others could write is not trustworthy.
    """
    try:
        _make_dirs(path)
        info = path.lstat()
    except OSError as exc:
        raise ConfigError(f"{path}: can not be made or read: {exc.strerror}.") from exc
    if stat.S_ISLNK(info.st_mode) or not stat.S_ISDIR(info.st_mode):
        raise ConfigError(
            f"{path}: is not a directory (links are not followed here). Move it away."
        )
    if info.st_uid != os.geteuid():
        raise ConfigError(
            f"{path}: belongs to user {info.st_uid}, but this is user {os.geteuid()}. "
            f"Run as its owner or choose another --home."
        )
    mode = stat.S_IMODE(info.st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} lets other users in. Run: chmod 700 {path}")


def _make_dirs(path: Path) -> None:
    """mkdir -p with 0700 for every new level: pathlib gives 0777 & ~umask to the parents."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    for level in reversed(missing):
        level.mkdir(mode=0o700, exist_ok=True)


def _from_systemd(environ: Mapping[str, str], variable: str) -> Path | None:
    """systemd's directory of one kind, where it is this program's.

    Services hand their variables down to what they start, so a directory that is not called
    "nextgpu" is another program's and is left alone.  With DynamicUser= the path is a link of
    root's to /var/lib/private/…, hence resolve().
    """
    for text in environ.get(variable, "").split(":"):
        path = Path(text)
        if path.is_absolute() and path.name == APP:
            return path.resolve()
    return None


def _xdg_runtime(environ: Mapping[str, str], state_dir: Path) -> Path:
    """Without XDG_RUNTIME_DIR the sockets live in the state directory: a name in /tmp that
    anyone can guess, anyone can also take first."""
    runtime = Path(environ.get("XDG_RUNTIME_DIR", ""))
    return runtime / APP if runtime.is_absolute() else state_dir / "run"


WhileRunning = Literal["allowed", "refused", "never"]


@dataclass(frozen=True, slots=True)
class PathKind:
    """One kind of file that the software writes: where, why, and for how long.

    `attribute` names the property of `Paths`; `personal` is true where the file says something
    about the owner or about peers.  `beside` are patterns of the names that the same kind has in
    the same directory, {name} being its own: journals of a database, drafts that a crash left.
    `deleting` says whether `nextgpu data delete` takes the kind away under a running daemon, only
    without one, or never.
    """

    attribute: str
    what: str
    why: str
    kept: str
    personal: bool
    beside: tuple[str, ...] = ()
    deleting: WhileRunning = "refused"
    # A directory that only holds other kinds.
    holds_others: bool = False

    @property
    def name(self) -> str:
        """The word for it on the command line: "peer-history"."""
        stem = self.attribute
        for suffix in ("_file", "_dir"):
            stem = stem.removesuffix(suffix)
        return stem.replace("_", "-")


@dataclass(frozen=True, slots=True)
class ElsewhereKind:
    """What is written outside the node's own places.  `patterns` are of whole paths, as fnmatch
    takes them, with {tmp} for the directory of temporary files."""

    name: str
    patterns: tuple[str, ...]
    what: str
    why: str
    kept: str


# Everything that is ever written belongs to one of these; a file that does not is a defect, and
# tests/e2e/test_written_files.py fails for it.
PATH_REGISTRY: tuple[PathKind, ...] = (
    PathKind(
        "config_file",
        "settings",
        "what the owner decided, written by `nextgpu config set` and by hand",
        "until the owner deletes it",
        personal=True,
        beside=(".{name}.*",),
        deleting="allowed",
    ),
    PathKind(
        "system_config_file",
        "settings of the machine",
        "what the administrator decided for every user",
        "until the administrator deletes it",
        personal=False,
        deleting="never",
    ),
    PathKind(
        "data_dir",
        "data directory",
        "holds the identity key and the jobs",
        "until `nextgpu service uninstall --purge`",
        personal=True,
        holds_others=True,
    ),
    PathKind(
        "identity_file",
        "identity key",
        "the Ed25519 seed that this node signs with; its public half is the peer ID",
        "until it is deleted; the next start then makes another one",
        personal=True,
        beside=("{name}.new",),
    ),
    PathKind(
        "successions_file",
        "key successions",
        "signed statements that this node's key took the place of an earlier one; shown to peers",
        "until it is deleted; peers then no longer know who this node was",
        personal=True,
        beside=("{name}.new",),
    ),
    PathKind(
        "network_key_file",
        "network key",
        "the key of the private network that this node belongs to; without the file it belongs to "
        "the open one",
        "until `nextgpu network leave`",
        personal=True,
        beside=(".{name}.*.part",),
    ),
    PathKind(
        "state_dir",
        "state directory",
        "what a restart picks up again; never the content of a work unit",
        "until `nextgpu service uninstall --purge`",
        personal=True,
        holds_others=True,
    ),
    PathKind(
        "peer_history_file",
        "what is remembered of peers",
        "how many of our units each peer brought back, by day, and how fast; never what ran",
        "512 peers at most, counts halve each week; `submit.remember_peers = false` keeps none",
        personal=True,
        beside=("peer-history.lock", "peer-history.part"),
        deleting="allowed",
    ),
    PathKind(
        "known_peers_file",
        "known DHT nodes",
        "addresses of nodes that serve the DHT, so that a restart finds the network without a "
        "bootstrap node; never whom this node worked with",
        "100 at most, replaced every ten minutes; `network.remember_peers = false` keeps none",
        personal=True,
        beside=(".{name}.*.part",),
    ),
    PathKind(
        "jobs_dir",
        "jobs",
        "the user's own jobs: manifest, journal, results and checkpoints so far, in plaintext",
        "until `nextgpu rm`",
        personal=True,
        deleting="allowed",
    ),
    PathKind(
        "tokens_file",
        "record of tokens",
        "ids of the tokens that this node issued, what each allows and what was spent of it; "
        "never a token itself, nor what it was used for",
        "a token's line until 30 days after it expires",
        personal=True,
        beside=("{name}-journal", "{name}-wal", "{name}-shm"),
    ),
    PathKind(
        "owner_file",
        "the owner's word",
        "that lending is paused, until when, or drained, so that a restart keeps to it",
        "until lending goes on",
        personal=True,
        beside=(".{name}.*",),
        deleting="allowed",
    ),
    PathKind(
        "unit_history_file",
        "history of lent units",
        "of each unit that ran here its times, sizes, outcome and receipt, never content; the "
        "submitter's peer ID becomes a hash after a day",
        "7 days (history.keep_days); `nextgpu history off` keeps none",
        personal=True,
        beside=("{name}-journal", "{name}-wal", "{name}-shm"),
    ),
    PathKind(
        "cache_dir",
        "cache directory",
        "what can be made again",
        "may be deleted at any time",
        personal=False,
        deleting="allowed",
    ),
    PathKind(
        "runtime_dir",
        "runtime directory",
        "holds the sockets while the daemon runs",
        "until the daemon stops",
        personal=False,
        holds_others=True,
    ),
    PathKind(
        "api_socket",
        "API socket",
        "the command line talks to the daemon here",
        "until the daemon stops",
        personal=False,
    ),
    PathKind(
        "units_socket",
        "work unit socket",
        "sealed work units of this machine's own programs pass here",
        "until the daemon stops",
        personal=False,
    ),
    PathKind(
        "web_token_file",
        "key of the dashboard",
        "the bearer token of this run of the daemon, for a scraper of /metrics",
        "while the dashboard is open",
        personal=False,
        beside=(".{name}.*.part",),
    ),
    PathKind(
        "web_page_file",
        "way to the dashboard",
        "a page that leads a browser to the dashboard, so that no command line shows the key",
        "until the daemon stops",
        personal=False,
        beside=(".{name}.*.part",),
        deleting="allowed",
    ),
    PathKind(
        "worker_dir",
        "worker directory",
        "the id of the launcher's process, for a restart to clean up after a crash; a unit's own "
        "scratch space is a tmpfs inside its sandbox",
        "until the daemon stops",
        personal=False,
    ),
)

ELSEWHERE: tuple[ElsewhereKind, ...] = (
    ElsewhereKind(
        "demo",
        ("{tmp}/nextgpu-demo-*",),
        "three nodes of `nextgpu demo`",
        "homes, a program and results of the demo's own text",
        "until the demo ends",
    ),
    ElsewhereKind(
        "privacy-audit",
        ("{tmp}/nextgpu-audit-*",),
        "two nodes of `nextgpu privacy audit`",
        "homes and logs, searched for the audit's own marked text",
        "until the audit ends",
    ),
    ElsewhereKind(
        "temporary-probe",
        # Eight letters of tempfile's alphabet.
        ("{tmp}/" + "[a-z0-9_]" * 8,),
        "an empty file for an instant",
        "Python's tempfile tries whether the directory of temporary files can be written",
        "removed at once",
    ),
    ElsewhereKind(
        "bytecode",
        ("*/__pycache__", "*/__pycache__/*"),
        "compiled Python files beside the installed packages",
        "Python writes them at the first import; `pip uninstall` removes them",
        "until the package is removed",
    ),
)
