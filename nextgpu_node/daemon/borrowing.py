"""The unit socket: a submitter's process on one side, a peer on the other, frames between.

    CONNECT peer ──► a unit stream to that peer is opened ──► CONNECTED
    SIGN draft   ──► decoded, then signed with the node's identity ──► SIGNED
    all else     ──► relayed as it is, both ways
    a connection that breaks ──► another one, and on from there (47-resuming.md)

The relay sees envelopes and ciphertext.  Whoever can open the socket (mode 0600) is the owner.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
import trio

from nextgpu_node.clock import now_ms
from nextgpu_node.daemon.lanes import LaneFrames
from nextgpu_node.daemon.lasting import LastingFrames, LinkStream
from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.frames import ByteStream, FrameStream, widen
from nextgpu_node.identity import Identity
from nextgpu_node.p2p.lanes import LaneStream, dial_lane
from nextgpu_node.p2p.network import Network
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import Signed, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.ids import peer_id_from_public_key, public_key_from_peer_id
from nextgpu_protocol.lane import LaneEnds, hello
from nextgpu_protocol.limits import MAX_RESUME_LIFETIME_MS, MIB, RESUME_GRACE_MS
from nextgpu_protocol.local import SIGNABLE, Connect, SignDraft
from nextgpu_protocol.messages import (
    SUITE,
    LaneTicket,
    Refusal,
    UnitHeader,
    UnitResume,
    UnitResumed,
)
from nextgpu_protocol.session import LANE_ASKING, RESUMPTION, Session, Table

log = structlog.get_logger()

UNIT_PROTOCOL = "/nextgpu/unit/1"
RESUME_PROTOCOL = "/nextgpu/resume/1"
LANE_PROTOCOL = "/nextgpu/lane/1"
_CONNECT_DEADLINE_S = 10
_DIAL_DEADLINE_S = 20
_FIRST_RETRY_S = 0.1
_SLOWEST_RETRY_S = 2.0
_LEAST_PATIENCE_S = 2.0
_LANE_S = 10
_LANE_ENTRY_S = 3
# A lane costs four round trips: it pays for units that carry more than this.
_LANE_FROM_BYTES = 4 * MIB
_jitter = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Lane:
    """A connection to the provider's bulk lane, and the ticket that it will be entered with."""

    stream: LaneStream
    ticket: bytes = field(repr=False)
    frames: LaneFrames


@dataclass(frozen=True, slots=True)
class Found:
    """What a unit can go on over, and how many frames its peer has."""

    stream: LinkStream
    frames: FrameStream
    received: int


@dataclass(slots=True, eq=False)
class Relay:
    """One borrowed unit, as its own daemon sees it: sizes and an id."""

    peer_id: str
    peer: LastingFrames
    began_s: float
    streams: list[FrameStream]  # that carry it, or did until just now
    header: Signed[UnitHeader] | None = None
    attempt: int = 0
    is_large: trio.Event = field(default_factory=trio.Event)
    lane: Lane | None = None
    input_bytes: int = 0
    output_bytes: int = 0

    @property
    def unit_id(self) -> str:
        return self.header.message.unit_id.hex() if self.header is not None else ""

    @property
    def patience_s(self) -> float:
        """How long a peer that was lost is waited for: no longer than the unit has run, since it
        could be run again elsewhere in that time."""
        age_s = time.monotonic() - self.began_s
        return min(max(age_s, _LEAST_PATIENCE_S), RESUME_GRACE_MS / 1000)

    def count(self, *, in_bytes: int = 0, out_bytes: int = 0) -> None:
        self.input_bytes += in_bytes
        self.output_bytes += out_bytes
        if self.input_bytes + self.output_bytes > _LANE_FROM_BYTES:
            self.is_large.set()

    async def cancel(self) -> None:
        await self.peer.send(FrameKind.CANCEL)


