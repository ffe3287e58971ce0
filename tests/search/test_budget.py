"""Budgets by a clock that tests turn: what may start, and what has to be kept for retests and the report."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from peftscape.search import budget as module
from peftscape.search.budget import CAUTION, REPORT_S, RETEST_SHARE, Budget, parameter_limit, parse_duration


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


def budget(clock: Clock, **more: Any) -> Budget:
    return Budget(**{"trials": None, "time_s": None, "trainable": None, "started": clock.now, **more})


def may_start(of: Budget, *, steps: int = 100, **more: int) -> bool:
    return of.may_start(**{"begun": 0, "in_flight_steps": 0, "in_flight": 0, "steps": steps, "retests": 0, **more})


def test_time_passes_over_all_sessions(clock: Clock) -> None:
    of = budget(clock, time_s=100.0, spent_s=30.0)
    assert (of.elapsed_s(), of.left_s()) == (30.0, 70.0)
    clock.now += 50
    assert (of.elapsed_s(), of.left_s()) == (80.0, 20.0)
    assert not of.over()
    clock.now += 20 - REPORT_S
    assert of.over()


def test_without_a_limit_there_is_no_end(clock: Clock) -> None:
    of = budget(clock)
    clock.now += 1e9
    assert of.left_s() == math.inf
    assert not of.over()
    assert may_start(of, begun=10**9)
    assert of.retests_that_fit(10) == math.inf


def test_trials_are_counted(clock: Clock) -> None:
    of = budget(clock, trials=3)
    assert [may_start(of, begun=n) for n in (0, 2, 3, 4)] == [True, True, False, False]


def test_a_lane_starts_only_if_all_that_runs_and_follows_still_fits(clock: Clock) -> None:
    of = budget(clock, time_s=100.0)
    of.measured(1.0, 10)  # a tenth of a second for a step of a lane
    of.lane_evaluation_s = 2.0
    lane = 100 * 0.1 + 2.0
    assert of.lane_s(100) == pytest.approx(lane)

    def starts(**more: int) -> bool:
        """Whether it may start with a hair more time than needed, and not with a hair less."""
        running = 0.1 * more.get("in_flight_steps", 0) + 2.0 * more.get("in_flight", 0)
        reserve = min(more.get("retests", 0) * lane, RETEST_SHARE * 100)
        needed = CAUTION * (running + lane + reserve) + REPORT_S
        clock.now = 1000 + 100 - needed - 0.01
        enough = may_start(of, **more)
        clock.now += 0.02
        return enough and not may_start(of, **more)

    assert starts()
    assert starts(in_flight_steps=250, in_flight=4)
    assert starts(retests=2)
    assert starts(retests=50), "retests keep at most their share"


def test_a_retest_is_evaluated_on_test_data_too(clock: Clock) -> None:
    of = budget(clock, time_s=100.0, retest_evaluations=5.0)
    of.measured(1.0, 10)
    of.lane_evaluation_s = 2.0
    assert of.lane_s(100, retest=True) == pytest.approx(10.0 + 5 * 2.0)
    assert of.retests_that_fit(100) == pytest.approx((100 - REPORT_S) / (CAUTION * 20.0))
    needed = CAUTION * (0.1 * 30 + 2 * 10.0 + 20.0) + REPORT_S
    clock.now = 1000 + 100 - needed - 0.01
    assert of.may_train(30, 2, 100)
    clock.now += 0.02
    assert not of.may_train(30, 2, 100)


def test_no_retest_fits_when_the_time_is_over(clock: Clock) -> None:
    of = budget(clock, time_s=10.0)
    of.measured(1.0, 1)
    clock.now += 20
    assert of.retests_that_fit(5) == 0.0
    assert not may_start(of)


def test_estimates_follow_recent_steps(clock: Clock) -> None:
    of = budget(clock, time_s=100.0)
    assert of.lane_s(50) == 0.0
    of.measured(8.0, 4)
    assert of.lane_step_s == 2.0
    for _ in range(200):
        of.measured(4.0, 8)
    assert of.lane_step_s == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1h1m1s", 3661), (" 1.5H ", 5400), ("0.5m", 30)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "1d", "30m2h", "-5m", "1h30", "five minutes"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match='is not a time like "90s", "30m", "2h" or "1h30m"'):
        parse_duration(text)


def test_a_limit_is_a_number_or_a_percentage_of_the_backbone() -> None:
    assert parameter_limit(None, 1000) is None
    assert parameter_limit(123, 1000) == 123
    assert parameter_limit("2%", 22_700_000) == 454_000
    assert parameter_limit(" 0.5 %", 1000) == 5
