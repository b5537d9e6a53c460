"""Peers that are slow, silent or too many, through real processes.

Each meets a deadline or a bound; the `peer` fixture then checks that nothing is lent any more.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

import pytest
import torch
import trio
from nacl.signing import SigningKey

from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_protocol.envelope import open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.framing import FrameKind, encode_frame
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.messages import Receipt
from nextgpu_protocol.records import RecordKind
from nextgpu_protocol.sealing import CiphertextHash
from tests.e2e.test_bad_input import error_code, image, loaded
from tests.support.nodes import Trio
from tests.support.raw_peer import RawPeer, RawUnit, raw_peer

OUTPUT_BYTES = 32 * MIB


class Grow(torch.nn.Module):
    """Little in, much out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(OUTPUT_BYTES // 8)


async def much_output(peer: RawPeer, *, max_seconds: int) -> RawUnit:
    """A unit whose results fill every buffer on the way; nobody reads them yet."""
    program: Program = export(Grow(), (torch.ones(1),))
    unit = await peer.open()
    await unit.take_up(
        memory_bytes=512 * MIB, output_bytes=2 * OUTPUT_BYTES, max_seconds=max_seconds
    )
    step = (RecordKind.STEP, image(**{program.spec.xs[0].name: torch.ones(1)}))
    await unit.write(*loaded(program), step, final=True)
    return unit


@pytest.mark.slow
async def test_a_submitter_that_never_reads_its_results_loses_the_slot(
    nodes: Trio, peer: RawPeer
) -> None:
    await much_output(peer, max_seconds=2)
    # Its time (2 s), what was on its way (15 s), the frame that was being sent (10 s).
    with trio.fail_after(2 + 15 + 10 + 10):
        await nodes.wait_idle()


async def test_a_unit_that_is_cancelled_while_its_results_wait_ends_in_whole_frames(
    peer: RawPeer,
) -> None:
    unit = await much_output(peer, max_seconds=30)
    await trio.sleep(1)  # until every buffer between the worker and here is full
    await unit.send(FrameKind.CANCEL)
    digest, sizes = CiphertextHash(), 0
    with trio.fail_after(20):
        while (frame := await unit.frames.receive_untrusted()) is not None:
            kind, body = frame
            if kind is FrameKind.RECEIPT:
                receipt = open_envelope_untrusted(Receipt, body).message
                break
            assert kind is FrameKind.DATA
            unit.opener.open_untrusted(body)
            digest.update(body)
            sizes += len(body)
    assert receipt.status == "cancelled"
    assert receipt.output_hash == digest.digest()
    assert receipt.metering.output_bytes == sizes < OUTPUT_BYTES


async def test_five_hundred_streams_of_one_peer_leave_room_for_another(
    nodes: Trio, peer: RawPeer
) -> None:
    """Most are refused at once; those that were taken say nothing and are dropped after 10 s."""
    opened, refused = 0, 0

    async def open_one() -> None:
        nonlocal opened, refused
        try:
            await peer.open()
            opened += 1
        except (PeerLost, NetworkError):
            refused += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(open_one)
        assert 0 < opened <= 64
        assert refused == 500 - opened
        address = nodes.provider.ready.address
        async with raw_peer(nodes.provider.ready.peer_id, address) as other:
            unit = await other.open()
            await unit.offer()
            await unit.send(FrameKind.CANCEL)


async def test_a_flood_of_requests_takes_one_slot_and_is_told_so(peer: RawPeer) -> None:
    """Each by a key of its own, since keys cost nothing."""
    codes: Counter[str] = Counter()
    with trio.fail_after(60):
        first = await peer.open()
        await first.offer()
        for _ in range(60):
            unit = await peer.open()
            peer.key = SigningKey(os.urandom(32))
            codes[(await unit.refusal()).name] += 1
            await unit.stream.aclose()
        await first.send(FrameKind.CANCEL)
    assert codes == {"BUSY": 60}


@pytest.mark.slow
async def test_a_request_of_one_byte_a_second_is_not_waited_for(peer: RawPeer) -> None:
    unit = await peer.open()
    request = sign_message(peer.request(), peer.key).data
    began_s = trio.current_time()
    with suppress(PeerLost):
        for byte in encode_frame(FrameKind.REQUEST, request):
            await unit.stream.send_all(bytes([byte]))
            with trio.move_on_after(1):
                assert await unit.stream.receive_some() == b""
                break
    assert trio.current_time() - began_s < 14


@pytest.mark.slow
async def test_offers_left_to_expire_are_withdrawn(nodes: Trio, peer: RawPeer) -> None:
    unit = await peer.open()
    await unit.offer()
    with trio.fail_after(75):
        assert await error_code(unit) is ErrorCode.EXPIRED
    await nodes.wait_idle()
