"""Two ends of a Noise connection in memory, bare or with a muxer on top."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport as NoiseTransport

from nextgpu_node.p2p.noise_pipe import NoisePipe
from nextgpu_node.p2p.yamux import _HEADER, MuxLimits, ReceiveBudget, Yamux


class MemorySocket:
    """A memory stream with the part of SocketStream that libp2p and NoisePipe use."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.send_all = stream.send_all
        self.receive_some = stream.receive_some
        self.aclose = stream.aclose
        self.socket = self

    def getpeername(self) -> tuple[str, int]:
        return "192.0.2.1", 4001

    def close(self) -> None:
        self._stream.send_stream.close()
        self._stream.receive_stream.close()


async def noise_pair() -> tuple[Any, Any]:
    """The dialling and the answering end of a secured connection (libp2p's own sessions)."""
    left, right = trio.testing.memory_stream_pair()
    ends: dict[str, Any] = {}

    async def secure(name: str, stream: Any, is_initiator: bool) -> None:
        keys = create_new_key_pair(name.encode() * 8)
        noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
        socket = MemorySocket(stream)
        raw = RawConnection(TrioTCPStream(socket), is_initiator)  # type: ignore[arg-type]
        if is_initiator:
            ends[name] = await noise.secure_outbound(raw, peer("bbbb"))
        else:
            ends[name] = await noise.secure_inbound(raw)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(secure, "aaaa", left, True)
        nursery.start_soon(secure, "bbbb", right, False)
    return ends["aaaa"], ends["bbbb"]


def peer(name: str) -> ID:
    return ID.from_pubkey(create_new_key_pair(name.encode() * 8).public_key)


def yamux(
    session: Any,
    *,
    is_initiator: bool,
    limits: MuxLimits | None = None,
    unread_bytes: int = 1 << 28,
) -> Yamux:
    return Yamux(
        session,
        peer("bbbb" if is_initiator else "aaaa"),
        is_initiator=is_initiator,
        limits=limits or MuxLimits(),
        budget=ReceiveBudget(unread_bytes),
    )


@asynccontextmanager
async def muxed_pair(
    limits: MuxLimits | None = None, unread_bytes: int = 1 << 28
) -> AsyncIterator[tuple[Yamux, Yamux]]:
    """The dialling and the answering muxer, running."""
    ours, theirs = await noise_pair()
    left = yamux(ours, is_initiator=True, limits=limits, unread_bytes=unread_bytes)
    right = yamux(theirs, is_initiator=False, limits=limits, unread_bytes=unread_bytes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.start)
        nursery.start_soon(right.start)
        yield left, right
        await left.close()
        await right.close()


class RawPeer:
    """A dialler that speaks Noise and then whatever frames the test likes."""

    def __init__(self, session: Any) -> None:
        self.pipe = NoisePipe(session)
        self._buffer = b""

    async def send(
        self, kind: int, flags: int, stream_id: int, length: int, body: bytes = b""
    ) -> None:
        await self.pipe.send([_HEADER.pack(0, kind, flags, stream_id, length) + body])

    async def next_frame(self) -> tuple[int, int, int, int]:
        """kind, flags, stream id and length of the next frame without payload."""
        while len(self._buffer) < _HEADER.size:
            self._buffer += await self.pipe.receive()
        frame = _HEADER.unpack_from(self._buffer)
        self._buffer = self._buffer[_HEADER.size :]
        return frame[1:]


@asynccontextmanager
async def attacked(
    limits: MuxLimits | None = None, unread_bytes: int = 1 << 28
) -> AsyncIterator[tuple[RawPeer, Yamux]]:
    """A raw peer and the muxer it talks to."""
    ours, theirs = await noise_pair()
    victim = yamux(theirs, is_initiator=False, limits=limits, unread_bytes=unread_bytes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(victim.start)
        yield RawPeer(ours), victim
        await victim.close()
