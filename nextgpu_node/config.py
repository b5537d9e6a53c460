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
from nextgpu_node.hours import parse_hours, parse_window
from nextgpu_node.paths import Paths
from nextgpu_node.peer_terms import parse_terms
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


@dataclass(frozen=True, slots=True)
class Hours:
    """Windows of the week; see hours.py.  In text, semicolons stand between them."""

    expected: str = 'windows such as "22:00-07:00 mon-fri", or always'

    def read(self, value: object) -> object:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(value)
        return tuple(str(parse_window(item)) for item in value)

    def parse(self, text: str) -> object:
        if text.lstrip().startswith("["):
            return tomllib.loads(f"list = {text}")["list"]
        return parse_hours(text)


@dataclass(frozen=True, slots=True)
class Share:
    """A part of what there is: "60%", or a size."""

    expected: str = 'a part from "1%" to "100%", or a size such as "8 GiB"'

    def read(self, value: object) -> object:
        return str(parse_part(_require(value, str)))

    def parse(self, text: str) -> object:
        return text


@dataclass(frozen=True, slots=True)
class Portion:
    """A share of something as a percentage: `max_utilisation = 60`, or "60%"."""

    low: int
    high: int = 100

    @property
    def expected(self) -> str:
        return f"a percentage from {self.low} to {self.high}"

    def read(self, value: object) -> object:
        return Whole(self.low, self.high).read(value)

    def parse(self, text: str) -> object:
        return int(text.strip().removesuffix("%"))


@dataclass(frozen=True, slots=True)
class Measure:
    """A whole number with its unit of measurement, which may be left out; 0 is no limit."""

    low: int
    high: int
    unit: str

    @property
    def expected(self) -> str:
        return f"0 for no limit, or {self.low} to {self.high} {self.unit}"

    def read(self, value: object) -> object:
        return Whole(self.low if value else 0, self.high).read(value)

    def parse(self, text: str) -> object:
        return int(text.strip().upper().removesuffix(self.unit.upper()))


@dataclass(frozen=True, slots=True)
class PeerTermsList:
    """Peers with limits of their own; see peer_terms.py."""

    expected: str = 'a list such as "12D3KooW… units=1 seconds_per_day=3600 kinds=program,python"'

    def read(self, value: object) -> object:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(value)
        terms = [parse_terms(item) for item in value]
        if len({one.peer_id for one in terms}) != len(terms):
            raise ValueError(value)
        return tuple(map(str, terms))

    def parse(self, text: str) -> object:
        if text.lstrip().startswith("["):
            return tomllib.loads(f"list = {text}")["list"]
        return [item.strip() for item in text.split(";") if item.strip()]


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


@dataclass(frozen=True, slots=True)
class Part:
    """A limit that is a share of a total, or a size; `of` says how much that is."""

    percent: int = 0
    size_bytes: int = 0

    def of(self, total_bytes: int) -> int:
        """Bytes of `total_bytes`, all of them at most."""
        if self.percent:
            return total_bytes * self.percent // 100
        return min(self.size_bytes, total_bytes)

    def __str__(self) -> str:
        return f"{self.percent}%" if self.percent else format_size(self.size_bytes)


def parse_part(text: str) -> Part:
    """ "60%" or a size; ValueError for anything else, and for nothing at all."""
    if text.strip().endswith("%"):
        percent = int(text.strip().removesuffix("%"))
        if not 1 <= percent <= 100:
            raise ValueError(text)
        return Part(percent=percent)
    size_bytes = parse_size(text)
    if not size_bytes:
        raise ValueError(text)
    return Part(size_bytes=size_bytes)


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
    return text == "auto" or _is_label(text)


def _is_label(text: str) -> bool:
    return re.fullmatch(r"cpu|(cuda|xpu):\d{1,2}", text) is not None


def _is_program_name(text: str) -> bool:
    """As the kernel names processes: the file's name, without its directory."""
    return 0 < len(text) <= 255 and "/" not in text and text.isprintable()


