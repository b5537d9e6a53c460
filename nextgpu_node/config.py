"""Settings: one frozen dataclass per section, every default visible here.

    flag  >  NEXTGPU_SECTION_KEY  >  user's file  >  /etc/nextgpu/config.toml  >  default

Files are TOML 1.0.  An unknown key is an error that names the nearest known one: a misspelled
limit must not silently become no limit.  Sizes are written "4 GiB" and held in bytes, in a field
whose name ends in `_bytes`.  For people: docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

import tomlkit
import tomlkit.exceptions

from nextgpu_node.errors import ConfigError
from nextgpu_node.paths import Paths
from nextgpu_protocol.ids import public_key_from_peer_id
from nextgpu_protocol.limits import (
    GIB,
    KIB,
    MAX_MEMORY_BYTES,
    MAX_STREAM_BYTES,
    MAX_UNIT_SECONDS,
    MIB,
)

VERSION = 1

# A settings file is a page of text; more is a mistake in the path.
MAX_FILE_BYTES = 1 * MIB

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 1024 * GIB,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([A-Za-z]{0,3})\s*")


# --- what a value may be ----------------------------------------------------------------------


class Rule(Protocol):
    """What one key takes.  `read` and `parse` raise ValueError where the value does not fit."""

    @property
    def expected(self) -> str:
        """Completes the sentence "… was expected"."""

    def read(self, value: object) -> object:
        """The value of the dataclass field from a value of the TOML file."""

    def parse(self, text: str) -> object:
        """The TOML value from text: a flag, an environment variable, `config set`."""


@dataclass(frozen=True, slots=True)
class Switch:
    expected: str = "true or false"

    def read(self, value: object) -> object:
        return _require(value, bool)

    def parse(self, text: str) -> object:
        words = {"true": True, "yes": True, "on": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "0": False}
        if text.strip().lower() not in words:
            raise ValueError(text)
        return words[text.strip().lower()]


@dataclass(frozen=True, slots=True)
class Whole:
    low: int
    high: int

    @property
    def expected(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def read(self, value: object) -> object:
        # bool is an int in Python; `threads = true` is a mistake all the same.
        if type(value) is not int or not self.low <= value <= self.high:
            raise ValueError(value)
        return value

    def parse(self, text: str) -> object:
        return int(text)


@dataclass(frozen=True, slots=True)
class Size:
    low: int
    high: int

    @property
    def expected(self) -> str:
        return f'a size from "{format_size(self.low)}" to "{format_size(self.high)}"'

    def read(self, value: object) -> object:
        size = parse_size(value) if isinstance(value, str) else _require(value, int)
        if isinstance(size, bool) or not self.low <= size <= self.high:
            raise ValueError(value)
        return size

    def parse(self, text: str) -> object:
        return text


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple[str, ...]

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(f'"{option}"' for option in self.options)

    def read(self, value: object) -> object:
        if value not in self.options:
            raise ValueError(value)
        return value

    def parse(self, text: str) -> object:
        return text


@dataclass(frozen=True, slots=True)
class Text:
    expected: str
    check: Callable[[str], bool]

    def read(self, value: object) -> object:
        if not isinstance(value, str) or not self.check(value):
            raise ValueError(value)
        return value

    def parse(self, text: str) -> object:
        return text


@dataclass(frozen=True, slots=True)
class TextList:
    item: str
    check: Callable[[str], bool]

    @property
    def expected(self) -> str:
        return f"a list of {self.item}"

    def read(self, value: object) -> object:
        if not isinstance(value, list):
            raise ValueError(value)
        for item in value:
            if not isinstance(item, str) or not self.check(item):
                raise ValueError(item)
        return tuple(value)

    def parse(self, text: str) -> object:
        """A TOML array, or the items with commas between them."""
        if text.lstrip().startswith("["):
            return tomllib.loads(f"list = {text}")["list"]
        return [item.strip() for item in text.split(",") if item.strip()]


def _require(value: object, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ValueError(value)
    return value


def parse_size(text: str) -> int:
    """Bytes of "512 MiB", "1.5 GiB", "2GB" or "4096"; ValueError for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(text)
    return int(Decimal(match[1]) * _UNITS[match[2].upper()])


