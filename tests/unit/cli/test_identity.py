"""`nextgpu identity`: what a user types and is told, and what never reaches the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nextgpu_node.identity import load_or_create
from tests.unit.api.backend import MemoryBackend
from tests.unit.cli.conftest import Cli, Done


def with_words(cli: Cli, *args: str, **words: str) -> Done:
    """`nextgpu identity …` with each word behind its own --…-fd, and no terminal."""
    fds: list[int] = []
    more: list[str] = []
    for name, text in words.items():
        reader, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        fds.append(reader)
        more += [f"--{name.replace('_', '-')}", str(reader)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nextgpu_node.cli.main", "identity", *args, *more],
            env=cli.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            pass_fds=fds,
            start_new_session=True,
        )
    finally:
        for fd in fds:
            os.close(fd)
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_key_is_sealed_shown_rotated_moved_and_opened_again(cli: Cli, tmp_path: Path) -> None:
    nothing = with_words(cli, "show")
    assert nothing.code == 2
    assert "first start" in nothing.err
    first = load_or_create(cli.paths)
    assert with_words(cli, "passphrase", new_passphrase_fd="horse\n").code == 0
    shown = json.loads(with_words(cli, "show", "--json").out)
    assert (shown["peer_id"], shown["sealed"]) == (first.peer_id, True)

    wrong = with_words(cli, "rotate", passphrase_fd="cow\n")
    assert wrong.code == 2
    assert "Nothing was changed" in wrong.err
    nobody = with_words(cli, "rotate")
    assert nobody.code == 2
    assert "no terminal" in nobody.err
    rotated = with_words(cli, "rotate", passphrase_fd="horse\n")
    assert rotated.code == 0, rotated.err
    assert first.peer_id in rotated.out

    file = tmp_path / "exported"
    exported = with_words(
        cli, "export", str(file), passphrase_fd="horse\n", export_passphrase_fd="trip\n"
    )
    assert exported.code == 0, exported.err
    assert file.stat().st_mode & 0o777 == 0o600
    cli.environ["NEXTGPU_HOME"] = str(tmp_path / "there")
    imported = with_words(cli, "import", str(file), export_passphrase_fd="trip\n")
    assert imported.code == 0, imported.err
    there = json.loads(with_words(cli, "show", "--json").out)
    assert there["former_peer_ids"] == [first.peer_id]
    assert there["peer_id"] in rotated.out
    no_export = with_words(cli, "import", str(cli.paths.identity_file), export_passphrase_fd="x")
    assert no_export.code == 2
    assert "not an exported identity" in no_export.err


async def test_the_key_of_a_running_node_is_not_replaced(cli: Cli, backend: MemoryBackend) -> None:
    before = load_or_create(cli.paths)
    done = await cli.beside("identity", "rotate")
    assert done.code == 2
    assert "Stop it first" in done.err
    assert load_or_create(cli.paths).peer_id == before.peer_id
