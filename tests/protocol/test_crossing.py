"""One unit between two honest ends over a transport that delivers when and in what pieces it
likes, with a hostile one beside it: bytes, frames, the table and the seal together.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.framing import FrameDecoder, FrameKind, encode_frame
from nextgpu_protocol.sealing import Opener, Sealer
from nextgpu_protocol.session import TRANSITIONS, Session, SessionState, Side
from tests.protocol import samples

K = FrameKind


class End:
    """One peer: its table, its two directions of the seal, and what is on its way to it."""

    def __init__(self, side: Side, sealer: Sealer, opener: Opener) -> None:
        self.side: Side = side
        self.session = Session(side)
        self.decoder = FrameDecoder()
        self.sealer, self.opener = sealer, opener
        self.preamble: bytes | None = sealer.preamble
        self.arriving = bytearray()
        self.sealed: list[bytes] = []
        self.opened: list[bytes] = []

    @property
    def closed(self) -> bool:
        return self.session.state is SessionState.CLOSED

    def body(self, kind: FrameKind, text: bytes) -> bytes:
        """What this end puts into a frame: DATA is sealed, all else is empty here."""
        if kind is not K.DATA:
            return b""
        if self.preamble is not None:
            body, self.preamble = self.preamble, None
            return body
        self.sealed.append(text)
        return self.sealer.seal(text)

    def take(self, kind: FrameKind, body: bytes) -> None:
        self.session.received_untrusted(kind)
        if kind is K.DATA:
            had_begun = self.opener._state is not None
            text = self.opener.open_untrusted(body)
            if had_begun:
                self.opened.append(text)


class Crossing(RuleBasedStateMachine):
    """Both ends follow their own table; the wire decides what they have heard of each other."""

    def __init__(self) -> None:
        super().__init__()
        worker, submitter = samples.worker_keys(), samples.submitter_keys()
        self.ends: dict[Side, End] = {
            "S": End("S", Sealer(submitter.inbound), Opener(submitter.outbound)),
            "P": End("P", Sealer(worker.outbound), Opener(worker.inbound)),
        }

    def other(self, side: Side) -> End:
        return self.ends["P" if side == "S" else "S"]

    @rule(side=st.sampled_from(("S", "P")), pick=st.integers(0, 50), text=st.binary(max_size=40))
    def says_what_it_may(self, side: Side, pick: int, text: bytes) -> None:
        end = self.ends[side]
        kinds = [k for state, s, k in TRANSITIONS if (state, s) == (end.session.state, side)]
        if not kinds:
            return
        kind = kinds[pick % len(kinds)]
        end.session.sending(kind)
        self.other(side).arriving += encode_frame(kind, end.body(kind, text))

    @rule(side=st.sampled_from(("S", "P")), size=st.integers(1, 200))
    def hears_some_bytes(self, side: Side, size: int) -> None:
        end = self.ends[side]
        part, end.arriving[:] = bytes(end.arriving[:size]), end.arriving[size:]
        end.decoder.feed(part)
        for kind, body in end.decoder:
            if not end.closed:  # a side that has closed drops what still arrives
                end.take(kind, body)

    @rule(
        side=st.sampled_from(("S", "P")),
        kind=st.sampled_from([kind for kind in FrameKind if kind < 32]),
        damage=st.integers(1, 255),
    )
    def hears_a_lie(self, side: Side, kind: FrameKind, damage: int) -> None:
        """A frame that the other end never sent, once everything else was heard."""
        end = self.ends[side]
        if end.arriving or end.decoder.mid_frame or end.closed:
            return
        state = end.session.state
        sender = self.other(side).side
        allowed = (state, sender, kind) in TRANSITIONS
        if allowed and kind is not K.DATA:
            return  # an envelope would be needed, and its signature: tests of those are elsewhere
        expected = ErrorCode.BAD_SEAL if allowed else ErrorCode.UNEXPECTED_MESSAGE
        assert code_of(lambda: end.take(kind, bytes([damage]) * 56)) is expected
        assert end.session.state is state  # what was refused has changed nothing

    @invariant()
    def what_was_opened_is_what_was_sealed_so_far(self) -> None:
        for side, end in self.ends.items():
            sealed = self.other(side).sealed
            assert end.opened == sealed[: len(end.opened)]

    @invariant()
    def ends_that_have_heard_everything_stand_in_one_place(self) -> None:
        s, p = self.ends["S"], self.ends["P"]
        waiting = s.arriving or p.arriving or s.decoder.mid_frame or p.decoder.mid_frame
        if not waiting and not (s.closed or p.closed):
            assert s.session.state is p.session.state


def code_of(act: Callable[[], object]) -> ErrorCode | None:
    try:
        act()
    except RemoteProtocolError as exc:
        return exc.code
    return None


Crossing.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestCrossing = Crossing.TestCase
