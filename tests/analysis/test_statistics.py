"""Statistics on simulated cases whose truth is known, in a small form; benchmarks/calibration.py has the full one."""

import itertools
import math

import numpy as np
import pytest
import synthetic
from scipy import stats
from simulated import search

from peftscape.analysis.attainment import attainment, hypervolume_by_trial
from peftscape.analysis.belief import ROUGH, believe
from peftscape.analysis.compare import (
    as_good_as_best,
    better_than,
    holm,
    optimism,
    paired,
    paired_by_example,
    seed_luck,
)
from peftscape.analysis.front import hypervolume, parse_limits, parse_objectives, within
from peftscape.analysis.runs import compare_runs
from peftscape.analysis.shrink import front_probability, posterior
from peftscape.spaces.record import Score

AXES = parse_objectives("accuracy:max,trainable:min")


def grid_volume(points: np.ndarray, corner: int) -> int:
    cells = itertools.product(range(corner), repeat=points.shape[1])
    return sum(bool((points <= np.array(cell)).all(axis=1).any()) for cell in cells)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_counts_cells(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    for _ in range(60):
        points = rng.integers(0, 5, (rng.integers(0, 7), objectives)).astype(float)
        found = hypervolume(points.reshape(-1, objectives), ["minimize"] * objectives, [4.0] * objectives)
        assert found == pytest.approx(grid_volume(points.reshape(-1, objectives), 4), rel=1e-12)


def test_attainment_is_what_a_share_of_sets_reached() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        sets = [rng.integers(0, 6, (4, 2)).astype(float) for _ in range(5)]
        for share, needed in ((0.2, 1), (0.5, 3), (1.0, 5)):
            surface = attainment(sets, ["minimize", "maximize"], share)
            for x, y in itertools.product(range(6), repeat=2):
                reached = sum(bool(((s[:, 0] <= x) & (s[:, 1] >= y)).any()) for s in sets) >= needed
                assert bool(((surface[:, 0] <= x) & (surface[:, 1] >= y)).any()) == reached


def test_hypervolume_by_trial_is_that_of_each_beginning() -> None:
    records = synthetic.records(30)
    found = hypervolume_by_trial(records, AXES, [0.5, 4e6])
    points = [(r.validation, r.costs.trainable) for r in records[:20] if r.state == "complete"]
    assert found[19] == pytest.approx(hypervolume(points, ["maximize", "minimize"], [0.5, 4e6]), rel=1e-12)
    assert (np.diff(found) >= 0).all()


def test_limits_constrain() -> None:
    records = synthetic.records(50)
    kept = within(records, parse_limits("trainable<=1e5, accuracy >= 0.85", known=["trainable", "accuracy"]))
    assert [r.number for r in kept] == [
        r.number for r in records if r.costs.trainable <= 1e5 and r.scores and r.validation >= 0.85
    ]
    with pytest.raises(ValueError, match='Did you mean "trainable"'):
        parse_limits("trainble<=3", known=["trainable"])


def test_holm_is_the_step_down_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_paired_test_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6))
    oracle = stats.ttest_rel(a, b)
    found = paired(a.tolist(), b.tolist())
    assert (found.p, found.interval.low) == (
        pytest.approx(oracle.pvalue),
        pytest.approx(oracle.confidence_interval().low),
    )
    assert found.probability == pytest.approx(stats.ttest_rel(a, b, alternative="less").pvalue, abs=1e-9)
    assert paired_by_example([a], [b]).p == pytest.approx(oracle.pvalue)


def test_pooled_luck_is_the_residual_of_designs_by_seeds() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 3))
    records = [
        synthetic.record(i, retests=tuple(Score(seed=s, validation=0.9, test=float(v)) for s, v in enumerate(row)))
        for i, row in enumerate(table)
    ]
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    found = seed_luck(records)
    assert found is not None
    assert found.variance == pytest.approx(2 * (rest**2).sum() / 8)
    assert found.freedom == 8
    assert seed_luck(records[:1]) is None


def test_better_than_keeps_its_level_under_no_difference() -> None:
    rng = np.random.default_rng(1)
    false = 0
    for case in range(300):
        luck = rng.normal(0.9, 0.01, (6, 4))
        records = [
            synthetic.record(i, retests=tuple(Score(seed=s, validation=0.9, test=float(v)) for s, v in enumerate(row)))
            for i, row in enumerate(luck)
        ]
        false += any(d.corrected < 0.05 for d in better_than(records))
        assert case or len(better_than(records)) == 15
    assert false / 300 <= 0.05 + 1.96 * math.sqrt(0.05 * 0.95 / 300)


