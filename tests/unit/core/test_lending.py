"""The provider's decisions as tables: events in, effects out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from nacl.signing import SigningKey

from nextgpu_node.core import lending as core
from nextgpu_node.core.lending import Lending, UnitState
from nextgpu_protocol.envelope import Signed
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.ids import PeerKey, peer_id_from_public_key
from nextgpu_protocol.messages import Offer
from tests.support.messages import (
    NOW_MS,
    POLICY,
    PROVIDER,
    STRANGER,
    SUBMITTER,
    header,
    offer,
    request,
)

S = 7  # a session
SENDER = peer_id_from_public_key(bytes(SUBMITTER.verify_key))


@pytest.fixture
def lending() -> Lending:
    return Lending(PeerKey(bytes(PROVIDER.verify_key)), POLICY, table_version=1)


def handle(lending: Lending, event: core.Event, *, now_ms: int = NOW_MS) -> list[core.Effect]:
    return lending.handle(event, now_ms=now_ms)


def offered(lending: Lending) -> Signed[Offer]:
    """Bring session S to OFFERED."""
    handle(lending, core.UnitRequested(S, request(), SENDER))
    handle(lending, core.WorkerReady(S))
    made = offer()
    handle(lending, core.OfferSent(S, made))
    return made


def running(lending: Lending) -> None:
    made = offered(lending)
    handle(lending, core.HeaderReceived(S, header(made)))


def test_a_unit_goes_straight_through(lending: Lending) -> None:
    assert isinstance(
        handle(lending, core.UnitRequested(S, request(), SENDER))[0], core.SpawnWorker
    )
    assert isinstance(handle(lending, core.WorkerReady(S))[0], core.SendOffer)
    made = offer()
    assert handle(lending, core.OfferSent(S, made)) == []
    taken = header(made)
    assert handle(lending, core.HeaderReceived(S, taken)) == [core.StartUnit(made, taken)]
    assert handle(lending, core.OutputEnded(S)) == [core.AwaitExit()]
    assert handle(lending, core.WorkerEnded(S, "done")) == [core.WipeWorker()]
    assert handle(lending, core.Wiped(S)) == [core.SendReceipt("done")]
    assert handle(lending, core.SessionOver(S)) == []
    assert lending.used_slots == 0


def test_a_refused_request_takes_no_slot(lending: Lending) -> None:
    lending.policy = replace(POLICY, sharing=False, reason="sharing is off")
    effects = handle(lending, core.UnitRequested(S, request(), SENDER))
    assert effects == [core.Refuse(ErrorCode.NOT_SHARING, "sharing is off")]
    assert lending.used_slots == 0


def test_sharing_switched_off_while_the_worker_starts_discards_it(lending: Lending) -> None:
    handle(lending, core.UnitRequested(S, request(), SENDER))
    lending.policy = replace(POLICY, sharing=False, reason="sharing is off")
    assert isinstance(handle(lending, core.WorkerReady(S))[0], core.Discard)


def test_a_worker_that_can_not_start_ends_the_session(lending: Lending) -> None:
    handle(lending, core.UnitRequested(S, request(), SENDER))
    (effect,) = handle(lending, core.WorkerFailedToStart(S))
    assert isinstance(effect, core.Discard)
    assert effect.code is ErrorCode.INTERNAL


def test_a_header_by_another_signer_starts_nothing(lending: Lending) -> None:
    made = offered(lending)
    (effect,) = handle(lending, core.HeaderReceived(S, header(made, STRANGER)))
    assert effect == core.Discard(ErrorCode.WRONG_PEER, "header and request differ in signer")


def test_a_header_for_another_offer_starts_nothing(lending: Lending) -> None:
    offered(lending)
    (effect,) = handle(lending, core.HeaderReceived(S, header(offer(price=1))))
    assert isinstance(effect, core.Discard)
    assert effect.code is ErrorCode.WRONG_OFFER


def test_a_header_after_the_offer_expired_starts_nothing(lending: Lending) -> None:
    made = offered(lending)
    (effect,) = handle(lending, core.HeaderReceived(S, header(made)), now_ms=NOW_MS + 30_001)
    assert effect == core.Discard(ErrorCode.EXPIRED, "the offer")


def test_a_header_of_another_suite_starts_nothing(lending: Lending) -> None:
    made = offered(lending)
    (effect,) = handle(lending, core.HeaderReceived(S, header(made, suite=2)))
    assert isinstance(effect, core.Discard)
    assert effect.code is ErrorCode.UNKNOWN_SUITE


@pytest.mark.parametrize("status", ["cancelled", "timed_out", "submitter_lost", "owner_stopped"])
def test_a_running_unit_that_is_stopped_is_wiped_and_receipted(
    lending: Lending, status: str
) -> None:
    running(lending)
    stopped = core.UnitStopped(S, status, ErrorCode.CANCELLED)
    assert handle(lending, stopped) == [core.WipeWorker()]
    assert handle(lending, core.Wiped(S)) == [core.SendReceipt(status)]


def test_stopping_before_the_header_gives_no_receipt(lending: Lending) -> None:
    offered(lending)
    stopped = core.UnitStopped(S, "submitter_lost", ErrorCode.SUBMITTER_LOST)
    assert handle(lending, stopped) == [core.Discard(ErrorCode.SUBMITTER_LOST, "")]


def test_the_first_reason_to_stop_is_the_one_that_counts(lending: Lending) -> None:
    running(lending)
    handle(lending, core.UnitStopped(S, "timed_out", ErrorCode.TIMED_OUT))
    assert handle(lending, core.UnitStopped(S, "cancelled", ErrorCode.CANCELLED)) == []
    assert handle(lending, core.WorkerEnded(S, "worker_crashed")) == []
    assert handle(lending, core.Wiped(S)) == [core.SendReceipt("timed_out")]


def test_a_worker_that_exits_without_its_end_frame_has_crashed(lending: Lending) -> None:
    running(lending)
    handle(lending, core.WorkerEnded(S, "done"))
    assert handle(lending, core.Wiped(S)) == [core.SendReceipt("worker_crashed")]


def test_events_for_a_session_that_is_over_do_nothing(lending: Lending) -> None:
    for event in (
        core.WorkerReady(S),
        core.OutputEnded(S),
        core.UnitStopped(S, "cancelled", ErrorCode.CANCELLED),
        core.WorkerEnded(S, "done"),
    ):
        assert handle(lending, event) == []
    assert lending.state_of(S) is UnitState.OVER


def test_a_unit_holds_its_slot_until_its_stream_is_over(lending: Lending) -> None:
    lending.policy = replace(POLICY, max_concurrent_units=1)
    running(lending)
    handle(lending, core.UnitStopped(S, "cancelled", ErrorCode.CANCELLED))
    (effect,) = handle(lending, core.UnitRequested(S + 1, request(nonce=1), SENDER))
    assert isinstance(effect, core.Refuse)
    assert effect.code is ErrorCode.BUSY


def test_one_peer_can_not_fill_the_memory_of_requests_with_keys_of_its_own(
    lending: Lending,
) -> None:
    """Each request by another signer: the sixth over one connection is not even remembered."""
    many = replace(POLICY, max_concurrent_units=100)
    lending.policy = many
    keys = [SigningKey(bytes([100 + i]) * 32) for i in range(8)]
    for i, key in enumerate(keys):
        (effect,) = handle(lending, core.UnitRequested(S + i, request(key), SENDER))
        expected = core.SpawnWorker if i < POLICY.requests_per_minute else core.Refuse
        assert isinstance(effect, expected)
    assert effect == core.Refuse(ErrorCode.RATE_LIMITED, "")
    assert len(lending._seen) == POLICY.requests_per_minute
    other = peer_id_from_public_key(bytes(STRANGER.verify_key))
    (effect,) = handle(lending, core.UnitRequested(S + 99, request(STRANGER), other))
    assert isinstance(effect, core.SpawnWorker)


# --- the owner is back ----------------------------------------------------------------------------


def test_a_running_unit_may_save_its_state_and_then_ends(lending: Lending) -> None:
    running(lending)
    assert handle(lending, core.OwnerReturned(S)) == [core.AskToGiveBack()]
    assert lending.state_of(S) is UnitState.RUNNING
    assert handle(lending, core.OutputEnded(S)) == [core.AwaitExit()]
    assert handle(lending, core.WorkerEnded(S, "owner_stopped")) == [core.WipeWorker()]
    assert handle(lending, core.Wiped(S)) == [core.SendReceipt("owner_stopped")]


def test_one_that_does_not_is_stopped(lending: Lending) -> None:
    running(lending)
    handle(lending, core.OwnerReturned(S))
    late = core.UnitStopped(S, "owner_stopped", ErrorCode.OWNER_RETURNED)
    assert handle(lending, late) == [core.WipeWorker()]
    assert handle(lending, core.Wiped(S)) == [core.SendReceipt("owner_stopped")]


def test_a_unit_that_has_not_begun_is_dropped(lending: Lending) -> None:
    offered(lending)
    lending.policy = replace(POLICY, sharing=False, reason="paused by its owner")
    assert handle(lending, core.OwnerReturned(S)) == [
        core.Discard(ErrorCode.NOT_SHARING, "paused by its owner")
    ]


def test_a_unit_that_is_ending_ends_as_it_would(lending: Lending) -> None:
    assert handle(lending, core.OwnerReturned(S)) == []
    running(lending)
    handle(lending, core.OutputEnded(S))
    assert handle(lending, core.OwnerReturned(S)) == []
    assert handle(lending, core.WorkerEnded(S, "done")) == [core.WipeWorker()]
