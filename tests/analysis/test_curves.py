"""Fits, tuning curves and what matters, on data whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import synthetic

from peftscape.analysis.fit import FitError, fit_curve
from peftscape.analysis.importance import ablation, heat_map, importances, marginal
from peftscape.analysis.tuning import expected_best, tuning_curve


def test_the_law_is_found_again() -> None:
    cost = np.geomspace(1e3, 1e7, 12)
    curve = fit_curve(cost, 0.95 - 0.8 * cost**-0.3, refits=20)
    assert curve.kind == "saturating"
    assert curve.at(3e4).value == pytest.approx(0.95 - 0.8 * 3e4**-0.3, abs=1e-3)
    assert curve.at(1e8).extrapolated
    assert not curve.at(1e5).extrapolated
    found = curve.cost_for(0.9)
    assert found.cost == pytest.approx((0.8 / 0.05) ** (1 / 0.3), rel=0.1)
    assert curve.cost_for(0.99).cost is None


def test_steps_are_isotonic_and_never_fall() -> None:
    cost = np.geomspace(1e3, 1e7, 16)
    curve = fit_curve(cost, np.where(cost > 1e5, 0.9, 0.3), refits=20)
    assert curve.kind == "isotonic"
    values = [curve.at(c).value for c in np.geomspace(1e3, 1e7, 40)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


def test_few_sizes_are_refused_and_zero_is_a_point_of_its_own() -> None:
    with pytest.raises(FitError, match="4 distinct sizes"):
        fit_curve([0, 1, 2, 2, 3, 4], [0.1, 1, 2, 2, 3, 4])
    assert fit_curve([0, 1, 2, 3, 4, 5], [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], refits=5).zero == 0.3


def test_a_loss_falls() -> None:
    cost = np.geomspace(10, 1e5, 10)
    curve = fit_curve(cost, 0.1 + 2 * cost**-0.5, direction="minimize", refits=20)
    assert curve.at(100).value == pytest.approx(0.3, abs=0.01)
    assert curve.at(100).low <= 0.3 + 1e-3


def test_intervals_hold_new_designs() -> None:
    rng = np.random.default_rng(0)
    held = []
    for case in range(40):
        cost = np.exp(rng.uniform(7, 16, 15))
        curve = fit_curve(cost, 0.95 - 0.8 * cost**-0.25 + rng.normal(0, 0.01, 15), refits=30, seed=case)
        for c in np.exp(rng.uniform(np.log(curve.low), np.log(curve.high), 5)):
            found = curve.at(float(c))
            held.append(found.new_low <= 0.95 - 0.8 * c**-0.25 + rng.normal(0, 0.01) <= found.new_high)
    assert 0.89 <= np.mean(held) <= 0.99


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_expected_best_is_the_mean_over_all_draws(direction: str) -> None:
    scores = [0.3, 0.9, 0.5, 0.5, 0.1]
    pick = max if direction == "maximize" else min
    for n, found in enumerate(expected_best(scores, direction), start=1):
        draws = [pick(draw) for draw in itertools.combinations(scores, n)]
        assert found == pytest.approx(math.fsum(draws) / len(draws))


def test_a_tuning_curve_rises_within_its_band() -> None:
    curve = tuning_curve(synthetic.records(80))
    assert curve is not None
    assert (np.diff(curve.expected) >= -1e-12).all()
    assert (curve.low <= curve.expected + 1e-9).all()
    assert math.isnan(curve.after(1.0))
    assert tuning_curve(synthetic.records(2)) is None


def designs() -> list[synthetic.Record]:
    """Only the learning rate and the site matter: v is good, k is not."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(80):
        lr, v, layer = float(10 ** rng.uniform(-4, -2)), bool(i % 2), int(rng.integers(0, 4))
        placement = {"method": "lora", "sites": ["v" if v else "k"], "layers": [layer], "rank": 8}
        score = 0.7 + 0.1 * v + 0.05 * (math.log10(lr) + 4) + rng.normal(0, 0.003)
        made.append(synthetic.record(i, score, design={"placements": [placement], "training": {"lr": lr}}))
    return made


def test_what_matters_is_found() -> None:
    from peftscape.analysis.front import Objective

    found = {i.knob: i.variance for i in importances(designs(), Objective("accuracy", "maximize"))}
    assert found["sites"] + found["training.lr"] > 0.9
    assert found["sites"] > found["layers"]
    assert importances(designs()[:10], Objective("accuracy", "maximize")) == ()
    levels = {level.name: level.interval.mean for level in marginal(designs(), "sites")}
    assert levels["v"] - levels["k"] == pytest.approx(0.1, abs=0.02)
    heat = heat_map(designs())
    assert heat is not None
    assert (heat.gain[:, heat.sites.index("v")] > 0).all()
    assert (heat.gain[:, heat.sites.index("k")] < 0).all()


def test_an_ablation_path_takes_records_where_there_are_some() -> None:
    def made(number: int, score: float, rank: int, lr: float) -> synthetic.Record:
        placements = [{"method": "lora", "sites": ["q"], "rank": rank}]
        return synthetic.record(number, score, design={"placements": placements, "training": {"lr": lr}})

    records = [made(0, 0.5, 8, 0.1), made(1, 0.6, 16, 0.1), made(2, 0.8, 16, 0.2), made(3, 0.4, 4, 0.3)]
    path = ablation(records, records[0], records[2])
    assert path[0].number == 0
    assert path[-1].number == 2
    assert len(path) == 3
    assert path[1].number in (1, None)
    assert [step.number for step in ablation(records, records[0], records[1])] == [0, 1]
