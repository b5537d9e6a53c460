"""The model behind docs/network.md says the same each time, and what it must."""

from __future__ import annotations

from scripts.simulate_discovery import crowded_place, lookups, message_bytes


def test_the_same_question_has_the_same_answer() -> None:
    assert lookups(500, 0.05) == lookups(500, 0.05)
    assert crowded_place(2000, periods=4) == crowded_place(2000, periods=4)


def test_a_lookup_grows_with_the_logarithm() -> None:
    small, large = lookups(300, 0.0), lookups(30_000, 0.0)
    assert small["calls_mean"] < large["calls_mean"] < small["calls_mean"] + 7
    assert small["to_dead_mean"] == large["to_dead_mean"] == 0


def test_a_crowded_place_is_offered_about_what_it_holds() -> None:
    few, many = crowded_place(200, periods=8), crowded_place(20_000, periods=8)
    assert few["sampling"] == 0
    assert few["records_held"] == 200
    assert many["records_held"] <= 256
    assert 0.7 < many["estimate_of_true"] < 1.4
    assert many["announcements_per_s_settled"] < many["announcements_per_s_if_all_came"] / 10


def test_an_announcement_fits_its_bound() -> None:
    assert message_bytes().store_one < 400
