"""Intervals equal scipy's and cover; the band of candidates holds what noise may have hidden."""

import dataclasses
import math

import numpy as np
import pytest
import synthetic
from scipy import stats

from peftscape.analysis.front import front, parse_objectives
from peftscape.analysis.noise import (
    candidates,
    proportion_interval,
    retest_interval,
    smallest_difference,
    standard_error,
    t_interval,
    validation_error,
    validation_interval,
)
from peftscape.spaces.record import Score

AXES = parse_objectives("accuracy:max,trainable:min")


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_t_interval_is_scipys(level: float) -> None:
    values = [0.91, 0.93, 0.9, 0.95]
    low, high = stats.t.interval(level, 3, np.mean(values), stats.sem(values))
    found = t_interval(values, level)
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 4)


@pytest.mark.parametrize("n", [3, 10])
def test_the_t_interval_covers(n: int) -> None:
    rng = np.random.default_rng(n)
    found = [t_interval(rng.normal(0.9, 0.01, n).tolist()) for _ in range(1000)]
    assert 0.93 <= np.mean([i.low <= 0.9 <= i.high for i in found]) <= 0.97


def test_one_value_has_no_bounds_and_none_is_an_error() -> None:
    assert (t_interval([0.9]).low, t_interval([0.9]).high) == (-math.inf, math.inf)
    for bad in ([], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="finite"):
            t_interval(bad)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (475, 500), (500, 500)])
def test_the_proportion_interval_is_wilsons(k: int, n: int) -> None:
    oracle = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    found = proportion_interval(k / n, n)
    assert (found.low, found.high) == (pytest.approx(oracle.low, abs=1e-12), pytest.approx(oracle.high))


def test_the_smallest_difference_is_where_a_paired_test_is_significant_half_the_time() -> None:
    n, p, rng = 500, 0.95, np.random.default_rng(0)
    d = smallest_difference(n, p)
    assert d == pytest.approx(0.019, abs=5e-4)  # "500 questions: about 2 points"
    assert smallest_difference(n, p, correlation=0) == pytest.approx(1.96 * math.sqrt(2 * p * (1 - p) / n), rel=1e-4)
    # Outcomes with correlation 1/2: with probability 1/2 both designs share one draw.
    shared = rng.random((4000, n)) < 0.5
    one, two = rng.random((2, 4000, n))
    a = one < p + d / 2
    b = np.where(shared, one, two) < p - d / 2
    difference = a.mean(axis=1) - b.mean(axis=1)
    error = (a.astype(float) - b).std(axis=1, ddof=1) / math.sqrt(n)
    assert np.mean(difference > 1.96 * error) == pytest.approx(0.5, abs=0.05)


def test_the_sampling_error_is_what_drawing_examples_gives() -> None:
    rng = np.random.default_rng(0)
    assert standard_error("accuracy", 0.9, 537) == pytest.approx((rng.binomial(537, 0.9, 20_000) / 537).std(), rel=0.05)
    pairs = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=(3000, 400))
    seen = [np.corrcoef(pair.T)[0, 1] for pair in pairs]
    assert standard_error("pearson", 0.6, 400) == pytest.approx(np.std(seen), rel=0.06)
    assert standard_error("accuracy", 1.0, 100) > 0
    for metric in ("mse", "log_loss", "eval_loss", "perplexity", "r2", "bleu"):
        assert math.isnan(standard_error(metric, 0.2, 100)), f"{metric} is no share"


def test_more_seeds_add_the_error_of_their_mean() -> None:
    one = synthetic.record(0, 0.9)
    two = synthetic.record(0, scores=(Score(seed=0, validation=0.85), Score(seed=1, validation=0.95)))
    assert validation_error(two) == pytest.approx(math.hypot(validation_error(one), 0.05))


def test_candidates_are_the_front_and_what_its_band_holds() -> None:
    records = synthetic.records(150)
    members = {r.number for r in front(records, AXES)}
    found = candidates(records, AXES)
    numbers = [r.number for r in found]
    assert set(numbers[: len(members)]) == members
    complete = [r for r in records if r.state == "complete"]
    within = {
        r.number
        for r in complete
        if all(
            r.validation + validation_error(r) > other.validation
            for other in complete
            if other.costs.trainable <= r.costs.trainable and other is not r
        )
    }
    assert set(numbers) == within | members
    assert found[0].validation == max(r.validation for r in complete)
    assert candidates(records, AXES, 3) == found[:3]
    assert {r.number for r in candidates(records, AXES, errors=0)} == members


def test_a_wider_band_holds_more() -> None:
    records = synthetic.records(150)
    counts = [len(candidates(records, AXES, errors=e)) for e in (0, 0.5, 1, 2)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_the_band_keeps_the_truly_best() -> None:
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(200):
        truth = rng.uniform(0.9, 0.95, 20)
        # The designs answer the same questions, half alike: with probability 1/2 all share one draw.
        draws = np.where(rng.random(537) < 0.5, rng.random(537), rng.random((20, 537)))
        seen = (draws < truth[:, None]).mean(axis=1)
        records = [synthetic.record(i, float(v), 1000) for i, v in enumerate(seen)]
        kept += int(np.argmax(truth)) in [r.number for r in candidates(records, AXES, errors=2)]
    assert kept / 200 > 0.95


def test_equal_designs_are_retested_once() -> None:
    records = [synthetic.record(i, 0.9, 1000, digest="same") for i in range(3)]
    assert [r.number for r in candidates(records, AXES)] == [0]


def test_test_scores_decide_nothing() -> None:
    plain = synthetic.records(60)
    tested = [
        dataclasses.replace(r, retests=(Score(seed=9, validation=0.1, test=float(i % 2)),)) for i, r in enumerate(plain)
    ]
    assert [r.number for r in candidates(plain, AXES)] == [r.number for r in candidates(tested, AXES)]
    assert [r.number for r in front(plain, AXES)] == [r.number for r in front(tested, AXES)]


def test_a_records_intervals() -> None:
    record = synthetic.record(
        0, 0.9, retests=tuple(Score(seed=i, validation=0.9, test=0.9 + i / 100) for i in range(3))
    )
    assert retest_interval(record) == t_interval([0.9, 0.91, 0.92])
    assert validation_interval(record) == proportion_interval(0.9, 537)
    assert retest_interval(synthetic.record(1)) is None
