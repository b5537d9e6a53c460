"""What holds for every command: exit codes, one line for a mistake, --json, speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nextgpu_node.cli import main
from nextgpu_node.errors import IntegrityError, NextGPUError, NoPeerFound
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from tests.unit.cli.conftest import CaptureFd, Cli

_ALL = [name for name, _, _ in main._COMMANDS]


def test_help_names_every_command(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    assert all(f" {name} " in done.out for name in [*_ALL, *main._GROUPS])


def test_help_loads_no_command(cli: Cli) -> None:
    """It must come at once; torch alone takes seconds."""
    script = (
        "import sys; sys.argv = ['nextgpu', '--help']\n"
        "from nextgpu_node.cli.main import main; main()\n"
        "print(sorted({'torch', 'numpy', 'httpx', 'trio', 'psutil', 'libp2p'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["peers", "units", "gpus", "map", "run", "retry"])
def test_torch_is_loaded_only_where_tensors_are(cli: Cli, name: str) -> None:
    """`map` and `run` fork before it: who waits holds none of it, and the child no thread of it."""
    words = {
        "map": ["--inputs", "none", "--outputs", "out", "setup.ngp"],
        "run": ["--input", "none.safetensors", "setup.ngp"],
        "retry": ["0"],
    }
    script = (
        f"import sys; sys.argv = {['nextgpu', name, *words.get(name, [])]}\n"
        "from nextgpu_node.cli.main import main; main()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=cli.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["peerz"], "'peerz' is no command. Did you mean 'peers'?"),
        (["qqqq"], "'qqqq' is no command. `nextgpu --help` lists them."),
        (["peers", "--bogus"], "Unknown option: --bogus"),
        (["peers", "--kind", "tpu"], "--kind"),
        (["peers", "--limit", "many"], "--limit"),
        (["peers", "--vram", "lots"], '--vram takes a size such as 16 (GB) or "16GiB"'),
        (["cancel"], "ID"),
        (["cancel", "a/b"], "not the id of a unit"),
        (["share", "maybe"], "maybe"),
        (["status", "extra"], "extra"),
        (["--home", "/" + "x" * 120, "status"], "Use a shorter --home"),
        (["config", "set", "sharing.enabled", "perhaps"], "true or false"),
        (["config", "set", "sharing.enabld", "true"], "Did you mean sharing.enabled?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    capfd: CaptureFd,
    args: list[str],
    sentence: str,
) -> None:
    done = cli.here(monkeypatch, capfd, *args)
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("nextgpu: ")
    assert sentence in line


@pytest.mark.parametrize(
    "args", [["status"], ["peers"], ["units"], ["cancel", "ab"], ["share", "on"], ["share", "off"]]
)
def test_without_a_daemon_it_is_exit_code_3(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: CaptureFd, args: list[str]
) -> None:
    done = cli.here(monkeypatch, capfd, *args)
    assert (done.code, done.out) == (3, "")
    assert done.err == "nextgpu: No nextgpud answers here. Start it with `nextgpu up`.\n"


def test_a_mistake_ends_the_process_with_its_code(cli: Cli) -> None:
    done = cli("peerz")
    assert (done.code, len(done.err.splitlines())) == (2, 1)


def test_with_json_an_error_is_an_object_too(cli: Cli) -> None:
    done = cli("status", "--json")
    assert done.code == 3
    error = json.loads(done.out)
    assert (error["schema"], error["exit_code"]) == (1, 3)
    assert "nextgpu up" in error["error"]


def test_a_reader_that_leaves_is_no_fault(cli: Cli) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        cli.command("config", "show"),
        env=cli.environ,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (NoPeerFound(), 4),
        (RemoteProtocolError(ErrorCode.BAD_SEAL), 7),
        (ExceptionGroup("", [ExceptionGroup("", [IntegrityError()])]), 7),
        (KeyboardInterrupt(), 130),
        (BaseExceptionGroup("", [NextGPUError(), KeyboardInterrupt()]), 130),
    ],
)
def test_what_a_command_raises_becomes_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, exc: BaseException, code: int
) -> None:
    def raises(tokens: object) -> int:
        raise exc

    monkeypatch.setattr(main, "_run", raises)
    assert main.main() == code


def test_a_missing_torch_is_said_so(cli: Cli) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.argv = ['nextgpu', 'run', 'x', '--output', 'y']\n"
        "from nextgpu_node.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=cli.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nextgpu: This command needs torch. Install it: pip install ")


@pytest.mark.parametrize(
    "exc", [ValueError("a bug"), ExceptionGroup("", [NextGPUError(), ValueError("a bug")])]
)
def test_a_fault_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch, exc: Exception) -> None:
    def raises(tokens: object) -> int:
        raise exc

    monkeypatch.setattr(main, "_run", raises)
    with pytest.raises(type(exc)):
        main.main()
