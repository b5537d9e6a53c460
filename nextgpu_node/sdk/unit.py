"""One borrowed unit, seen from the submitter's own process: the only place besides the worker
where its plaintext exists.

    open_unit     connect, request, verify the offer, make the one key pair, take the offer up
    RemoteUnit    seal and send steps; open what comes back; verify the receipt
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import trio

from nextgpu_node.api_types import PeerView
from nextgpu_node.clock import now_ms
from nextgpu_node.errors import DaemonUnreachable, IntegrityError, PeerLost
from nextgpu_node.frames import FrameStream, widen
from nextgpu_node.sdk.events import Offered, ReceiptVerified, UnitEvent
from nextgpu_node.sdk.inbox import Inbox
from nextgpu_node.sdk.outcome import refusal_untrusted, translated
from nextgpu_protocol.checks import OwnUnit, check_offer_untrusted, check_receipt_untrusted
from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.ids import peer_id_from_public_key, public_key_from_peer_id
from nextgpu_protocol.limits import CHUNK_PLAINTEXT_BYTES, MAX_REQUEST_LIFETIME_MS
from nextgpu_protocol.local import Connect, SignDraft
from nextgpu_protocol.messages import (
    SUITE,
    HeldToken,
    Offer,
    Receipt,
    ReceiptAck,
    Refusal,
    UnitHeader,
    UnitRequest,
)
from nextgpu_protocol.program import ProgramSpec, encode_program
from nextgpu_protocol.records import (
    Piece,
    RecordKind,
    RecordWriter,
    UnitManifest,
    read_records_untrusted,
)
from nextgpu_protocol.sealing import (
    CiphertextHash,
    KeyPair,
    Opener,
    Sealer,
    StreamKeys,
    transcript_hash,
)
from nextgpu_protocol.session import Session, SessionState
from nextgpu_protocol.tokens import open_chain_untrusted, use_token

if TYPE_CHECKING:
    from torch import Tensor

    from nextgpu_node.graph.artifact import Program

_Signable = TypeVar("_Signable", UnitRequest, UnitHeader, ReceiptAck)

_OFFER_DEADLINE_S = 40
# A provider ends the unit when its time is over; then come what is on its way, the wipe, a receipt.
_ENDING_S = 60
_RECEIPT_DEADLINE_S = 30
# Where data that is still on its way here is sent no more: nobody would read it.
_INPUT_IS_OVER = frozenset(
    {
        SessionState.CANCELLED,
        SessionState.OUTPUT_ENDED,
        SessionState.RECEIPTED,
        SessionState.CLOSED,
    }
)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a unit needs.  Sizes in bytes; None takes what the peer, and the token, allow.

    `peer_id` asks for one peer by name, and a token for its issuer; otherwise every peer that
    fits is tried, best first.
    """

    kind: str = "any"
    device_memory_bytes: int = 0
    memory_bytes: int | None = None
    max_seconds: int | None = None
    input_bytes: int | None = None
    output_bytes: int | None = None
    peer_id: str | None = None
    token: HeldToken | None = None

    @property
    def wanted_peer(self) -> str | None:
        """The one peer that can serve this, where there is one."""
        if self.peer_id is None and self.token is not None:
            return peer_id_from_public_key(open_chain_untrusted(self.token.blocks).issuer)
        return self.peer_id


@asynccontextmanager
async def open_unit(
    units_socket: Path,
    peer: PeerView,
    needs: Needs,
    *,
    table_version: int,
    unit_class: type[RemoteUnit] | None = None,
) -> AsyncIterator[RemoteUnit]:
    """A unit on `peer`, ready for its program; a RemoteUnit where no other class is named.

    Raises Refused, PeerLost, IntegrityError or DaemonUnreachable.  Leaving the block in any way
    ends the unit: the peer kills its worker when the connection goes.
    """
    stream = await _connect(units_socket)
    try:
        unit = (unit_class or RemoteUnit)(FrameStream(stream), peer)
        with translated():
            with trio.move_on_after(_OFFER_DEADLINE_S) as deadline:
                await unit.negotiate(needs, table_version)
            if deadline.cancelled_caught:
                raise PeerLost("The peer did not answer with an offer in time.")
        yield unit
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(1):
            await stream.aclose()


