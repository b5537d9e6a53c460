"""The units: accepted by systemd's own tools, explained line by line, and fit for the sandbox."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nextgpu_node.sandbox.zygote_process import ENVIRONMENT, SERVICE_SOCKET

UNITS = Path(__file__).parents[2] / "systemd"
SYSTEM, USER = UNITS / "nextgpud.service", UNITS / "nextgpud-user.service"
SLICE = UNITS / "nextgpu.slice"
WORKER, SOCKET = UNITS / "nextgpu-worker@.service", UNITS / "nextgpu-worker.socket"
PLACEHOLDER = "/opt/nextgpu/.venv/bin/nextgpud"
PYTHON = "/opt/nextgpu/.venv/bin/python"
ALL = [(SYSTEM, "--system"), (USER, "--user"), (WORKER, "--system")]

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def settings(unit: Path) -> dict[str, list[str]]:
    """Key -> its values, in order, of all sections."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def analyze(unit: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze ARGUMENTS UNIT`, on a copy whose ExecStart= exists here."""
    for source in (unit, WORKER, SOCKET, SLICE):
        text = source.read_text().replace(PLACEHOLDER, "/bin/true").replace(PYTHON, "/bin/true")
        (tmp_path / source.name).write_text(text)
    runtime = tmp_path / "run"
    runtime.mkdir(exist_ok=True)
    return subprocess.run(
        ["systemd-analyze", *arguments, f"./{unit.name}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        # A user's manager looks for its runtime directory, also when only asked to verify.
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "XDG_RUNTIME_DIR": str(runtime),
            "SYSTEMD_PAGER": "",
            "NO_COLOR": "1",
            "LC_ALL": "C.UTF-8",
        },
    )


@needs_systemd
@pytest.mark.parametrize(
    ("unit", "manager"), [*ALL, (SOCKET, "--system"), (SLICE, "--system"), (SLICE, "--user")]
)
def test_systemd_finds_no_fault(unit: Path, manager: str, tmp_path: Path) -> None:
    done = analyze(unit, tmp_path, "verify", manager)
    # Known from systemd 254 on and ignored before; the unit says so.
    newer = re.compile(r"Unknown key '(RestartSteps|RestartMaxDelaySec)' in section")
    faults = [line for line in done.stderr.splitlines() if not newer.search(line)]
    assert (done.returncode, faults) == (0, [])


def recorded_score(unit: Path) -> float:
    match = re.search(r"\(systemd 252\): (\d+\.\d)", unit.read_text())
    assert match is not None
    return float(match[1])


@needs_systemd
@pytest.mark.parametrize(("unit", "manager"), ALL)
def test_the_exposure_is_no_worse_than_recorded(unit: Path, manager: str, tmp_path: Path) -> None:
    # Releases of systemd weigh a little differently: half a point of slack.
    threshold = str(round(recorded_score(unit) * 10) + 5)
    arguments = ("security", "--offline=yes", "--no-pager", f"--threshold={threshold}", manager)
    done = analyze(unit, tmp_path, *arguments)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("unit", [SYSTEM, USER, WORKER, SOCKET, SLICE])
def test_every_setting_stands_below_its_reason(unit: Path) -> None:
    """A run of settings begins with a comment, and no run is longer than one thought."""
    runs: list[int] = []
    after_comment = True
    for line in unit.read_text().splitlines():
        if line.startswith("#"):
            after_comment = True
        elif line and not line.startswith("[") and not line.startswith(("Description", "WantedBy")):
            if after_comment:
                runs.append(0)
            runs[-1] += 1
            after_comment = False
    assert max(runs) <= 8


@pytest.mark.parametrize("unit", [SYSTEM, USER])
def test_only_the_daemon_speaks_and_the_watchdog_is_on(unit: Path) -> None:
    have = settings(unit)
    assert have["Type"] == ["notify"]
    assert have["NotifyAccess"] == ["main"]
    assert have["WatchdogSec"] == ["60"]
    assert have["Restart"] == ["on-failure"]
    assert have["ExecStart"] == [PLACEHOLDER]


