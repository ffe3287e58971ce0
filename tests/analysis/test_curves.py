"""Fits, tuning curves and what matters, on data whose answer is known."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import synthetic
from scipy import optimize, stats
from simulated import CURVES
from sklearn.isotonic import IsotonicRegression

from peftscape.analysis.ablation import ablation, ends, missing
from peftscape.analysis.bands import EXPONENTS, law_band, rising, rising_band
from peftscape.analysis.fit import FitError, fit_curve
from peftscape.analysis.heat import heat_map
from peftscape.analysis.importance import importances, interactions, marginal
from peftscape.analysis.predictor import predictor
from peftscape.analysis.tuning import expected_best, tuning_curve
from peftscape.spaces.record import Record


def test_the_law_is_found_again() -> None:
    cost = np.geomspace(1e3, 1e7, 12)
    curve = fit_curve(cost, 0.95 - 0.8 * cost**-0.3)
    assert curve.kind == "saturating"
    assert curve.at(3e4).value == pytest.approx(0.95 - 0.8 * 3e4**-0.3, abs=1e-3)
    assert curve.at(1e8).extrapolated
    assert not curve.at(1e5).extrapolated
    found = curve.cost_for(0.9)
    assert found.cost == pytest.approx((0.8 / 0.05) ** (1 / 0.3), rel=0.1)
    assert curve.cost_for(0.99).cost is None


def test_steps_are_isotonic_and_never_fall() -> None:
    cost = np.geomspace(1e3, 1e7, 16)
    curve = fit_curve(cost, np.where(cost > 1e5, 0.9, 0.3))
    assert curve.kind == "isotonic"
    values = [curve.at(c).value for c in np.geomspace(1e3, 1e7, 40)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


def test_few_sizes_are_refused_and_zero_is_a_point_of_its_own() -> None:
    with pytest.raises(FitError, match="4 distinct sizes"):
        fit_curve([0, 1, 2, 2, 3, 4], [0.1, 1, 2, 2, 3, 4])
    assert fit_curve([0, 1, 2, 3, 4, 5], [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]).zero == 0.3


def test_a_loss_falls() -> None:
    cost = np.geomspace(10, 1e5, 10)
    curve = fit_curve(cost, 0.1 + 2 * cost**-0.5, direction="minimize")
    assert curve.at(100).value == pytest.approx(0.3, abs=0.01)
    assert curve.at(100).low <= 0.3 + 1e-3


@pytest.mark.parametrize(("name", "sizes"), [("law", 8), ("law", 20), ("sigmoid", 15), ("flat", 15)])
def test_a_curves_interval_holds_the_truth_and_new_designs(name: str, sizes: int) -> None:
    rng = np.random.default_rng(sizes)
    truth, curve_held, new_held = CURVES[name], [], []
    for _ in range(60):
        x = np.sort(rng.uniform(7, 16, sizes))
        curve = fit_curve(np.exp(x), truth(x) + rng.normal(0, 0.01, sizes))
        for at in rng.uniform(x[0], x[-1], 5):
            found, true = curve.at(float(np.exp(at))), float(truth(at))
            curve_held.append(found.low <= true <= found.high)
            new_held.append(found.new_low <= true + rng.normal(0, 0.01) <= found.new_high)
    # Five points of one curve are alike: 300 say about as much as 100 would. A monotone curve's interval is wide.
    assert 0.90 <= np.mean(curve_held) <= (0.99 if name in ("law", "flat") else 1.0)
    assert 0.90 <= np.mean(new_held) <= 0.995


def test_the_laws_interval_is_what_optimising_through_each_value_gives() -> None:
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(7, 14, 12))
    y = 0.95 - 0.8 * np.exp(-0.25 * x) + rng.normal(0, 0.01, 12)

    def loss(v: float, at: float) -> float:
        """The least squares of a curve through v at `at`, by trying slopes for every exponent."""
        best = math.inf
        for g in EXPONENTS:
            shape = np.exp(-g * at) - np.exp(-g * x)
            b = float(shape @ (y - v) / (shape @ shape))
            best = min(best, float(((y - v - b * shape) ** 2).sum()))
        return best

    free = optimize.minimize_scalar(lambda v: loss(v, 10.0), bounds=(0.5, 1.2), method="bounded").fun
    limit = free * (1 + stats.t.ppf(0.975, 9) ** 2 / 9)
    low, high = law_band(x, y, np.array([10.0]))
    for end, outward in ((low[0], -1), (high[0], 1)):
        assert loss(end, 10.0) <= limit * 1.001
        assert loss(end + outward * 1e-3, 10.0) > limit


def test_the_rising_fit_is_scikit_learns_and_its_interval_what_constrained_fits_allow() -> None:
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(7, 14, 9))
    y = np.sort(rng.random(9)) + rng.normal(0, 0.1, 9)
    oracle = IsotonicRegression().fit(x, y)
    at = np.linspace(x[0], x[-1], 30)
    assert rising(x, y, at) == pytest.approx(oracle.predict(at))
    free = float(((oracle.predict(x) - y) ** 2).sum())

    def loss(v: float, k: int) -> float:
        """The best rising fit that is at most v before size k and at least v from there on, by SLSQP."""
        bounds = [(None, v)] * k + [(v, None)] * (len(x) - k)
        rises = {"type": "ineq", "fun": np.diff}
        start = np.concatenate([np.full(k, min(v, 0.0)), np.full(len(x) - k, max(v, 1.0))])
        found = optimize.minimize(lambda f: ((f - y) ** 2).sum(), start, bounds=bounds, constraints=[rises])
        return float(found.fun)

    middle = (x[3] + x[4]) / 2
    low, high = rising_band(x, y, np.array([middle]))
    extra = [loss(float(v), 4) - free for v in (low[0], high[0])]
    assert extra[0] == pytest.approx(extra[1], rel=1e-3)  # both ends lie where the likelihood ratio is the quantile
    outside = rising_band(x, y, np.array([x[0] - 1, x[-1] + 1]))
    assert (outside[0][0], outside[1][1]) == (-math.inf, math.inf)


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


def test_interactions_are_told_from_what_adds_up() -> None:
    rng = np.random.default_rng(0)

    def made(together: bool) -> list[synthetic.Record]:
        records = []
        for i in range(200):
            wide, deep, lr = bool(rng.integers(2)), bool(rng.integers(2)), float(10 ** rng.uniform(-4, -2))
            placement = {"method": "lora", "sites": ["q", "v"] if wide else ["q"], "layers": [0, 1] if deep else [0]}
            effect = 0.1 * (wide != deep) if together else 0.05 * wide + 0.05 * deep
            score = 0.7 + effect + rng.normal(0, 0.005)
            records.append(synthetic.record(i, score, design={"placements": [placement], "training": {"lr": lr}}))
        return records

    names = ["sites", "layers", "training.lr"]
    apart, alike = interactions(made(False), names), interactions(made(True), names)
    assert alike[0].knobs == ("sites", "layers")
    assert alike[0].share > 0.5
    assert all(pair.share < 0.03 for pair in (*apart, *alike[1:]))
    assert interactions(made(True)[:10], names) == ()


def test_a_numbers_marginal_is_a_curve_and_a_choices_a_list() -> None:
    levels = marginal(designs(), "training.lr")
    at = [level.at for level in levels]
    assert len(levels) == 6
    assert at == sorted(at)
    means = [level.interval.mean for level in levels]
    assert means[-1] > means[0]
    assert all(level.interval.low <= level.interval.mean <= level.interval.high for level in levels)
    assert all(level.at is None for level in marginal(designs(), "sites"))


def lora(number: int, score: float, rank: int, lr: float, **more: object) -> synthetic.Record:
    placements = [{"method": "lora", "sites": ["q"], "rank": rank, **more}]
    return synthetic.record(number, score, design={"placements": placements, "training": {"lr": lr}})


def test_an_ablation_path_takes_records_where_there_are_some() -> None:
    records = [lora(0, 0.5, 8, 0.1), lora(1, 0.6, 16, 0.1), lora(2, 0.8, 16, 0.2), lora(3, 0.4, 4, 0.3)]
    path = ablation(records, records[0], records[2])
    assert (path[0].number, path[-1].number, len(path)) == (0, 2, 3)
    assert path[1].number in (1, None)
    assert [step.number for step in ablation(records, records[0], records[1])] == [0, 1]


def test_what_is_missing_on_a_path_can_be_made_and_does_not_change_it() -> None:
    rng = np.random.default_rng(0)
    records = [lora(i, 0.5 + rng.random() / 10, 2 ** (i % 5), 0.1 * (1 + i % 3), alpha=i) for i in range(20)]
    best = synthetic.record(20, 0.9, design={
        "placements": [
            {"method": "lora", "sites": ["q", "v"], "rank": 64, "alpha": 3},
            {"method": "ia3", "sites": ["k"]},
        ],
        "training": {"lr": 0.5},
    })  # fmt: skip
    book = lora(21, 0.6, 7, 0.7, alpha=9.0)
    records += [best, synthetic.record(21, 0.6, design=book.design, textbook="Hu et al. 2021")]
    found = ends(records)
    assert found is not None
    assert [r.number for r in found] == [21, 20]
    path = ablation(records, *found)
    assert len(path) == 1 + 5  # sites, rank, alpha, lr and a second method
    for before, after in itertools.pairwise(path):
        assert differences(before.design, after.design) == 1
    made = [synthetic.record(i, 0.1 * i, design=dict(design)) for i, design in enumerate(missing(path))]
    assert len(made) == 4
    again = ablation(records, *found, made)
    assert [step.change for step in again] == [step.change for step in path]
    assert missing(again) == ()
    assert [step.score for step in again if step.ablation] == [r.validation for r in made]


def differences(a: object, b: object) -> int:
    """In how many placements' knobs, whole placements or training knobs two designs differ."""
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    one, two = ({p["method"]: p for p in design["placements"]} for design in (a, b))
    count = len(one.keys() ^ two.keys())
    for own, other in [(one[m], two[m]) for m in one.keys() & two.keys()] + [(a["training"], b["training"])]:
        count += sum(own.get(key) != other.get(key) for key in own.keys() | other.keys())
    return count


