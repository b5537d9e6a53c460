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
from dataclasses import dataclass

import structlog
import trio

from nextgpu_node.clock import now_ms
from nextgpu_node.daemon.lasting import LastingFrames
from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.frames import FrameStream, widen
from nextgpu_node.identity import Identity
from nextgpu_node.p2p.network import Network
from nextgpu_node.p2p.streams import PeerStream
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import Signed, sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.ids import peer_id_from_public_key
from nextgpu_protocol.limits import MAX_RESUME_LIFETIME_MS, RESUME_GRACE_MS
from nextgpu_protocol.local import SIGNABLE, Connect, SignDraft
from nextgpu_protocol.messages import SUITE, Refusal, UnitHeader, UnitResume, UnitResumed
from nextgpu_protocol.session import RESUMPTION, Session

log = structlog.get_logger()

UNIT_PROTOCOL = "/nextgpu/unit/1"
RESUME_PROTOCOL = "/nextgpu/resume/1"
_CONNECT_DEADLINE_S = 10
_DIAL_DEADLINE_S = 20
_FIRST_RETRY_S = 0.1
_SLOWEST_RETRY_S = 2.0
_LEAST_PATIENCE_S = 2.0
_jitter = random.SystemRandom()


@dataclass(slots=True, eq=False)
class Relay:
    """One borrowed unit, as its own daemon sees it: sizes and an id."""

    peer_id: str
    peer: LastingFrames
    began_s: float
    header: Signed[UnitHeader] | None = None
    attempt: int = 0
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
        relay = Relay(peer_id, LastingFrames(stream), time.monotonic())
        self.relays.add(relay)
        try:
            await local.send(FrameKind.CONNECTED, self._identity.public_key)
            await self._pump_both(relay, local)
        finally:
            self.relays.discard(relay)
            await _close(stream)

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
                    relay.input_bytes += len(body)
                passed.append((kind, body))
            if passed:
                await relay.peer.send_many(passed)

    async def _to_local(self, relay: Relay, local: FrameStream) -> None:
        while (frames := await relay.peer.receive_ready_untrusted()) is not None:
            relay.output_bytes += sum(len(b) for kind, b in frames if kind is FrameKind.DATA)
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
                    stream, received = await self._find_again(relay)
                await self._go_on(relay, stream, received)
        except (NetworkError, PeerLost, RemoteProtocolError, trio.TooSlowError) as exc:
            log.info("unit.not_resumed", unit_id=relay.unit_id, reason=type(exc).__name__)
            relay.peer.give_up()

    async def _find_again(self, relay: Relay) -> tuple[PeerStream, int]:
        """A stream that the peer takes for this unit, and how many frames it has."""
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                return await self._try_again(relay)
            except PeerLost:
                log.debug("unit.peer_still_lost", unit_id=relay.unit_id)
            await trio.sleep(delay_s * _jitter.uniform(0.5, 1.5))
            delay_s = min(delay_s * 2, _SLOWEST_RETRY_S)

    async def _try_again(self, relay: Relay) -> tuple[PeerStream, int]:
        relay.attempt += 1
        stream = await self._network.open_stream(relay.peer_id, RESUME_PROTOCOL)
        try:
            return stream, await self._ask_to_resume(relay, FrameStream(stream))
        except BaseException:
            await _close(stream)
            raise

    async def _ask_to_resume(self, relay: Relay, frames: FrameStream) -> int:
        assert relay.header is not None
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
        session = Session("S", RESUMPTION)
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
        return decode_message_untrusted(UnitResumed, body).received

    @staticmethod
    async def _go_on(relay: Relay, stream: PeerStream, received: int) -> None:
        """Carry the unit over `stream` until that breaks too."""
        try:
            link = await relay.peer.attach(stream, received)
            log.info("unit.resumed", unit_id=relay.unit_id)
            await link.over.wait()
        finally:
            await _close(stream)


async def _close(stream: PeerStream) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(2):
        await stream.aclose()


async def _say(local: FrameStream, code: ErrorCode, detail: str) -> None:
    try:
        with trio.move_on_after(1):
            await local.send(FrameKind.ERROR, encode_message(Refusal(int(code), detail[:200])))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        log.debug("relay.local_side_left")
