"""Where files go, and who else may see them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from nextgpu_node.errors import ConfigError
from nextgpu_node.paths import (
    MAX_SOCKET_PATH_BYTES,
    PATH_REGISTRY,
    Paths,
    check_socket_path,
    ensure_private_dir,
    find_paths,
)


def all_paths(paths: Paths) -> list[Path]:
    return [getattr(paths, kind.attribute) for kind in PATH_REGISTRY]


def test_one_home_holds_everything(tmp_path: Path) -> None:
    for path in all_paths(Paths.under(tmp_path)):
        assert path.is_relative_to(tmp_path)


def test_a_flag_beats_the_variable_which_beats_the_users_directories(tmp_path: Path) -> None:
    environ = {"NEXTGPU_HOME": str(tmp_path / "variable")}
    assert find_paths(environ, home=tmp_path / "flag") == Paths.under(tmp_path / "flag")
    assert find_paths(environ) == Paths.under(tmp_path / "variable")
    assert find_paths({}) == Paths.of_user({})


def test_xdg_directories_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CONFIG", "DATA", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind.lower()))
    paths = Paths.of_user({"XDG_RUNTIME_DIR": str(tmp_path / "run")})
    assert paths.config_file == tmp_path / "config/nextgpu/config.toml"
    assert paths.identity_file == tmp_path / "data/nextgpu/identity.key"
    assert paths.state_dir == tmp_path / "state/nextgpu"
    assert paths.cache_dir == tmp_path / "cache/nextgpu"
    assert paths.api_socket == tmp_path / "run/nextgpu/api.sock"


@pytest.mark.parametrize("runtime", ["", "relative/run"])
def test_without_a_runtime_directory_sockets_never_go_to_tmp(runtime: str) -> None:
    paths = Paths.of_user({"XDG_RUNTIME_DIR": runtime})
    assert paths.runtime_dir == paths.state_dir / "run"


def test_systemds_directories_replace_their_own_kind(tmp_path: Path) -> None:
    paths = Paths.of_user(
        {
            "STATE_DIRECTORY": f"{tmp_path}/state/nextgpu",
            "RUNTIME_DIRECTORY": f"{tmp_path}/run/nextgpu",
            "CONFIGURATION_DIRECTORY": f"{tmp_path}/etc/nextgpu",
        }
    )
    assert paths.identity_file == tmp_path / "state/nextgpu/data/identity.key"
    assert paths.state_dir == tmp_path / "state/nextgpu/state"
    assert paths.units_socket == tmp_path / "run/nextgpu/units.sock"
    assert paths.config_file == tmp_path / "etc/nextgpu/config.toml"
    assert paths.cache_dir == Paths.of_user({}).cache_dir


def test_a_dynamic_users_link_is_followed(tmp_path: Path) -> None:
    private = tmp_path / "private" / "nextgpu"
    private.mkdir(parents=True)
    (tmp_path / "nextgpu").symlink_to(private)
    assert Paths.of_user({"STATE_DIRECTORY": f"{tmp_path}/nextgpu"}).data_dir == private / "data"


def test_another_services_directory_is_left_alone(tmp_path: Path) -> None:
    environ = {"STATE_DIRECTORY": f"{tmp_path}/gitlab-runner"}
    assert Paths.of_user(environ) == Paths.of_user({})


def test_the_system_services_sockets_are_where_its_unit_puts_them() -> None:
    assert Paths.of_system_service().api_socket == Path("/run/nextgpu/api.sock")


def test_a_path_too_long_for_a_socket_is_refused_with_the_way_out() -> None:
    check_socket_path(Path("/" + "x" * (MAX_SOCKET_PATH_BYTES - 1)))
    with pytest.raises(ConfigError, match="shorter --home"):
        check_socket_path(Path("/" + "x" * MAX_SOCKET_PATH_BYTES))
    with pytest.raises(ConfigError, match="unix socket"):
        find_paths({}, home=Path("/tmp") / ("é" * 50))


def test_the_limit_is_the_kernels(tmp_path: Path) -> None:
    import socket

    fits = str(tmp_path) + "/" + "x" * (MAX_SOCKET_PATH_BYTES - 1 - len(str(tmp_path)))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(fits)
    with socket.socket(socket.AF_UNIX) as server, pytest.raises(OSError, match="too long"):
        server.bind(fits + "x")


def test_a_private_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        ensure_private_dir(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    ensure_private_dir(tmp_path / "a" / "b")


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o770])
def test_a_directory_open_to_others_is_refused_with_the_chmod(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 700 {directory}"):
        ensure_private_dir(directory)
    assert directory.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        ensure_private_dir(directory)


def test_a_link_or_a_file_in_the_directorys_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match="is not a directory"):
            ensure_private_dir(tmp_path / name)
    with pytest.raises(ConfigError, match="can not be made"):
        ensure_private_dir(tmp_path / "file" / "below")


def test_every_path_is_in_the_registry_once() -> None:
    named = [kind.attribute for kind in PATH_REGISTRY]
    properties = [name for name, value in vars(Paths).items() if isinstance(value, property)]
    assert sorted(named) == sorted([f.name for f in dataclasses.fields(Paths)] + properties)
    assert all(kind.why and kind.kept for kind in PATH_REGISTRY)
