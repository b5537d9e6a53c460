"""Settings: what is read, what is refused, where each value came from."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_node.config import (
    SETTINGS,
    Config,
    format_size,
    load_config,
    parse_size,
    set_value,
)
from nextgpu_node.errors import ConfigError
from nextgpu_node.identity import Identity
from nextgpu_node.paths import Paths

GIB = 1024**3


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return dataclasses.replace(
        Paths.under(tmp_path), system_config_file=tmp_path / "etc" / "config.toml"
    )


def load(paths: Paths, text: str = "", **environ: str) -> Config:
    if text:
        paths.config_file.write_text(text)
    return load_config(paths, overrides={}, environ=environ)


def test_without_files_everything_is_a_default_and_sharing_is_off(paths: Paths) -> None:
    config = load(paths)
    assert config == Config()
    assert config.sharing.enabled is False
    assert config.sharing.max_memory_bytes == 4 * GIB
    assert config.network.listen == ("/ip4/0.0.0.0/tcp/4650",)
    assert set(config.origins.values()) == {"default"}
    assert dict(config.items()).keys() == SETTINGS.keys() == config.origins.keys()


def test_every_default_is_valid_by_its_own_rule() -> None:
    for setting in SETTINGS.values():
        default = setting.default
        written = list(default) if isinstance(default, tuple) else default
        assert setting.rule.read(written) == default


def test_flag_beats_variable_beats_user_beats_system_beats_default(paths: Paths) -> None:
    paths.system_config_file.parent.mkdir()
    every = "\n".join(f"{key} = 10" for key in ("warm_workers", "threads", "max_unit_seconds"))
    paths.system_config_file.write_text(f"[sharing]\n{every}\nmax_concurrent_units = 10\n")
    paths.config_file.write_text("sharing = {threads=11, max_unit_seconds=11, warm_workers=11}")
    config = load_config(
        paths,
        overrides={"sharing.max_unit_seconds": "13"},
        environ={"NEXTGPU_SHARING_MAX_UNIT_SECONDS": "12", "NEXTGPU_SHARING_WARM_WORKERS": "12"},
    )
    expected = {
        "sharing.max_unit_seconds": (13, "flag"),
        "sharing.warm_workers": (12, "NEXTGPU_SHARING_WARM_WORKERS"),
        "sharing.threads": (11, str(paths.config_file)),
        "sharing.max_concurrent_units": (10, str(paths.system_config_file)),
        "sharing.requests_per_minute": (60, "default"),
    }
    values = dict(config.items())
    assert {key: (values[key], config.origins[key]) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[sharing]\nmax_memry = 1", "sharing.max_memory"),
        ("[sharing]\nmax_memory_bytes = 1", "sharing.max_memory"),
        ("[shring]\nenabled = true", "Did you mean [sharing]?"),
        ("[network]\nenabled = true", "sharing.enabled"),
        ("enabled = true", "sharing.enabled"),
        ("[sharing]\nzzzzzz = 1", "docs/configuration.md"),
        ("[node]\nname = 'mine'", "no names on purpose"),
        ("sharing = true", "write [sharing]"),
    ],
)
def test_an_unknown_key_is_refused_by_file_and_key_with_the_nearest(
    paths: Paths, text: str, names: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(paths, text)
    assert str(caught.value).startswith(f"{paths.config_file}: ")
    assert names in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sharing.enabled = 'yes'", "true or false was expected, found the text 'yes'"),
        ("sharing.threads = true", "a whole number from 0 to 1024 was expected, found true"),
        ("sharing.threads = 1.5", "found 1.5"),
        ("sharing.threads = -1", "found -1"),
        ("sharing.max_unit_seconds = 0", "from 1 to 86400"),
        ("sharing.max_memory = '4 gigs'", 'a size from "256 MiB" to "1 TiB" was expected'),
        ("sharing.max_memory = '1 KiB'", "found the text '1 KiB'"),
        ("sharing.max_memory = true", "found true"),
        ("sharing.max_memory = '-4 GiB'", "found the text '-4 GiB'"),
        ("sharing.device = 'gpu'", '"auto", "cpu" or "cuda:N"'),
        ("sharing.minimum_isolation = 'none'", 'one of "A", "B", "C"'),
        ("sharing.allow = '12D3'", "a list of peer IDs"),
        ("sharing.allow = ['12D3']", "found the text '12D3'"),
        ("network.listen = ['0.0.0.0:4650']", "a list of multiaddrs"),
        ("network.bootstrap = ['/ip4/1.2.3.4/tcp/1']", 'that end in "/p2p/12D3KooW'),
        ("log.level = 'trace'", 'one of "debug"'),
        ("log.level = {a = 1}", "found the table"),
        ("version = 2", "reads version 1, found 2"),
        ("version = true", "reads version 1"),
        ("sharing.enabled = ", "is not valid TOML"),
        ("a = " + "[" * 5000, "is not valid TOML"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_found(
    paths: Paths, line: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(paths, line)
    assert expected in str(caught.value)


def test_every_kind_of_value_is_read(paths: Paths) -> None:
    peer = Identity.ephemeral().peer_id
    config = load(
        paths,
        f"""
        version = 1
        [network]
        bootstrap = ["/dns4/example.org/tcp/4650/p2p/{peer}"]
        [sharing]
        enabled = true
        device = "cuda:1"
        deny = ["{peer}"]
        max_memory = 1073741824
        max_input = "1.5 GiB"
        """,
    )
    assert config.network.bootstrap == (f"/dns4/example.org/tcp/4650/p2p/{peer}",)
    assert config.sharing.enabled is True
    assert config.sharing.deny == (peer,)
    assert config.sharing.max_memory_bytes == GIB
    assert config.sharing.max_input_bytes == GIB * 3 // 2


def test_variables_are_read_as_text(paths: Paths) -> None:
    config = load(
        paths,
        NEXTGPU_SHARING_ENABLED="yes",
        NEXTGPU_SHARING_MAX_MEMORY="8 GiB",
        NEXTGPU_NETWORK_LISTEN="/ip4/127.0.0.1/tcp/1, /ip6/::1/tcp/2",
        NEXTGPU_NETWORK_ANNOUNCE='["/ip4/127.0.0.1/tcp/1"]',
        NEXTGPU_HOME="/not/a/setting",
        UNRELATED="x",
    )
    assert config.sharing.enabled is True
    assert config.sharing.max_memory_bytes == 8 * GIB
    assert config.network.listen == ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2")
    assert config.network.announce == ("/ip4/127.0.0.1/tcp/1",)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("NEXTGPU_SHARING_MAXMEMORY", "1 GiB", "Did you mean NEXTGPU_SHARING_MAX_MEMORY?"),
        ("NEXTGPU_SHARING_THREADS", "many", "NEXTGPU_SHARING_THREADS: sharing.threads: a whole"),
        ("NEXTGPU_SHARING_ENABLED", "", "true or false was expected"),
        ("NEXTGPU_NETWORK_LISTEN", "[", "a list of multiaddrs"),
    ],
)
def test_a_wrong_variable_is_named(paths: Paths, name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(paths, **{name: value})
    assert says in str(caught.value)


def test_flags_take_values_and_text_and_refuse_unknown_keys(paths: Paths) -> None:
    flags = {"network.listen": ["/ip4/127.0.0.1/tcp/0"], "sharing.enabled": True}
    config = load_config(paths, overrides=flags, environ={})
    assert config.network.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert config.sharing.enabled is True
    with pytest.raises(ConfigError, match=r"flag: sharing\.enable: .*sharing\.enabled"):
        load_config(paths, overrides={"sharing.enable": "true"}, environ={})


def test_a_file_that_can_not_be_text_is_refused(paths: Paths) -> None:
    paths.config_file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(paths)
    paths.config_file.write_bytes(b"#" * (1024**2 + 1))
    with pytest.raises(ConfigError, match="is larger than"):
        load(paths)
    paths.config_file.unlink()
    paths.config_file.mkdir()
    with pytest.raises(ConfigError, match="can not be read"):
        load(paths)


@given(st.integers(min_value=0, max_value=2**50))
def test_sizes_round_trip(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "GiB", "1 XB", "1e9", "1,5 GiB", "1 GiB 2", "٣ GiB", "nan"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


# --- config set -------------------------------------------------------------------------------

WITH_COMMENTS = """\
# mine, do not touch
version = 1

