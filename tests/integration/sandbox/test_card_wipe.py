"""What is done about a card's memory after a unit, on a machine without a card: who asks whom, and
what the report says.  tests/gpu has the real thing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nextgpu_node.sandbox.launcher import Launcher, Worker
from nextgpu_node.sandbox.policy import Plan
from nextgpu_protocol.framing import FrameKind, encode_frame
from tests.support.sandbox import SMALL, read_frame, running_launcher

pytestmark = pytest.mark.sandbox

ON_CARD = dataclasses.replace(SMALL, device="cuda:0")


async def _use(worker: Worker) -> None:
    await worker.stream.send_all(encode_frame(FrameKind.DATA, b"abc"))
    await read_frame(worker.stream)


async def _step(worker: Worker) -> bool | None:
    report = await worker.finish()
    return dict(report.steps).get("gpu-memory-cleared")


async def test_only_a_unit_on_a_card_has_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def clear(launcher: Launcher, plan: Plan, order: bytes) -> tuple[int, int]:
        return 100, 0

    monkeypatch.setattr(Launcher, "_ask_card", clear)
    async with running_launcher(tmp_path) as launcher:
        on_processor, idle = await launcher.spawn(SMALL), await launcher.spawn(ON_CARD)
        await _use(on_processor)
        assert await _step(on_processor) is None
        assert await _step(idle) is None
        used = await launcher.spawn(ON_CARD)
        await _use(used)
        assert await _step(used) is True


@pytest.mark.parametrize(
    ("clear", "look"), [((100, 1), (100, 0)), ((100, 0), (100, 1)), ((0, 0), (0, 0))]
)
async def test_what_is_left_on_the_card_is_reported(
    clear: tuple[int, int],
    look: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answer(launcher: Launcher, plan: Plan, order: bytes) -> tuple[int, int]:
        return {b"clear": clear, b"look": look}[order]

    monkeypatch.setattr(Launcher, "_ask_card", answer)
    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(ON_CARD)
        await _use(worker)
        report = await worker.finish()
    assert report.failed == ["gpu-memory-cleared"]


async def test_a_card_that_another_unit_uses_is_left_alone_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    async def clear(launcher: Launcher, plan: Plan, order: bytes) -> tuple[int, int]:
        asked.append(order)
        return 100, 0

    monkeypatch.setattr(Launcher, "_ask_card", clear)
    async with running_launcher(tmp_path) as launcher:
        first, second = await launcher.spawn(ON_CARD), await launcher.spawn(ON_CARD)
        for worker in (first, second):
            await _use(worker)
        assert await _step(first) is False
        assert asked == []
        assert await _step(second) is True
        assert asked == [b"clear", b"look"]


@pytest.mark.slow  # torch is imported for it
@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="there is a card here")
async def test_without_a_driver_the_step_has_not_held(tmp_path: Path) -> None:
    """The process that clears is a confined fork like the unit's own, and finds no card here."""
    async with running_launcher(tmp_path) as launcher:
        worker = await launcher.spawn(ON_CARD)
        await _use(worker)
        assert await _step(worker) is False
        # Nothing of the attempt is left either.
        assert not launcher._slots