class RemoteUnit:
    """The submitter's end of one sealed conversation.

    `start`, `send_step` and `close_input` may run in one task while another iterates `events`.
    """

    kind: ClassVar[str] = "program"  # UnitRequest.kind

    def __init__(self, frames: FrameStream, peer: PeerView) -> None:
        self._frames = frames
        self._peer = peer
        self._peer_key = public_key_from_peer_id(peer.peer_id)
        self._session = Session("S")
        self._writer = RecordWriter()
        self._sent = CiphertextHash()
        self._received = CiphertextHash()
        self.sent_bytes = 0
        self.unit_id = os.urandom(16)
        self._deadline_s = math.inf
        # What the worker itself said, under the seal, where it gave up.
        self.failure: Refusal | None = None

    # --- opening ----------------------------------------------------------------------------

    async def negotiate(self, needs: Needs, table_version: int) -> None:
        """CONNECT, REQUEST, OFFER, HEADER.  Everything the peer says is verified here."""
        await self._frames.send(FrameKind.CONNECT, encode_message(Connect(self._peer_key)))
        own_key = await self._expect(FrameKind.CONNECTED)
        request = await self._sign("request", self._make_request(needs, table_version, own_key))
        await self._send(FrameKind.REQUEST, request.data)
        offer = open_envelope_untrusted(Offer, await self._expect(FrameKind.OFFER))
        check_offer_untrusted(offer, request, self._peer_key, now_ms=now_ms())
        self._check_runtime(offer.message.runtime)
        ephemeral = KeyPair(os.urandom(32))
        header = await self._sign("header", self._make_header(offer, ephemeral))
        self._transcript = transcript_hash(offer.data, header.data)
        keys = ephemeral.submitter_keys(offer.message.one_time_key, self._transcript)
        await self._send(FrameKind.HEADER, header.data)
        self.offer = offer.message
        self._deadline_s = trio.current_time() + offer.message.max_seconds + _ENDING_S
        await self._open_streams(keys)

    async def _open_streams(self, keys: StreamKeys) -> None:
        self._sealer = Sealer(keys.inbound)
        self._opener = Opener(keys.outbound)
        await self._send_data(self._sealer.preamble)

    def _check_runtime(self, runtime: str) -> None:
        """A last look before anything of the unit is sent.  A program runs on every runtime."""

    def offered(self) -> Offered:
        return Offered(offer=self.offer, unit_id=self.unit_id.hex())

    def _make_request(self, needs: Needs, table_version: int, own_key: bytes) -> UnitRequest:
        issued_at_ms, nonce = now_ms(), os.urandom(16)
        peer, token = self._peer, needs.token
        most_bytes, most_seconds = peer.memory_bytes, peer.max_seconds
        if token is not None:
            allows = open_chain_untrusted(token.blocks).allows
            most_bytes = min(most_bytes, allows.memory_bytes)
            most_seconds = min(most_seconds, allows.gpu_seconds)
        return UnitRequest(
            suite=SUITE,
            nonce=nonce,
            provider_key=self._peer_key,
            device_kind=needs.kind,
            device_memory_bytes=needs.device_memory_bytes,
            memory_bytes=needs.memory_bytes or most_bytes,
            max_seconds=needs.max_seconds or most_seconds,
            input_bytes=needs.input_bytes or peer.input_bytes,
            output_bytes=needs.output_bytes or peer.output_bytes,
            table_version=table_version,
            issued_at_ms=issued_at_ms,
            expires_at_ms=issued_at_ms + MAX_REQUEST_LIFETIME_MS,
            token=use_token(token, own_key, nonce) if token is not None else b"",
            kind=self.kind,
        )

    def _make_header(self, offer: Signed[Offer], ephemeral: KeyPair) -> UnitHeader:
        issued_at_ms = now_ms()
        return UnitHeader(
            suite=SUITE,
            unit_id=self.unit_id,
            offer_hash=offer.hash,
            ephemeral_key=ephemeral.public,
            chunk_bytes=CHUNK_PLAINTEXT_BYTES,
            issued_at_ms=issued_at_ms,
            expires_at_ms=issued_at_ms + MAX_REQUEST_LIFETIME_MS,
        )

    async def _sign(self, name: str, message: _Signable) -> Signed[_Signable]:
        """Have our own daemon sign `message`; check that it signed just that."""
        draft = SignDraft(name, encode_message(message))
        await self._frames.send(FrameKind.SIGN, encode_message(draft))
        signed = open_envelope_untrusted(type(message), await self._expect(FrameKind.SIGNED))
        if signed.message != message:
            raise IntegrityError("The local nextgpud signed something else than it was asked to.")
        return signed

    # --- sending ----------------------------------------------------------------------------

    async def start(
        self,
        program: Program,
        *,
        checkpoint_ms: int = 0,
        checkpoint_steps: int = 0,
        return_carry: bool = False,
        carry: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Seal and send the program, its constants and its first state.

        `carry` is a checkpoint to go on from; without it the program's own first state is sent,
        or, where the program has an init graph, computed by the worker.
        """
        # Here and below, not above: a command says what is wrong with its flags without torch.
        from nextgpu_node.graph.tensors import encode_tensors

        self._spec: ProgramSpec = program.spec
        manifest = UnitManifest(checkpoint_ms, checkpoint_steps, return_carry)
        await self._write(RecordKind.MANIFEST, [encode_message(manifest)])
        await self._write(RecordKind.PROGRAM, [encode_program(program.spec)])
        await self._write(RecordKind.CONSTANTS, encode_tensors(program.constants))
        first = carry if carry is not None else program.carry
        if program.spec.carry and (first or program.spec.init is None):
            await self._write(RecordKind.CARRY, encode_tensors(first))
        await self._flush(final=False)

    async def send_step(self, xs: Mapping[str, Tensor]) -> None:
        """Seal and send the inputs of one step."""
        await self.send_steps([xs])

    async def send_steps(self, steps: Iterable[Mapping[str, Tensor]]) -> None:
        """Several steps at once: small ones share a sealed chunk, and its padding."""
        from nextgpu_node.graph.tensors import encode_tensors

        for xs in steps:
            await self._write(RecordKind.STEP, encode_tensors(xs))
        await self._flush(final=False)

    async def close_input(self) -> None:
        """No more steps: the worker finishes when it has run those that it has."""
        await self._flush(final=True)
        if self._session.state is SessionState.STREAMING:
            await self._send(FrameKind.END)

    async def cancel(self) -> None:
        """End the unit now.  `events` still gives the receipt."""
        await self._send(FrameKind.CANCEL)

    async def _write(self, kind: RecordKind, pieces: Iterable[Piece]) -> None:
        for chunk in self._writer.write(kind, pieces):
            await self._send_data(self._sealer.seal(chunk))

    async def _flush(self, *, final: bool) -> None:
        # One by one: behind gigabytes, padding alone has up to a thirty-second of them.
        for chunk, is_last in self._writer.flush_marked():
            await self._send_data(self._sealer.seal(chunk, final=final and is_last))

    async def _send_data(self, body: bytes) -> None:
        if self._session.state in _INPUT_IS_OVER:
            return
        self._sent.update(body)
        self.sent_bytes += len(body)
        await self._send(FrameKind.DATA, body)

    async def _send(self, kind: FrameKind, body: bytes = b"") -> None:
        self._session.sending(kind)
        with translated(), self._in_time():
            await self._frames.send(kind, body)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """A peer that neither goes on nor ends the unit is given up."""
        with trio.CancelScope(deadline=self._deadline_s) as scope:
            yield
        if scope.cancelled_caught:
            raise PeerLost("The peer went silent: it did not end the unit in its time.")

    # --- receiving --------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[UnitEvent, None]:
        """Everything the worker says, then the verified receipt.

        Raises at the end, after the receipt, where the unit did not succeed.
        """
        inbox = self._make_inbox()
        with translated():
            while (frame := await self._receive()) is not None:
                kind, body = frame
                match kind:
                    case FrameKind.DATA:
                        self._received.update(body)
                        for record in read_records_untrusted(self._opener.open_untrusted(body)):
                            for event in inbox.take_untrusted(record):
                                yield event
                    case FrameKind.END:
                        self._opener.check_end_untrusted()
                        self._deadline_s = trio.current_time() + _RECEIPT_DEADLINE_S
                    case FrameKind.RECEIPT:
                        receipt = await self._take_receipt_untrusted(body, inbox)
                        self.failure = inbox.failure
                        yield ReceiptVerified(receipt=receipt, peer_id=self._peer.peer_id)
                        inbox.raise_if_failed(receipt)
                        return
                    case _:
                        raise refusal_untrusted(body)
        raise PeerLost("The connection to the peer ended before the results were complete.")

    def _make_inbox(self) -> Inbox:
        return Inbox(self._spec, max_bytes=self.offer.output_bytes)

    async def _receive(self) -> Frame | None:
        with self._in_time():
            frame = await self._frames.receive_untrusted()
        if frame is not None and frame[0] is not FrameKind.ERROR:
            self._session.received_untrusted(frame[0])
        return frame

    async def _expect(self, kind: FrameKind) -> bytes:
        frame = await self._frames.receive_untrusted()
        if frame is None:
            raise PeerLost("The connection to the peer ended before it made an offer.")
        got, body = frame
        if got in (FrameKind.REFUSAL, FrameKind.ERROR):
            raise refusal_untrusted(body)
        if got is not kind:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, got.name)
        if kind is FrameKind.OFFER:
            self._session.received_untrusted(kind)
        return body

    async def _take_receipt_untrusted(self, body: bytes, inbox: Inbox) -> Receipt:
        signed = open_envelope_untrusted(Receipt, body)
        self._check_receipt_untrusted(signed, inbox)
        ack = await self._sign("ack", ReceiptAck(self.unit_id, signed.hash))
        await self._send(FrameKind.ACK, ack.data)
        return signed.message

    def _check_receipt_untrusted(self, signed: Signed[Receipt], inbox: Inbox) -> None:
        if inbox.summary is not None and not self._opener.finished:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, "no final chunk")
        # A program that stopped early leaves input on the way, which the peer may not have read.
        read_all = inbox.summary is not None and not inbox.summary.stopped_early
        unit = OwnUnit(
            provider_key=self._peer_key,
            unit_id=self.unit_id,
            transcript=self._transcript,
            received=self._received.digest(),
            sent=self._sent.digest() if read_all else None,
        )
        check_receipt_untrusted(signed, unit)


async def _connect(units_socket: Path) -> trio.SocketStream:
    try:
        stream = await trio.open_unix_socket(str(units_socket))
    except OSError as exc:
        raise DaemonUnreachable from exc
    widen(stream.socket)
    return stream
