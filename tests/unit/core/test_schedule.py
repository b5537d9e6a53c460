"""Maps in virtual time: each claim of the schedule over peers that are slow, lost or lying."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from nextgpu_node.core.retry import Remedy
from nextgpu_node.core.schedule import (
    HERE,
    AuditPlan,
    Failed,
    Purpose,
    ScheduleLimits,
    detection_rate,
    draw_sample,
)
from tests.support.simulation import SimulatedPeer, Simulation

LOST = Failed(0, Remedy.ELSEWHERE, "the connection ended")
TOO_SMALL = Failed(0, Remedy.ELSEWHERE, "out of memory", unfit=True)
FULL = Failed(0, Remedy.WAIT, "busy", refused=True)
BROKEN = Failed(0, Remedy.GIVE_UP, "bad tensors")
FORGED = Failed(0, Remedy.DISTRUST, "the seal does not open")


def test_every_shard_is_kept_once_and_shared_out() -> None:
    done = Simulation({"a": SimulatedPeer(), "b": SimulatedPeer()}, range(20)).run()
    assert done.kept.keys() == set(range(20))
    assert set(done.times_kept.values()) == {1}
    assert done.shares() == {"a": 10, "b": 10}
    assert done.now_s < 12


def test_a_peer_never_has_more_than_its_slots() -> None:
    peers = {"a": SimulatedPeer(slots=3), "b": SimulatedPeer(slots=1)}
    done = Simulation(peers, range(40)).run()
    assert done.most_in_flight == {"a": 3, "b": 1}


def test_a_slow_peer_gets_less_and_does_not_hold_up_the_end() -> None:
    """Alone the fast one takes 30 s; the slow one's last shard is taken over."""
    peers = {"slow": SimulatedPeer(seconds=25), "fast": SimulatedPeer(seconds=1)}
    done = Simulation(peers, range(30)).run()
    assert done.shares()["fast"] >= 28
    assert done.now_s < 31


def test_the_last_straggler_is_run_twice_and_kept_once() -> None:
    peers = {"stuck": SimulatedPeer(seconds=9999), "a": SimulatedPeer(seconds=1)}
    done = Simulation(peers, range(6)).run()
    copies = Counter(start.shard for start in done.starts)
    assert sorted(copies.values()) == [1, 1, 1, 1, 1, 2]
    assert done.shares() == {"a": 6}
    assert done.now_s < 10


def test_nothing_is_run_twice_where_nothing_is_late() -> None:
    done = Simulation({"a": SimulatedPeer(), "b": SimulatedPeer()}, range(7)).run()
    assert len(done.starts) == 7


def test_peers_that_die_and_come_back_cost_only_what_they_had() -> None:
    peers = {
        "a": SimulatedPeer(),
        "b": SimulatedPeer(dies_s=3.5),
        "c": SimulatedPeer(dies_s=2.5, returns_s=8),
        "d": SimulatedPeer(),
    }
    done = Simulation(peers, range(60)).run()
    assert done.kept.keys() == set(range(60))
    assert len(done.starts) <= 62
    assert done.shares()["c"] > 4


def test_a_shard_that_is_too_large_for_one_peer_goes_to_another() -> None:
    peers = {"small": SimulatedPeer(fails=TOO_SMALL), "large": SimulatedPeer()}
    done = Simulation(peers, range(5)).run()
    assert done.shares() == {"large": 5}
    assert Counter(s.peer_id for s in done.starts)["small"] <= 5


def test_a_shard_that_fits_nobody_fails_at_once_with_the_reason() -> None:
    peers = {"a": SimulatedPeer(fails=TOO_SMALL), "b": SimulatedPeer(fails=TOO_SMALL)}
    done = Simulation(peers, [7]).run()
    assert done.failed == {7: "out of memory"}
    assert done.now_s < 5


def test_what_would_fail_anywhere_is_tried_once() -> None:
    done = Simulation({"a": SimulatedPeer(fails=BROKEN), "b": SimulatedPeer()}, [0]).run()
    assert done.failed == {0: "bad tensors"}
    assert len(done.starts) == 1


def test_among_strangers_one_word_is_not_enough_to_give_a_shard_up() -> None:
    limits = ScheduleLimits(confirm_failures=True)
    peers = {"liar": SimulatedPeer(fails=BROKEN), "b": SimulatedPeer()}
    assert Simulation(peers, [0], limits=limits).run().shares() == {"b": 1}
    both = {"a": SimulatedPeer(fails=BROKEN), "b": SimulatedPeer(fails=BROKEN)}
    assert Simulation(both, [0], limits=limits).run().failed == {0: "bad tensors"}


def test_a_shard_that_every_attempt_loses_is_given_up_after_six() -> None:
    done = Simulation({"a": SimulatedPeer(fails=LOST)}, [0]).run()
    assert done.failed == {0: "the connection ended"}
    assert len(done.starts) == 6


@pytest.mark.parametrize("count", [1, 300])
def test_peers_that_all_refuse_end_after_the_patience(count: int) -> None:
    peers = {f"p{k}": SimulatedPeer(fails=FULL) for k in range(count)}
    limits = ScheduleLimits(patience_s=2)
    done = Simulation(peers, range(3), limits=limits).run(until_s=10)
    assert done.starved == {0, 1, 2}
    assert 2 <= done.now_s < 3


