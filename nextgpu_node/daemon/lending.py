"""Drives one lent unit: performs what `core.lending` decides, and reports back to it.

    peer stream ──DATA──► worker        ciphertext both ways; this process never holds a key
    peer stream ◄──DATA── worker

A stream that breaks the protocol ends its own unit and nothing else.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import assert_never

import psutil
import structlog
import trio

from nextgpu_node.clock import now_ms
from nextgpu_node.core import lending as core
from nextgpu_node.core.admission import Grant
from nextgpu_node.core.tokens import Reservation
from nextgpu_node.daemon.bandwidth import Line
from nextgpu_node.daemon.lasting import LastingFrames, Link, LinkStream
from nextgpu_node.daemon.workers import status_of_exit
from nextgpu_node.errors import NetworkError, PeerLost, SandboxError, StoreError
from nextgpu_node.frames import ByteStream, FrameStream
from nextgpu_node.identity import Identity
from nextgpu_node.sandbox.launcher import Worker
from nextgpu_node.sandbox.slots import WorkerExit
from nextgpu_node.store.token_ledger import TokenLedger
from nextgpu_node.store.unit_history import PastUnit
from nextgpu_protocol.checks import LentUnitLink, check_resume_untrusted
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import Signed, open_envelope_untrusted, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.ids import (
    PeerId,
    PeerKey,
    peer_id_from_public_key,
    public_key_from_peer_id,
)
from nextgpu_protocol.limits import MAX_OFFER_LIFETIME_MS, RESUME_GRACE_MS
from nextgpu_protocol.local import Assignment
from nextgpu_protocol.messages import (
    SUITE,
    Metering,
    Offer,
    Receipt,
    ReceiptAck,
    Refusal,
    UnitHeader,
    UnitRequest,
    UnitResume,
    UnitResumed,
    WipeStep,
)
from nextgpu_protocol.sealing import CiphertextHash, transcript_hash
from nextgpu_protocol.session import Session, SessionState

log = structlog.get_logger()

_REQUEST_DEADLINE_S = 10
_EXIT_GRACE_S = 3
_ACK_DEADLINE_S = 10
_SEND_DEADLINE_S = 10
# What a worker has left behind when it ends is at most a few frames on their way.
_DRAIN_S = 15
_EVENTS = 8
# What a worker has to save its state when the owner wants the device back.
GRACE_S = 1.0


@dataclass(slots=True)
class Traffic:
    """One direction's ciphertext: how much, and its hash for the receipt."""

    limit_bytes: int
    size_bytes: int = 0
    hash: CiphertextHash = field(default_factory=CiphertextHash)

    def count_untrusted(self, body: bytes, direction: str) -> None:
        if self.size_bytes + len(body) > self.limit_bytes:
            raise RemoteProtocolError(ErrorCode.OVER_LIMIT, f"{direction} bytes")
        self.size_bytes += len(body)
        self.hash.update(body)


@dataclass(slots=True)
class Running:
    """What exists only once the header was accepted."""

    offer: Signed[Offer]
    header: Signed[UnitHeader]
    inbound: Traffic
    outbound: Traffic
    began_s: float


