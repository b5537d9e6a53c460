"""Tokens at the provider: admitted, counted once, never overdrawn.  Spec: 75-tokens.md"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nextgpu_node.core import lending as core
from nextgpu_node.core.admission import OwnerPolicy
from nextgpu_node.core.tokens import MAX_BLOCKS_COUNTED, IssuedToken, TokenBook
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.ids import PeerId, PeerKey, peer_id_from_public_key
from nextgpu_protocol.limits import GIB
from nextgpu_protocol.messages import SUITE, HeldToken, TokenBlock
from nextgpu_protocol.tokens import (
    TokenChain,
    attenuate_token,
    issue_token,
    open_chain_untrusted,
    use_token,
)
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

OWN_KEY = PeerKey(bytes(PROVIDER.verify_key))
SUBMITTER_KEY = PeerKey(bytes(SUBMITTER.verify_key))
STRANGER_KEY = PeerKey(bytes(STRANGER.verify_key))
ALLOWS = TokenBlock(SUITE, b"", bytes(32), 100, GIB, ("program",), b"", NOW_MS + 1000)
ONLY_TOKENS = replace(POLICY, serve="tokens", requests_per_minute=1000)


def issued(**changes: Any) -> tuple[HeldToken, TokenBook]:
    held = issue_token(replace(ALLOWS, **changes), PROVIDER, b"1" * 32)
    book = TokenBook()
    token_id = open_chain_untrusted(held.blocks).token_id
    book.add(IssuedToken(token_id, 100, GIB, ("program",), b"", NOW_MS, NOW_MS + 1000))
    return held, book


class Desk:
    """A provider's decider, and requests that come to it one after the other."""

    def __init__(self, book: TokenBook, policy: OwnerPolicy = ONLY_TOKENS, **keys: Any) -> None:
        self.lending = core.Lending(OWN_KEY, policy, table_version=1, tokens=book, **keys)
        self._session = 0

    def ask(
        self, held: HeldToken | None, *, key: Any = SUBMITTER, now_ms: int = NOW_MS, **event: Any
    ) -> core.Effect:
        """The first effect of a request that brings `held`; its session is `self._session`."""
        self._session += 1
        changes = event.pop("changes", {})
        nonce = self._session.to_bytes(16)
        token = use_token(held, bytes(key.verify_key), nonce) if held else b""
        signed = request(key, nonce=self._session, **{"token": token, **changes})
        asked = core.UnitRequested(self._session, signed, self._sender(), **event)
        self.last = signed
        (effect,) = self.lending.handle(asked, now_ms=now_ms)
        return effect

    def _sender(self) -> PeerId:
        """Another one each time: what one connection may ask is not what is tested here."""
        return peer_id_from_public_key(self._session.to_bytes(32))

    def code(self, held: HeldToken | None, **event: Any) -> ErrorCode:
        effect = self.ask(held, **event)
        assert isinstance(effect, core.Refuse), effect
        return effect.code

    def tell(self, *events: core.Event) -> list[core.Effect]:
        return [e for event in events for e in self.lending.handle(event, now_ms=NOW_MS)]

    def start(self) -> core.Effect:
        """Bring the last request to the point where its header has come."""
        made = offer(request_hash=self.last.hash)
        session = self._session
        ready = (core.WorkerReady(session), core.OfferSent(session, made))
        self.tell(*ready)
        (effect,) = self.tell(core.HeaderReceived(session, header(made)))
        return effect

    def finish(self, wall_ms: int) -> list[core.Effect]:
        session = self._session
        self.tell(core.OutputEnded(session), core.WorkerEnded(session, "done"))
        return self.tell(core.Wiped(session, wall_ms), core.SessionOver(session))


def test_a_token_opens_the_door_and_nothing_else_does() -> None:
    held, book = issued()
    desk = Desk(book)
    assert isinstance(desk.ask(held), core.SpawnWorker)
    assert desk.code(None) is ErrorCode.NOT_ALLOWED


def test_the_owner_says_whom_a_token_serves() -> None:
    held, book = issued()
    listed = replace(POLICY, allow=frozenset({peer_id_from_public_key(STRANGER_KEY)}))
    assert Desk(book, listed).code(held) is ErrorCode.NOT_ALLOWED
    assert isinstance(Desk(book, replace(listed, serve="tokens")).ask(held), core.SpawnWorker)
    assert isinstance(Desk(book, replace(listed, serve="everyone")).ask(None), core.SpawnWorker)


def test_deny_wins_over_a_token_and_over_every_setting() -> None:
    held, book = issued()
    denied = frozenset({peer_id_from_public_key(SUBMITTER_KEY)})
    for serve in ("allow", "tokens", "everyone"):
        policy = replace(POLICY, serve=serve, deny=denied, allow=denied)
        assert Desk(book, policy).code(held) is ErrorCode.NOT_ALLOWED