@pytest.mark.parametrize("unit", [SYSTEM, USER])
def test_all_that_is_lent_is_one_branch_that_comes_last(unit: Path) -> None:
    assert settings(unit)["Slice"] == [SLICE.name]
    assert int(settings(SLICE)["CPUWeight"][0]) < 100  # what every other branch has


@pytest.mark.parametrize("unit", [SYSTEM, USER])
def test_plaintext_stays_in_memory_and_one_worker_is_not_the_service(unit: Path) -> None:
    have = settings(unit)
    assert have["MemorySwapMax"] == ["0"]
    assert have["LimitCORE"] == ["0"]
    assert have["OOMPolicy"] == ["continue"]
    assert have["Delegate"] == ["cpu memory pids"]


@pytest.mark.parametrize("unit", [SYSTEM, USER])
def test_nothing_stands_in_the_way_of_the_sandbox(unit: Path) -> None:
    have = settings(unit)
    breaks_the_sandbox = {
        "RestrictNamespaces",
        "ProtectControlGroups",
        "ProcSubset",
        "PrivateDevices",
        "MemoryDenyWriteExecute",
        "PrivateNetwork",
    }
    assert not breaks_the_sandbox & have.keys()
    allowed = have["SystemCallFilter"][0].split()
    for call in ("@system-service", "@mount", "landlock_restrict_self"):
        assert call in allowed


@pytest.mark.parametrize("directory", ["StateDirectory", "RuntimeDirectory", "CacheDirectory"])
def test_the_services_directories_are_ours_alone(directory: str) -> None:
    have = settings(SYSTEM)
    assert have[directory] == ["nextgpu"]
    assert have[f"{directory}Mode"] == ["0700"]


def test_the_service_has_no_privilege_to_lose() -> None:
    have = settings(SYSTEM)
    assert have["DynamicUser"] == ["yes"]
    assert have["NoNewPrivileges"] == ["yes"]
    assert have["CapabilityBoundingSet"] == have["AmbientCapabilities"] == [""]
    assert have["ProtectSystem"] == ["strict"]


def test_a_worker_service_has_nothing_to_reach_and_leaves_nothing() -> None:
    have = settings(WORKER)
    for key in (
        "DynamicUser",
        "PrivateNetwork",
        "PrivateIPC",
        "PrivateUsers",
        "RestrictNamespaces",
    ):
        assert have[key] == ["yes"], key
    assert have["RestrictAddressFamilies"] == ["none"]
    assert have["StandardOutput"] == have["StandardError"] == ["null"]
    assert have["CollectMode"] == ["inactive-or-failed"]
    assert (have["MemorySwapMax"], have["LimitCORE"]) == (["0"], ["0"])
    assert int(have["RuntimeMaxSec"][0]) > 24 * 3600, "a warm worker waits for up to a day"


def test_every_worker_service_has_a_user_of_its_own() -> None:
    """Without a name, systemd names the user after the template: one for all instances."""
    assert "%i" in settings(WORKER)["User"][0]


def test_the_worker_service_starts_our_launcher_in_our_launchers_environment() -> None:
    have = settings(WORKER)
    assert have["ExecStart"][0].startswith(f"{PYTHON} -I -m nextgpu_node.sandbox.zygote ")
    assert have["ExecStart"][0].endswith(" --control-fd 3 --single")
    variables = dict(item.split("=") for line in have["Environment"] for item in line.split())
    assert variables == ENVIRONMENT


def test_the_worker_socket_is_where_the_daemon_connects_and_for_its_group() -> None:
    have = settings(SOCKET)
    assert have["ListenSequentialPacket"] == [SERVICE_SOCKET]
    assert have["Accept"] == ["yes"]
    assert (have["SocketMode"], have["SocketGroup"]) == (["0660"], ["nextgpu-worker"])
