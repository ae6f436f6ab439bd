"""The learning rate ends at its end, with a budget of minutes as without one (rules of edge_ilseg/schedule.py)."""

from __future__ import annotations

import pytest

from edge_ilseg.config import TrainConfig
from edge_ilseg.schedule import Schedule, in_time, iterations_that_fit, scheduled_rate


def test_an_unbent_schedule_is_the_share_of_iterations_to_the_bit() -> None:
    for iterations in (1, 7, 600, 1500):
        schedule = Schedule(iterations)
        assert [schedule.share(i) for i in range(iterations)] == [i / iterations for i in range(iterations)]


def test_the_rate_is_that_of_the_formula() -> None:
    settings = TrainConfig(learning_rate=0.1, learning_rate_end=0.01, schedule_power=0.5)
    assert scheduled_rate(0.1, settings, 0.0) == 0.1
    assert scheduled_rate(0.1, settings, 0.75) == pytest.approx(0.01 + 0.09 * 0.5)
    assert scheduled_rate(0.1, settings, 1.0) == pytest.approx(0.01)
    assert scheduled_rate(0.005, settings, 0.3) == 0.005, "an end above the peak is the peak"


def test_so_many_iterations_are_planned_as_fit_with_a_reserve() -> None:
    assert iterations_that_fit(100.0, 1.0, 1000) == 95
    assert iterations_that_fit(100.0, 1.0, 50) == 50
    assert iterations_that_fit(0.5, 1.0, 50) == 1
    assert iterations_that_fit(-3.0, 1.0, 50) == 1
    assert iterations_that_fit(3.0, 0.0, 50) == 50


def test_a_schedule_that_fits_is_left_as_it_is() -> None:
    schedule = Schedule(100)
    assert in_time(schedule, 40, seconds_left=60.0, seconds_per_iteration=1.0) is schedule


def test_a_slow_machine_bends_the_schedule_without_a_jump_and_to_its_end() -> None:
    schedule = Schedule(100)
    bent = in_time(schedule, 40, seconds_left=20.0, seconds_per_iteration=1.0)
    assert bent.iterations == 40 + 19
    assert bent.share(40) == schedule.share(40)
    shares = [bent.share(i) for i in range(40, 60)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    again = in_time(bent, 50, seconds_left=2.0, seconds_per_iteration=1.0)
    assert again.iterations == 51
    assert (again.share(50), again.share(51)) == (bent.share(50), pytest.approx(1.0))
