"""Several providers behind one unit socket, in this process: the real worker in a thread for each
unit, the real cryptography, no sandbox and no network.

What can be done to a provider is what happens to real ones: be full, go away, come back, lie, be
too small.  The frames are those of the daemon's unit socket.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio
from nacl.signing import SigningKey
from torch import Tensor

from nextgpu_node.api_types import DeviceView, PeerNeed, PeersReply, PeerView
from nextgpu_node.clock import now_ms
from nextgpu_node.frames import FrameStream
from nextgpu_node.graph.machine import Machine, StepOutcome
from nextgpu_node.worker.channel import Channel, ChannelClosed
from nextgpu_node.worker.unit import Unit, UnitLimits
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.ids import peer_id_from_public_key
from nextgpu_protocol.limits import MIB
from nextgpu_protocol.local import SIGNABLE, Assignment, Connect, SignDraft
from nextgpu_protocol.messages import Offer, Receipt, Refusal, UnitHeader, UnitRequest
from nextgpu_protocol.sealing import CiphertextHash, KeyPair, transcript_hash
from tests.support.messages import METERING, OFFER, SUBMITTER

_STATUS = {0: "done", 10: "failed", 11: "out_of_memory"}


@dataclass(eq=False)
class FarmPeer:
    """One provider.  `delay_s` before each frame of results; `units` counts those it took."""

    key: SigningKey = field(default_factory=SigningKey.generate)
    slots: int = 1
    input_bytes: int = 64 * MIB
    memory_bytes: int = 1024 * MIB
    up: bool = True
    delay_s: float = 0.0
    refuse: ErrorCode | None = None
    lies_in_receipt: bool = False
    lies: bool = False  # wrong results under good seals and receipts
    dies_after_results: int | None = None
    units: int = 0
    headers: int = 0
    open_units: int = 0
    scopes: set[trio.CancelScope] = field(default_factory=set)

    @property
    def peer_id(self) -> str:
        return peer_id_from_public_key(bytes(self.key.verify_key))

    def kill(self) -> None:
        """As kill -9: every connection breaks, nobody says anything."""
        self.up = False
        for scope in self.scopes:
            scope.cancel()

    def view(self) -> PeerView:
        device = DeviceView(
            kind="cpu", name="cpu", memory_total_bytes=8 * 2**30, memory_free_bytes=2**30
        )
        return PeerView(
            peer_id=self.peer_id,
            latency_ms=1,
            sharing=True,
            reason="",
            devices=[device],
            free_slots=self.slots - self.open_units,
            memory_bytes=self.memory_bytes,
            max_seconds=60,
            input_bytes=self.input_bytes,
            output_bytes=64 * MIB,
            runtime="torch",
            table_version=1,
            isolation=["seccomp"],
        )


class Farm:
    """`ask` is what a peer book asks; `socket_path` what units are opened at."""

    def __init__(self, peers: list[FarmPeer], socket_path: Path) -> None:
        self.peers = peers
        self.socket_path = socket_path

    async def ask(self, need: PeerNeed) -> PeersReply:
        views = [peer.view() for peer in self.peers if peer.up]
        return PeersReply(peers=views, candidates=len(self.peers))

    async def serve(self, stream: trio.SocketStream) -> None:
        frames = FrameStream(stream)
        async with stream:
            # Whatever the submitter does ends its own stream alone.
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError):
                connect = decode_message_untrusted(
                    Connect, await frames.expect_untrusted(FrameKind.CONNECT)
                )
                peer = next(p for p in self.peers if bytes(p.key.verify_key) == connect.peer_key)
                if not peer.up:
                    await _say(frames, FrameKind.ERROR, ErrorCode.PEER_UNREACHABLE)
                    return
                with trio.CancelScope() as scope:
                    peer.scopes.add(scope)
                    try:
                        await _Conversation(frames, peer).run()
                    finally:
                        peer.scopes.discard(scope)


# Each unit has a thread of its own, as it has a process elsewhere.
_THIS_WORKER = threading.local()
_honest_step = Machine.step_and_release


def _step(self: Machine, xs: dict[str, Tensor]) -> StepOutcome:
    outcome = _honest_step(self, xs)
    if not getattr(_THIS_WORKER, "lies", False):
        return outcome
    return StepOutcome({name: y * 1.01 + 0.01 for name, y in outcome.ys.items()}, outcome.stop)


Machine.step_and_release = _step  # type: ignore[method-assign]


@asynccontextmanager
async def open_farm(peers: list[FarmPeer], directory: Path) -> AsyncIterator[Farm]:
    path = directory / "units.sock"
    listening = trio.socket.socket(socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen(64)
    farm = Farm(peers, path)
    async with trio.open_nursery() as nursery:
        listener = trio.SocketListener(listening)
        nursery.start_soon(trio.serve_listeners, farm.serve, [listener])
        yield farm
        nursery.cancel_scope.cancel()


class _Conversation:
    def __init__(self, frames: FrameStream, peer: FarmPeer) -> None:
        self._frames = frames
        self._peer = peer
        self._results = 0
        self._out_scope = trio.CancelScope()

    async def run(self) -> None:
        await self._frames.send(FrameKind.CONNECTED)
        await self._sign()
        data = await self._frames.expect_untrusted(FrameKind.REQUEST)
        refusal = self._peer.refuse
        if self._peer.open_units >= self._peer.slots:
            refusal = refusal or ErrorCode.BUSY
        if refusal is not None:
            await _say(self._frames, FrameKind.REFUSAL, refusal)
            return
        self._peer.units += 1
        self._peer.open_units += 1
        try:
            await self._unit(open_envelope_untrusted(UnitRequest, data))
        finally:
            self._peer.open_units -= 1

    async def _sign(self) -> None:
        draft = decode_message_untrusted(
            SignDraft, await self._frames.expect_untrusted(FrameKind.SIGN)
        )
        message = decode_message_untrusted(SIGNABLE[draft.type], draft.payload)
        await self._frames.send(FrameKind.SIGNED, sign_message(message, SUBMITTER).data)

    async def _unit(self, request: Signed[UnitRequest]) -> None:
        pair = KeyPair(os.urandom(32))
        now = now_ms()
        asked = request.message
        offer = replace(
            OFFER,
            one_time_key=pair.public,
            request_hash=request.hash,
            submitter_key=request.signer,
            memory_bytes=asked.memory_bytes,
            max_seconds=asked.max_seconds,
            input_bytes=asked.input_bytes,
            output_bytes=asked.output_bytes,
            issued_at_ms=now,
            expires_at_ms=now + 30_000,
        )
        signed: Signed[Offer] = sign_message(offer, self._peer.key)
        await self._frames.send(FrameKind.OFFER, signed.data)
        await self._sign()
        header_data = await self._frames.expect_untrusted(FrameKind.HEADER)
        self._peer.headers += 1
        header = open_envelope_untrusted(UnitHeader, header_data)
        ours, theirs = socket.socketpair()
        limits: Mapping[str, int | str] = {
            "device": "cpu",
            "max_threads": 1,
            "memory_bytes": self._peer.memory_bytes,
        }
        self._status = "worker_crashed"
        self._received, self._sent = CiphertextHash(), CiphertextHash()
        worker = FrameStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._work, theirs, pair, limits)
                await worker.send(
                    FrameKind.ASSIGN, encode_message(Assignment(signed.data, header_data))
                )
                nursery.start_soon(self._pump_in, worker)
                with self._out_scope:
                    await self._pump_out(worker)
                await trio.testing.wait_all_tasks_blocked(0.001)
                nursery.cancel_scope.cancel()
        finally:
            ours.close()
            theirs.close()
        transcript = transcript_hash(signed.data, header_data)
        await self._receipt(header.message.unit_id, transcript)

    async def _work(
        self, sock: socket.socket, pair: KeyPair, limits: Mapping[str, int | str]
    ) -> None:
        unit = Unit(Channel(sock), pair, UnitLimits.from_mapping(limits))
        with suppress(ChannelClosed, OSError):
            code = await trio.to_thread.run_sync(self._compute, unit, abandon_on_cancel=True)
            self._status = _STATUS.get(code, "protocol_error")

    def _compute(self, unit: Unit) -> int:
        _THIS_WORKER.lies = self._peer.lies
        try:
            return unit.run()
        finally:
            _THIS_WORKER.lies = False  # the thread serves others afterwards

    async def _pump_in(self, worker: FrameStream) -> None:
        while (frame := await self._frames.receive_untrusted()) is not None:
            kind, body = frame
            if kind is FrameKind.CANCEL:
                self._status = "cancelled"
                self._out_scope.cancel()
                return
            if kind is FrameKind.DATA:
                self._received.update(body)
            with suppress(trio.BrokenResourceError):
                await worker.send(kind, body)
        await worker.aclose()

    async def _pump_out(self, worker: FrameStream) -> None:
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            while (frame := await worker.receive_untrusted()) is not None:
                kind, body = frame
                await trio.sleep(self._peer.delay_s)
                with trio.CancelScope(shield=True):  # whole frames, whatever ends the unit
                    if kind is FrameKind.DATA:
                        self._sent.update(body)
                    await self._frames.send(kind, body)
                self._results += 1
                if self._results - 2 == self._peer.dies_after_results:  # preamble, STARTED
                    self._peer.kill()
                    await trio.lowlevel.checkpoint()
                if kind is FrameKind.END:
                    return

    async def _receipt(self, unit_id: bytes, transcript: bytes) -> None:
        receipt = Receipt(
            unit_id=unit_id,
            transcript_hash=transcript,
            input_hash=self._received.digest(),
            output_hash=bytes(32) if self._peer.lies_in_receipt else self._sent.digest(),
            status=self._status,
            metering=METERING,
            isolation=("seccomp",),
            wipe=(),
            finished_at_ms=now_ms(),
        )
        await self._frames.send(FrameKind.RECEIPT, sign_message(receipt, self._peer.key).data)
        await self._sign()
        await self._frames.expect_untrusted(FrameKind.ACK)


async def _say(frames: FrameStream, kind: FrameKind, code: ErrorCode) -> None:
    await frames.send(kind, encode_message(Refusal(int(code), "")))
