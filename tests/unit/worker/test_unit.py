"""The worker's first word, and its assignment: the daemon is not simply believed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from nextgpu_node.worker.channel import Channel
from nextgpu_node.worker.main import serve
from nextgpu_node.worker.unit import WorkerExitCode
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.local import Assignment
from tests.support.messages import header, offer

LIMITS: dict[str, int | str] = {"device": "cpu", "max_threads": 1, "memory_bytes": 64 * MIB}
DEADLINE_S = 20


class RunningWorker:
    """`serve` in a thread of this process: the code of the worker without its walls."""

    def __init__(self, ours: socket.socket, ending: Future[int]) -> None:
        self.socket = ours
        self.channel = channel = Channel(ours)
        self._ending = ending
        self.public_key = channel.expect_untrusted(FrameKind.HELLO)

    def assign(self, offer_data: bytes, header_data: bytes) -> None:
        body = encode_message(Assignment(offer_data, header_data))
        self.channel.send(FrameKind.ASSIGN, body)

    def exit_code(self) -> int:
        return self._ending.result(DEADLINE_S)


@pytest.fixture
def worker() -> Iterator[RunningWorker]:
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_S)
    with ThreadPoolExecutor(1) as pool, ours, theirs:
        yield RunningWorker(ours, pool.submit(serve, theirs, LIMITS))
        ours.close()


def test_each_worker_has_a_key_of_its_own(worker: RunningWorker) -> None:
    assert len(worker.public_key) == 32
    assert worker.public_key != bytes(32)


def test_an_assignment_that_fits_is_taken(worker: RunningWorker) -> None:
    made = offer(one_time_key=worker.public_key)
    worker.assign(made.data, header(made).data)
    assert worker.channel.expect_untrusted(FrameKind.DATA)


def test_an_offer_of_another_workers_key_is_not_taken(worker: RunningWorker) -> None:
    made = offer(one_time_key=bytes([7]) * 32)
    worker.assign(made.data, header(made).data)
    assert worker.exit_code() == WorkerExitCode.PROTOCOL_ERROR


def test_a_header_for_another_offer_is_not_taken(worker: RunningWorker) -> None:
    made = offer(one_time_key=worker.public_key)
    other = offer(one_time_key=worker.public_key, price=1)
    worker.assign(made.data, header(other).data)
    assert worker.exit_code() == WorkerExitCode.PROTOCOL_ERROR


def test_a_header_that_is_not_signed_is_not_taken(worker: RunningWorker) -> None:
    made = offer(one_time_key=worker.public_key)
    signed = header(made).data
    worker.assign(made.data, signed[:-1] + bytes([signed[-1] ^ 1]))
    assert worker.exit_code() == WorkerExitCode.PROTOCOL_ERROR


def test_a_daemon_that_leaves_ends_the_worker(worker: RunningWorker) -> None:
    worker.socket.close()
    assert worker.exit_code() == WorkerExitCode.ABANDONED