def format_size(size_bytes: int) -> str:
    """The shortest exact way to write a size: 4294967296 -> "4 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _UNITS[unit.upper()] == 0:
            return f"{size_bytes // _UNITS[unit.upper()]} {unit}"
    return f"{size_bytes} B"


def _is_multiaddr(text: str) -> bool:
    return re.fullmatch(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/\S+", text) is not None


def _is_peer_multiaddr(text: str) -> bool:
    address, _, peer_id = text.rpartition("/p2p/")
    return _is_multiaddr(address) and _is_peer_id(peer_id)


def _is_peer_id(text: str) -> bool:
    try:
        public_key_from_peer_id(text)
    except ValueError:
        return False
    return True


def _is_device(text: str) -> bool:
    return re.fullmatch(r"auto|cpu|cuda:\d{1,2}", text) is not None


def _setting(default: object, rule: Rule) -> Any:
    """A dataclass field with its rule; Any, so that the field's own annotation types it."""
    return field(default=default, metadata={"rule": rule})


# --- the sections -----------------------------------------------------------------------------

_MULTIADDRS = TextList('multiaddrs such as "/ip4/0.0.0.0/tcp/4650"', _is_multiaddr)
_PEER_IDS = TextList('peer IDs such as "12D3KooW…"', _is_peer_id)
_STREAM_SIZE = Size(1 * MIB, MAX_STREAM_BYTES)
_MEMORY_SIZE = Size(256 * MIB, MAX_MEMORY_BYTES)
_UNIT_SECONDS = Whole(1, MAX_UNIT_SECONDS)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """There is no name on purpose: a name would follow its owner across the network."""

    identity: Literal["persistent", "ephemeral"] = _setting(
        "persistent", Choice(("persistent", "ephemeral"))
    )


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    listen: tuple[str, ...] = _setting(("/ip4/0.0.0.0/tcp/4650",), _MULTIADDRS)
    announce: tuple[str, ...] = _setting((), _MULTIADDRS)
    bootstrap: tuple[str, ...] = _setting(
        (), TextList('multiaddrs that end in "/p2p/12D3KooW…"', _is_peer_multiaddr)
    )
    mode: Literal["auto", "server", "client"] = _setting(
        "auto", Choice(("auto", "server", "client"))
    )


@dataclass(frozen=True, slots=True)
class SharingConfig:
    # Off until the owner says yes.
    enabled: bool = _setting(False, Switch())
    device: str = _setting("auto", Text('"auto", "cpu" or "cuda:N"', _is_device))
    allow: tuple[str, ...] = _setting((), _PEER_IDS)
    deny: tuple[str, ...] = _setting((), _PEER_IDS)
    serve: Literal["allow", "tokens", "everyone"] = _setting(
        "allow", Choice(("allow", "tokens", "everyone"))
    )
    # By name only: there is no value that means everyone.
    python_allow: tuple[str, ...] = _setting((), _PEER_IDS)
    minimum_isolation: Literal["A", "B", "C"] = _setting("A", Choice(("A", "B", "C")))
    max_concurrent_units: int = _setting(1, Whole(1, 64))
    max_unit_seconds: int = _setting(600, _UNIT_SECONDS)
    max_memory_bytes: int = _setting(4 * GIB, _MEMORY_SIZE)
    max_input_bytes: int = _setting(2 * GIB, _STREAM_SIZE)
    max_output_bytes: int = _setting(2 * GIB, _STREAM_SIZE)
    # 0: none kept warm; the first unit then waits for a fork.
    warm_workers: int = _setting(1, Whole(0, 16))
    # 0: half of the cores, at least one; the owner keeps the rest.
    threads: int = _setting(0, Whole(0, 1024))
    requests_per_minute: int = _setting(60, Whole(1, 100_000))


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", Choice(("debug", "info", "warning", "error"))
    )
    format: Literal["auto", "json", "console"] = _setting(
        "auto", Choice(("auto", "json", "console"))
    )


@dataclass(frozen=True, slots=True)
class SubmitConfig:
    """What `nextgpu run` asks for where its flags do not say otherwise."""

    device: Literal["any", "cpu", "cuda"] = _setting("any", Choice(("any", "cpu", "cuda")))
    max_unit_seconds: int = _setting(600, _UNIT_SECONDS)
    max_memory_bytes: int = _setting(4 * GIB, _MEMORY_SIZE)
    max_output_bytes: int = _setting(2 * GIB, _STREAM_SIZE)
    trusted: tuple[str, ...] = _setting((), _PEER_IDS)
    remember_peers: bool = _setting(True, Switch())


