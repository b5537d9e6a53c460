"""A daemon and a provider in one task, honest except where a test makes it lie.

It speaks the unit socket's frames over a real unix socket and does the provider's cryptography, so
that each lie is exactly one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import trio
from nacl.signing import SigningKey

from nextgpu_node.clock import now_ms
from nextgpu_node.frames import FrameStream
from nextgpu_node.graph.tensors import encode_tensors
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.local import SIGNABLE, SignDraft
from nextgpu_protocol.messages import Receipt, Refusal, UnitHeader, UnitRequest
from nextgpu_protocol.records import RecordKind, RecordWriter, UnitSummary
from nextgpu_protocol.sealing import CiphertextHash, KeyPair, Sealer, transcript_hash
from tests.support.messages import METERING, OFFER, PROVIDER, SUBMITTER

Change = Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


@dataclass
class LyingPeer:
    """Each field is one place for a lie; the defaults are honest."""

    offer_key: SigningKey = PROVIDER
    receipt_key: SigningKey = PROVIDER
    refuse: ErrorCode | None = None
    change_draft: Change = _same
    change_offer: Change = _same
    change_receipt: Change = _same
    change_chunk: Callable[[bytes], bytes] = _same
    say_done: bool = True
    seal_final: bool = True
    send_end: bool = True
    send_receipt: bool = True
    say_more: bool = False  # a result after DONE
    silent_after: str = ""  # "connect", "request", "header", "input", "results" or "end"
    result: dict[str, torch.Tensor] = field(default_factory=dict)
    input_sizes: list[int] = field(default_factory=list)  # of the DATA bodies that came

    async def serve(self, stream: trio.SocketStream) -> None:
        self._frames = FrameStream(stream)
        self._sent = CiphertextHash()
        self._received = CiphertextHash()
        async with stream:
            try:
                await self._unit()
            except trio.BrokenResourceError:
                return  # the submitter has seen enough

    async def _unit(self) -> None:
        await self._frames.expect_untrusted(FrameKind.CONNECT)
        await self._go_on_after("connect")
        await self._frames.send(FrameKind.CONNECTED, bytes(SUBMITTER.verify_key))
        await self._sign()
        envelope = await self._frames.expect_untrusted(FrameKind.REQUEST)
        await self._go_on_after("request")
        if self.refuse is not None:
            await self._frames.send(
                FrameKind.REFUSAL, encode_message(Refusal(int(self.refuse), ""))
            )
            return
        await self._offer(envelope)
        await self._sign()
        await self._run(await self._frames.expect_untrusted(FrameKind.HEADER))

    async def _go_on_after(self, stage: str) -> None:
        if stage == self.silent_after:
            await trio.sleep_forever()

    async def _sign(self) -> None:
        """The daemon's part."""
        draft = decode_message_untrusted(
            SignDraft, await self._frames.expect_untrusted(FrameKind.SIGN)
        )
        message = decode_message_untrusted(SIGNABLE[draft.type], draft.payload)
        signed = sign_message(self.change_draft(message), SUBMITTER)
        await self._frames.send(FrameKind.SIGNED, signed.data)

    async def _offer(self, envelope: bytes) -> None:
        request = open_envelope_untrusted(UnitRequest, envelope)
        self._otk = KeyPair(os.urandom(32))
        issued_at_ms = now_ms()
        offer = replace(
            OFFER,
            one_time_key=self._otk.public,
            request_hash=request.hash,
            submitter_key=request.signer,
            memory_bytes=request.message.memory_bytes,
            max_seconds=request.message.max_seconds,
            issued_at_ms=issued_at_ms,
            expires_at_ms=issued_at_ms + 30_000,
        )
        self._signed_offer = sign_message(self.change_offer(offer), self.offer_key)
        await self._frames.send(FrameKind.OFFER, self._signed_offer.data)

    async def _run(self, header_data: bytes) -> None:
        header = open_envelope_untrusted(UnitHeader, header_data)
        self._transcript = transcript_hash(self._signed_offer.data, header_data)
        keys = self._otk.worker_keys_untrusted(header.message.ephemeral_key, self._transcript)
        await self._go_on_after("header")
        while (frame := await self._frames.receive_untrusted()) is not None:
            if frame[0] is FrameKind.END:
                break
            self._received.update(frame[1])
            self.input_sizes.append(len(frame[1]))
        await self._go_on_after("input")
        await self._results(Sealer(keys.outbound))
        await self._go_on_after("results")
        if self.send_end:
            await self._frames.send(FrameKind.END)
        await self._go_on_after("end")
        if self.send_receipt:
            await self._receipt(header.message.unit_id)

    async def _results(self, sealer: Sealer) -> None:
        await self._data(sealer.preamble)
        writer = RecordWriter()
        chunks = list(writer.write(RecordKind.STARTED, [b""]))
        chunks += writer.write(RecordKind.RESULT, encode_tensors(self.result))
        if self.say_done:
            done = encode_message(UnitSummary(1, 0, 0, False))
            chunks += writer.write(RecordKind.DONE, [done])
        if self.say_more:
            chunks += writer.write(RecordKind.RESULT, encode_tensors(self.result))
        chunks += writer.flush()
        for index, chunk in enumerate(chunks):
            final = self.seal_final and index == len(chunks) - 1
            await self._data(self.change_chunk(sealer.seal(chunk, final=final)))

    async def _data(self, body: bytes) -> None:
        self._sent.update(body)
        await self._frames.send(FrameKind.DATA, body)

    async def _receipt(self, unit_id: bytes) -> None:
        receipt = Receipt(
            unit_id=unit_id,
            transcript_hash=self._transcript,
            input_hash=self._received.digest(),
            output_hash=self._sent.digest(),
            status="done",
            metering=METERING,
            isolation=("seccomp",),
            wipe=(),
            finished_at_ms=now_ms(),
        )
        signed = sign_message(self.change_receipt(receipt), self.receipt_key)
        await self._frames.send(FrameKind.RECEIPT, signed.data)
        await self._sign()
        await self._frames.expect_untrusted(FrameKind.ACK)
