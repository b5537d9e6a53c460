"""What a service manager hears, on a real datagram socket."""

from __future__ import annotations

import os
import secrets
import select
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from nextgpu_node.daemon.sdnotify import Notifier


@asynccontextmanager
async def manager(address: str) -> AsyncIterator[trio.socket.SocketType]:
    """A socket like systemd's at NOTIFY_SOCKET=`address`."""
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as listener:
        await listener.bind("\0" + address[1:] if address.startswith("@") else address)
        yield listener


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "abstract":
        return "@nextgpu-test-" + secrets.token_hex(8)
    return str(tmp_path / "notify")


async def received(listener: trio.socket.SocketType) -> str:
    with trio.fail_after(5):
        data: bytes = await listener.recv(4096)
    return data.decode()


async def test_states_arrive_as_one_datagram_each(address: str) -> None:
    async with manager(address) as listener:
        notifier = Notifier({"NOTIFY_SOCKET": address})
        notifier.ready("sharing is off")
        notifier.status("two units")
        notifier.stopping()
        assert await received(listener) == "READY=1\nSTATUS=sharing is off"
        assert await received(listener) == "STATUS=two units"
        assert await received(listener) == "STOPPING=1"


async def test_a_status_can_not_smuggle_a_second_assignment(address: str) -> None:
    async with manager(address) as listener:
        Notifier({"NOTIFY_SOCKET": address}).status("fine\nMAINPID=1\r\n")
        assert await received(listener) == "STATUS=fine MAINPID=1"


async def test_the_watchdog_pings_twice_per_period_while_the_loop_turns(
    address: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with manager(address) as listener, trio.open_nursery() as nursery:
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000"})
        assert notifier.watchdog_s == 30.0
        started = trio.current_time()
        nursery.start_soon(notifier.run_watchdog)
        for ping in range(4):
            # recv is ready at once or after the task's own sleep: no timeout of ours in between.
            assert (await listener.recv(64)) == b"WATCHDOG=1"
            assert trio.current_time() - started == pytest.approx(15 * ping)
        nursery.cancel_scope.cancel()


async def test_a_loop_that_stands_still_is_silent(address: str) -> None:
    async with manager(address) as listener, trio.open_nursery() as nursery:
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "10000"})
        nursery.start_soon(notifier.run_watchdog)
        await received(listener)
        time.sleep(0.1)  # noqa: ASYNC251 - the blocked loop is what is tested: ten periods
        assert waiting(listener) <= 1
        nursery.cancel_scope.cancel()


def waiting(listener: trio.socket.SocketType) -> int:
    """How many datagrams have arrived, without letting the loop turn."""
    count = 0
    while select.select([listener.fileno()], [], [], 0)[0]:
        os.read(listener.fileno(), 64)
        count += 1
    return count


async def test_without_a_manager_nothing_is_sent_and_nothing_waits() -> None:
    for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}):
        notifier = Notifier({**environ, "WATCHDOG_USEC": "1000"})
        notifier.ready()
        with trio.fail_after(5):
            await notifier.run_watchdog()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "2000000"}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_the_one_meant_for_this_process(
    environ: dict[str, str], expected: float | None
) -> None:
    assert Notifier({"NOTIFY_SOCKET": "@x", **environ}).watchdog_s == expected


async def test_a_manager_that_is_gone_or_full_is_not_our_end(tmp_path: Path) -> None:
    gone = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    gone.ready()
    full_path = str(tmp_path / "full")
    async with manager(full_path):
        full = Notifier({"NOTIFY_SOCKET": full_path})
        for _ in range(1000):
            full.status("x" * 1000)
