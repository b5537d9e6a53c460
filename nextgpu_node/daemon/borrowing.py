"""The unit socket: a submitter's process on one side, a peer on the other, frames between.

    CONNECT peer ──► a unit stream to that peer is opened ──► CONNECTED
    SIGN draft   ──► decoded, then signed with the node's identity ──► SIGNED
    all else     ──► relayed as it is, both ways

The relay sees envelopes and ciphertext.  Whoever can open the socket (mode 0600) is the owner.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
import trio

from nextgpu_node.errors import NetworkError, PeerLost
from nextgpu_node.frames import FrameStream, widen
from nextgpu_node.identity import Identity
from nextgpu_node.p2p.network import Network
from nextgpu_protocol.codec import decode_message_untrusted, encode_message
from nextgpu_protocol.envelope import sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.ids import peer_id_from_public_key
from nextgpu_protocol.local import SIGNABLE, Connect, SignDraft
from nextgpu_protocol.messages import Refusal, UnitHeader

log = structlog.get_logger()

UNIT_PROTOCOL = "/nextgpu/unit/1"
_CONNECT_DEADLINE_S = 10
_DIAL_DEADLINE_S = 20


@dataclass(slots=True, eq=False)
class Relay:
    """One borrowed unit, as its own daemon sees it: sizes and an id."""

    peer: FrameStream
    began_s: float
    unit_id: str = ""
    input_bytes: int = 0
    output_bytes: int = 0

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
        relay = Relay(FrameStream(stream), time.monotonic())
        self.relays.add(relay)
        try:
            await local.send(FrameKind.CONNECTED, self._identity.public_key)
            await self._pump_both(relay, local)
        finally:
            self.relays.discard(relay)
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await stream.aclose()

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
            relay.unit_id = message.unit_id.hex()
        return sign_message(message, self._identity.signing_key).data


async def _say(local: FrameStream, code: ErrorCode, detail: str) -> None:
    try:
        with trio.move_on_after(1):
            await local.send(FrameKind.ERROR, encode_message(Refusal(int(code), detail[:200])))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        log.debug("relay.local_side_left")
