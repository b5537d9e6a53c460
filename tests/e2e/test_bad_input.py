"""What a hostile or clumsy submitter can do to a provider, through real processes.

Each ends in its own code, leaves no worker, and the daemon goes on serving: the `peer` fixture
checks the last two after every test.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import msgpack
import pytest
import torch
import trio

from nextgpu_node.clock import now_ms
from nextgpu_node.graph.artifact import Program
from nextgpu_node.graph.export import export
from nextgpu_node.graph.tensors import encode_tensors
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import sign_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.ids import public_key_from_peer_id
from nextgpu_protocol.limits import MAX_FRAME_BYTES, MIB
from nextgpu_protocol.messages import Refusal
from nextgpu_protocol.program import encode_program
from nextgpu_protocol.records import RecordKind, UnitManifest
from tests.support.nodes import Trio
from tests.support.raw_peer import RawPeer, RawUnit, raw_peer

MANIFEST = (RecordKind.MANIFEST, encode_message(UnitManifest(0, 0, return_carry=False)))
TEN_MINUTES_MS = 600_000


def image(**tensors: torch.Tensor) -> bytes:
    return b"".join(bytes(piece) for piece in encode_tensors(tensors))


def loaded(program: Program) -> list[tuple[RecordKind, bytes]]:
    """The records up to where steps begin."""
    constants = b"".join(bytes(piece) for piece in encode_tensors(program.constants))
    return [
        MANIFEST,
        (RecordKind.PROGRAM, encode_program(program.spec)),
        (RecordKind.CONSTANTS, constants),
    ]


async def error_code(unit: RawUnit) -> ErrorCode:
    """The code of the ERROR frame that ends an offered unit."""
    frame = await unit.frames.receive_untrusted()
    assert frame is not None
    assert frame[0] is FrameKind.ERROR
    return decode_message_untrusted(Refusal, frame[1]).error_code()


# --- the port and the frames -----------------------------------------------------------------


async def test_garbage_on_the_port_ends_one_connection(nodes: Trio, peer: RawPeer) -> None:
    port = int(nodes.provider.ready.address.split("/")[4])
    for size in (1, 64, 70_000):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(os.urandom(size))
    unit = await peer.open()
    await unit.offer()
    await unit.send(FrameKind.CANCEL)


async def test_an_oversized_frame_ends_the_stream(peer: RawPeer) -> None:
    unit = await peer.open()
    await unit.stream.send_all((MAX_FRAME_BYTES + 1).to_bytes(4) + bytes([FrameKind.REQUEST]))
    with trio.fail_after(15):
        assert await unit.stream.receive_some() == b""


async def test_a_stream_that_says_nothing_is_dropped(peer: RawPeer) -> None:
    unit = await peer.open()
    with trio.fail_after(15):
        assert await unit.stream.receive_some() == b""


# --- the request -----------------------------------------------------------------------------


async def test_a_wrong_signature_is_refused(peer: RawPeer) -> None:
    unit = await peer.open()
    good = sign_message(peer.request(), peer.key).data
    name, payload, key, signature = msgpack.unpackb(good)
    forged = msgpack.packb([name, payload, key, bytes([signature[0] ^ 1]) + signature[1:]])
    kind, body = await unit.ask_with(forged)
    assert kind is FrameKind.REFUSAL
    assert decode_message_untrusted(Refusal, body).error_code() is ErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize(
    ("age_ms", "code"),
    [(-TEN_MINUTES_MS, ErrorCode.NOT_YET_VALID), (TEN_MINUTES_MS, ErrorCode.EXPIRED)],
)
async def test_a_request_out_of_its_time_is_refused(
    peer: RawPeer, age_ms: int, code: ErrorCode
) -> None:
    issued_at_ms = now_ms() - age_ms
    unit = await peer.open()
    changes = {"issued_at_ms": issued_at_ms, "expires_at_ms": issued_at_ms + 60_000}
    assert await unit.refusal(**changes) is code


async def test_a_replayed_request_is_refused(peer: RawPeer) -> None:
    first = await peer.open()
    await first.offer()
    await first.send(FrameKind.CANCEL)
    second = await peer.open()
    kind, body = await second.ask_with(first.request_data)
    assert kind is FrameKind.REFUSAL
    assert decode_message_untrusted(Refusal, body).error_code() is ErrorCode.REPLAYED


async def test_a_request_for_another_node_is_refused(nodes: Trio, peer: RawPeer) -> None:
    unit = await peer.open()
    other = public_key_from_peer_id(nodes.first.ready.peer_id)
    assert await unit.refusal(provider_key=other) is ErrorCode.WRONG_PEER


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"memory_bytes": 2048 * MIB}, ErrorCode.OVER_LIMIT),
        ({"max_seconds": 61}, ErrorCode.OVER_LIMIT),
        ({"input_bytes": 65 * MIB}, ErrorCode.OVER_LIMIT),
        ({"device_kind": "cuda"}, ErrorCode.NO_SUCH_DEVICE),
        ({"table_version": 9999}, ErrorCode.OLD_TABLE),
        ({"suite": 2}, ErrorCode.UNKNOWN_SUITE),
    ],
)
async def test_asking_for_more_than_there_is_is_refused(
    peer: RawPeer, asked: dict[str, object], code: ErrorCode
) -> None:
    unit = await peer.open()
    assert await unit.refusal(**asked) is code


async def test_a_node_that_does_not_share_says_so(nodes: Trio) -> None:
    async with raw_peer(nodes.first.ready.peer_id, nodes.first.ready.address) as peer:
        unit = await peer.open()
        assert await unit.refusal() is ErrorCode.NOT_SHARING


async def test_a_second_unit_is_told_that_the_node_is_busy(peer: RawPeer) -> None:
    first = await peer.open()
    await first.take_up()
    second = await peer.open()
    assert await second.refusal() is ErrorCode.BUSY
    await first.send(FrameKind.CANCEL)
    await first.answers()


# --- the header ------------------------------------------------------------------------------


async def test_a_header_for_another_offer_is_refused(peer: RawPeer) -> None:
    first = await peer.open()
    old_offer = await first.offer()
    await first.send(FrameKind.CANCEL)
    assert await first.stream.receive_some() == b""
    second = await peer.open()
    await second.offer()
    replayed = sign_message(second.header(old_offer), peer.key)
    await second.send(FrameKind.HEADER, replayed.data)
    assert await error_code(second) is ErrorCode.WRONG_OFFER


async def test_data_before_the_header_ends_the_unit(peer: RawPeer) -> None:
    unit = await peer.open()
    await unit.offer()
    await unit.send(FrameKind.DATA, b"too early")
    assert await error_code(unit) is ErrorCode.UNEXPECTED_MESSAGE


# --- the sealed stream -----------------------------------------------------------------------


async def test_a_flipped_bit_does_not_open(peer: RawPeer) -> None:
    unit = await peer.open()
    await unit.take_up()
    chunk = bytearray(unit.sealer.seal(bytes(5000)))
    chunk[2500] ^= 1
    await unit.send(FrameKind.DATA, bytes(chunk))
    code, receipt = await unit.failure()
    assert code is ErrorCode.BAD_SEAL
    assert receipt.status == "protocol_error"


async def test_a_stream_without_its_final_chunk_is_truncated(
    peer: RawPeer, linear: Program
) -> None:
    unit = await peer.open()
    await unit.take_up()
    await unit.write(*loaded(linear))
    await unit.send(FrameKind.END)
    code, _ = await unit.failure()
    assert code is ErrorCode.TRUNCATED


async def test_an_unknown_operator_is_named_and_not_run(peer: RawPeer, linear: Program) -> None:
    (node, *rest) = linear.spec.step.nodes
    step = replace(linear.spec.step, nodes=(replace(node, op="aten.from_file.default"), *rest))
    hostile = replace(linear.spec, step=step)
    unit = await peer.open()
    await unit.take_up()
    await unit.write(MANIFEST, (RecordKind.PROGRAM, encode_program(hostile)), final=True)
    code, receipt = await unit.failure()
    assert code is ErrorCode.UNKNOWN_OPERATOR
    assert receipt.status == "failed"


async def test_bytes_that_are_no_program_are_refused(peer: RawPeer) -> None:
    unit = await peer.open()
    await unit.take_up()
    await unit.write(MANIFEST, (RecordKind.PROGRAM, os.urandom(500)), final=True)
    code, _ = await unit.failure()
    assert code in (ErrorCode.MALFORMED, ErrorCode.BAD_PROGRAM)


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, 5), torch.ones(2, 4, dtype=torch.int64), torch.ones(8)]
)
async def test_tensors_of_another_shape_or_dtype_are_refused(
    peer: RawPeer, linear: Program, tensor: torch.Tensor
) -> None:
    unit = await peer.open()
    await unit.take_up()
    step = (RecordKind.STEP, image(**{linear.spec.xs[0].name: tensor}))
    await unit.write(*loaded(linear), step, final=True)
    code, receipt = await unit.failure()
    assert code is ErrorCode.BAD_TENSORS
    assert receipt.status == "failed"


async def test_records_out_of_order_are_refused(peer: RawPeer, linear: Program) -> None:
    unit = await peer.open()
    await unit.take_up()
    await unit.write((RecordKind.PROGRAM, encode_program(linear.spec)), MANIFEST, final=True)
    code, _ = await unit.failure()
    assert code is ErrorCode.UNEXPECTED_MESSAGE


# --- limits and losses -----------------------------------------------------------------------


async def test_more_input_than_granted_ends_the_unit(peer: RawPeer) -> None:
    unit = await peer.open()
    await unit.take_up()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            async def flood() -> None:
                for _ in range(64):
                    await unit.send(FrameKind.DATA, unit.sealer.seal(bytes(256 * 1024)))

            nursery.start_soon(flood)
            _, receipt = await unit.answers()
            nursery.cancel_scope.cancel()
    # The worker refuses the zeros as records, or the daemon counts them: whichever is first.
    assert receipt.status in ("over_limit", "protocol_error", "done")
    assert receipt.metering.input_bytes <= 9 * MIB


async def test_a_unit_past_its_time_is_killed(peer: RawPeer, linear: Program) -> None:
    unit = await peer.open()
    await unit.take_up(max_seconds=1)
    await unit.write(*loaded(linear))
    with trio.fail_after(10):
        _, receipt = await unit.answers()
    assert receipt.status == "timed_out"
    assert receipt.wipe
    assert receipt.failed_wipe_steps == []


async def test_a_cancelled_unit_is_wiped_and_receipted(peer: RawPeer, linear: Program) -> None:
    unit = await peer.open()
    await unit.take_up()
    await unit.write(*loaded(linear))
    await unit.send(FrameKind.CANCEL)
    _, receipt = await unit.answers()
    assert receipt.status == "cancelled"


async def test_a_worker_that_dies_is_reported_as_crashed(
    nodes: Trio, peer: RawPeer, linear: Program
) -> None:
    (serving,) = nodes.worker_pids()
    unit = await peer.open()
    await unit.take_up()
    await unit.write(*loaded(linear))
    os.kill(serving, signal.SIGKILL)
    _, receipt = await unit.answers()
    assert receipt.status == "worker_crashed"


async def test_a_worker_that_dies_before_its_assignment_is_reported_as_crashed(
    nodes: Trio, peer: RawPeer
) -> None:
    (serving,) = nodes.worker_pids()
    unit = await peer.open()
    offer = await unit.offer()
    os.kill(serving, signal.SIGKILL)
    await nodes.wait_gone(serving)
    await unit.accept(offer)
    _, receipt = await unit.answers()
    assert receipt.status == "worker_crashed"


async def test_a_submitter_that_vanishes_leaves_no_worker(
    nodes: Trio, peer: RawPeer, linear: Program
) -> None:
    (serving,) = nodes.worker_pids()
    unit = await peer.open()
    await unit.take_up()
    await unit.write(*loaded(linear)[:2])
    await unit.stream.reset()
    await nodes.wait_idle()
    assert serving not in nodes.worker_pids()


async def test_a_program_that_wants_more_memory_than_its_limit_is_ended(peer: RawPeer) -> None:
    class Bomb(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.expand(1 << 16, 1 << 16).contiguous().sum()

    program = export(Bomb(), (torch.ones(1, 1),))
    unit = await peer.open()
    await unit.take_up()
    step = (RecordKind.STEP, image(**{program.spec.xs[0].name: torch.ones(1, 1)}))
    await unit.write(*loaded(program), step, final=True)
    code, receipt = await unit.failure()
    assert code in (ErrorCode.OVER_LIMIT, ErrorCode.OUT_OF_MEMORY)
    assert receipt.status in ("over_limit", "out_of_memory")