def _setting(default: object, rule: Rule) -> Any:
    """A dataclass field with its rule; Any, so that the field's own annotation types it."""
    return field(default=default, metadata={"rule": rule})


# --- the sections -----------------------------------------------------------------------------

_MULTIADDRS = TextList('multiaddrs such as "/ip4/0.0.0.0/tcp/4650"', _is_multiaddr)
_PEER_IDS = TextList('peer IDs such as "12D3KooW…"', _is_peer_id)
_STREAM_SIZE = Size(1 * MIB, MAX_STREAM_BYTES)
_MEMORY_SIZE = Size(256 * MIB, MAX_MEMORY_BYTES)
_UNIT_SECONDS = Whole(1, MAX_UNIT_SECONDS)
_DEVICE_LABELS = TextList('devices such as "cuda:1" or "cpu"', _is_label)
_PROGRAMS = TextList('names of programs such as "blender"', _is_program_name)
_RESERVE_SIZE = Size(0, 1024 * GIB)


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
    lane: bool = _setting(True, Switch())
    lane_port: int = _setting(0, Whole(0, 65_535))
    bootstrap: tuple[str, ...] = _setting(
        (), TextList('multiaddrs that end in "/p2p/12D3KooW…"', _is_peer_multiaddr)
    )
    mode: Literal["auto", "server", "client"] = _setting(
        "auto", Choice(("auto", "server", "client"))
    )
    remember_peers: bool = _setting(True, Switch())


@dataclass(frozen=True, slots=True)
class SharingConfig:
    # Off until the owner says yes.
    enabled: bool = _setting(False, Switch())
    device: str = _setting("auto", Text('"auto", "cpu" or "cuda:N"', _is_device))
    exclude_devices: tuple[str, ...] = _setting((), _DEVICE_LABELS)
    # When.
    hours: tuple[str, ...] = _setting((), Hours())
    on_battery: bool = _setting(False, Switch())
    only_when_idle: bool = _setting(False, Switch())
    idle_minutes: int = _setting(5, Whole(1, 24 * 60))
    exclusive_apps: tuple[str, ...] = _setting((), _PROGRAMS)
    # While.
    max_temperature: int = _setting(0, Measure(30, 120, "C"))
    max_power: int = _setting(0, Measure(10, 5000, "W"))
    max_foreign_vram_bytes: int = _setting(1 * GIB, _RESERVE_SIZE)
    max_foreign_gpu: int = _setting(0, Portion(0))
    max_foreign_cpu: int = _setting(0, Portion(0))
    min_free_memory_bytes: int = _setting(256 * MIB, _RESERVE_SIZE)
    min_free_disk_bytes: int = _setting(256 * MIB, _RESERVE_SIZE)
    allow: tuple[str, ...] = _setting((), _PEER_IDS)
    deny: tuple[str, ...] = _setting((), _PEER_IDS)
    serve: Literal["allow", "tokens", "everyone"] = _setting(
        "allow", Choice(("allow", "tokens", "everyone"))
    )
    # Of one peer; 0: no limit of its own.  `peers` names those for whom other ones hold.
    peer_units: int = _setting(0, Whole(0, 64))
    peer_seconds_per_day: int = _setting(0, Whole(0, 64 * 86_400))
    peers: tuple[str, ...] = _setting((), PeerTermsList())
    # By name only: there is no value that means everyone.
    python_allow: tuple[str, ...] = _setting((), _PEER_IDS)
    minimum_isolation: Literal["A", "B", "C"] = _setting("A", Choice(("A", "B", "C")))
    max_concurrent_units: int = _setting(1, Whole(1, 64))
    max_unit_seconds: int = _setting(600, _UNIT_SECONDS)
    max_memory_bytes: int = _setting(4 * GIB, _MEMORY_SIZE)
    max_input_bytes: int = _setting(2 * GIB, _STREAM_SIZE)
    max_output_bytes: int = _setting(2 * GIB, _STREAM_SIZE)
    max_vram: str = _setting("100%", Share())
    # Of the time: a unit rests between its steps.
    max_utilisation: int = _setting(100, Portion(5))
    max_scratch_bytes: int = _setting(64 * MIB, Size(1 * MIB, 64 * GIB))
    # Bytes of ciphertext in a second, all units together; 0: no limit.
    max_upload_bytes: int = _setting(0, _RESERVE_SIZE)
    max_download_bytes: int = _setting(0, _RESERVE_SIZE)
    # 0: none kept warm; the first unit then waits for a fork.
    warm_workers: int = _setting(1, Whole(0, 16))
    # 0: half of the cores, at least one; the owner keeps the rest.
    threads: int = _setting(0, Whole(0, 1024))
    requests_per_minute: int = _setting(60, Whole(1, 100_000))


