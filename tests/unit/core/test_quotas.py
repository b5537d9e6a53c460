"""Quotas and kinds of single peers, and the line's limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextgpu_node.core import lending as core
from nextgpu_node.core.admission import Submitter, check_policy
from nextgpu_node.core.bandwidth import TokenBucket
from nextgpu_node.core.lending import Lending
from nextgpu_node.core.quotas import DAY_MS, UsageBook
from nextgpu_node.peer_terms import PeerTerms
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import PeerId, PeerKey, peer_id_from_public_key
from tests.support.messages import NOW_MS, POLICY, PROVIDER, SUBMITTER, header, offer, request

KEY = PeerKey(bytes(SUBMITTER.verify_key))
ME = peer_id_from_public_key(KEY)
FORMER = PeerKey(bytes(range(32)))
MAX_S = request().message.max_seconds


def lending(**policy: object) -> Lending:
    many = replace(POLICY, max_concurrent_units=10, **policy)  # type: ignore[arg-type]
    return Lending(PeerKey(bytes(PROVIDER.verify_key)), many, table_version=1)


def ask(desk: Lending, session: int, *, now_ms: int = NOW_MS, **changes: object) -> core.Effect:
    times = {"issued_at_ms": now_ms, "expires_at_ms": now_ms + 60_000}
    asked = request(nonce=session, **{**times, **changes})
    (effect,) = desk.handle(core.UnitRequested(session, asked, ME), now_ms=now_ms)
    return effect


def run_to_its_end(desk: Lending, session: int, wall_ms: int) -> None:
    assert isinstance(ask(desk, session), core.SpawnWorker)
    desk.handle(core.WorkerReady(session), now_ms=NOW_MS)
    made = offer()
    desk.handle(core.OfferSent(session, made), now_ms=NOW_MS)
    desk.handle(core.HeaderReceived(session, header(made)), now_ms=NOW_MS)
    desk.handle(core.UnitStopped(session, "cancelled", ErrorCode.CANCELLED), now_ms=NOW_MS)
    desk.handle(core.Wiped(session, wall_ms), now_ms=NOW_MS)
    desk.handle(core.SessionOver(session), now_ms=NOW_MS)


def test_one_peer_has_so_many_units_at_once() -> None:
    desk = lending(peer_units=2)
    assert isinstance(ask(desk, 1), core.SpawnWorker)
    assert isinstance(ask(desk, 2), core.SpawnWorker)
    refused = ask(desk, 3)
    assert isinstance(refused, core.Refuse)
    assert refused.code is ErrorCode.BUSY
    desk.handle(core.SessionOver(1), now_ms=NOW_MS)
    assert isinstance(ask(desk, 4), core.SpawnWorker)


def test_a_day_of_one_peer_counts_what_ran_and_what_runs() -> None:
    desk = lending(peer_seconds_per_day=2 * MAX_S)
    run_to_its_end(desk, 1, wall_ms=10_000)
    assert isinstance(ask(desk, 2), core.SpawnWorker)  # holds MAX_S until it has ended
    refused = ask(desk, 3)
    assert isinstance(refused, core.Refuse)
    assert refused.code is ErrorCode.OVER_LIMIT
    assert refused.detail == f"max_seconds: {MAX_S} of {MAX_S - 10} left today"
    # A day later all of it is forgotten.
    desk.handle(core.SessionOver(2), now_ms=NOW_MS)
    later = NOW_MS + DAY_MS + 600_000
    assert isinstance(ask(desk, 4, now_ms=later), core.SpawnWorker)


def test_a_changed_key_has_no_second_quota() -> None:
    desk = lending(peer_seconds_per_day=MAX_S)
    desk.usage.add(peer_id_from_public_key(FORMER), 1000, at_ms=NOW_MS)
    names = Submitter(KEY, frozenset({FORMER}))
    assert desk.load_of(names, now_ms=NOW_MS).used_ms == 1000
    event = core.UnitRequested(1, request(), ME, frozenset({FORMER}))
    (effect,) = desk.handle(event, now_ms=NOW_MS)
    assert isinstance(effect, core.Refuse)


def test_terms_of_its_own_take_the_place_of_everyones() -> None:
    desk = lending(peer_units=1, terms={ME: PeerTerms(ME, units=2)})
    assert isinstance(ask(desk, 1), core.SpawnWorker)
    assert isinstance(ask(desk, 2), core.SpawnWorker)
    assert isinstance(ask(desk, 3), core.Refuse)

    slow = lending(requests_per_minute=100, terms={ME: PeerTerms(ME, requests_per_minute=2)})
    # Each request is counted for the connection and for the key that signed.
    codes = [getattr(ask(slow, session), "code", None) for session in range(4)]
    assert codes == [None, None, ErrorCode.RATE_LIMITED, ErrorCode.RATE_LIMITED]


@pytest.mark.parametrize(
    ("kinds", "listed", "asked", "code"),
    [
        (None, False, "program", None),
        (None, False, "python", ErrorCode.PYTHON_NOT_ALLOWED),
        (None, True, "python", None),
        (("program",), True, "python", ErrorCode.PYTHON_NOT_ALLOWED),
        (("program", "python"), False, "python", None),
        (("python",), False, "program", ErrorCode.NOT_ALLOWED),
    ],
)
def test_kinds_of_unit_by_peer(
    kinds: tuple[str, ...] | None, listed: bool, asked: str, code: ErrorCode | None
) -> None:
    terms = {ME: PeerTerms(ME, kinds=kinds)} if kinds else {}
    python_allow = frozenset({ME}) if listed else frozenset()
    policy = replace(POLICY, terms=terms, python_allow=python_allow)
    wanted = request(kind=asked)
    if code is None:
        check_policy(wanted, policy, table_version=1, used_slots=0)
        return
    with pytest.raises(RemoteProtocolError) as caught:
        check_policy(wanted, policy, table_version=1, used_slots=0)
    assert caught.value.code is code


def test_a_denied_peer_is_found_among_those_that_run() -> None:
    desk = lending()
    ask(desk, 1)
    assert desk.sessions_of_denied() == []
    desk.policy = replace(desk.policy, deny=frozenset({ME}))
    assert desk.sessions_of_denied() == [1]


@given(st.lists(st.tuples(st.integers(0, 3 * DAY_MS), st.integers(0, 10**6)), max_size=40))
def test_a_days_use_is_what_lies_within_it(units: list[tuple[int, int]]) -> None:
    """To the ten minutes: never less than the last 24 hours, never more than 10 minutes beyond."""
    book, units = UsageBook(), sorted(units)
    for at_ms, used_ms in units:
        book.add(ME, used_ms, at_ms=at_ms)
    now_ms = units[-1][0] if units else 0
    within = sum(used for at, used in units if at > now_ms - DAY_MS)
    around = sum(used for at, used in units if at >= now_ms - DAY_MS - 600_000)
    assert within <= book.used_ms([ME], now_ms=now_ms) <= around


def test_however_many_peers_come_the_book_stays_small() -> None:
    book = UsageBook()
    for number in range(5000):
        book.add(PeerId(str(number)), 1, at_ms=0)
    assert len(book._slots) == 4096
    assert book.used_ms([PeerId("4999")], now_ms=0) == 1


@given(
    st.integers(1000, 10**9),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 10**6)), min_size=1, max_size=50),
)
def test_in_the_long_run_no_more_passes_than_the_rate(
    rate: int, sends: list[tuple[float, int]]
) -> None:
    bucket, now_s, passed = TokenBucket(rate), 0.0, 0
    for pause_s, size in sends:
        now_s += pause_s
        now_s += bucket.delay_s(size, now_s=now_s)
        passed += size
        assert passed <= rate * (now_s + 0.1) * (1 + 1e-9) + 1


def test_no_rate_is_no_delay() -> None:
    assert TokenBucket(0).delay_s(10**12, now_s=0.0) == 0.0