def test_a_denied_peer_learns_nothing_about_its_token() -> None:
    _, book = issued()
    denied = frozenset({peer_id_from_public_key(SUBMITTER_KEY)})
    desk = Desk(book, replace(POLICY, serve="tokens", deny=denied))
    assert desk.code(None, changes={"token": b"no token"}) is ErrorCode.NOT_ALLOWED


def test_earlier_keys_are_names_of_the_peer_in_every_list() -> None:
    held, book = issued(audience=STRANGER_KEY)
    former = {"former_keys": frozenset({STRANGER_KEY})}
    listed = frozenset({peer_id_from_public_key(STRANGER_KEY)})
    desk = Desk(book)
    assert desk.code(held) is ErrorCode.TOKEN_AUDIENCE
    assert isinstance(desk.ask(held, **former), core.SpawnWorker)
    assert Desk(book, replace(POLICY, deny=listed)).code(None, **former) is ErrorCode.NOT_ALLOWED
    allowing = Desk(book, replace(POLICY, allow=listed))
    assert allowing.code(None) is ErrorCode.NOT_ALLOWED
    assert isinstance(allowing.ask(None, **former), core.SpawnWorker)


def test_a_token_of_an_earlier_own_key_serves_where_it_is_remembered() -> None:
    held = issue_token(ALLOWS, STRANGER, b"1" * 32)
    token_id = open_chain_untrusted(held.blocks).token_id
    book = TokenBook()
    desk = Desk(book, own_former_keys=frozenset({STRANGER_KEY}))
    assert desk.code(held) is ErrorCode.TOKEN_REVOKED
    book.add(IssuedToken(token_id, 100, GIB, ("program",), b"", NOW_MS, NOW_MS + 1000))
    assert isinstance(desk.ask(held), core.SpawnWorker)
    assert Desk(book).code(held) is ErrorCode.TOKEN_ISSUER


def test_each_refusal_has_its_code() -> None:
    held, book = issued()
    desk = Desk(book)
    assert desk.code(held, now_ms=NOW_MS + 1001) is ErrorCode.TOKEN_EXPIRED
    assert desk.code(held, changes={"max_seconds": 101}) is ErrorCode.TOKEN_LIMIT
    assert desk.code(held, changes={"memory_bytes": GIB + 1}) is ErrorCode.TOKEN_LIMIT
    assert desk.code(None, changes={"token": b"no token"}) is ErrorCode.BAD_TOKEN
    forged = issue_token(ALLOWS, STRANGER, b"1" * 32)
    assert desk.code(forged) is ErrorCode.TOKEN_ISSUER
    unknown = issue_token(ALLOWS, PROVIDER, b"2" * 32)
    assert desk.code(unknown) is ErrorCode.TOKEN_REVOKED
    book.revoke(open_chain_untrusted(held.blocks).token_id)
    assert desk.code(held) is ErrorCode.TOKEN_REVOKED


def test_a_token_seen_in_a_request_serves_no_other_one() -> None:
    held, book = issued()
    desk = Desk(book)
    stolen = use_token(held, SUBMITTER_KEY, (77).to_bytes(16))
    assert desk.code(None, changes={"token": stolen}) is ErrorCode.BAD_TOKEN
    assert desk.code(None, key=STRANGER, changes={"token": stolen}) is ErrorCode.BAD_TOKEN


def test_a_bad_token_is_refused_also_where_everyone_is_served() -> None:
    _, book = issued()
    desk = Desk(book, replace(POLICY, serve="everyone"))
    assert desk.code(None, changes={"token": b"no token"}) is ErrorCode.BAD_TOKEN


def test_units_side_by_side_can_not_overdraw() -> None:
    """60 s are asked each time, 100 s are there: the second waits, or asks for less."""
    held, book = issued()
    desk = Desk(book)
    assert isinstance(desk.ask(held), core.SpawnWorker)
    assert desk.code(held) is ErrorCode.TOKEN_SPENT
    desk.tell(core.SessionOver(1))
    assert isinstance(desk.ask(held), core.SpawnWorker)


def test_nothing_starts_before_its_reservation_is_on_disk() -> None:
    held, book = issued()
    desk = Desk(book)
    desk.ask(held)
    saving = desk.start()
    assert isinstance(saving, core.SaveReservation)
    assert saving.reservation.reserved_ms == 60_000
    (started,) = desk.tell(core.ReservationSaved(1))
    assert isinstance(started, core.StartUnit)


def test_a_reservation_that_can_not_be_saved_starts_nothing_and_costs_nothing() -> None:
    held, book = issued()
    desk = Desk(book)
    desk.ask(held)
    desk.start()
    (dropped,) = desk.tell(core.UnitStopped(1, "owner_stopped", ErrorCode.INTERNAL))
    assert isinstance(dropped, core.Discard)
    desk.tell(core.SessionOver(1))
    assert isinstance(desk.ask(held), core.SpawnWorker)
    assert not book.spent_ms