[sharing]
enabled = false   # not yet
max_memory = "4 GiB"

[log]  # quiet
level = "warning"
"""


def test_setting_a_value_keeps_comments_order_and_mode(paths: Paths) -> None:
    paths.config_file.write_text(WITH_COMMENTS)
    paths.config_file.chmod(0o640)
    assert set_value(paths.config_file, "sharing.enabled", "true") is True
    assert set_value(paths.config_file, "sharing.max_memory", "8 GiB") == 8 * GIB
    assert set_value(paths.config_file, "network.listen", "/ip4/127.0.0.1/tcp/1") == (
        "/ip4/127.0.0.1/tcp/1",
    )
    text = paths.config_file.read_text()
    head = WITH_COMMENTS.replace("false", "true").replace("4 GiB", "8 GiB")
    assert text.startswith(head)
    assert tomllib.loads(text)["network"] == {"listen": ["/ip4/127.0.0.1/tcp/1"]}
    assert paths.config_file.stat().st_mode & 0o777 == 0o640
    assert load(paths).sharing.enabled is True


def test_setting_a_value_makes_a_private_file(paths: Paths) -> None:
    set_value(paths.config_file, "log.level", "debug")
    assert paths.config_file.stat().st_mode & 0o777 == 0o600
    assert load(paths).log.level == "debug"


@pytest.mark.parametrize(
    ("dotted", "text"),
    [("sharing.threads", "many"), ("sharing.thread", "1"), ("sharing", "1"), ("version", "2")],
)
def test_a_refused_value_changes_nothing(paths: Paths, dotted: str, text: str) -> None:
    paths.config_file.write_text(WITH_COMMENTS)
    with pytest.raises(ConfigError):
        set_value(paths.config_file, dotted, text)
    assert paths.config_file.read_text() == WITH_COMMENTS


@pytest.mark.parametrize("broken", ["[sharing", "[sharing]\nother = 1\n", "sharing = 1\n"])
def test_a_file_that_is_already_wrong_is_left_as_it_is(paths: Paths, broken: str) -> None:
    paths.config_file.write_text(broken)
    with pytest.raises(ConfigError):
        set_value(paths.config_file, "sharing.threads", "1")
    assert paths.config_file.read_text() == broken


def test_a_wrong_value_is_repaired_by_setting_it(paths: Paths) -> None:
    paths.config_file.write_text("[sharing]\nthreads = 'many'\n")
    assert set_value(paths.config_file, "sharing.threads", "2") == 2


def test_a_failed_write_leaves_the_old_file_and_no_draft(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths.config_file.write_text(WITH_COMMENTS)

    def full_disk(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nextgpu_node.config.os.fsync", full_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        set_value(paths.config_file, "sharing.enabled", "true")
    assert paths.config_file.read_text() == WITH_COMMENTS
    assert [p.name for p in paths.config_file.parent.iterdir()] == ["config.toml"]


def test_a_linked_settings_file_stays_a_link(paths: Paths, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text(WITH_COMMENTS)
    paths.config_file.symlink_to(real)
    set_value(paths.config_file, "sharing.enabled", "true")
    assert paths.config_file.is_symlink()
    assert "enabled = true" in real.read_text()
