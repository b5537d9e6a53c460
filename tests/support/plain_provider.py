"""A provider without walls: the worker's own code in a thread, the daemon's part in a few lines."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio
from nacl.signing import SigningKey

from nextgpu_node.clock import now_ms
from nextgpu_node.frames import ByteStream, FrameStream
from nextgpu_node.worker.main import serve
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted, sign_message
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.local import Assignment
from nextgpu_protocol.messages import Offer, Receipt, ReceiptAck, UnitHeader, UnitRequest
from nextgpu_protocol.sealing import CiphertextHash, transcript_hash
from tests.support.messages import METERING, OFFER

LIMITS: dict[str, int | str] = {"device": "cpu", "max_threads": 1, "memory_bytes": 256 * MIB}


async def lend(stream: ByteStream, key: SigningKey) -> Signed[ReceiptAck]:
    """One unit from its request to its acknowledgement."""
    frames = FrameStream(stream)
    request_data = await frames.expect_untrusted(FrameKind.REQUEST)
    request = open_envelope_untrusted(UnitRequest, request_data)
    async with _worker() as worker:
        offer = _offer(request, await worker.expect_untrusted(FrameKind.HELLO), key)
        await frames.send(FrameKind.OFFER, offer.data)
        header_data = await frames.expect_untrusted(FrameKind.HEADER)
        await worker.send(FrameKind.ASSIGN, encode_message(Assignment(offer.data, header_data)))
        return await _Relay(frames, worker).run(offer, header_data, key)


@asynccontextmanager
async def _worker() -> AsyncIterator[FrameStream]:
    """Leaving ends it: it reads the end of its socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, serve, theirs, LIMITS)
            with ours:
                yield FrameStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))


def _offer(request: Signed[UnitRequest], one_time_key: bytes, key: SigningKey) -> Signed[Offer]:
    asked, issued_at_ms = request.message, now_ms()
    offer = replace(
        OFFER,
        offer_id=os.urandom(16),
        one_time_key=one_time_key,
        request_hash=request.hash,
        submitter_key=request.signer,
        memory_bytes=asked.memory_bytes,
        max_seconds=asked.max_seconds,
        input_bytes=asked.input_bytes,
        output_bytes=asked.output_bytes,
        issued_at_ms=issued_at_ms,
        expires_at_ms=issued_at_ms + 30_000,
    )
    return sign_message(offer, key)


class _Relay:
    """Both directions, hashed as they pass."""

    def __init__(self, peer: FrameStream, worker: FrameStream) -> None:
        self._peer = peer
        self._worker = worker
        self._received, self._sent = CiphertextHash(), CiphertextHash()

    async def run(
        self, offer: Signed[Offer], header_data: bytes, key: SigningKey
    ) -> Signed[ReceiptAck]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, self._peer, self._worker, self._received)
            nursery.start_soon(self._pump, self._worker, self._peer, self._sent)
        header = open_envelope_untrusted(UnitHeader, header_data).message
        receipt = self._receipt(header, transcript_hash(offer.data, header_data))
        signed = sign_message(receipt, key)
        await self._peer.send(FrameKind.RECEIPT, signed.data)
        ack_data = await self._peer.expect_untrusted(FrameKind.ACK)
        ack = open_envelope_untrusted(ReceiptAck, ack_data)
        assert ack.message.receipt_hash == signed.hash
        return ack

    async def _pump(self, source: FrameStream, sink: FrameStream, digest: CiphertextHash) -> None:
        """Frames up to END."""
        kind = FrameKind.DATA
        while kind is not FrameKind.END:
            frame = await source.receive_untrusted()
            assert frame is not None
            kind, body = frame
            if kind is FrameKind.DATA:
                digest.update(body)
            await sink.send(kind, body)

    def _receipt(self, header: UnitHeader, transcript: bytes) -> Receipt:
        return Receipt(
            unit_id=header.unit_id,
            transcript_hash=transcript,
            input_hash=self._received.digest(),
            output_hash=self._sent.digest(),
            status="done",
            metering=METERING,
            isolation=(),
            wipe=(),
            finished_at_ms=now_ms(),
        )