@dataclass(frozen=True, slots=True)
class Config:
    """All settings.  `origins` maps every dotted key to where its value comes from."""

    node: NodeConfig = NodeConfig()
    network: NetworkConfig = NetworkConfig()
    sharing: SharingConfig = SharingConfig()
    log: LogConfig = LogConfig()
    submit: SubmitConfig = SubmitConfig()
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def items(self) -> Iterator[tuple[str, object]]:
        """Every dotted key with its value, in the order of the documentation."""
        for dotted, setting in SETTINGS.items():
            yield dotted, getattr(getattr(self, setting.section), setting.attribute)


@dataclass(frozen=True, slots=True)
class Setting:
    """One key: where it lives in `Config`, what it takes, what it is when nobody says."""

    section: str
    key: str  # as written in TOML
    attribute: str  # as named in the dataclass
    rule: Rule
    default: object

    @property
    def variable(self) -> str:
        return f"NEXTGPU_{self.section}_{self.key}".upper()


_SECTIONS: dict[str, type[Any]] = {
    "node": NodeConfig,
    "network": NetworkConfig,
    "sharing": SharingConfig,
    "log": LogConfig,
    "submit": SubmitConfig,
}


def _all_settings() -> Iterator[tuple[str, Setting]]:
    for section, cls in _SECTIONS.items():
        for item in dataclasses.fields(cls):
            rule = item.metadata["rule"]
            key = item.name.removesuffix("_bytes") if isinstance(rule, Size) else item.name
            yield f"{section}.{key}", Setting(section, key, item.name, rule, item.default)


# Every key that exists, by its dotted name.
SETTINGS: Mapping[str, Setting] = MappingProxyType(dict(_all_settings()))


# --- reading ----------------------------------------------------------------------------------


def load_config(
    paths: Paths, *, overrides: Mapping[str, object], environ: Mapping[str, str]
) -> Config:
    """The settings that hold, each with its origin.

    `overrides` are the flags: dotted key to a TOML value, or to text as a user types it.
    Raises ConfigError naming the file or variable, the key, what was expected and what was found.
    """
    values: dict[str, object] = {dotted: item.default for dotted, item in SETTINGS.items()}
    origins = dict.fromkeys(SETTINGS, "default")

    def take(found: Mapping[str, object], origin: Callable[[str], str]) -> None:
        for dotted, value in found.items():
            values[dotted] = value
            origins[dotted] = origin(dotted)

    for path in dict.fromkeys((paths.system_config_file, paths.config_file)):
        take(_read_file(path), lambda _, path=path: str(path))  # type: ignore[misc]
    take(_read_environ(environ), lambda dotted: SETTINGS[dotted].variable)
    take(_read_flags(overrides), lambda _: "flag")
    return _build(values, origins)


def _build(values: Mapping[str, object], origins: Mapping[str, str]) -> Config:
    sections = {
        name: cls(**{s.attribute: values[d] for d, s in SETTINGS.items() if s.section == name})
        for name, cls in _SECTIONS.items()
    }
    return Config(**sections, origins=MappingProxyType(dict(origins)))


def _read_file(path: Path) -> dict[str, object]:
    text = _read_text(path)
    return {} if text is None else _read_toml(text, str(path))


def _read_text(path: Path) -> str | None:
    """The file's text, or None where there is no file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"{path}: can not be read: {exc.strerror}.") from exc
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {format_size(MAX_FILE_BYTES)}.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {exc.start}).") from exc


def _read_toml(text: str, origin: str) -> dict[str, object]:
    """Dotted keys to checked values."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{origin}: is not valid TOML: {exc}.") from exc
    version = document.pop("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise ConfigError(
            f"{origin}: version: this release reads version {VERSION}, found {version!r}."
        )
    found: dict[str, object] = {}
    for section, table in document.items():
        if not isinstance(table, dict) or section not in _SECTIONS:
            raise _unknown_key(section, origin)
        for key, value in table.items():
            found[f"{section}.{key}"] = _read_value(f"{section}.{key}", value, origin)
    return found


def _read_environ(environ: Mapping[str, str]) -> dict[str, object]:
    """NEXTGPU_SECTION_KEY.  Other NEXTGPU_ names (NEXTGPU_HOME) are not settings."""
    by_variable = {setting.variable: dotted for dotted, setting in SETTINGS.items()}
    prefixes = tuple(f"NEXTGPU_{section.upper()}_" for section in _SECTIONS)
    found: dict[str, object] = {}
    for name in sorted(environ):
        if not name.startswith(prefixes):
            continue
        if name not in by_variable:
            near = difflib.get_close_matches(name, by_variable, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name}: is not a known setting.{hint}")
        dotted = by_variable[name]
        found[dotted] = _read_value(dotted, _parse_text(dotted, environ[name], name), name)
    return found


