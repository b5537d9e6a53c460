"""The frames of one unit, over one stream after another.  Spec: 47-resuming.md

A unit outlives its connection: where that breaks, both sides wait for a stream to take its place,
then each sends again what the other did not receive.  Whoever sends or receives here sees one
conversation without a gap, or one error at its end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from nextgpu_node.errors import ConnectionLost, NetworkError, PeerLost
from nextgpu_node.frames import ByteStream, FrameStream
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import Frame, FrameKind
from nextgpu_protocol.resumption import SentFrames

_BROKEN = (PeerLost, NetworkError, trio.BrokenResourceError, trio.ClosedResourceError)
# What is sent again goes out a few frames at a time.
_BATCH = 8


class LinkStream(ByteStream, Protocol):
    """A stream that can be ended while others wait in it."""

    def abort(self) -> None: ...


@dataclass(eq=False, slots=True)
class Link:
    """One stream that carries the unit, until `over`."""

    stream: ByteStream
    frames: FrameStream
    over: trio.Event = field(default_factory=trio.Event)


class LastingFrames:
    """Frames both ways.  One task may receive while several send: each frame goes out whole.

    Until `lasts` is called a broken connection is an error, as with FrameStream.
    """

    def __init__(self, stream: ByteStream) -> None:
        link = Link(stream, FrameStream(stream))
        # Apart, since what was lost is sent again while the other side's is already read.
        self._receiving: Link | None = link
        self._sending: Link | None = link
        self._sent = SentFrames()
        self._received = 0
        self._ready: deque[Frame] = deque()
        self._send_lock = trio.StrictFIFOLock()
        self._is_cut = False
        self._grace_s: float | None = None
        self._waits_until = math.inf
        self._suspended: set[Link] = set()
        self._changed = trio.lowlevel.ParkingLot()

    # --- frames, as FrameStream has them --------------------------------------------------

    async def receive_untrusted(self) -> Frame | None:
        """The next frame, or None where the peer ended the stream between two frames."""
        if not self._ready:
            frames = await self._receive_untrusted()
            if frames is None:
                return None
            self._ready.extend(frames)
        return self._ready.popleft()

    async def receive_ready_untrusted(self) -> list[Frame] | None:
        """Every whole frame that is here, at least one."""
        if not self._ready:
            return await self._receive_untrusted()
        frames = list(self._ready)
        self._ready.clear()
        return frames

    async def expect_untrusted(self, kind: FrameKind) -> bytes:
        """The body of the next frame, which must be of `kind`."""
        frame = await self.receive_untrusted()
        if frame is None:
            raise RemoteProtocolError(ErrorCode.TRUNCATED, f"{kind.name} is missing")
        if frame[0] is not kind:
            raise RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, frame[0].name)
        return frame[1]

    async def send(self, kind: FrameKind, body: bytes = b"") -> None:
        await self.send_many([(kind, body)])

    async def send_many(self, frames: Sequence[Frame]) -> None:
        """Send frames, none between them.  After a cancelled one nothing can follow."""
        async with self._send_lock:
            if self._is_cut:
                raise trio.BrokenResourceError("an earlier frame was cut")
            self._is_cut = True
            self._sent.add(frames)
            await self._deliver(frames)
            self._is_cut = False

    async def _receive_untrusted(self) -> list[Frame] | None:
        while True:
            link = self._receiving or await self._awaited("_receiving")
            try:
                frames = await link.frames.receive_ready_untrusted()
            except _BROKEN as exc:
                self._note_broken(link, exc)
                continue
            # Only what is handed out counts as received: the rest of a link that was replaced
            # meanwhile comes again on the next one.
            if link is self._receiving:
                self._received += len(frames or ())
                return frames

    async def _deliver(self, frames: Sequence[Frame]) -> None:
        link = self._sending
        if link is not None:
            try:
                await link.frames.send_many(frames)
            except _BROKEN as exc:
                self._note_broken(link, exc)
            if link is self._sending:
                return
        # These are noted as sent: they go out with all that was lost, on the next link.
        if self._sending is None:
            await self._awaited("_sending")

    # --- one link after another -------------------------------------------------------------

    def lasts(self, grace_s: float) -> None:
        """From now on a broken connection is waited out for so long."""
        self._grace_s = grace_s

    async def wait_broken(self) -> None:
        """Until there is no link."""
        while self._receiving is not None:
            await self._changed.park()

    def detach(self) -> int:
        """Give up the link that there is; how many frames have come, which from now on stands."""
        self.suspend()
        self._drop_suspended()
        return self._received

    def suspend(self) -> None:
        """As `detach`, but the stream stays open until another takes its place: to close it would
        tell the peer that the unit is over."""
        links = self._links()
        if links:
            self._waits_until = trio.current_time() + (self._grace_s or 0)
        self._suspended |= links
        self._receiving = self._sending = None
        self._changed.unpark_all()

    def _drop_suspended(self) -> None:
        for link in self._suspended:
            link.over.set()
            abort = getattr(link.stream, "abort", None)
            if abort is not None:
                abort()
        self._suspended.clear()

    def finish(self) -> None:
        """The unit is over: whoever owns the stream that carries it may close it."""
        for link in self._links() | self._suspended:
            link.over.set()

    def _links(self) -> set[Link]:
        return {link for link in (self._receiving, self._sending) if link is not None}

    @property
    def received(self) -> int:
        """Frames that came, and went on to whoever receives here."""
        return self._received

    @property
    def kept_from(self) -> int:
        return self._sent.kept_from

    @property
    def sent(self) -> int:
        return self._sent.count

    async def attach(
        self, stream: LinkStream, peer_received: int, frames: FrameStream | None = None
    ) -> Link:
        """Go on over `stream`: send what the peer lacks, then let everybody send again.

        `frames` reads and writes it, where something has been said on it, or in another way.
        Returns once that is done, or the link is over already.  Raises RemoteProtocolError where
        what the peer lacks is not held.
        """
        link, at = Link(stream, frames or FrameStream(stream)), peer_received
        lacking = self._sent.after_untrusted(at)
        self.detach()
        self._receiving = link
        self._changed.unpark_all()
        try:
            while lacking:
                await link.frames.send_many(lacking[:_BATCH])
                at += len(lacking[:_BATCH])
                lacking = self._sent.after_untrusted(at)
        except _BROKEN as exc:
            self._note_broken(link, exc)
        if link is self._receiving:
            self._sending = link
            self._changed.unpark_all()
        return link

    def give_up(self) -> None:
        """No link will come any more: whoever waits for one is told so."""
        self.detach()
        self._waits_until = -math.inf
        self._changed.unpark_all()

    def _note_broken(self, link: Link, exc: Exception) -> None:
        """Raises where the unit ends with this link."""
        if link not in (self._receiving, self._sending):
            return
        if self._grace_s is None or not isinstance(exc, ConnectionLost):
            raise exc
        self.detach()

    async def _awaited(self, side: str) -> Link:
        with trio.CancelScope() as scope:
            while (link := getattr(self, side)) is None:
                scope.deadline = self._waits_until
                if self._waits_until <= trio.current_time():
                    break
                await self._changed.park()
        if link is None:
            raise PeerLost("The connection to the peer was lost, and it did not come back in time.")
        found: Link = link
        return found
