"""Commands about this machine, on this machine: gpus, doctor, up."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from nextgpu_node.cli.context import Context
from nextgpu_node.cli.doctor import _check_sandbox
from nextgpu_node.cli.output import Output
from nextgpu_node.cli.starting import _consent, _daemon_command, _explain
from nextgpu_node.config import SharingConfig, load_config
from nextgpu_node.hostinfo.devices import choose_device, list_devices
from nextgpu_node.sandbox.policy import Tier
from nextgpu_node.sandbox.probe import SandboxReport
from tests.unit.api.backend import MemoryBackend
from tests.unit.cli.conftest import Cli

TIER_A = SandboxReport("A", ("seccomp",), ())
NONE = SandboxReport("none", (), (("landlock", "Boot Linux 5.13 or newer."),))


@pytest.fixture
def ctx(cli: Cli) -> Context:
    return Context(cli.paths, cli.home, None, {}, Output(json=False, color=False))


def test_gpus_says_so_where_there_is_none(cli: Cli) -> None:
    done = cli("gpus", "--json")
    devices = json.loads(done.out)["devices"]
    assert devices[-1]["kind"] == "cpu"
    assert all("uuid" not in device for device in devices)
    if len(devices) == 1:
        assert "cpu (no GPU here)" in cli("gpus").out


async def test_doctor_gives_each_problem_one_remedy(cli: Cli, backend: MemoryBackend) -> None:
    done = await cli.beside("doctor", "--json")
    report = json.loads(done.out)
    assert done.code == (0 if report["ok"] else 1)
    names = [check["name"] for check in report["checks"]]
    assert {"settings", "torch", "sandbox", "daemon", "network", "sharing"} <= set(names)
    assert all(check["remedy"] for check in report["checks"] if check["ok"] is False)
    (network,) = [check for check in report["checks"] if check["name"] == "network"]
    assert network["detail"] == "connected to 2 peers"


def test_doctor_ends_with_1_where_something_essential_fails(cli: Cli) -> None:
    cli.paths.config_file.write_text("version = 1\n[sharing]\nenabld = true\n")
    done = cli("doctor")
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0].startswith("FAIL  settings")
    assert lines[1].strip().startswith("-> ")
    assert any(line.startswith("--    daemon") and "not running" in line for line in lines)


def test_up_explains_exactly_what_holds(ctx: Context) -> None:
    config = load_config(ctx.paths, overrides={}, environ={})
    device = choose_device(list_devices(), "cpu")
    text = " ".join(_explain(device, TIER_A, config))
    for words in (
        "sealed to the worker process",
        "our software keeps nothing of it",
        "the owner of that machine could run a modified node",
        "cpu (no GPU here)",
        "tier A (seccomp)",
        "4 GiB of memory",
    ):
        assert words in text


def test_up_says_what_is_missing_and_promises_nothing(ctx: Context) -> None:
    config = load_config(ctx.paths, overrides={}, environ={})
    text = "\n".join(_explain(choose_device(list_devices(), "cpu"), NONE, config))
    assert "can borrow but not lend" in text
    assert "landlock is missing. Boot Linux 5.13 or newer." in text
    assert "sealed" not in text
    assert _consent(ctx, config, NONE, yes=True) is None
    assert not ctx.paths.config_file.exists()


def test_yes_is_remembered_and_not_asked_again(ctx: Context) -> None:
    before = load_config(ctx.paths, overrides={}, environ={})
    assert _consent(ctx, before, TIER_A, yes=True) is True
    after = load_config(ctx.paths, overrides={}, environ={})
    assert after.sharing.enabled is True
    assert _consent(ctx, after, TIER_A, yes=False) is None


def test_without_a_terminal_nothing_is_shared(
    ctx: Context, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        config = load_config(ctx.paths, overrides={}, environ={})
        assert _consent(ctx, config, TIER_A, yes=False) is None
    assert "sharing stays off" in capsys.readouterr().err
    assert not ctx.paths.config_file.exists()


@pytest.mark.parametrize(("answer", "enabled"), [("y", True), ("yes", True), ("", False)])
def test_on_a_terminal_it_asks_once(cli: Cli, answer: str, enabled: bool) -> None:
    script = (
        "import os\nfrom nextgpu_node.cli.context import Context\n"
        "from nextgpu_node.cli.output import Output\n"
        "from nextgpu_node.cli.starting import _consent\n"
        "from nextgpu_node.config import load_config\n"
        "from nextgpu_node.sandbox.probe import SandboxReport\n"
        "ctx = Context.from_options(os.environ, None, None, Output(json=False, color=False))\n"
        "config = load_config(ctx.paths, overrides={}, environ={})\n"
        "_consent(ctx, config, SandboxReport('A', (), ()), yes=False)\n"
    )
    leader, follower = pty.openpty()
    os.write(leader, f"{answer}\n".encode())
    command = [cli.command()[0], "-c", script]
    subprocess.run(command, env=cli.environ, stdin=follower, stderr=follower, check=True)
    os.close(follower)
    assert b"Lend this device to other people? [y/N]" in os.read(leader, 10_000)
    os.close(leader)
    config = load_config(cli.paths, overrides={}, environ={})
    assert config.sharing.enabled is enabled
    assert config.origins["sharing.enabled"] != "default"


def test_the_daemon_gets_the_same_options(ctx: Context, cli: Cli) -> None:
    command = _daemon_command(ctx, {"sharing.enabled": "false"})
    assert command[1:] == [
        "-m",
        "nextgpu_node.daemon.main",
        "--home",
        str(cli.home),
        "--set",
        "sharing.enabled=false",
    ]


async def test_up_becomes_the_daemon_and_a_second_one_is_refused(
    cli: Cli, backend: MemoryBackend
) -> None:
    """The process that `up` turns into meets the socket of a living daemon."""
    done = await cli.beside("--home", str(cli.home), "up", "--no-share")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("nextgpud: Another nextgpud already serves")


def test_yes_and_no_share_contradict(cli: Cli) -> None:
    assert cli("up", "--yes", "--no-share").code == 2


@pytest.mark.parametrize(
    ("tier", "floor", "said"),
    [
        ("C", "A", "tier C, and sharing.minimum_isolation is A: this node does not lend"),
        ("B", "B", "tier B: seccomp"),
        ("C", "B", "tier C, and sharing.minimum_isolation is B: this node does not lend"),
    ],
)
def test_doctor_says_where_the_sandbox_is_below_the_floor(
    tier: Tier, floor: Tier, said: str
) -> None:
    sharing = SharingConfig(enabled=True, minimum_isolation=floor)
    first = _check_sandbox(SandboxReport(tier, ("seccomp",), ()), sharing)[0]
    assert first.detail == said
    assert first.ok is (tier <= floor)


def test_a_lowered_floor_is_said_every_time() -> None:
    lowered = SharingConfig(minimum_isolation="C")
    said = [check.detail for check in _check_sandbox(TIER_A, lowered)]
    assert any("weaker walls" in line for line in said)
    assert all("weaker" not in check.detail for check in _check_sandbox(TIER_A, SharingConfig()))
