"""The owner's commands: share, limits, allow, deny, history, gpus."""

from __future__ import annotations

import json
import tomllib

import pytest

from nextgpu_node.api_types import SharingView
from nextgpu_node.cli.sharing import describe
from nextgpu_node.config import SharingConfig
from nextgpu_protocol.ids import peer_id_from_public_key
from tests.unit.api.backend import MemoryBackend
from tests.unit.cli.conftest import Cli

PEER = peer_id_from_public_key(bytes(range(32)))


async def test_the_owners_words_are_commands(cli: Cli, backend: MemoryBackend) -> None:
    assert (await cli.beside("share", "pause", "1h")).code == 0
    assert (await cli.beside("share", "pause")).code == 0
    assert (await cli.beside("share", "resume")).code == 0
    assert backend.pauses == [3600, 0, -1]
    assert "draining" in (await cli.beside("share", "drain")).out
    wrong = await cli.beside("share", "pause", "an hour")
    assert (wrong.code, backend.pauses) == (2, [3600, 0, -1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "lending", "active": True}, "on, 1 of 2 slots free"),
        ({"state": "starting"}, "on: starting"),
        ({"state": "off", "reason": "sharing is off"}, "off"),
        ({"state": "paused", "reason": "you are active"}, "paused: you are active"),
        ({"state": "paused", "reason": "81 C"}, "paused: 81 C"),
        ({"state": "paused", "cause": "owner", "reason": "by you until 14:05", "until_ms": 1},
         "paused: by you until 14:05"),
        ({"state": "draining", "reason": "takes no new units"}, "draining: takes no new units"),
    ],
)  # fmt: skip
def test_every_state_is_one_line(changes: dict[str, object], words: str) -> None:
    facts: dict[str, object] = {
        "enabled": True, "active": False, "reason": "", "slots": 2, "free_slots": 1, **changes
    }  # fmt: skip
    assert describe(SharingView(**facts)) == words  # type: ignore[arg-type]


def test_limits_are_written_without_a_node(cli: Cli) -> None:
    cli.paths.config_file.parent.mkdir(parents=True, exist_ok=True)
    cli.paths.config_file.write_text("# mine\n[sharing]\nthreads = 3  # of eight\n")
    done = cli(
        "limits", "set", "--vram", "60%", "--temp", "80", "--power", "200W",
        "--hours", "22:00-7:00 mon-fri; 00:00-24:00 sat sun", "--idle", "yes",
        "--unit-time", "10m", "--upload", "5 MiB", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    text = cli.paths.config_file.read_text()
    assert "# mine" in text
    assert "# of eight" in text
    assert tomllib.loads(text)["sharing"] == {
        "threads": 3,
        "max_vram": "60%",
        "max_temperature": 80,
        "max_power": 200,
        "hours": ["22:00-07:00 mon-fri", "00:00-24:00 sat,sun"],
        "only_when_idle": True,
        "max_unit_seconds": 600,
        "max_upload": "5 MiB",
    }
    assert json.loads(done.out)["limits"]["hours"] == "22:00-07:00 mon-fri; 00:00-24:00 sat,sun"
    assert "60%" in cli("limits", "show").out


def test_one_wrong_limit_changes_none(cli: Cli) -> None:
    done = cli("limits", "set", "--temp", "80", "--hours", "22-07")
    assert done.code == 2
    assert "22:00-07:00 mon-fri" in done.err
    assert not cli.paths.config_file.exists()
    assert cli("limits", "set").code == 2


async def test_limits_hold_in_the_running_node(cli: Cli, backend: MemoryBackend) -> None:
    done = await cli.beside("limits", "set", "--temp", "80", "--apps", "blender,steam")
    assert done.code == 0
    assert backend.config == SharingConfig(max_temperature=80, exclusive_apps=("blender", "steam"))
    assert "blender,steam" in done.out
    # The daemon saves its settings; where it can not, this process does.
    assert not cli.paths.config_file.exists()
    backend.saves, backend.note = False, "read-only"
    assert (await cli.beside("limits", "set", "--temp", "70")).err == ""
    assert "max_temperature = 70" in cli.paths.config_file.read_text()


async def test_peers_are_allowed_with_limits_and_denied(cli: Cli, backend: MemoryBackend) -> None:
    done = await cli.beside(
        "allow", PEER, "--units", "1", "--time", "2h", "--kinds", "program,python"
    )
    assert done.code == 0, done.err
    assert backend.config.allow == (PEER,)
    assert backend.config.peers == (f"{PEER} units=1 seconds_per_day=7200 kinds=program,python",)
    assert "the 1 allowed peers and nobody else" in done.out
    assert (await cli.beside("deny", PEER)).code == 0
    assert (backend.config.allow, backend.config.deny, backend.config.peers) == ((), (PEER,), ())
    assert (await cli.beside("serving", "--forget", PEER)).code == 0
    assert backend.config.deny == ()
    assert (await cli.beside("allow", "somebody")).code == 2
    assert (await cli.beside("allow", PEER, "--kinds", "shell")).code == 2


async def test_the_history_is_shown_cleared_and_switched_off(
    cli: Cli, backend: MemoryBackend
) -> None:
    shown = (await cli.beside("history")).out
    assert "done" in shown
    assert "1.5 s" in shown
    assert json.loads((await cli.beside("history", "--json")).out)["units"][0]["wall_ms"] == 1500
    assert (await cli.beside("history", "off")).out.startswith("Nothing is recorded")
    assert backend.records is False
    assert "7 days" in (await cli.beside("history", "on")).out
    assert (await cli.beside("history", "--clear")).out == "The history is empty.\n"
    assert (await cli.beside("history", "off", "--clear")).code == 2


async def test_gpus_says_what_a_device_does(cli: Cli, backend: MemoryBackend) -> None:
    row = (await cli.beside("gpus")).out.splitlines()[1]
    assert "50%" in row
    assert "61 C" in row
