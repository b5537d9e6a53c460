from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from nextgpu_node.api.sockets import AlreadyRunning, listen_private, remove_listening
from nextgpu_node.errors import ConfigError, NextGPUError


def test_a_second_daemon_on_the_same_socket_is_refused(socket_path: Path) -> None:
    with listen_private(socket_path):
        with pytest.raises(AlreadyRunning, match="already serves"):
            listen_private(socket_path)
        # The first one still has its name.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(socket_path))


def test_a_daemon_whose_queue_is_full_is_alive(socket_path: Path) -> None:
    with listen_private(socket_path) as listener:
        listener.listen(0)
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(str(socket_path))
        with pytest.raises(AlreadyRunning):
            listen_private(socket_path)
        for client in waiting:
            client.close()


def test_a_stale_socket_is_replaced(socket_path: Path) -> None:
    # Closed without removing the file: what a killed daemon leaves behind.
    listen_private(socket_path).close()
    assert socket_path.is_socket()
    with listen_private(socket_path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_path))


def test_a_file_that_is_no_socket_is_never_removed(socket_path: Path) -> None:
    socket_path.parent.mkdir(mode=0o700)
    socket_path.write_text("mine")
    with pytest.raises(NextGPUError, match="in the way"):
        listen_private(socket_path)
    assert socket_path.read_text() == "mine"


def test_a_directory_open_to_others_is_refused(socket_path: Path) -> None:
    socket_path.parent.mkdir()
    socket_path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        listen_private(socket_path)


def test_the_mode_does_not_depend_on_the_umask(socket_path: Path) -> None:
    old = os.umask(0)
    try:
        with listen_private(socket_path):
            assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    finally:
        os.umask(old)


def test_children_do_not_inherit_the_listener(socket_path: Path) -> None:
    with listen_private(socket_path) as listener:
        assert not listener.get_inheritable()


def test_a_successor_keeps_its_socket(socket_path: Path) -> None:
    old = listen_private(socket_path)
    socket_path.unlink()
    with listen_private(socket_path):
        remove_listening(socket_path, old)
        assert socket_path.is_socket()
