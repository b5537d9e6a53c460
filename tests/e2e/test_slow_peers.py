"""Peers that are slow, silent or too many, through real processes.

Each meets a deadline or a bound; the `peer` fixture then checks that nothing is lent any more.
"""

from __future__ import annotations

import pytest
import torch
import trio

from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_protocol.envelope import open_envelope_untrusted
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.messages import Receipt
from nextgpu_protocol.records import RecordKind
from nextgpu_protocol.sealing import CiphertextHash
from tests.e2e.test_bad_input import image, loaded
from tests.support.nodes import Trio
from tests.support.raw_peer import RawPeer, RawUnit

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