def test_what_was_used_is_spent_once_and_before_the_receipt() -> None:
    held, book = issued()
    desk = Desk(book)
    desk.ask(held)
    desk.start()
    desk.tell(core.ReservationSaved(1))
    settle, receipt = desk.finish(1234)
    assert isinstance(settle, core.Settle)
    assert isinstance(receipt, core.SendReceipt)
    assert settle.charged_ms == 1234
    assert list(book.spent_ms.values()) == [1234]
    assert book.settle(settle.reservation, 1234) == 0
    assert list(book.spent_ms.values()) == [1234]


def test_a_unit_that_outruns_its_time_costs_what_was_reserved() -> None:
    held, book = issued()
    desk = Desk(book)
    desk.ask(held)
    desk.start()
    desk.tell(core.ReservationSaved(1))
    settle, _ = desk.finish(99_000)
    assert isinstance(settle, core.Settle)
    assert settle.charged_ms == 60_000


def test_a_unit_that_vanishes_after_it_started_costs_all_that_was_reserved() -> None:
    held, book = issued()
    desk = Desk(book)
    desk.ask(held)
    desk.start()
    desk.tell(core.ReservationSaved(1), core.SessionOver(1))
    assert list(book.spent_ms.values()) == [60_000]
    assert desk.code(held) is ErrorCode.TOKEN_SPENT


def test_a_part_that_was_handed_on_comes_out_of_the_whole() -> None:
    held, book = issued()
    part = attenuate_token(held, replace(ALLOWS, gpu_seconds=60), b"2" * 32)
    desk = Desk(book)
    assert isinstance(desk.ask(part), core.SpawnWorker)
    assert desk.code(part, changes={"max_seconds": 1}) is ErrorCode.TOKEN_SPENT
    assert desk.code(held, changes={"max_seconds": 41}) is ErrorCode.TOKEN_SPENT
    assert isinstance(desk.ask(held, changes={"max_seconds": 40}), core.SpawnWorker)


def test_a_part_is_spent_by_itself_too() -> None:
    held, book = issued()
    part = attenuate_token(held, replace(ALLOWS, gpu_seconds=60), b"2" * 32)
    desk = Desk(book)
    desk.ask(part)
    desk.start()
    desk.tell(core.ReservationSaved(1))
    desk.finish(60_000)
    assert desk.code(part, changes={"max_seconds": 1}) is ErrorCode.TOKEN_SPENT
    assert isinstance(desk.ask(held, changes={"max_seconds": 40}), core.SpawnWorker)


def test_a_worker_under_a_token_gets_no_more_memory_than_it_allows() -> None:
    held, book = issued(memory_bytes=GIB)
    effect = Desk(book).ask(held)
    assert isinstance(effect, core.SpawnWorker)
    assert effect.grant.memory_bytes == GIB < POLICY.memory_bytes


def test_a_busy_node_sets_nothing_aside() -> None:
    held, book = issued()
    assert Desk(book, replace(ONLY_TOKENS, max_concurrent_units=0)).code(held) is ErrorCode.BUSY
    assert isinstance(Desk(book).ask(held), core.SpawnWorker)


def test_narrowing_without_end_does_not_fill_the_record() -> None:
    held, book = issued()
    code = None
    for index in range(MAX_BLOCKS_COUNTED + 1):
        part = attenuate_token(held, ALLOWS, (index + 2).to_bytes(32))
        chain = open_chain_untrusted(part.blocks)
        try:
            book.release(book.reserve(chain, index.to_bytes(32), 1))
        except RemoteProtocolError as exc:
            code = exc.code
    assert code is ErrorCode.RATE_LIMITED


def test_the_units_of_a_token_are_known() -> None:
    held, book = issued()
    desk = Desk(book)
    desk.ask(held)
    token_id = open_chain_untrusted(held.blocks).token_id
    assert desk.lending.sessions_under(token_id) == [1]
    assert desk.lending.sessions_under(bytes(32)) == []


def chains() -> list[TokenChain]:
    held, _ = issued()
    part = attenuate_token(held, replace(ALLOWS, gpu_seconds=30), b"2" * 32)
    other = attenuate_token(held, replace(ALLOWS, gpu_seconds=50), b"3" * 32)
    last = attenuate_token(part, replace(ALLOWS, gpu_seconds=10), b"4" * 32)
    return [open_chain_untrusted(one.blocks) for one in (held, part, other, last)]


CHAINS = chains()


@given(st.lists(st.tuples(st.sampled_from("rsx"), st.integers(0, 3), st.integers(1, 100))))
def test_no_order_of_uses_spends_more_than_any_block_allows(
    steps: list[tuple[str, int, int]],
) -> None:
    book = TokenBook()
    open_ones: list[Any] = []
    for index, (what, which, amount) in enumerate(steps):
        if what == "r":
            with suppress(RemoteProtocolError):
                open_ones.append(book.reserve(CHAINS[which], index.to_bytes(32), amount))
        elif open_ones and what == "s":
            book.settle(open_ones.pop(), amount * 1000)
        elif open_ones:
            book.release(open_ones.pop())
        for chain in CHAINS:
            for block, budget_s in chain.budgets:
                used_ms = book.spent_ms.get(block, 0) + book.held_under(block)
                assert used_ms <= budget_s * 1000
