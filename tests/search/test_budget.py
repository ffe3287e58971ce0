"""Budgets by a clock that tests turn: what may start, and what has to be kept for retests and the report."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from peftscape.search import budget as module
from peftscape.search.budget import (
    CAUTION,
    CLOSE_S,
    REPORT_GROWS,
    REPORT_S,
    RETEST_SHARE,
    Budget,
    drawn,
    parameter_limit,
    parse_bytes,
    parse_duration,
)
from peftscape.search.retest_order import first_retests, next_retest
from peftscape.spaces.record import Costs


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
    plain = {"begun": 0, "in_flight_steps": 0, "in_flight": 0, "steps": steps, "retests": 0, "whole": steps}
    return of.may_start(**{**plain, **more})


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


def test_a_trial_is_evaluated_at_its_rungs_too_and_goes_on_whatever_the_number_of_trials(clock: Clock) -> None:
    of = budget(clock, time_s=100.0, trials=3, evaluations=3)
    of.measured(1.0, 10)
    of.lane_evaluation_s = 2.0
    assert of.lane_s(100) == pytest.approx(10.0 + 3 * 2.0)
    assert not may_start(of, begun=3)
    needed = CAUTION * (0.1 * 30 + 2 * 2.0 + 16.0) + REPORT_S
    for hair, fits in ((-0.01, True), (0.01, False)):
        clock.now = 1000 + 100 - needed + hair
        assert of.fits(in_flight_steps=30, in_flight=2, steps=100, retests=0, whole=100) is fits
    clock.now = 1000 + 100 - CAUTION * (8.0 + 1.5 * 12.0) - REPORT_S
    assert not of.fits(in_flight_steps=0, in_flight=0, steps=20, retests=2, whole=100), "retests are whole trainings"
    assert of.fits(in_flight_steps=0, in_flight=0, steps=20, retests=1, whole=100)


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


# -- budgets beside trials and time


def test_device_seconds_are_those_of_all_sessions_and_workers(clock: Clock) -> None:
    of = budget(clock, device_s=100.0)
    of.measured(1.0, 10)
    assert of.account.device_s == 1.0
    assert may_start(of)
    of.others = {"device_s": 100 - 1 - CAUTION * 10 + 0.1}
    assert not may_start(of)
    of.others = {"device_s": 100 - 1 - CAUTION * 10 - 0.1}
    assert may_start(of)
    assert not of.over()
    of.others = {"device_s": 99.0}
    assert of.over()


def test_examples_never_overshoot_by_one(clock: Clock) -> None:
    of = budget(clock, examples=1000, batch=10)
    assert may_start(of, steps=100)
    assert not may_start(of, steps=101)
    assert not may_start(of, steps=100, in_flight_steps=1)
    of.measured(1.0, 4)  # 4 lane-steps of 10 examples
    assert may_start(of, steps=96)
    assert not may_start(of, steps=97)
    of.others = {"examples": 10}
    assert not may_start(of, steps=96)
    assert of.may_train(0, 0, 95)
    assert not of.may_train(1, 1, 95)
    assert of.retests_that_fit(10) == pytest.approx(9.5)


def test_what_others_promised_is_taken_until_they_have_ended() -> None:
    at_work = {"device_s": 5.0, "examples": 100, "promised_s": 3.0, "promised_examples": 60, "ended": False}
    ended = {**at_work, "ended": True}
    assert drawn({"a": at_work, "b": ended}) == {"device_s": 13.0, "examples": 260}


def test_a_promise_is_kept_in_the_account(clock: Clock) -> None:
    of = budget(clock, batch=8)
    of.measured(2.0, 4)
    of.lane_evaluation_s = 1.0
    of.promise(20, 2)
    assert of.account.promised_examples == 160
    assert of.account.promised_s == pytest.approx(20 * 0.5 + 2)


def test_designs_over_a_limit_are_told_with_the_limit(clock: Clock) -> None:
    price = Costs(adapter=90, head=10, trainable=100, train_flops=1, infer_flops=1, peak_bytes=5000, adapter_bytes=700)
    assert budget(clock).over_limits(price) == []
    assert budget(clock, trainable=100, peak_bytes=5000, adapter_bytes=700).over_limits(price) == []
    assert budget(clock, trainable=99, peak_bytes=4999, adapter_bytes=699).over_limits(price) == [
        "100 trained parameters are over the limit of 99",
        "5,000 bytes at the peak of training are over the limit of 4,999",
        "700 bytes of the saved adapter are over the limit of 699",
    ]


def test_the_report_is_given_the_time_that_one_took(clock: Clock) -> None:
    of = budget(clock, time_s=100.0)
    assert of.report_s == REPORT_S
    of.reported(2.0)
    assert of.report_s == 2.0 * REPORT_GROWS + CLOSE_S
    clock.now += 100 - of.report_s
    assert of.over()


def test_a_step_may_take_no_longer_than_its_limit_or_the_time_there_is(clock: Clock) -> None:
    assert budget(clock).patience_s() is None
    assert budget(clock, step_limit_s=60.0).patience_s() == 60.0
    of = budget(clock, step_limit_s=60.0, time_s=100.0)
    assert of.patience_s() == 60.0
    clock.now += 70
    assert of.patience_s() == 30 - REPORT_S
    clock.now += 29
    assert of.patience_s() == 1.0


def test_lanes_that_cannot_end_in_time_are_noticed(clock: Clock) -> None:
    of = budget(clock, time_s=100.0)
    assert not of.cannot_finish(10**6, 8), "nothing was measured yet"
    of.measured(1.0, 1)
    assert not of.cannot_finish(85, 1)
    assert of.cannot_finish(86, 1)
    of.evaluation_steps = 4.0
    assert of.cannot_finish(83, 1), "an evaluation that was not measured yet is guessed from a step"
    of.evaluated(1.0, 1)
    assert not of.cannot_finish(83, 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [(5, 5), ("5", 5), ("500kB", 500_000), ("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), (" 2mib", 2**21), ("7B", 7)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5", "4 elephants", "1e9", "5TBB", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size like"):
        parse_bytes(text)


# -- which retests first


def test_three_seeds_of_the_first_designs_that_fit() -> None:
    order = first_retests([7, 4, 9], [0, 1, 2, 3, 4], set(), fit=math.inf)
    assert order == [(n, s) for n in (7, 4, 9) for s in (0, 1, 2)]
    order = first_retests([7, 4, 9], [0, 1, 2, 3, 4], set(), fit=8)
    assert {number for number, _ in order} == {7, 4}, "one or two seeds of a third would make no interval"
    assert [number for number, _ in first_retests([7, 4], [0, 1, 2], set(), fit=1)] == [7, 7, 7]


def test_what_is_retested_is_not_retested_again() -> None:
    known = {(7, 0), (7, 1), (7, 2), (4, 0)}
    assert first_retests([7, 4, 9], [0, 1, 2, 3], known, fit=5) == [(4, 1), (4, 2), (9, 0), (9, 1), (9, 2)]
    assert first_retests([], [0, 1], set(), fit=3) == []


def test_the_next_seed_goes_where_it_narrows_an_open_place_most() -> None:
    doubt = {7: 0.0, 4: 0.25, 9: 0.2}
    taken = {7: 3, 4: 3, 9: 3}
    given = []
    while (number := next_retest(doubt, taken, own=5, further=4)) is not None:
        beyond = sum(max(0, count - 5) for count in taken.values())
        able = [n for n in doubt if taken[n] < 5 or (beyond < 4 and doubt[n] > 0)]
        falls = {n: doubt[n] * (1 / taken[n] - 1 / (taken[n] + 1)) for n in able}  # of the mean's variance, in s^2
        assert falls[number] == pytest.approx(max(falls.values()))
        taken[number] += 1
        given.append(number)
    assert given[:2] == [4, 9]
    assert taken[7] == 5, "every trial gets its own number, however certain it is"
    assert sum(taken.values()) == 3 * 5 + 4, "and the further ones go to open places"
    assert next_retest({7: 0.0}, {7: 5}, own=5, further=4) is None, "none where nothing is open"
    assert next_retest({}, {}, own=5, further=4) is None
