"""Peers weighed by what they say, what is remembered of them and what the user wants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from nextgpu_node.api_types import PeerNeed, PeerView
from nextgpu_node.core.choice import PeerRecord, Preferences, appraise, choose, rank
from tests.support.peers import CARD, CPU, GB, peer

ANY = PeerNeed()


def order(*peers: PeerView, **known: Any) -> list[str]:
    weighed = choose(peers, known.pop("need", ANY), **known)
    return [one.peer.peer_id for one in weighed if not one.excluded]


BIG = msgspec.structs.replace(CARD, memory_total_bytes=80 * GB, memory_free_bytes=80 * GB)
FULL = msgspec.structs.replace(CARD, memory_free_bytes=GB)


@pytest.mark.parametrize(
    ("better", "worse", "need"),
    [
        (peer("a"), peer("b", free_slots=0, latency_ms=0.1), ANY),
        (peer("a", latency_ms=90.0), peer("b", devices=[CPU]), ANY),
        (peer("a"), peer("b", latency_ms=50.0), ANY),
        (peer("a"), peer("b", devices=[BIG]), ANY),
        (peer("a", devices=[BIG]), peer("b", devices=[FULL]), PeerNeed(memory_bytes=8 * GB)),
    ],
    ids=["a free slot", "a GPU", "the nearer", "the smallest that fits", "free memory"],
)
def test_what_peers_say_orders_them(better: PeerView, worse: PeerView, need: PeerNeed) -> None:
    assert [one.peer_id for one in rank([worse, better], need)] == ["a", "b"]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (PeerRecord(done=20), PeerRecord(done=10, lost=10)),
        (PeerRecord(), PeerRecord(lost=3)),
        (PeerRecord(done=20), PeerRecord()),
        (PeerRecord(bytes_per_s=100e6), PeerRecord(bytes_per_s=1e6)),
    ],
    ids=["more came back", "unknown before bad", "proven before unknown", "faster"],
)
def test_what_is_remembered_orders_peers(better: PeerRecord, worse: PeerRecord) -> None:
    assert order(peer("b"), peer("a"), records={"a": better, "b": worse}) == ["a", "b"]


def test_a_peer_that_once_lied_is_not_asked_again() -> None:
    assert order(peer("a"), peer("b"), records={"a": PeerRecord(distrusted=True)}) == ["b"]


def test_named_and_trusted_peers_narrow_the_choice() -> None:
    peers = (peer("a"), peer("b"), peer("c"))
    assert order(*peers, preferences=Preferences(peers=frozenset({"b"}))) == ["b"]
    trusting = Preferences(trusted=frozenset({"c"}))
    assert order(*peers, preferences=trusting)[0] == "c"
    assert order(*peers, preferences=replace(trusting, trusted_only=True)) == ["c"]
    assert order(*peers, preferences=Preferences(trusted_only=True)) == []


def test_the_cost_is_the_product_of_factors_that_say_why() -> None:
    record = PeerRecord(done=3, lost=1, bytes_per_s=5e6)
    weighed = appraise(peer("a"), ANY, Preferences(), record)
    product = 1.0
    for factor in weighed.factors:
        product *= factor.effect
    assert weighed.cost == pytest.approx(product)
    assert {factor.name: factor.why for factor in weighed.factors} == {
        "load": "1 free slots",
        "device": "NVIDIA Example",
        "memory": "16.0 times the memory that is needed",
        "latency": "answered in 5.0 ms",
        "throughput": "moved 5.0 MB/s",
        "reliability": "3 of 4 units came back",
        "trust": "a stranger",
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sharing": False, "reason": "on battery"}, "is not sharing: on battery"),
        ({"devices": []}, "has no device that fits"),
    ],
)
def test_an_excluded_peer_says_why(change: dict[str, Any], why: str) -> None:
    (weighed,) = choose([peer("a", **change)], ANY)
    assert weighed.excluded == why