def test_a_few_designs_predict_by_ridge_regression_and_its_error_is_that_of_left_out_ones() -> None:
    rng = np.random.default_rng(0)
    ranks, rates = rng.uniform(1, 9, 12), rng.uniform(1, 3, 12)
    scores = 0.5 + 0.02 * ranks - 0.05 * rates + rng.normal(0, 0.005, 12)

    def design(rank: float, rate: float) -> dict[str, Any]:
        return {"placements": [{"method": "lora", "rank": rank}], "training": {"lr": rate}}

    def made(rows: Iterable[int]) -> list[Record]:
        return [synthetic.record(i, float(scores[i]), design=design(float(ranks[i]), float(rates[i]))) for i in rows]

    predict, error = predictor(made(range(12)))
    grid = [design(r, t) for r in (2.0, 8.0) for t in (1.5, 2.5)]
    wanted = [0.5 + 0.02 * r - 0.05 * t for r in (2.0, 8.0) for t in (1.5, 2.5)]
    assert predict(grid) == pytest.approx(wanted, abs=0.015)
    gaps = [
        scores[i] - predictor(made([j for j in range(12) if j != i]))[0]([design(ranks[i], rates[i])])[0]
        for i in range(12)
    ]
    # The closed form holds mean and scale fixed, which a fit without the design moves a little.
    assert error == pytest.approx(float(np.sqrt(np.mean(np.square(gaps)))), rel=0.1)