def test_pairing_by_example_covers_with_seeds_and_examples_drawn() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        seeds, examples = rng.normal(0, 0.02, (5, 1)), rng.normal(0, 0.3, (1, 200))
        d = 0.01 + seeds + examples + rng.normal(0, 0.3, (5, 200))
        found = paired_by_example(d, np.zeros_like(d)).interval
        covered += found.low <= 0.01 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_truly_best_is_among_those_as_good_as_the_best() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        truth = rng.normal(0.9, 0.01, 25)
        kept = as_good_as_best(truth + rng.normal(0, 0.01, 25), np.full(25, 0.01))
        held += bool(kept[truth.argmax()])
    assert held / 400 >= 0.95
    assert as_good_as_best([0.5, 0.9], [0.001, 0.001]).tolist() == [False, True]


def test_shrunken_scores_cover_and_front_probabilities_are_calibrated() -> None:
    rng = np.random.default_rng(4)
    chances, members, covered = [], [], []
    for case in range(40):
        cost = np.exp(rng.uniform(7, 15, 60))
        truth = 0.955 - 0.8 * (cost + 500) ** -0.28 - rng.gamma(1.2, 0.02, 60)
        seen = truth + rng.normal(0, 0.01, 60)
        after = posterior(seen, np.full(60, 0.01), cost, draws=300, refits=10, seed=case)
        low, high = after.interval()
        covered.append(np.mean((low <= truth) & (truth <= high)))
        chances.append(front_probability(after.draws, cost, ["maximize", "minimize"]))
        order = np.argsort(cost)
        member = np.empty(60)
        member[order] = truth[order] >= np.maximum.accumulate(truth[order])
        members.append(member)
    assert 0.92 <= np.mean(covered) <= 0.98
    p, m = np.concatenate(chances), np.concatenate(members)
    table = []
    for low, high in itertools.pairwise([0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01]):
        inside = (p >= low) & (p < high)
        table.append((round(float(p[inside].mean()), 3), round(float(m[inside].mean()), 3), int(inside.sum())))
    assert all(abs(said - seen) < 0.15 for said, seen, _ in table), table


def test_front_probability_equals_counting_fronts() -> None:
    rng = np.random.default_rng(5)
    draws = rng.integers(0, 5, (50, 8)).astype(float)
    cost = rng.integers(0, 4, 8).astype(float)
    counted = np.zeros(8)
    for draw in draws:
        for i in range(8):
            beaten = (draw >= draw[i]) & (cost <= cost[i]) & ((draw > draw[i]) | (cost < cost[i]))
            counted[i] += not beaten.any()
    one = front_probability(draws + rng.uniform(0, 1e-9, draws.shape), cost, ["maximize", "minimize"])
    many = front_probability(draws, np.column_stack([cost, cost]), ["maximize", "minimize", "minimize"])
    assert many.tolist() == pytest.approx((counted / 50).tolist())
    assert (one <= many + 0.5).all()


def test_single_scores_give_a_sensitivity_and_seeds_a_probability() -> None:
    single = believe(synthetic.records(40), AXES)
    assert single is not None
    assert (single.kind, single.seed_sd) == ("sensitivity", None)
    seeds = believe(synthetic.study(40, retested=4).records, AXES)
    assert seeds is not None
    assert seeds.kind == "probability"
    assert seeds.seed_sd is not None
    assert believe([synthetic.record(0, metric="mse", direction="minimize")], parse_objectives("mse:min")) is None


def test_optimism_is_the_gap_between_selection_and_retest() -> None:
    records = [
        synthetic.record(i, v, retests=(Score(seed=1, validation=v, test=t),))
        for i, (v, t) in enumerate([(0.9, 0.88), (0.92, 0.91), (0.95, 0.92)])
    ]
    found = optimism(records)
    assert found is not None
    assert found.interval.mean == pytest.approx(0.02)
    assert optimism(synthetic.records(5)) is None


def test_runs_are_compared_as_scipy_does() -> None:
    a, b = [0.9, 0.92, 0.95, 0.91], [0.85, 0.86, 0.9, 0.84]
    found = compare_runs(a, b)
    oracle = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found.low, found.high) == (pytest.approx(oracle.low), pytest.approx(oracle.high))
    assert found.p == pytest.approx(4 / 70)
    assert found.needed is not None
    assert found.needed >= 2


def test_probabilities_are_rough_where_scores_err_as_much_as_designs_of_like_cost_lie_apart() -> None:
    rng = np.random.default_rng(6)
    blurs: dict[float, list[float]] = {0.005: [], 0.015: []}
    for noise, found in blurs.items():
        for _ in range(3):
            cost, _truth, seen = search(rng, "edge", 60, noise)
            found.append(posterior(seen, np.full(60, noise), cost, draws=20, refits=1).blur)
    assert max(blurs[0.005]) < ROUGH < min(blurs[0.015])
    few = believe(synthetic.records(5), AXES)
    assert few is not None
    assert few.rough, "nothing is learnt from five"
