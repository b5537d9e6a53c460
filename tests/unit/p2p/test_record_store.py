"""A place holds the newest of each peer, an even sample of many, and never more than its bounds."""

from __future__ import annotations

import hashlib
from functools import cache

import pytest
from nacl.signing import SigningKey

from nextgpu_node.p2p import record_store
from nextgpu_node.p2p.record_store import (
    HELD,
    PER_NETWORK_ON_SHELF,
    PER_PEER,
    SHELF_RECORDS,
    RecordStore,
)
from nextgpu_protocol.dht import shard_place
from nextgpu_protocol.envelope import Signed, sign_message
from nextgpu_protocol.errors import ErrorCode
from nextgpu_protocol.messages import SUITE, Announcement

NOW_MS = 1_800_000_000_000
LIFE_MS = 1_800_000
KEY = hashlib.sha256(b"key").digest()
PLACE = shard_place(KEY, 0, 0)
ADDRESS = ("/ip4/192.0.2.1/tcp/1",)


@cache
def signer(number: int) -> SigningKey:
    return SigningKey(hashlib.sha256(b"%d" % number).digest())


def announcement(
    number: int,
    *,
    at_ms: int = NOW_MS,
    key: bytes = KEY,
    addresses: tuple[str, ...] = ADDRESS,
) -> Signed[Announcement]:
    message = Announcement(SUITE, key, addresses, at_ms, at_ms + LIFE_MS)
    return sign_message(message, signer(number))


def store() -> RecordStore:
    return RecordStore(bytes(32))


def test_the_newest_of_a_peer_is_held_and_an_older_one_can_not_return() -> None:
    held = store()
    old, new = announcement(1), announcement(1, at_ms=NOW_MS + 1)
    assert held.put(old, 0, "") == (HELD, 0)
    assert held.put(old, 0, "") == (HELD, 0)  # the very same again: sent twice
    assert held.put(new, 0, "") == (HELD, 0)
    assert held.put(old, 0, "") == (ErrorCode.REPLAYED, 0)
    other = announcement(1, at_ms=NOW_MS + 1, addresses=("/ip4/192.0.2.9/tcp/9",))
    assert held.put(other, 0, "") == (ErrorCode.REPLAYED, 0)
    assert held.get(PLACE, NOW_MS) == (0, [new.data])
    assert len(held) == 1


def test_what_was_withdrawn_is_not_shown_and_does_not_come_back() -> None:
    held = store()
    held.put(announcement(1), 0, "")
    assert held.put(announcement(1, at_ms=NOW_MS + 5, addresses=()), 0, "") == (HELD, 0)
    assert held.get(PLACE, NOW_MS + 5) == (0, [])
    assert held.put(announcement(1), 0, "") == (ErrorCode.REPLAYED, 0)
    assert held.put(announcement(1, at_ms=NOW_MS + 6), 0, "") == (HELD, 0)


def test_nothing_is_shown_from_the_moment_on_at_which_it_expires() -> None:
    held = store()
    held.put(announcement(1), 0, "")
    assert held.get(PLACE, NOW_MS + LIFE_MS - 1)[1]
    assert not held.get(PLACE, NOW_MS + LIFE_MS)[1]
    held.sweep(NOW_MS + LIFE_MS)
    assert len(held) == 0
    assert not held._shelves
    assert not held._per_peer


def test_a_full_place_holds_an_even_sample_whose_rate_it_knows() -> None:
    count = 3000
    one, other = store(), store()
    everyone = [announcement(number) for number in range(count)]
    for signed in everyone:
        one.put(signed, 0, "")
    for signed in reversed(everyone):
        other.put(signed, 0, "")
    sampling, records = one.get(PLACE, NOW_MS)
    assert SHELF_RECORDS // 4 < len(records) <= SHELF_RECORDS
    assert 0.7 * count < len(records) << sampling < 1.3 * count
    # Who came first does not matter: another holder has the same ones.
    there = other.get(PLACE, NOW_MS)
    assert (sampling, sorted(records)) == (there[0], sorted(there[1]))


def test_a_record_that_is_not_sampled_is_told_the_rate() -> None:
    held = store()
    results = [held.put(announcement(number), 0, "") for number in range(1000)]
    code, sampling = results[-1]
    refused = [result for result in results if result[0] == ErrorCode.OVER_LIMIT]
    assert refused
    assert sampling == held.get(PLACE, NOW_MS)[0] > 0
    assert code in (HELD, ErrorCode.OVER_LIMIT)


def test_a_place_that_empties_holds_a_larger_share_again() -> None:
    held = store()
    for number in range(1000):
        held.put(announcement(number), 0, "")
    assert held.get(PLACE, NOW_MS)[0] > 0
    for _ in range(10):
        held.sweep(NOW_MS + LIFE_MS)
    assert held.put(announcement(5000, at_ms=NOW_MS + LIFE_MS), 0, "") == (HELD, 0)


def test_one_network_has_sixteen_records_at_a_place() -> None:
    held = store()
    codes = [held.put(announcement(number), 0, "203.0.113.0/24")[0] for number in range(100)]
    assert codes.count(HELD) == PER_NETWORK_ON_SHELF
    assert set(codes) == {HELD, ErrorCode.RATE_LIMITED}
    assert held.put(announcement(200), 0, "198.51.100.0/24") == (HELD, 0)


def test_a_sybil_with_ground_keys_does_not_push_others_out() -> None:
    """Whoever picks keys with low ranks would be sampled first; his network is capped."""
    held = store()
    honest = [announcement(number) for number in range(100)]
    for number, signed in enumerate(honest):
        held.put(signed, 0, f"198.51.{number}.0/24")
    for number in range(1000, 3000):
        held.put(announcement(number), 0, "203.0.113.0/24")
    sampling, records = held.get(PLACE, NOW_MS)
    assert sampling == 0
    assert {signed.data for signed in honest} <= set(records)


def test_one_peer_has_sixty_four_records_in_all() -> None:
    held = store()
    keys = [hashlib.sha256(b"%d" % number).digest() for number in range(100)]
    codes = [held.put(announcement(1, key=key), 0, "")[0] for key in keys]
    assert codes.count(HELD) == PER_PEER == len(held)


def test_a_full_store_gives_up_the_place_that_is_farthest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_store, "MAX_RECORDS", 50)
    held = store()
    keys = [hashlib.sha256(b"%d" % number).digest() for number in range(400)]
    for number, key in enumerate(keys):
        held.put(announcement(number, key=key), 0, "")
    assert len(held) == 50
    kept = {place for place, shelf in held._shelves.items() if shelf.records}
    assert kept == set(sorted(shard_place(key, 0, 0) for key in keys)[:50])
