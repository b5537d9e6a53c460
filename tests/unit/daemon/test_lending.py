"""What a submitter can make a lent unit wait for, and for how long: every wait has an end.

The clock is trio's own for tests, the transport holds nothing that was not read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from nextgpu_node.clock import now_ms
from nextgpu_node.core.lending import Lending, UnitState
from nextgpu_node.daemon.bandwidth import Bandwidth, Line
from nextgpu_node.daemon.lending import GRACE_S, LentUnit
from nextgpu_node.frames import FrameStream
from nextgpu_node.identity import Identity, SecretKey
from nextgpu_node.store.token_ledger import TokenLedger
from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.framing import FrameKind, encode_frame
from nextgpu_protocol.ids import PeerKey, peer_id_from_public_key
from nextgpu_protocol.limits import MAX_OFFER_LIFETIME_MS
from nextgpu_protocol.messages import Offer, Receipt, Refusal, UnitRequest
from nextgpu_protocol.sealing import CiphertextHash
from tests.support.fake_worker import FakeWorker
from tests.support.messages import POLICY, PROVIDER, REQUEST, SUBMITTER, header

MAX_SECONDS = 30
SENDER = peer_id_from_public_key(bytes(SUBMITTER.verify_key))


@dataclass
class Lent:
    """A unit of the provider's, seen from the submitter's end of its stream."""

    unit: LentUnit
    decider: Lending
    worker: FakeWorker
    stream: trio.abc.Stream
    frames: FrameStream

    async def ask(self) -> Signed[Offer]:
        request = replace(
            REQUEST,
            issued_at_ms=now_ms(),
            expires_at_ms=now_ms() + 60_000,
            max_seconds=MAX_SECONDS,
        )
        await self.frames.send(FrameKind.REQUEST, sign_message(request, SUBMITTER).data)
        return open_envelope_untrusted(Offer, await self.frames.expect_untrusted(FrameKind.OFFER))

    async def take_up(self) -> None:
        times = {"issued_at_ms": now_ms(), "expires_at_ms": now_ms() + 60_000}
        await self.frames.send(FrameKind.HEADER, header(await self.ask(), **times).data)

    async def receipt(self) -> Receipt:
        body = await self.frames.expect_untrusted(FrameKind.RECEIPT)
        return open_envelope_untrusted(Receipt, body).message

    async def over(self) -> float:
        """Until nothing is left of it; the time at which that was."""
        await self.unit.finished.wait()
        assert self.decider.used_slots == 0
        assert self.decider.state_of(self.unit.id) is UnitState.OVER
        return trio.current_time()


async def _no_former_keys(_request: Signed[UnitRequest]) -> frozenset[PeerKey]:
    return frozenset()


@asynccontextmanager
async def lent(
    tmp_path: Path, streams: Any = None, line: Line | None = None
) -> AsyncIterator[Lent]:
    """`streams`: the submitter's and the provider's end, where they are special."""
    theirs, ours = streams or trio.testing.lockstep_stream_pair()
    worker: Any = FakeWorker()

    async def take_worker(_memory_bytes: int) -> Any:
        return worker

    decider = Lending(PeerKey(bytes(PROVIDER.verify_key)), POLICY, table_version=1)
    identity, ledger = Identity(SecretKey(bytes(PROVIDER))), TokenLedger(tmp_path / "tokens")
    unit = LentUnit(
        1, ours, SENDER, decider, take_worker, "test", identity, ledger, _no_former_keys,
        line=line,
    )  # fmt: skip
    with trio.fail_after(300):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await unit.run()
                await trio.aclose_forcefully(ours)

            nursery.start_soon(serve)
            nursery.start_soon(worker.run_clock)
            yield Lent(unit, decider, worker, theirs, FrameStream(theirs))
            nursery.cancel_scope.cancel()


async def test_a_submitter_that_says_nothing_is_dropped_after_ten_seconds(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        assert await one.over() == pytest.approx(10, abs=0.1)


async def test_a_request_of_one_byte_a_second_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    frame = encode_frame(FrameKind.REQUEST, bytes(400))
    async with lent(tmp_path) as one:
        with suppress(trio.BrokenResourceError):
            for byte in frame:
                await trio.sleep(1)
                await one.stream.send_all(bytes([byte]))
        assert await one.over() <= 11


async def test_an_offer_left_to_expire_is_withdrawn_and_its_worker_wiped(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.ask()
        body = await one.frames.expect_untrusted(FrameKind.ERROR)
        assert decode_message_untrusted(Refusal, body).error_code() is ErrorCode.EXPIRED
        assert await one.over() == pytest.approx(MAX_OFFER_LIFETIME_MS / 1000, abs=0.1)
        assert one.worker.finished


async def test_an_offer_that_is_not_even_read_is_dropped_after_ten_seconds(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        request = replace(REQUEST, issued_at_ms=now_ms(), expires_at_ms=now_ms() + 60_000)
        await one.frames.send(FrameKind.REQUEST, sign_message(request, SUBMITTER).data)
        assert await one.over() <= 11
        assert one.worker.finished


async def test_a_submitter_that_sends_no_input_is_timed_out_with_a_receipt(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.take_up()
        assert (await one.receipt()).status == "timed_out"
        assert trio.current_time() == pytest.approx(MAX_SECONDS, abs=0.1)


async def test_results_that_nobody_reads_are_dropped_after_the_worker_has_ended(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.take_up()
        await one.worker.inside.send_all(encode_frame(FrameKind.DATA, bytes(1000)) * 50)
        # Its time (30 s), what was on its way (15 s), and the frame that was being sent (10 s).
        assert await one.over() <= MAX_SECONDS + 15 + 10 + 1
        assert one.worker.finished


async def test_a_receipt_that_nobody_reads_is_dropped_after_ten_seconds(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.take_up()
        await one.worker.end("exited", 10)
        assert await one.over() <= 11


async def test_what_is_going_out_when_the_unit_is_cancelled_comes_whole(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.take_up()
        await one.worker.inside.send_all(encode_frame(FrameKind.DATA, bytes(1000)) * 50)
        await one.stream.receive_some(100)  # the rest of this frame is still on its way
        await one.frames.send(FrameKind.CANCEL)
        await trio.sleep(1)
        rest = FrameStream(one.stream)
        rest._decoder.feed(encode_frame(FrameKind.DATA, bytes(1000))[:100])
        bodies = []
        while (frame := await rest.receive_untrusted()) and frame[0] is FrameKind.DATA:
            bodies.append(frame[1])
        assert frame is not None
        assert set(bodies) == {bytes(1000)}
        receipt = open_envelope_untrusted(Receipt, frame[1]).message
        assert receipt.status == "cancelled"
        assert receipt.metering.output_bytes == 1000 * len(bodies)


async def test_output_over_its_limit_is_cut_between_frames_and_the_receipt_covers_the_rest(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.take_up()
        chunk = bytes(REQUEST.output_bytes // 5)
        await one.worker.inside.send_all(encode_frame(FrameKind.DATA, chunk) * 6)
        digest, sizes = CiphertextHash(), 0
        while (frame := await one.frames.receive_untrusted()) and frame[0] is FrameKind.DATA:
            digest.update(frame[1])
            sizes += len(frame[1])
        assert frame is not None
        receipt = open_envelope_untrusted(Receipt, frame[1]).message
        assert receipt.status == "over_limit"
        assert receipt.output_hash == digest.digest()
        assert receipt.metering.output_bytes == sizes == 5 * len(chunk)


async def test_after_a_frame_that_was_cut_nothing_is_sent() -> None:
    ours, _theirs = trio.testing.lockstep_stream_pair()
    frames = FrameStream(ours)
    with trio.move_on_after(0.01):
        await frames.send(FrameKind.DATA, bytes(100))
    with pytest.raises(trio.BrokenResourceError):
        await frames.send(FrameKind.RECEIPT)


# --- the owner is back ----------------------------------------------------------------------------


async def test_a_worker_that_hears_nothing_is_killed_after_its_grace(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.take_up()
        one.unit.give_back()
        await one.worker.asked_to_give_back.wait()
        assert (await one.receipt()).status == "owner_stopped"
        assert trio.current_time() == pytest.approx(GRACE_S, abs=0.1)
        assert one.worker.finished


async def test_what_a_worker_saves_reaches_a_submitter_that_reads_slowly(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """The worker is gone in time; its last state is still on its way when the grace is over."""
    async with lent(tmp_path) as one:
        await one.take_up()
        one.unit.give_back()
        await one.worker.asked_to_give_back.wait()
        # More than is read at once: the rest of it waits in the worker's socket.
        saved = encode_frame(FrameKind.DATA, bytes(200_000)) * 5 + encode_frame(FrameKind.END)
        await one.worker.inside.send_all(saved)
        await one.worker.end("exited", 15)
        await trio.sleep(5 * GRACE_S)
        kinds = [(await one.frames.receive_untrusted() or (None,))[0] for _ in range(6)]
        assert kinds == [*[FrameKind.DATA] * 5, FrameKind.END]
        receipt = await one.receipt()
        assert (receipt.status, receipt.metering.output_bytes) == ("owner_stopped", 1_000_000)


async def test_an_offer_is_withdrawn_when_the_owner_returns(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.ask()
        one.decider.policy = replace(POLICY, sharing=False, reason="paused by its owner")
        one.unit.give_back()
        refusal = decode_message_untrusted(
            Refusal, await one.frames.expect_untrusted(FrameKind.ERROR)
        )
        assert refusal.error_code() is ErrorCode.NOT_SHARING
        assert refusal.detail == "paused by its owner"
        assert not one.worker.asked_to_give_back.is_set()


async def test_what_ran_is_remembered_without_what_it_was(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with lent(tmp_path) as one:
        await one.take_up()
        await one.frames.send(FrameKind.DATA, bytes(500))
        await one.worker.end("exited", 10)
        receipt = await one.receipt()
        past = one.unit.past
        assert past is not None
        assert (past.peer, past.status, past.kind) == (SENDER, "failed", "program")
        assert past.metering == receipt.metering
        assert open_envelope_untrusted(Receipt, past.receipt).message == receipt


async def test_the_owners_line_is_not_overrun(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    line = Line(Bandwidth(1000), Bandwidth())
    async with lent(tmp_path, line=line) as one:
        await one.take_up()
        began_s = trio.current_time()
        await one.worker.inside.send_all(encode_frame(FrameKind.DATA, bytes(1000)) * 5)
        for _ in range(5):
            await one.frames.expect_untrusted(FrameKind.DATA)
        assert 3.8 <= trio.current_time() - began_s <= 6
