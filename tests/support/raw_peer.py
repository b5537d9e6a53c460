"""A submitter that speaks the protocol by hand, so that it can break it at any point.

It is a libp2p node of its own in the test's process, with a key that only it has.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from nacl.signing import SigningKey

from nextgpu_node.clock import now_ms
from nextgpu_node.frames import FrameStream
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.settings import P2PSettings
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_protocol.codec import decode_message_untrusted
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.ids import public_key_from_peer_id
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.messages import (
    SUITE,
    Offer,
    Receipt,
    Refusal,
    UnitHeader,
    UnitRequest,
)
from nextgpu_protocol.records import Record, RecordKind, RecordWriter, read_records_untrusted
from nextgpu_protocol.sealing import KeyPair, Opener, Sealer, transcript_hash

UNIT_PROTOCOL = "/nextgpu/unit/1"


@dataclass
class RawPeer:
    """`network` runs; `key` signs; `provider_id` is whom every method talks to."""

    network: Network
    key: SigningKey
    provider_id: str
    units: list[RawUnit] = field(default_factory=list)

    def request(self, **changes: Any) -> UnitRequest:
        fields: dict[str, Any] = {
            "suite": SUITE,
            "nonce": os.urandom(16),
            "provider_key": public_key_from_peer_id(self.provider_id),
            "device_kind": "any",
            "device_memory_bytes": 0,
            "memory_bytes": 64 * MIB,
            "max_seconds": 30,
            "input_bytes": 8 * MIB,
            "output_bytes": 8 * MIB,
            "table_version": 1,
            "issued_at_ms": now_ms(),
            "expires_at_ms": now_ms() + 60_000,
            "token": b"",
        }
        return UnitRequest(**{**fields, **changes})

    async def open(self) -> RawUnit:
        stream = await self.network.open_stream(self.provider_id, UNIT_PROTOCOL)
        self.units.append(RawUnit(self, stream))
        return self.units[-1]

    async def leave(self) -> None:
        """End every unit: a connection that is only cut would be waited for (47-resuming.md)."""
        for unit in self.units:
            await unit.stream.reset()


class RawUnit:
    """One stream.  `take_up` brings it to where ciphertext flows."""

    def __init__(self, peer: RawPeer, stream: PeerStream) -> None:
        self.peer = peer
        self.stream = stream
        self.frames = FrameStream(stream)
        self.writer = RecordWriter()

    async def send(self, kind: FrameKind, body: bytes = b"") -> None:
        await self.frames.send(kind, body)

    async def ask(self, **changes: Any) -> tuple[FrameKind, bytes]:
        """Send a request; the answer as it came."""
        request = sign_message(self.peer.request(**changes), self.peer.key)
        return await self.ask_with(request.data)

    async def ask_with(self, envelope: bytes) -> tuple[FrameKind, bytes]:
        self.request_data = envelope
        await self.send(FrameKind.REQUEST, envelope)
        frame = await self.frames.receive_untrusted()
        assert frame is not None
        return frame

    async def refusal(self, **changes: Any) -> ErrorCode:
        """The code with which a request is refused."""
        kind, body = await self.ask(**changes)
        assert kind is FrameKind.REFUSAL, kind
        return decode_message_untrusted(Refusal, body).error_code()

    async def offer(self, **changes: Any) -> Signed[Offer]:
        kind, body = await self.ask(**changes)
        assert kind is FrameKind.OFFER, kind
        return open_envelope_untrusted(Offer, body)

    def header(self, offer: Signed[Offer], **changes: Any) -> UnitHeader:
        self.key_pair = KeyPair(os.urandom(32))
        fields: dict[str, Any] = {
            "suite": SUITE,
            "unit_id": os.urandom(16),
            "offer_hash": offer.hash,
            "ephemeral_key": self.key_pair.public,
            "chunk_bytes": 256 * 1024,
            "issued_at_ms": now_ms(),
            "expires_at_ms": now_ms() + 60_000,
        }
        return UnitHeader(**{**fields, **changes})

    async def take_up(self, **changes: Any) -> None:
        """Request, offer, header, keys, preamble."""
        await self.accept(await self.offer(**changes))

    async def accept(self, offer: Signed[Offer]) -> None:
        """Header, keys, preamble."""
        header = sign_message(self.header(offer), self.peer.key)
        transcript = transcript_hash(offer.data, header.data)
        keys = self.key_pair.submitter_keys(offer.message.one_time_key, transcript)
        self.sealer, self.opener = Sealer(keys.inbound), Opener(keys.outbound)
        await self.send(FrameKind.HEADER, header.data)
        await self.send(FrameKind.DATA, self.sealer.preamble)

    async def write(self, *records: tuple[RecordKind, bytes], final: bool = False) -> None:
        """Seal records and send them."""
        chunks = [c for kind, body in records for c in self.writer.write(kind, [body])]
        chunks += list(self.writer.flush())
        for index, chunk in enumerate(chunks):
            last = final and index == len(chunks) - 1
            await self.send(FrameKind.DATA, self.sealer.seal(chunk, final=last))
        if final:
            await self.send(FrameKind.END)

    async def answers(self) -> tuple[list[Record], Receipt]:
        """Everything until the receipt, opened."""
        records: list[Record] = []
        while (frame := await self.frames.receive_untrusted()) is not None:
            kind, body = frame
            if kind is FrameKind.DATA:
                records += read_records_untrusted(self.opener.open_untrusted(body))
            if kind is FrameKind.RECEIPT:
                return records, open_envelope_untrusted(Receipt, body).message
        raise AssertionError("the stream ended without a receipt")

    async def failure(self) -> tuple[ErrorCode, Receipt]:
        """The code of the sealed FAILED record, and the receipt."""
        records, receipt = await self.answers()
        assert records[-1].kind is RecordKind.FAILED
        return decode_message_untrusted(Refusal, bytes(records[-1].body)).error_code(), receipt


@asynccontextmanager
async def raw_peer(provider_id: str, provider_address: str) -> AsyncIterator[RawPeer]:
    """A connected RawPeer."""
    key = SigningKey(os.urandom(32))
    settings = P2PSettings(
        key_seed=bytes(key),
        listen_addrs=("/ip4/127.0.0.1/tcp/0",),
        dht_mode="client",
        max_streams_per_peer=10_000,  # the bounds that count are the other side's
    )
    network = Network(settings, {})
    async with trio.open_nursery() as nursery:
        await nursery.start(network.run)
        await network.connect(provider_address)
        peer = RawPeer(network, key, provider_id)
        yield peer
        with trio.move_on_after(1):
            await peer.leave()
        nursery.cancel_scope.cancel()
