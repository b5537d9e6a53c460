"""The window follows what the worker is measured to do."""

from nextgpu_node.core.pipelining import Pace


def answers(service_s: float, count: int) -> Pace:
    """A pace after `count` calls that were all sent at once."""
    pace = Pace()
    pace.restart(0.0)
    for index in range(1, count + 1):
        pace.answered(0.0, index * service_s)
    return pace


def test_a_quick_worker_gets_many_calls_and_a_slow_one_two():
    assert answers(0.0001, 20).window == 256
    assert answers(0.01, 20).window == 10
    assert answers(5.0, 3).window == 2


def test_the_window_doubles_at_most_with_each_answer():
    assert [answers(0.0001, count).window for count in range(5)] == [1, 2, 4, 8, 16]


def test_the_time_that_a_call_waited_here_is_not_the_workers():
    pace = Pace()
    pace.restart(0.0)
    pace.answered(100.0, 100.01)
    assert abs(pace.service_s - 0.01) < 1e-9


def test_a_worker_that_becomes_slow_loses_its_window():
    pace = answers(0.0001, 20)
    for index in range(1, 12):
        pace.answered(0.0, 1.0 + index)
    assert pace.window == 2


def test_a_lease_that_would_end_before_the_answer_takes_no_call():
    pace = answers(5.0, 3)
    assert pace.has_time(20.0, 60.0, 1)
    assert not pace.has_time(48.0, 60.0, 0)
    assert not pace.has_time(20.0, 60.0, 8)
