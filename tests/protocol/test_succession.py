"""A change of key, attacked: both signatures or none.  Spec: 15-succession.md"""

from __future__ import annotations

import pytest
from nacl.signing import SigningKey

from nextgpu_protocol.codec import encode_message
from nextgpu_protocol.envelope import sign_message
from nextgpu_protocol.errors import ErrorCode, RemoteProtocolError
from nextgpu_protocol.messages import SUITE, Predecessor, Succession, Successions, Successor
from nextgpu_protocol.succession import make_succession, predecessors_untrusted
from tests.protocol.samples import NOW_MS

OLD, NEW, NEWEST, THIEF = (SigningKey(bytes([i]) * 32) for i in range(1, 5))


def key(signer: SigningKey) -> bytes:
    return bytes(signer.verify_key)


def read(peer: SigningKey, *links: Succession) -> tuple[bytes, ...]:
    return predecessors_untrusted(encode_message(Successions(links)), key(peer))


def code_of(peer: SigningKey, *links: Succession) -> ErrorCode:
    with pytest.raises(RemoteProtocolError) as caught:
        read(peer, *links)
    return caught.value.code


FIRST = make_succession(OLD, NEW, now_ms=NOW_MS)
SECOND = make_succession(NEW, NEWEST, now_ms=NOW_MS + 1)


def test_a_chain_leads_from_the_first_key_to_the_peer() -> None:
    assert read(NEWEST) == ()
    assert read(NEW, FIRST) == (key(OLD),)
    assert read(NEWEST, FIRST, SECOND) == (key(OLD), key(NEW))


def test_neither_half_of_a_succession_serves_alone() -> None:
    # The thief claims OLD's name: it can sign only for itself.
    claim = sign_message(Predecessor(SUITE, key(OLD), bytes(32)), THIEF).data
    assert code_of(THIEF, Succession(FIRST.successor, claim)) is ErrorCode.WRONG_PEER
    own = sign_message(Successor(SUITE, key(THIEF), NOW_MS), THIEF)
    over_own = sign_message(Predecessor(SUITE, key(OLD), own.hash), THIEF).data
    assert code_of(THIEF, Succession(own.data, over_own)) is ErrorCode.WRONG_PEER
    # OLD names an heir that never agreed.
    naming = sign_message(Successor(SUITE, key(THIEF), NOW_MS), OLD)
    by_old = sign_message(Predecessor(SUITE, key(OLD), naming.hash), OLD).data
    assert code_of(THIEF, Succession(naming.data, by_old)) is ErrorCode.WRONG_PEER


def test_an_answer_to_one_naming_does_not_serve_another() -> None:
    again = make_succession(OLD, NEW, now_ms=NOW_MS + 5)
    mixed = Succession(again.successor, FIRST.predecessor)
    assert code_of(NEW, mixed) is ErrorCode.BAD_SIGNATURE


def test_a_chain_shown_by_another_peer_is_not_its_own() -> None:
    assert code_of(THIEF, FIRST) is ErrorCode.WRONG_PEER
    assert code_of(NEWEST, SECOND, FIRST) is ErrorCode.WRONG_PEER
    back = make_succession(NEW, OLD, now_ms=NOW_MS)
    assert code_of(OLD, FIRST, back) is ErrorCode.MALFORMED