class Borrowing:
    """Serves the unit socket: one relay per connection."""

    def __init__(self, network: Network, identity: Identity) -> None:
        self._network = network
        self._identity = identity
        self.relays: set[Relay] = set()

    async def serve(self, local_stream: trio.SocketStream) -> None:
        """One submitter's process, until either side is done.  Never raises for what they do."""
        widen(local_stream.socket)
        local = FrameStream(local_stream)
        try:
            with trio.fail_after(_CONNECT_DEADLINE_S):
                body = await local.expect_untrusted(FrameKind.CONNECT)
            connect = decode_message_untrusted(Connect, body)
            peer_id = peer_id_from_public_key(connect.peer_key)
            await self._relay_to(peer_id, local)
        except RemoteProtocolError as exc:
            await _say(local, exc.code, exc.detail)
        except (NetworkError, PeerLost, trio.TooSlowError):
            await _say(local, ErrorCode.PEER_UNREACHABLE, "")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("relay.local_side_left")
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await local_stream.aclose()

    async def cancel(self, unit_id: str) -> bool:
        """Cancel the borrowed unit of that id; False where there is none."""
        for relay in self.relays:
            if unit_id and relay.unit_id == unit_id:
                await relay.cancel()
                return True
        return False

    async def _relay_to(self, peer_id: str, local: FrameStream) -> None:
        with trio.fail_after(_DIAL_DEADLINE_S):
            stream = await self._network.open_stream(peer_id, UNIT_PROTOCOL)
        relay = Relay(peer_id, LastingFrames(stream), time.monotonic(), [FrameStream(stream)])
        self.relays.add(relay)
        try:
            await local.send(FrameKind.CONNECTED, self._identity.public_key)
            await self._pump_both(relay, local)
        finally:
            self.relays.discard(relay)
            if relay.lane is not None:
                relay.lane.stream.abort()
            for each in relay.streams:
                await _close(each)

    async def _pump_both(self, relay: Relay, local: FrameStream) -> None:
        """Either side's end ends both: a submitter that is gone wants no results."""
        failures: list[Exception] = []

        async def run(pump: Callable[[Relay, FrameStream], Awaitable[None]]) -> None:
            try:
                await pump(relay, local)
            except (RemoteProtocolError, NetworkError, PeerLost, trio.BrokenResourceError) as exc:
                failures.append(exc)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, self._to_peer)
            nursery.start_soon(run, self._to_local)
            nursery.start_soon(self._keep_linked, relay)
            nursery.start_soon(self._prepare_lane, relay)
        if failures:
            raise failures[0]

    async def _to_peer(self, relay: Relay, local: FrameStream) -> None:
        while (frames := await local.receive_ready_untrusted()) is not None:
            passed: list[Frame] = []
            for kind, body in frames:
                if kind is FrameKind.SIGN:
                    await local.send(FrameKind.SIGNED, self._sign_untrusted(relay, body))
                    continue
                if kind is FrameKind.DATA:
                    relay.count(in_bytes=len(body))
                passed.append((kind, body))
            if passed:
                await relay.peer.send_many(passed)

    async def _to_local(self, relay: Relay, local: FrameStream) -> None:
        while (frames := await relay.peer.receive_ready_untrusted()) is not None:
            relay.count(out_bytes=sum(len(b) for kind, b in frames if kind is FrameKind.DATA))
            await local.send_many(frames)

    def _sign_untrusted(self, relay: Relay, body: bytes) -> bytes:
        draft = decode_message_untrusted(SignDraft, body)
        message = decode_message_untrusted(SIGNABLE[draft.type], draft.payload)
        if isinstance(message, UnitHeader):
            relay.header = sign_message(message, self._identity.signing_key)
            relay.peer.lasts(RESUME_GRACE_MS / 1000)
            return relay.header.data
        return sign_message(message, self._identity.signing_key).data

    # --- a connection that breaks ---------------------------------------------------------------

    async def _keep_linked(self, relay: Relay) -> None:
        """Go back to the unit each time its connection breaks, until that fails for good."""
        try:
            while True:
                await relay.peer.wait_broken()
                with trio.fail_after(relay.patience_s):
                    found = await self._enter_lane(relay) or await self._find_again(relay)
                await self._go_on(relay, found)
        except (NetworkError, PeerLost, RemoteProtocolError, trio.TooSlowError) as exc:
            log.info("unit.not_resumed", unit_id=relay.unit_id, reason=type(exc).__name__)
            relay.peer.give_up()

    async def _find_again(self, relay: Relay) -> Found:
        """A stream that the peer takes for this unit, and how many frames it has."""
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                return await self._try_again(relay)
            except PeerLost:
                log.debug("unit.peer_still_lost", unit_id=relay.unit_id)
            await trio.sleep(delay_s * _jitter.uniform(0.5, 1.5))
            delay_s = min(delay_s * 2, _SLOWEST_RETRY_S)

    async def _try_again(self, relay: Relay) -> Found:
        stream = await self._network.open_stream(relay.peer_id, RESUME_PROTOCOL)
        try:
            frames = FrameStream(stream)
            answer = await self._ask_untrusted(relay, frames, RESUMPTION)
            received = decode_message_untrusted(UnitResumed, answer).received
            return Found(stream, frames, received)
        except BaseException:
            await _close(stream)
            raise

    async def _ask_untrusted(self, relay: Relay, frames: FrameStream, table: Table) -> bytes:
        """Say which unit is ours; what the peer answers when it agrees."""
        assert relay.header is not None
        relay.attempt += 1
        issued_at_ms = now_ms()
        resume = UnitResume(
            suite=SUITE,
            unit_id=relay.header.message.unit_id,
            header_hash=relay.header.hash,
            attempt=relay.attempt,
            received=relay.peer.received,
            issued_at_ms=issued_at_ms,
            expires_at_ms=issued_at_ms + MAX_RESUME_LIFETIME_MS,
        )
        envelope = sign_message(resume, self._identity.signing_key)
        session = Session("S", table)
        session.sending(FrameKind.RESUME)
        await frames.send(FrameKind.RESUME, envelope.data)
        frame = await frames.receive_untrusted()
        if frame is None:
            raise PeerLost("The peer closed the stream before it answered.")
        kind, body = frame
        session.received_untrusted(kind)
        if kind is FrameKind.REFUSAL:
            refusal = decode_message_untrusted(Refusal, body)
            raise RemoteProtocolError(refusal.error_code(), refusal.detail)
        return body

    @staticmethod
    async def _go_on(relay: Relay, found: Found) -> None:
        """Carry the unit over what was found.  Its earlier streams are done with then."""
        earlier, relay.streams = relay.streams, [found.frames]
        try:
            await relay.peer.attach(found.stream, found.received, found.frames)
            log.info("unit.resumed", unit_id=relay.unit_id)
        finally:
            for each in earlier:
                await _close(each)

    # --- a lane for much ------------------------------------------------------------------------

    async def _prepare_lane(self, relay: Relay) -> None:
        """Where the unit turns out to be large: have a lane ready, and let go of the stream."""
        await relay.is_large.wait()
        with trio.move_on_after(_LANE_S):
            try:
                relay.lane = await self._open_lane(relay)
            except (NetworkError, PeerLost, RemoteProtocolError, trio.BrokenResourceError) as exc:
                # It stays where it is.
                log.debug("lane.not_opened", unit_id=relay.unit_id, reason=type(exc).__name__)
        if relay.lane is not None:
            relay.peer.suspend()

    async def _open_lane(self, relay: Relay) -> Lane | None:
        ip = self._network.ip_of(relay.peer_id)
        if ip is None or relay.header is None:
            return None
        stream = await self._network.open_stream(relay.peer_id, LANE_PROTOCOL)
        try:
            answer = await self._ask_untrusted(relay, FrameStream(stream), LANE_ASKING)
        finally:
            await _close(stream)
        ticket = decode_message_untrusted(LaneTicket, answer)
        ends = LaneEnds(
            unit_id=relay.header.message.unit_id,
            submitter_peer=self._identity.public_key,
            provider_peer=public_key_from_peer_id(relay.peer_id),
        )
        lane = await dial_lane(ip, ticket.port)
        return Lane(lane, ticket.ticket, LaneFrames(lane, ticket.ticket, ends, "S"))

    @staticmethod
    async def _enter_lane(relay: Relay) -> Found | None:
        """The lane that was prepared, if the peer lets this unit in."""
        lane, relay.lane = relay.lane, None
        if lane is None:
            return None
        try:
            with trio.fail_after(_LANE_ENTRY_S):
                await lane.stream.send_all(hello(lane.ticket))
                received = encode_message(UnitResumed(relay.peer.received))
                await lane.frames.send(FrameKind.RESUMED, received)
                answer = await lane.frames.expect_untrusted(FrameKind.RESUMED)
            return Found(
                lane.stream, lane.frames, decode_message_untrusted(UnitResumed, answer).received
            )
        except (PeerLost, RemoteProtocolError, trio.TooSlowError) as exc:
            log.debug("lane.not_entered", unit_id=relay.unit_id, reason=type(exc).__name__)
            lane.stream.abort()
            return None
        except BaseException:
            lane.stream.abort()
            raise


async def _close(stream: ByteStream | FrameStream) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(2):
        await stream.aclose()


async def _say(local: FrameStream, code: ErrorCode, detail: str) -> None:
    try:
        with trio.move_on_after(1):
            await local.send(FrameKind.ERROR, encode_message(Refusal(int(code), detail[:200])))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        log.debug("relay.local_side_left")