@dataclass(frozen=True, slots=True)
class HistoryConfig:
    """What is remembered of units that ran here (store/unit_history.py)."""

    record: bool = _setting(True, Switch())
    keep_days: int = _setting(7, Whole(1, 3650))


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", Choice(("debug", "info", "warning", "error"))
    )
    format: Literal["auto", "json", "console"] = _setting(
        "auto", Choice(("auto", "json", "console"))
    )


@dataclass(frozen=True, slots=True)
class WebConfig:
    """The dashboard on loopback.  `nextgpu web` opens it where `open` is false."""

    open: bool = _setting(False, Switch())
    # Where it is taken, another one; 0: always another one.
    port: int = _setting(4651, Whole(0, 65535))


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
    history: HistoryConfig = HistoryConfig()
    log: LogConfig = LogConfig()
    web: WebConfig = WebConfig()
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
    "history": HistoryConfig,
    "log": LogConfig,
    "web": WebConfig,
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
    """`set_values` of one key; returns its value."""
    return set_values(path, {dotted: text})[dotted]


def set_values(path: Path, changes: Mapping[str, str]) -> dict[str, object]:
    """Set keys in the file at `path`, keeping its comments and order; returns their values.

    The new text is checked as a whole before the file is replaced in one step: on any error,
    raised as ConfigError, the file is as it was.
    """
    checked = read_changes(changes)
    text = _read_text(path) or f"version = {VERSION}\n"
    for dotted, change in changes.items():
        text = _with_value(text, dotted, _parse_text(dotted, change, "config set"), str(path))
    _read_toml(text, str(path))
    try:
        _replace_file(path.resolve(), text)
    except OSError as exc:
        raise ConfigError(f"{path}: can not be written: {exc.strerror}. It is unchanged.") from exc
    return checked


def read_changes(changes: Mapping[str, str]) -> dict[str, object]:
    """The values of settings that are given as text.  Raises ConfigError for the first bad one."""
    return {
        dotted: _read_value(dotted, _parse_text(dotted, text, "config set"), "config set")
        for dotted, text in changes.items()
    }


def with_changes(config: Config, checked: Mapping[str, object]) -> Config:
    """`config` where the values that `read_changes` gave hold; origins stay as they were."""
    sections: dict[str, Any] = {}
    for dotted, value in checked.items():
        setting = SETTINGS[dotted]
        section = sections.get(setting.section, getattr(config, setting.section))
        sections[setting.section] = dataclasses.replace(section, **{setting.attribute: value})
    return dataclasses.replace(config, **sections)


def shown(dotted: str, value: object) -> str:
    """A value in the short form in which it can be given again."""
    match value:
        case bool():
            return str(value).lower()
        case int() if SETTINGS[dotted].attribute.endswith("_bytes"):
            return format_size(value)
        case tuple() | list():
            between = "; " if isinstance(SETTINGS[dotted].rule, Hours | PeerTermsList) else ","
            return between.join(map(str, value))
        case _:
            return str(value)


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