def test_without_any_peer_the_patience_ends_it_too() -> None:
    done = Simulation({}, range(3)).run(until_s=100)
    assert done.starved == {0, 1, 2}
    assert 60 <= done.now_s < 61


def test_an_empty_map_is_finished_at_once() -> None:
    assert Simulation({}, []).run().now_s < 1


# --- audits -----------------------------------------------------------------------------------


def lying(*shards: int) -> SimulatedPeer:
    return SimulatedPeer(wrong=frozenset(shards))


ALL = AuditPlan(sampled=frozenset(range(20)))


def test_an_audit_runs_on_another_peer_and_confirms() -> None:
    done = Simulation({"a": SimulatedPeer(), "b": SimulatedPeer()}, range(20), ALL).run()
    assert done.confirmed == set(range(20))
    work = {s.shard: s.peer_id for s in done.starts if s.purpose is Purpose.WORK}
    audits = {s.shard: s.peer_id for s in done.starts if s.purpose is Purpose.AUDIT}
    assert audits.keys() == work.keys()
    assert all(audits[k] != work[k] for k in work)
    assert not done.distrusted


def test_with_one_peer_the_audit_runs_here() -> None:
    done = Simulation({"a": SimulatedPeer()}, range(4), AuditPlan(frozenset({1, 3}))).run()
    assert [s.shard for s in done.starts if s.peer_id == HERE] == [1, 3]
    assert done.confirmed == {1, 3}


def test_a_lone_liar_is_found_by_the_run_here_and_its_shards_fail() -> None:
    limits = ScheduleLimits(patience_s=3)
    done = Simulation({"liar": lying(*range(4))}, range(4), AuditPlan(frozenset({2})), limits).run()
    assert "liar" in done.distrusted
    assert done.kept == {}
    assert done.starved == set(range(4))


def test_a_liar_is_excluded_and_all_its_shards_are_done_again() -> None:
    peers = {"liar": lying(*range(20)), "a": SimulatedPeer(), "b": SimulatedPeer()}
    done = Simulation(peers, range(20), AuditPlan(frozenset({0, 5, 9}))).run()
    assert done.distrusted.keys() == {"liar"}
    assert done.kept.keys() == set(range(20))
    assert "liar" not in done.shares()


def test_an_honest_peer_is_not_blamed_for_an_auditor_that_lies() -> None:
    peers = {"a": SimulatedPeer(), "liar": lying(*range(20))}
    done = Simulation(peers, range(20), ALL).run()
    assert done.distrusted.keys() == {"liar"}
    assert done.shares() == {"a": 20}


def test_where_this_machine_can_not_judge_a_third_peer_does() -> None:
    peers = {"liar": lying(*range(20)), "a": SimulatedPeer(), "b": SimulatedPeer()}
    here = SimulatedPeer(fails=Failed(0, Remedy.GIVE_UP, "too large for this machine"))
    done = Simulation(peers, range(6), AuditPlan(frozenset({0, 1, 2})), here=here).run()
    assert done.distrusted.keys() == {"liar"}
    assert "liar" not in done.shares()


def test_a_canary_finds_a_liar_that_no_audit_looked_at() -> None:
    peers = {"liar": SimulatedPeer(wrong_canaries=True), "a": SimulatedPeer()}
    done = Simulation(peers, range(20), AuditPlan(canary_turns=(2,))).run()
    assert done.distrusted == {"liar": "it failed a canary"}
    assert done.shares() == {"a": 20}


def test_canaries_are_no_results() -> None:
    done = Simulation({"a": SimulatedPeer()}, range(5), AuditPlan(canary_turns=(0, 3))).run()
    assert [s.shard for s in done.starts if s.purpose is Purpose.CANARY] == [0, 1]
    assert set(done.times_kept.values()) == {1}


def test_a_broken_seal_costs_a_peer_everything_that_it_did() -> None:
    """Its earlier results are as doubtful as the last one."""
    forger = SimulatedPeer(fails=FORGED)
    done = Simulation({"forger": forger, "a": SimulatedPeer()}, range(5)).run()
    assert done.distrusted.keys() == {"forger"}
    assert done.shares() == {"a": 5}


@pytest.mark.parametrize(("share", "wrong"), [(0.05, 10), (0.2, 3), (0.5, 1)])
def test_liars_are_found_as_often_as_the_formula_says(share: float, wrong: int) -> None:
    """1 - (1 - p)^k over 400 drawn plans: four standard deviations, and the seed is fixed."""
    source = random.Random(7)
    trials, found = 400, 0
    for _ in range(trials):
        lies = frozenset(range(wrong))
        plan = AuditPlan(draw_sample(range(20), share, [source.random() for _ in range(20)]))
        # The liar is first in line and slow enough to get exactly its shards.
        peers = {
            "liar": SimulatedPeer(wrong=lies, slots=wrong, seconds=5.0),
            "a": SimulatedPeer(slots=20),
        }
        done = Simulation(peers, range(wrong), plan).run()
        found += "liar" in done.distrusted
    expected = detection_rate(share, wrong)
    deviation = (expected * (1 - expected) / trials) ** 0.5
    assert abs(found / trials - expected) < 4 * deviation