def _read_flags(overrides: Mapping[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for dotted, given in overrides.items():
        value = _parse_text(dotted, given, "flag") if isinstance(given, str) else given
        value = list(value) if isinstance(value, tuple) else value
        found[dotted] = _read_value(dotted, value, "flag")
    return found


def _parse_text(dotted: str, text: str, origin: str) -> object:
    if dotted not in SETTINGS:
        raise _unknown_key(dotted, origin)
    rule = SETTINGS[dotted].rule
    try:
        return rule.parse(text)
    except ValueError as exc:
        raise _wrong_value(dotted, text, origin) from exc


def _read_value(dotted: str, value: object, origin: str) -> object:
    if dotted not in SETTINGS:
        raise _unknown_key(dotted, origin)
    try:
        return SETTINGS[dotted].rule.read(value)
    except ValueError as exc:
        wrong = exc.args[0] if exc.args else value
        raise _wrong_value(dotted, wrong, origin) from exc


def _wrong_value(dotted: str, found: object, origin: str) -> ConfigError:
    kinds = {bool: "", int: "", float: "", str: "the text ", list: "the list ", dict: "the table "}
    shown = str(found).lower() if isinstance(found, bool) else repr(found)
    what = kinds.get(type(found), "") + shown
    return ConfigError(
        f"{origin}: {dotted}: {SETTINGS[dotted].rule.expected} was expected, found {what[:200]}."
    )


def _unknown_key(dotted: str, origin: str) -> ConfigError:
    if dotted == "node.name":
        return ConfigError(
            f"{origin}: node.name: nodes have no names on purpose: a name would follow its owner "
            f"across the network. Remove the key."
        )
    if dotted in _SECTIONS:
        return ConfigError(
            f"{origin}: {dotted}: is a section; write [{dotted}] and its keys below."
        )
    near = _nearest(dotted)
    hint = f"Did you mean {near}?" if near else "See docs/configuration.md for every key."
    return ConfigError(f"{origin}: {dotted}: is not a known key. {hint}")


def _nearest(dotted: str) -> str | None:
    """The known key most like `dotted`: in its own section first, then a key of that very name
    in another section, then a section."""
    section, _, key = dotted.rpartition(".")
    own = {s.key: d for d, s in SETTINGS.items() if s.section == section}
    if near := difflib.get_close_matches(key, own, n=1):
        return own[near[0]]
    everywhere = {s.key: d for d, s in SETTINGS.items()}
    if near := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.8):
        return everywhere[near[0]]
    sections = [] if section else difflib.get_close_matches(key, _SECTIONS, n=1)
    return f"[{sections[0]}]" if sections else None


# --- writing ----------------------------------------------------------------------------------


def set_value(path: Path, dotted: str, text: str) -> object:
    """Set one key in the file at `path`, keeping its comments and order; returns the value.

    The new text is checked as a whole before the file is replaced in one step: on any error,
    raised as ConfigError, the file is as it was.
    """
    value = _parse_text(dotted, text, "config set")
    checked = _read_value(dotted, value, "config set")
    old = _read_text(path)
    new = _with_value(old or f"version = {VERSION}\n", dotted, value, str(path))
    _read_toml(new, str(path))
    try:
        _replace_file(path.resolve(), new)
    except OSError as exc:
        raise ConfigError(f"{path}: can not be written: {exc.strerror}. It is unchanged.") from exc
    return checked


def _with_value(text: str, dotted: str, value: object, origin: str) -> str:
    setting = SETTINGS[dotted]
    try:
        document = tomlkit.parse(text)
        if setting.section not in document:
            document[setting.section] = tomlkit.table()
        table = document[setting.section]
        if not hasattr(table, "items"):
            raise _unknown_key(setting.section, origin)
        cast("dict[str, object]", table)[setting.key] = value
        return tomlkit.dumps(document)
    except tomlkit.exceptions.TOMLKitError as exc:
        raise ConfigError(f"{origin}: is not valid TOML: {exc}.") from exc


def _replace_file(path: Path, text: str) -> None:
    """Write a complete new file beside the old one, then rename: readers see one or the other."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    # mkstemp makes it 0600; the old file's mode is what its owner chose.
    fd, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
