"""Installing, looking at and removing the service, on file systems of their own.

The machine's service is installed below a root that does not run, with the real systemctl; a
user's with a systemctl that writes down what it is told.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from nextgpu_node.cli.service_plan import check_program, plan, program, system_options, user_options
from nextgpu_node.errors import UsageError
from tests.unit.cli.conftest import Cli

needs_systemctl = pytest.mark.skipif(
    shutil.which("systemctl") is None, reason="systemctl is not installed"
)


def everything(root: Path) -> dict[str, str]:
    """Path -> what is there: a directory, a link's target, or a file's content."""
    found = {}
    for path in sorted(root.rglob("*")):
        found[str(path.relative_to(root))] = f"{path.lstat().st_mode:o} {what_is(path)}"
    return found


def what_is(path: Path) -> str:
    if path.is_symlink():
        return str(path.readlink())
    return "directory" if path.is_dir() else path.read_text()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with a service of somebody else's."""
    made = tmp_path / "root"
    wants = made / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (made / "var/lib").mkdir(parents=True)
    (made / "var/lib/other").mkdir()
    (made / "etc/systemd/system/other.service").write_text("[Service]\nExecStart=/bin/true\n")
    (wants / "other.service").symlink_to("../other.service")
    return made


def live(root: Path) -> None:
    """What a service has left when it ran for a while: as DynamicUser= lays it out."""
    for kind in ("lib", "cache"):
        private = root / f"var/{kind}/private/nextgpu"
        private.mkdir(parents=True)
        (private / "identity.key").write_text("secret")
        (root / f"var/{kind}/nextgpu").symlink_to("private/nextgpu")
    (root / "etc/nextgpu").mkdir()
    (root / "etc/nextgpu/config.toml").write_text("version = 1\n")


@needs_systemctl
@pytest.mark.parametrize("more", [[], ["--workers"]])
def test_a_purge_leaves_the_machine_as_it_was(cli: Cli, root: Path, more: list[str]) -> None:
    # systemd itself keeps these two; they are not ours to remove.
    for kind in ("lib", "cache"):
        (root / f"var/{kind}/private").mkdir(parents=True)
    before = everything(root)
    assert cli("service", "install", "--root", str(root), *more).code == 0
    installed = everything(root)
    assert "etc/systemd/system/nextgpud.service" in installed
    assert "etc/systemd/system/multi-user.target.wants/nextgpud.service" in installed
    assert installed.items() > before.items()
    live(root)
    done = cli("service", "uninstall", "--root", str(root), "--purge", "--yes")
    assert done.code == 0, done.err
    assert "journalctl" in done.out
    assert everything(root) == before


@needs_systemctl
def test_without_a_purge_what_was_kept_stays(cli: Cli, root: Path) -> None:
    live(root)
    before = everything(root)
    cli("service", "install", "--root", str(root))
    assert cli("service", "uninstall", "--root", str(root)).code == 0
    assert everything(root) == before


@needs_systemctl
def test_a_purge_is_not_done_by_mistake(cli: Cli, root: Path) -> None:
    live(root)
    before = everything(root)
    done = cli("service", "uninstall", "--root", str(root), "--purge")
    assert (done.code, everything(root)) == (2, before)
    assert "identity key" in done.err


@needs_systemctl
def test_a_unit_of_somebody_else_is_not_touched(cli: Cli, root: Path) -> None:
    unit = root / "etc/systemd/system/nextgpud.service"
    unit.write_text("[Service]\nExecStart=/usr/bin/my-own\n")
    assert cli("service", "install", "--root", str(root)).code == 2
    assert "my-own" in unit.read_text()
    cli("service", "uninstall", "--root", str(root))
    assert "my-own" in unit.read_text()


@pytest.fixture
def spoken(cli: Cli, tmp_path: Path) -> Path:
    """A systemctl that only writes down its arguments, where a user has no manager."""
    tools, log = tmp_path / "bin", tmp_path / "spoken"
    tools.mkdir()
    (tools / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    (tools / "systemctl").chmod(0o755)
    cli.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
    cli.environ["XDG_RUNTIME_DIR"] = str(tmp_path / "runtime")
    # The user service is the one in the user's own places, not one of another home.
    del cli.environ["NEXTGPU_HOME"]
    return log


def test_a_users_service_comes_and_goes_whole(cli: Cli, spoken: Path) -> None:
    before = everything(cli.home)
    assert cli("service", "install", "--user").code == 0
    unit = cli.home / ".config/systemd/user/nextgpud.service"
    assert f"ExecStart={program()}" in unit.read_text()
    for place in (".config/nextgpu", ".local/share/nextgpu/jobs", ".local/state/nextgpu"):
        (cli.home / place).mkdir(parents=True)
    (cli.home / ".local/share/other").mkdir()
    done = cli("service", "uninstall", "--user", "--purge", "--yes")
    assert done.code == 0, done.err
    for made in (".local/share/other", ".local/share", ".local/state", ".local"):
        (cli.home / made).rmdir()  # of this test
    assert everything(cli.home) == before
    assert spoken.read_text().splitlines() == [
        "--no-pager --user daemon-reload",
        "--no-pager --user enable --now nextgpud.service",
        "--no-pager --user disable --now nextgpud.service",
        "--no-pager --user disable --now nextgpu-worker.socket",
        "--no-pager --user daemon-reload",
    ]


def test_status_says_what_systemd_says(cli: Cli, spoken: Path, tmp_path: Path) -> None:
    said = "LoadState=loaded\\nUnitFileState=enabled\\nActiveState=active\\nNRestarts=2"
    (tmp_path / "bin/systemctl").write_text(f"#!/bin/sh\nprintf '{said}\\n'\n")
    done = cli("service", "status", "--user")
    assert done.code == 0
    assert "restarts   2" in done.out
    (tmp_path / "bin/systemctl").write_text("#!/bin/sh\necho ActiveState=inactive\n")
    assert cli("service", "status", "--user").code == 3


def test_a_program_that_the_service_could_not_see_is_named() -> None:
    with pytest.raises(UsageError, match="is not there"):
        check_program(Path("/nowhere/nextgpud"))
    with NamedTemporaryFile(dir="/tmp") as file, pytest.raises(UsageError, match="below /tmp"):
        check_program(Path(file.name))


def test_every_unit_names_this_installation() -> None:
    for options in (system_options(workers=True), user_options(Path("/c"))):
        for file in plan(options):
            assert "/opt/nextgpu/.venv" not in file.text
            assert file.path.is_absolute()


def test_a_credential_gets_a_file_of_its_own(tmp_path: Path) -> None:
    files = plan(system_options(credential=tmp_path / "key.cred"))
    (drop_in,) = [file for file in files if file.path.name == "credential.conf"]
    assert f"LoadCredentialEncrypted=nextgpu.passphrase:{tmp_path}/key.cred" in drop_in.text
    assert files[-1].path.name == "nextgpud.service"
