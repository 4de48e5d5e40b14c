"""The registry of what a process is doing, with a clock that the tests set."""

from __future__ import annotations

import pytest

from priorzero.runtime.activity import Activities


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def activities(clock):
    return Activities(clock)


def reports_of(activities, clock, *, seconds):
    """All reports of the next ``seconds``, asked for twice per second."""
    found = []
    for _ in range(2 * seconds):
        clock.now += 0.5
        found.append(activities.report())
    return [report for report in found if report is not None]


def test_activity_is_reported_after_10_30_and_60_seconds_and_then_every_minute(activities, clock):
    with activities.announced("loading the LLM"):
        reports = reports_of(activities, clock, seconds=200)
    assert reports == [f"still loading the LLM ({seconds} s)" for seconds in (10, 30, 60, 120, 180)]
    assert reports_of(activities, clock, seconds=200) == []


def test_activity_is_reported_once_after_a_pause_of_the_watcher(activities, clock):
    """Native code can hold Python's lock for a while."""
    with activities.announced("loading the libraries"):
        clock.now += 43.0
        assert [activities.report(), activities.report()] == ["still loading the libraries (43 s)", None]
        assert reports_of(activities, clock, seconds=20) == ["still loading the libraries (60 s)"]


def test_activity_that_began_last_is_reported(activities, clock):
    with activities.announced("starting the games"):
        clock.now += 5
        with activities.announced("loading the LLM"):
            assert reports_of(activities, clock, seconds=12) == ["still loading the LLM (10 s)"]
        assert reports_of(activities, clock, seconds=1) == ["still starting the games (18 s)"]


def test_activity_that_recurs_is_reported_only_if_it_takes_longer_than_before(activities, clock):
    reports = []
    for seconds in (40, 35, 70):
        with activities.announced("learning: LLM"):
            reports.append(reports_of(activities, clock, seconds=seconds))
    assert reports == [
        ["still learning: LLM (10 s)", "still learning: LLM (30 s)"],
        [],
        ["still learning: LLM (60 s)"],
    ]


def test_activities_list_what_is_done_and_sum_up_the_time(activities, clock):
    with activities.announced("collecting"):
        clock.now += 2
        with activities.announced("looking"), activities.announced("looking"):
            clock.now += 3
            assert activities.current() == {"collecting": 5.0, "looking": 3.0}
    with pytest.raises(RuntimeError), activities.announced("collecting"):
        clock.now += 10
        raise RuntimeError
    assert activities.current() == {} and activities.seconds == {"collecting": 15.0, "looking": 6.0}
    assert activities.elapsed_s == 15.0
    activities.reset()
    assert activities.seconds == {} and activities.elapsed_s == 0.0
