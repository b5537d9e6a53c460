from __future__ import annotations

import json

from tests.unit.cli.conftest import Cli


def test_set_then_show_with_its_origin(cli: Cli) -> None:
    assert cli("config", "set", "sharing.max_memory", "2 GiB").code == 0
    rows = {line.split()[0]: line for line in cli("config", "show", "--origin").out.splitlines()}
    assert rows["sharing.max_memory"].endswith(f"2 GiB                  {cli.paths.config_file}")
    assert rows["log.level"].endswith("default")


def test_a_setting_from_the_environment_is_named(cli: Cli) -> None:
    cli.environ["NEXTGPU_LOG_LEVEL"] = "debug"
    shown = json.loads(cli("config", "show", "--origin", "--json").out)
    assert shown["settings"]["log.level"] == "debug"
    assert shown["origins"]["log.level"] == "NEXTGPU_LOG_LEVEL"


def test_another_file_is_read_and_written(cli: Cli) -> None:
    other = cli.home / "other.toml"
    assert cli("config", "set", "log.level", "error", "--config", str(other)).code == 0
    assert "error" in other.read_text()
    assert not cli.paths.config_file.exists()
    assert cli("--config", str(other), "config", "path").out == f"{other}\n"


def test_a_broken_file_is_named(cli: Cli) -> None:
    cli.paths.config_file.write_text("version = 1\n[sharing\n")
    done = cli("config", "show")
    assert done.code == 2
    assert str(cli.paths.config_file) in done.err


def test_json_is_one_object(cli: Cli) -> None:
    done = cli("config", "set", "network.bootstrap", "", "--json")
    assert json.loads(done.out)["key"] == "network.bootstrap"
    assert json.loads(cli("config", "path", "--json").out)["schema"] == 1
