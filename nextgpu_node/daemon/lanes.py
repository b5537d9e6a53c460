"""The bulk lane of a unit: its frames over a plain TCP connection.  Spec: 48-lane.md"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from nextgpu_node.daemon.lasting import LinkStream
from nextgpu_node.daemon.lending import LentUnit
from nextgpu_node.errors import ConnectionLost, PeerLost
from nextgpu_node.frames import FrameStream
from nextgpu_node.p2p.lanes import LaneStream
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.lane import HELLO_BYTES, LaneCipher, LaneEnds, lane_id, lane_id_untrusted
from nextgpu_protocol.limits import LANE_TICKET_BYTES
from nextgpu_protocol.messages import LaneTicket
from nextgpu_protocol.session import Side

_TICKET_S = 15
_HELLO_S = 5
_LEAVE_S = 1


class LaneFrames(FrameStream):
    """Frames over a lane.  DATA is sealed already; all others are sealed here."""

    def __init__(self, stream: LinkStream, ticket: bytes, ends: LaneEnds, own_side: Side) -> None:
        super().__init__(stream)
        peer_side: Side = "P" if own_side == "S" else "S"
        self._sealing = LaneCipher(ticket, ends, own_side)
        self._opening = LaneCipher(ticket, ends, peer_side)
        self._peer_left = False

    def _outgoing(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        return self._sealing.seal(frames)

    def _incoming_untrusted(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        return self._opening.open_untrusted(frames)

    async def receive_ready_untrusted(self) -> list[Frame] | None:
        """As FrameStream's, but None only where the peer took its leave: all else that ends a lane
        can be done by whoever stands on the way, and is a lost connection."""
        if self._peer_left:
            return None
        try:
            frames = await super().receive_ready_untrusted()
        except RemoteProtocolError as exc:
            raise ConnectionLost("The bulk lane was disturbed.") from exc
        if frames is None:
            raise ConnectionLost("The bulk lane ended without a word.")
        kinds = [kind for kind, _ in frames]
        if FrameKind.LANE in kinds:
            self._peer_left = True
            frames = frames[: kinds.index(FrameKind.LANE)]
        return frames or None

    async def aclose(self) -> None:
        """Take leave, then close."""
        with suppress(PeerLost, trio.BrokenResourceError, trio.ClosedResourceError):
            with trio.move_on_after(_LEAVE_S):
                await self.send(FrameKind.LANE)
        await super().aclose()


@dataclass(frozen=True, slots=True)
class _Issued:
    unit: LentUnit
    attempt: int
    ticket: bytes
    ends: LaneEnds
    until_s: float


class LaneDesk:
    """The provider's side: gives tickets out, and takes each back once."""

    def __init__(self) -> None:
        self._port = 0
        self._issued: dict[bytes, _Issued] = {}

    def opens(self, port: int) -> None:
        """Lanes are listened for at `port` from now on."""
        self._port = port

    def issue(self, unit: LentUnit, attempt: int, ends: LaneEnds) -> LaneTicket:
        """A ticket for the unit, in place of any that it had."""
        now_s = trio.current_time()
        self._issued = {
            name: each
            for name, each in self._issued.items()
            if each.unit is not unit and each.until_s > now_s
        }
        ticket = os.urandom(LANE_TICKET_BYTES)
        until_s = now_s + _TICKET_S
        self._issued[lane_id(ticket)] = _Issued(unit, attempt, ticket, ends, until_s)
        return LaneTicket(self._port, ticket, _TICKET_S * 1000)

    async def serve(self, stream: LaneStream) -> None:
        """One connection, whoever made it, for as long as it carries a unit."""
        with trio.fail_after(_HELLO_S):
            hello = await stream.receive_exactly(HELLO_BYTES)
            try:
                issued = self._take_untrusted(hello)
                frames = LaneFrames(stream, issued.ticket, issued.ends, "P")
                received = await issued.unit.check_lane_untrusted(frames, issued.attempt)
            except RemoteProtocolError:
                return
        link = await issued.unit.enter_lane(stream, frames, received)
        await link.over.wait()
        await frames.aclose()

    def _take_untrusted(self, hello: bytes) -> _Issued:
        issued = self._issued.pop(lane_id_untrusted(hello), None)
        if issued is None or issued.until_s <= trio.current_time():
            raise RemoteProtocolError(ErrorCode.UNKNOWN_UNIT, "lane")
        return issued
