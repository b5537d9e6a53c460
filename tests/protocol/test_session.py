"""The table of who may say what, and that both ends of it always agree."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nextgpu_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from nextgpu_protocol.framing import FrameKind
from nextgpu_protocol.session import TRANSITIONS, Session, SessionState, Side

SIDES: tuple[Side, ...] = ("S", "P")
K = FrameKind
PEER_KINDS = [kind for kind in FrameKind if kind < 32]
ALL_STEPS = list(itertools.product(SessionState, SIDES, FrameKind))
ABSENT = [step for step in ALL_STEPS if step not in TRANSITIONS]


def session_in(state: SessionState, side: Side) -> Session:
    session = Session(side)
    session.state = state
    return session


def other(side: Side) -> Side:
    return "P" if side == "S" else "S"


def test_every_absent_row_is_the_senders_fault_on_both_ends() -> None:
    assert len(ABSENT) > 200
    for state, sender, kind in ABSENT:
        with pytest.raises(LocalProtocolError):
            session_in(state, sender).sending(kind)
        receiver = session_in(state, other(sender))
        with pytest.raises(RemoteProtocolError) as caught:
            receiver.received_untrusted(kind)
        assert caught.value.code is ErrorCode.UNEXPECTED_MESSAGE
        assert receiver.state is state


def test_every_row_moves_both_ends_alike() -> None:
    for (state, sender, kind), following in TRANSITIONS.items():
        sends, receives = session_in(state, sender), session_in(state, other(sender))
        sends.sending(kind)
        receives.received_untrusted(kind)
        assert sends.state is receives.state is following


def test_a_session_begins_idle_and_every_state_is_reached_from_there() -> None:
    assert Session("S").state is Session("P").state is SessionState.IDLE
    assert reachable(SessionState.IDLE) == set(SessionState)


def test_closed_is_reached_from_every_state_and_left_from_none() -> None:
    for state in SessionState:
        assert SessionState.CLOSED in reachable(state)
    assert not [row for row in TRANSITIONS if row[0] is SessionState.CLOSED]


def test_from_every_state_after_the_header_the_provider_alone_can_give_its_receipt() -> None:
    before = {SessionState.IDLE, SessionState.REQUESTED, SessionState.OFFERED}
    after = set(SessionState) - before - {SessionState.RECEIPTED, SessionState.CLOSED}
    for state in after:
        assert TRANSITIONS[state, "P", K.RECEIPT] is SessionState.RECEIPTED
        assert TRANSITIONS[state, "P", K.ERROR] is SessionState.CLOSED


def test_frames_of_a_machine_never_pass_between_peers() -> None:
    assert {kind for _, _, kind in TRANSITIONS} <= set(PEER_KINDS)


def reachable(start: SessionState) -> set[SessionState]:
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        for (before, _, _), after in TRANSITIONS.items():
            if before is state and after not in seen:
                seen.add(after)
                todo.append(after)
    return seen


Wire = tuple[FrameKind, ...]
Both = tuple[SessionState, SessionState, Wire, Wire]  # S, P, on the way to P, on the way to S


def test_two_honest_peers_never_accuse_each_other_however_frames_cross() -> None:
    """Every interleaving with up to three frames on the way each way, searched whole."""
    start: Both = (SessionState.IDLE, SessionState.IDLE, (), ())
    seen, todo = {start}, deque([start])
    while todo:
        for following in moves(todo.popleft()):
            if following not in seen:
                seen.add(following)
                todo.append(following)
    settled = {(s, p) for s, p, to_p, to_s in seen if not to_p and not to_s}
    assert (SessionState.CLOSED, SessionState.CLOSED) in settled
    # With nothing on the way both ends stand at the same place, or one has closed on the other.
    assert all(s is p or SessionState.CLOSED in (s, p) for s, p in settled)


def moves(now: Both) -> list[Both]:
    s, p, to_p, to_s = now
    found: list[Both] = []
    for (state, sender, kind), after in TRANSITIONS.items():
        if sender == "S" and state is s and len(to_p) < 3:
            found.append((after, p, (*to_p, kind), to_s))
        if sender == "P" and state is p and len(to_s) < 3:
            found.append((s, after, to_p, (*to_s, kind)))
    # A side that has closed drops what still arrives.
    if to_p:
        found.append((s, p if p is SessionState.CLOSED else hear(p, "S", to_p[0]), to_p[1:], to_s))
    if to_s:
        found.append((s if s is SessionState.CLOSED else hear(s, "P", to_s[0]), p, to_p, to_s[1:]))
    return found


def hear(state: SessionState, sender: Side, kind: FrameKind) -> SessionState:
    receiver = session_in(state, other(sender))
    receiver.received_untrusted(kind)
    return receiver.state


class Conversation(RuleBasedStateMachine):
    """Real sessions against a model that keeps facts, not states."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[Side, Session] = {"S": Session("S"), "P": Session("P")}
        self.said: list[tuple[Side, FrameKind]] = []

    def count(self, side: Side, kind: FrameKind) -> int:
        return self.said.count((side, kind))

    @property
    def over(self) -> bool:
        last = self.said[-1] if self.said else None
        cancelled_offer = last == ("S", K.CANCEL) and not self.count("S", K.HEADER)
        return last in {("P", K.REFUSAL), ("P", K.ERROR), ("S", K.ACK)} or cancelled_offer

    def allowed(self, side: Side, kind: FrameKind) -> bool:
        """The rules of 45-session.md as sentences."""
        if self.over:
            return False
        requested, offered = self.count("S", K.REQUEST) > 0, self.count("P", K.OFFER) > 0
        taken, receipted = self.count("S", K.HEADER) > 0, self.count("P", K.RECEIPT) > 0
        cancelled = self.count("S", K.CANCEL) > 0 and not self.cancelled_after_receipt
        input_ended, output_ended = self.count("S", K.END) > 0, self.count("P", K.END) > 0
        match side, kind:
            case "S", K.REQUEST:
                return not requested
            case "P", K.REFUSAL | K.OFFER:
                return requested and not offered
            case "S", K.HEADER:
                return offered and not taken
            case "S", K.CANCEL:
                return offered and not cancelled
            case "P", K.ERROR:
                return offered and not receipted
            case "S", K.DATA | K.END:
                if receipted or output_ended:
                    return taken and not cancelled
                return taken and not cancelled and not input_ended
            case "P", K.DATA | K.END:
                return taken and not receipted and (cancelled or not output_ended)
            case "P", K.RECEIPT:
                return taken and not receipted
            case "S", K.ACK:
                return receipted
        return False

    @property
    def cancelled_after_receipt(self) -> bool:
        if not self.count("S", K.CANCEL) or not self.count("P", K.RECEIPT):
            return False
        return self.said.index(("S", K.CANCEL)) > self.said.index(("P", K.RECEIPT))

    @precondition(lambda self: not self.over)
    @rule(pick=st.integers(0, 1000))
    def a_legal_frame(self, pick: int) -> None:
        legal = [(s, k) for s in SIDES for k in FrameKind if self.allowed(s, k)]
        side, kind = legal[pick % len(legal)]
        self.ends[side].sending(kind)
        self.ends[other(side)].received_untrusted(kind)
        self.said.append((side, kind))

    @rule(side=st.sampled_from(SIDES), kind=st.sampled_from(FrameKind))
    def any_frame(self, side: Side, kind: FrameKind) -> None:
        if self.allowed(side, kind):
            return
        with pytest.raises(LocalProtocolError):
            self.ends[side].sending(kind)
        with pytest.raises(RemoteProtocolError):
            self.ends[other(side)].received_untrusted(kind)

    @invariant()
    def both_ends_agree(self) -> None:
        assert self.ends["S"].state is self.ends["P"].state
        assert (self.ends["S"].state is SessionState.CLOSED) == self.over


Conversation.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestConversation = Conversation.TestCase