class LentUnit:
    """One peer stream from its request to its receipt."""

    def __init__(
        self,
        session_id: int,
        stream: ByteStream,
        sender: PeerId,
        decider: core.Lending,
        take_worker: Callable[[int], Awaitable[Worker]],
        runtime: str,
        identity: Identity,
        ledger: TokenLedger,
        former_keys: Callable[[Signed[UnitRequest]], Awaitable[frozenset[PeerKey]]],
        take_python_worker: Callable[[int], Awaitable[tuple[Worker, str]]] | None = None,
        line: Line | None = None,
    ) -> None:
        """`take_python_worker` gives the runtime too: it is another process than the others."""
        self.id = session_id
        self._sender = sender
        self._frames = LastingFrames(stream)
        self._attempt = 0
        self._decider = decider
        self._take_from_pool = take_worker
        self._take_python_worker = take_python_worker
        self._runtime = runtime
        self._identity = identity
        self._ledger = ledger
        self._former_keys = former_keys
        self._line = line or Line()
        self._session = Session("P")
        self._send_events, self._events = trio.open_memory_channel[core.Event](_EVENTS)
        self._pump_scopes: list[trio.CancelScope] = []
        self._delivery = trio.CancelScope()
        self._is_stopping = False
        self._worker: Worker | None = None
        self._worker_frames: FrameStream | None = None
        self._running: Running | None = None
        self._exit: WorkerExit | None = None
        self._wipe: tuple[WipeStep, ...] = ()
        self._wall_ms = 0
        self._over = False
        self.began_s = time.monotonic()
        self.finished = trio.Event()
        self.past: PastUnit | None = None  # once there is a receipt

    @property
    def state(self) -> str:
        return self._decider.state_of(self.id).value

    @property
    def unit_id(self) -> str:
        return self._running.header.message.unit_id.hex() if self._running else ""

    @property
    def memory_bytes(self) -> int:
        """Of its worker's processes now; 0 without one."""
        if self._worker is None or self._worker.has_ended:
            return 0
        return _resident_bytes(self._worker.pid)

    @property
    def sizes(self) -> tuple[int, int]:
        """Ciphertext bytes so far: in, out."""
        if self._running is None:
            return 0, 0
        return self._running.inbound.size_bytes, self._running.outbound.size_bytes

    def stop(self, status: str, code: ErrorCode) -> None:
        """End the unit from outside, now.  Never blocks; a unit that is ending anyway goes on."""
        try:
            self._send_events.send_nowait(core.UnitStopped(self.id, status, code))
        except trio.WouldBlock:
            # The queue holds more events than one unit can have: it is ending already.
            log.debug("unit.stop_was_late", unit_id=self.unit_id)

    def give_back(self) -> None:
        """The owner is back: the worker has `GRACE_S` to save its state.  Never blocks."""
        try:
            self._send_events.send_nowait(core.OwnerReturned(self.id))
        except trio.WouldBlock:
            log.debug("unit.stop_was_late", unit_id=self.unit_id)

    def _stop_pumps(self) -> None:
        """No more frames either way.  One that is going out may still finish, so that the receipt
        can follow it."""
        self._is_stopping = True
        self._delivery.deadline = trio.current_time() + _SEND_DEADLINE_S
        for scope in self._pump_scopes:
            scope.cancel()

    async def run(self) -> None:
        """Serve the stream to its end.  Leaves no worker, whatever happens."""
        try:
            async with trio.open_nursery() as nursery:
                await self._converse(nursery)
                nursery.cancel_scope.cancel()
        except* (RemoteProtocolError, PeerLost, NetworkError, trio.BrokenResourceError) as group:
            log.info("unit.stream_ended", cause=type(group.exceptions[0]).__name__)
        finally:
            if self._worker is not None:
                await self._worker.finish()
            self._decider.handle(core.SessionOver(self.id), now_ms=now_ms())
            self._frames.finish()
            self.finished.set()

    async def _converse(self, nursery: trio.Nursery) -> None:
        request = await self._receive_request()
        former_keys = await self._former_keys(request)
        first = core.UnitRequested(self.id, request, self._sender, former_keys)
        pending: deque[core.Event] = deque([first])
        while not self._over:
            event = pending.popleft() if pending else await self._events.receive()
            for effect in self._decider.handle(event, now_ms=now_ms()):
                following = await self._perform(effect, nursery)
                if following is not None:
                    pending.append(following)

    async def _perform(self, effect: core.Effect, nursery: trio.Nursery) -> core.Event | None:
        match effect:
            case core.Refuse(code, detail):
                await self._say_no(FrameKind.REFUSAL, code, detail)
            case core.SpawnWorker(grant, unit_kind):
                return await self._take_worker(grant, unit_kind)
            case core.SendOffer(request, grant):
                return await self._send_offer(request, grant, nursery)
            case core.SaveReservation(reservation):
                return await self._save(reservation)
            case core.StartUnit(offer, header):
                await self._start(offer, header, nursery)
            case core.AskToGiveBack():
                self._ask_to_give_back(nursery)
            case core.AwaitExit():
                return await self._await_exit()
            case core.WipeWorker():
                return await self._wipe_worker()
            case core.Settle(reservation, charged_ms):
                await self._settle(reservation, charged_ms)
            case core.SendReceipt(status):
                await self._send_receipt(status)
            case core.Discard(code, detail):
                self._stop_pumps()
                await self._wipe_worker()
                asked = self._session.state is SessionState.REQUESTED
                kind = FrameKind.REFUSAL if asked else FrameKind.ERROR
                await self._say_no(kind, code, detail)
            case _:
                assert_never(effect)
        return None

    # --- before the header ------------------------------------------------------------------

    async def _receive_request(self) -> Signed[UnitRequest]:
        with trio.move_on_after(_REQUEST_DEADLINE_S):
            body = await self._frames.expect_untrusted(FrameKind.REQUEST)
            self._session.received_untrusted(FrameKind.REQUEST)
            try:
                return open_envelope_untrusted(UnitRequest, body)
            except RemoteProtocolError as exc:
                await self._say_no(FrameKind.REFUSAL, exc.code, exc.detail)
                raise
        raise RemoteProtocolError(ErrorCode.TIMED_OUT, "no request came")

    async def _take_worker(self, grant: Grant, kind: str) -> core.Event:
        self._kind = kind
        try:
            if kind == "python":
                assert self._take_python_worker is not None  # or admission would have refused
                taken = await self._take_python_worker(grant.memory_bytes)
                self._worker, self._runtime = taken
            else:
                self._worker = await self._take_from_pool(grant.memory_bytes)
        except SandboxError:
            log.error("worker.start_failed")
            return core.WorkerFailedToStart(self.id)
        self._worker_frames = FrameStream(self._worker.stream)
        return core.WorkerReady(self.id)

    async def _send_offer(
        self, request: Signed[UnitRequest], grant: Grant, nursery: trio.Nursery
    ) -> core.Event:
        offer = sign_message(self._make_offer(request, grant), self._identity.signing_key)
        with trio.move_on_after(_SEND_DEADLINE_S) as deadline:
            await self._send(FrameKind.OFFER, offer.data)
        if deadline.cancelled_caught:
            return core.UnitStopped(self.id, "submitter_lost", ErrorCode.SUBMITTER_LOST)
        nursery.start_soon(self._await_header)
        return core.OfferSent(self.id, offer)

    def _make_offer(self, request: Signed[UnitRequest], grant: Grant) -> Offer:
        device = self._decider.policy.device
        assert self._worker is not None
        assert device is not None
        issued_at_ms = now_ms()
        return Offer(
            suite=SUITE,
            offer_id=os.urandom(16),
            one_time_key=self._worker.public_key,
            request_hash=request.hash,
            submitter_key=request.signer,
            device=device,
            memory_bytes=grant.memory_bytes,
            max_seconds=grant.max_seconds,
            input_bytes=grant.input_bytes,
            output_bytes=grant.output_bytes,
            runtime=self._runtime,
            table_version=self._decider.table_version,
            isolation=self._worker.layers,
            price=0,
            issued_at_ms=issued_at_ms,
            expires_at_ms=issued_at_ms + MAX_OFFER_LIFETIME_MS,
        )

    async def _await_header(self) -> None:
        """The submitter's next word: a header, a cancel, or nothing in time."""
        event: core.Event = core.UnitStopped(self.id, "submitter_lost", ErrorCode.EXPIRED)
        with trio.move_on_after(MAX_OFFER_LIFETIME_MS / 1000):
            try:
                event = await self._receive_header_untrusted()
            except RemoteProtocolError as exc:
                event = core.UnitStopped(self.id, "protocol_error", exc.code)
            except (PeerLost, NetworkError, trio.BrokenResourceError):
                event = core.UnitStopped(self.id, "submitter_lost", ErrorCode.SUBMITTER_LOST)
        await self._send_events.send(event)

    async def _receive_header_untrusted(self) -> core.Event:
        frame = await self._frames.receive_untrusted()
        if frame is None:
            return core.UnitStopped(self.id, "submitter_lost", ErrorCode.SUBMITTER_LOST)
        kind, body = frame
        self._session.received_untrusted(kind)
        if kind is FrameKind.CANCEL:
            return core.UnitStopped(self.id, "cancelled", ErrorCode.CANCELLED)
        return core.HeaderReceived(self.id, open_envelope_untrusted(UnitHeader, body))

    async def _save(self, reservation: Reservation) -> core.Event:
        try:
            await trio.to_thread.run_sync(self._ledger.save, reservation)
        except StoreError:
            log.error("token.reservation_failed")
            return core.UnitStopped(self.id, "owner_stopped", ErrorCode.INTERNAL)
        return core.ReservationSaved(self.id)

    # --- while it runs ----------------------------------------------------------------------

    async def _start(
        self, offer: Signed[Offer], header: Signed[UnitHeader], nursery: trio.Nursery
    ) -> None:
        assert self._worker_frames is not None
        self._running = Running(
            offer,
            header,
            Traffic(offer.message.input_bytes),
            Traffic(offer.message.output_bytes),
            time.monotonic(),
        )
        assignment = encode_message(Assignment(offer.data, header.data))
        # A worker that died since its offer breaks its socket here.  The unit goes on all the
        # same: the pump out finds the end, and the submitter gets a receipt that says so.
        with suppress(trio.BrokenResourceError):
            await self._worker_frames.send(FrameKind.ASSIGN, assignment)
        assert self._worker is not None
        self._worker.restart_clock(offer.message.max_seconds)
        self._frames.lasts(RESUME_GRACE_MS / 1000)
        log.info("unit.started", unit_id=self.unit_id)
        nursery.start_soon(self._guard, self._pump_in, self._stoppable())
        nursery.start_soon(self._guard, self._pump_out, self._delivery)
        nursery.start_soon(self._guard, self._watch_worker, self._stoppable())

    async def resume_untrusted(
        self, resume: Signed[UnitResume], stream: LinkStream, sender: PeerId
    ) -> Link:
        """Go on over `stream`, on which the submitter came back.  The caller closes it when the
        link is over.  Raises RemoteProtocolError, and the unit is as it was.
        """
        self.check_submitter_untrusted(resume, sender)
        received = self._frames.detach()
        with trio.fail_after(_SEND_DEADLINE_S):
            answer = encode_message(UnitResumed(received))
            await FrameStream(stream).send(FrameKind.RESUMED, answer)
        if self._attempt != resume.message.attempt:
            raise RemoteProtocolError(ErrorCode.REPLAYED, "a later attempt came meanwhile")
        log.info("unit.resumed", unit_id=self.unit_id)
        return await self._frames.attach(stream, resume.message.received)

    def check_submitter_untrusted(self, resume: Signed[UnitResume], sender: PeerId) -> None:
        """Is this the unit's submitter, over a connection of its own, for the first time?"""
        if self._running is None:
            raise RemoteProtocolError(ErrorCode.UNKNOWN_UNIT)
        header = self._running.header
        link = LentUnitLink(
            unit_id=header.message.unit_id,
            header_hash=header.hash,
            submitter_key=header.signer,
            peer_key=public_key_from_peer_id(self._sender),
            last_attempt=self._attempt,
            kept_from=self._frames.kept_from,
            sent=self._frames.sent,
        )
        check_resume_untrusted(resume, link, public_key_from_peer_id(sender), now_ms=now_ms())
        self._attempt = resume.message.attempt

    async def check_lane_untrusted(self, lane: FrameStream, attempt: int) -> int:
        """How many frames the submitter has.  That this opens shows that it has the ticket."""
        body = await lane.expect_untrusted(FrameKind.RESUMED)
        received = decode_message_untrusted(UnitResumed, body).received
        if attempt != self._attempt or self.finished.is_set():
            raise RemoteProtocolError(ErrorCode.REPLAYED, "a later attempt came meanwhile")
        if not self._frames.kept_from <= received <= self._frames.sent:
            raise RemoteProtocolError(ErrorCode.WRONG_OFFSET, "received")
        return received

    async def enter_lane(self, stream: LinkStream, lane: FrameStream, peer_received: int) -> Link:
        """Go on over a lane that was checked; as `resume_untrusted`."""
        received = self._frames.detach()
        with trio.fail_after(_SEND_DEADLINE_S):
            await lane.send(FrameKind.RESUMED, encode_message(UnitResumed(received)))
        log.info("unit.on_lane", unit_id=self.unit_id)
        return await self._frames.attach(stream, peer_received, lane)

    def _stoppable(self) -> trio.CancelScope:
        scope = trio.CancelScope()
        self._pump_scopes.append(scope)
        return scope

    async def _guard(
        self, pump: Callable[[], Awaitable[core.Event]], scope: trio.CancelScope
    ) -> None:
        """Run one pump; whatever ends it early becomes one event."""
        with scope:
            event: core.Event
            try:
                event = await pump()
            except RemoteProtocolError as exc:
                over = exc.code is ErrorCode.OVER_LIMIT
                status = "over_limit" if over else "protocol_error"
                event = core.UnitStopped(self.id, status, exc.code)
            except (PeerLost, NetworkError, trio.BrokenResourceError):
                event = core.UnitStopped(self.id, "submitter_lost", ErrorCode.SUBMITTER_LOST)
            await self._send_events.send(event)

    async def _pump_in(self) -> core.Event:
        """Peer -> worker, then listen on for a cancel or the end of the connection."""
        assert self._running is not None
        assert self._worker_frames is not None
        while (frames := await self._frames.receive_ready_untrusted()) is not None:
            await self._line.download.take(sum(len(body) for _, body in frames))
            for kind, body in frames:
                self._session.received_untrusted(kind)
                if kind is FrameKind.CANCEL:
                    return core.UnitStopped(self.id, "cancelled", ErrorCode.CANCELLED)
                if kind is FrameKind.DATA:
                    self._running.inbound.count_untrusted(body, "input")
            # A worker that is done with its input, or gone, breaks its socket; its own pump says
            # which.
            with suppress(trio.BrokenResourceError):
                await self._worker_frames.send_many(frames)
        return core.UnitStopped(self.id, "submitter_lost", ErrorCode.SUBMITTER_LOST)

    async def _pump_out(self) -> core.Event:
        """Worker -> peer, to the worker's END or its end."""
        assert self._running is not None
        assert self._worker_frames is not None
        while (frames := await self._receive_from_worker()) is not None:
            await self._line.upload.take(sum(len(body) for _, body in frames))
            if self._is_stopping:
                break
            passed: list[Frame] = []
            try:
                self._count_output_untrusted(frames, passed)
            finally:
                # Also where one of them is over the limit: what is counted is what is sent.
                await self._frames.send_many(passed)
            if passed[-1][0] is FrameKind.END:
                return core.OutputEnded(self.id)
        return await self._await_exit()

    def _count_output_untrusted(self, frames: list[Frame], passed: list[Frame]) -> None:
        """Those up to the worker's END; what it says after that reaches nobody."""
        assert self._running is not None
        for kind, body in frames:
            if kind not in (FrameKind.DATA, FrameKind.END):
                raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "from the worker")
            if kind is FrameKind.DATA:
                self._running.outbound.count_untrusted(body, "output")
            self._session.sending(kind)
            passed.append((kind, body))
            if kind is FrameKind.END:
                return

    async def _watch_worker(self) -> core.Event:
        """A worker that has ended while its results wait for a submitter that does not read."""
        assert self._worker is not None
        status = status_of_exit(await self._worker.wait())
        await trio.sleep(_DRAIN_S)
        if status == "done":
            return core.UnitStopped(self.id, "submitter_lost", ErrorCode.SUBMITTER_LOST)
        return core.WorkerEnded(self.id, status)

    def _ask_to_give_back(self, nursery: trio.Nursery) -> None:
        assert self._worker is not None
        log.info("unit.owner_returned", unit_id=self.unit_id)
        self._worker.ask_to_give_back()
        nursery.start_soon(self._end_after_grace)

    async def _end_after_grace(self) -> None:
        """A worker that has ended holds nothing: what it saved may take its time to the submitter.

        One that has not ended by then is killed with whatever it was doing.
        """
        assert self._worker is not None
        with trio.move_on_after(GRACE_S):
            await self._worker.wait()
            return
        self.stop("owner_stopped", ErrorCode.OWNER_RETURNED)

    async def _receive_from_worker(self) -> list[Frame] | None:
        assert self._worker_frames is not None
        try:
            return await self._worker_frames.receive_ready_untrusted()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return None

    async def _await_exit(self) -> core.Event:
        assert self._worker is not None
        with trio.move_on_after(_EXIT_GRACE_S):
            self._exit = await self._worker.wait()
        status = status_of_exit(self._exit) if self._exit else "worker_crashed"
        return core.WorkerEnded(self.id, status)

    # --- afterwards -------------------------------------------------------------------------

    async def _wipe_worker(self) -> core.Event:
        self._stop_pumps()
        if self._worker is not None:
            report = await self._worker.finish()
            self._exit = self._exit or await self._worker.wait()
            self._wipe = tuple(WipeStep(name, held) for name, held in report.steps)
        if self._running is not None:
            self._wall_ms = round((time.monotonic() - self._running.began_s) * 1000)
        return core.Wiped(self.id, self._wall_ms)

    async def _settle(self, reservation: Reservation, charged_ms: int) -> None:
        try:
            await trio.to_thread.run_sync(self._ledger.settle, reservation, charged_ms)
        except StoreError:
            # The reservation stays on disk, and is spent in whole at the next start.
            log.error("token.settlement_failed")

    async def _send_receipt(self, status: str) -> None:
        receipt = sign_message(self._make_receipt(status), self._identity.signing_key)
        self.past = self._past_unit(receipt)
        log.info("unit.finished", unit_id=self.unit_id, status=status)
        with trio.move_on_after(_SEND_DEADLINE_S):
            await self._send(FrameKind.RECEIPT, receipt.data)
            await self._await_ack(receipt)
        self._over = True

    def _make_receipt(self, status: str) -> Receipt:
        running = self._running
        assert running is not None
        assert self._worker is not None
        usage = self._exit
        return Receipt(
            unit_id=running.header.message.unit_id,
            transcript_hash=transcript_hash(running.offer.data, running.header.data),
            input_hash=running.inbound.hash.digest(),
            output_hash=running.outbound.hash.digest(),
            status=status,
            metering=Metering(
                wall_ms=self._wall_ms,
                cpu_ms=round(usage.cpu_s * 1000) if usage else 0,
                peak_memory_bytes=usage.peak_rss_bytes if usage else 0,
                input_bytes=running.inbound.size_bytes,
                output_bytes=running.outbound.size_bytes,
            ),
            isolation=self._worker.layers,
            wipe=self._wipe,
            finished_at_ms=now_ms(),
        )

    def _past_unit(self, receipt: Signed[Receipt]) -> PastUnit:
        """What the owner may see of it later."""
        said, running = receipt.message, self._running
        assert running is not None
        offer = running.offer.message
        return PastUnit(
            unit_id=said.unit_id,
            peer=peer_id_from_public_key(offer.submitter_key),
            kind=self._kind,
            device=offer.device.name,
            started_at_ms=said.finished_at_ms - said.metering.wall_ms,
            metering=said.metering,
            status=said.status,
            wiped=not said.failed_wipe_steps,
            receipt=receipt.data,
        )

    async def _await_ack(self, receipt: Signed[Receipt]) -> None:
        """Until the submitter has the receipt, so that closing the stream cannot lose it."""
        with trio.move_on_after(_ACK_DEADLINE_S):
            while (frame := await self._frames.receive_untrusted()) is not None:
                kind, body = frame
                self._session.received_untrusted(kind)
                if kind is FrameKind.ACK:
                    ack = open_envelope_untrusted(ReceiptAck, body)
                    matches = ack.message.receipt_hash == receipt.hash
                    log.debug("receipt.acknowledged", unit_id=self.unit_id, matches=matches)
                    return

    async def _say_no(self, kind: FrameKind, code: ErrorCode, detail: str) -> None:
        self._over = True
        if self._session.state is SessionState.CLOSED:
            return  # the submitter has cancelled: it listens no more
        log.info("unit.refused", code=code.name)
        with trio.move_on_after(_SEND_DEADLINE_S):
            await self._send(kind, encode_message(Refusal(int(code), detail[:200])))

    async def _send(self, kind: FrameKind, body: bytes = b"") -> None:
        self._session.sending(kind)
        await self._frames.send(kind, body)


def _resident_bytes(pid: int) -> int:
    """What the process holds in memory; 0 where this user may not see it, or it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
