"""Whether the statistics keep their promises: python benchmarks/calibration.py [CASES]  (default 1,000).

Simulated searches with known truth: coverage of 95 % intervals with 3, 5 and 10 seeds, of shrunken scores and of
fitted curves; the reliability of front probabilities (against plain resampling around the scores seen); the false
positives of "better than" under no difference, paired by seed and by example; how often the truly best is in its
set; runs compared. The results go to benchmarks/results/calibration.json.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from peftscape.analysis.belief import believe
from peftscape.analysis.compare import as_good_as_best, holm, paired, paired_by_example
from peftscape.analysis.fit import fit_curve
from peftscape.analysis.noise import t_interval
from peftscape.analysis.runs import compare_runs
from peftscape.analysis.shrink import front_probability, posterior

# The searches are those of the tests, so that both simulate the same.
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "analysis"))
from simulated import AXES, CURVES, Floats, answers, on_front, reliability, search, searched  # noqa: E402

WAYS: Any = ["maximize", "minimize"]


def seeds_cover(rng: np.random.Generator, cases: int, seeds: int) -> float:
    """How often the t-interval over seeds holds the mean."""
    found = [t_interval(rng.normal(0.9, 0.01, seeds).tolist()) for _ in range(cases)]
    return float(np.mean([i.low <= 0.9 <= i.high for i in found]))


def false_by_seed(rng: np.random.Generator, cases: int) -> float:
    """How often 15 pairs of like designs, 4 seeds each, show a difference."""
    false = 0
    for _ in range(cases):
        luck = rng.normal(0.9, 0.01, (6, 4))
        ps = [paired(luck[i].tolist(), luck[j].tolist()).p for i in range(6) for j in range(i)]
        false += bool((holm(ps) < 0.05).any())
    return false / cases


def by_example(rng: np.random.Generator, cases: int, seeds: int) -> tuple[float, float]:
    """False positives of 15 pairs of like designs, and the coverage of a true difference of 0.02."""
    false, held = 0, []
    for _ in range(cases):
        given = answers(rng, np.full(6, 0.9), seeds, 500, 0.006)
        ps = [paired_by_example(given[i], given[j]).p for i in range(6) for j in range(i)]
        false += bool((holm(ps) < 0.05).any())
        apart = answers(rng, np.array([0.92, 0.9]), seeds, 500, 0.006)
        found = paired_by_example(apart[0], apart[1]).interval
        held.append(found.low <= 0.02 <= found.high)
    return false / cases, float(np.mean(held))


def best_is_kept(rng: np.random.Generator, cases: int) -> tuple[float, float]:
    """How often the truly best of 25 is in its set, and how many the set holds."""
    held, sizes = [], []
    for _ in range(cases):
        truth = rng.normal(0.9, 0.01, 25)
        kept = as_good_as_best(truth + rng.normal(0, 0.01, 25), np.full(25, 0.01))
        held.append(kept[truth.argmax()])
        sizes.append(kept.sum())
    return float(np.mean(held)), float(np.mean(sizes))


def curves_cover(rng: np.random.Generator, cases: int, name: str, n: int) -> dict[str, float]:
    """How often the curve's interval holds the true curve, and a new design's interval a new design."""
    truth, band, new, laws = CURVES[name], [], [], []
    for _ in range(cases):
        x = np.sort(rng.uniform(7, 16, n))
        curve = fit_curve(np.exp(x), truth(x) + rng.normal(0, 0.01, n))
        laws.append(curve.kind == "saturating")
        for at in rng.uniform(x[0], x[-1], 5):
            found, true = curve.at(float(np.exp(at))), float(truth(at))
            band.append(found.low <= true <= found.high)
            new.append(found.new_low <= true + rng.normal(0, 0.01) <= found.new_high)
    return {"curve": float(np.mean(band)), "new designs": float(np.mean(new)), "law chosen": float(np.mean(laws))}


def shrunken(rng: np.random.Generator, cases: int, kind: str, n: int, noise: float) -> dict[str, Any]:
    """Coverage of shrunken scores, and front probabilities against what was so and against plain resampling."""
    said, plain, seen, held = [], [], [], []
    for case in range(cases):
        cost, truth, scores = search(rng, kind, n, noise)
        after = posterior(scores, np.full(n, noise), cost, draws=400, seed=case)
        low, high = after.interval()
        held.append(np.mean((low <= truth) & (truth <= high)))
        said.append(front_probability(after.draws, cost, WAYS))
        plain.append(front_probability(scores + noise * rng.standard_normal((400, n)), cost, WAYS))
        seen.append(on_front(cost, truth))
    return {"covers": float(np.mean(held)), **_chances(said, plain, seen)}


def known_prior(rng: np.random.Generator, cases: int, n: int, noise: float) -> dict[str, Any]:
    """Front probabilities of "edge" searches by their true prior and trend: what is lost by having to learn them."""
    said, seen = [], []
    grid = np.linspace(-0.25, -1e-4, 500)
    prior = stats.gamma.pdf(-grid, 1.2, scale=0.02)
    for _ in range(cases):
        cost, truth, scores = search(rng, "edge", n, noise)
        edge = 0.955 - 0.8 * (cost + 500) ** -0.28
        weights = prior * np.exp(-0.5 * ((scores - edge)[:, None] - grid) ** 2 / noise**2)
        shares = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
        draws = np.column_stack([grid[np.searchsorted(row, rng.random(400)).clip(max=499)] for row in shares]) + edge
        said.append(front_probability(draws, cost, WAYS))
        seen.append(on_front(cost, truth))
    s, m = np.concatenate(said), np.concatenate(seen)
    return {"said, so, how many": reliability(s, m), "Brier": float(np.mean((s - m) ** 2))}


def _chances(said: list[Floats], plain: list[Floats], seen: list[Floats]) -> dict[str, Any]:
    s, p, m = np.concatenate(said), np.concatenate(plain), np.concatenate(seen)
    return {
        "said, so, how many": reliability(s, m),
        "Brier": float(np.mean((s - m) ** 2)),
        "resampled: said, so, how many": reliability(p, m),
        "resampled: Brier": float(np.mean((p - m) ** 2)),
    }


def whole_searches(rng: np.random.Generator, cases: int, seeds: int) -> dict[str, Any]:
    """Everything together: records with retests and outcomes in, shrunken intervals and front probabilities out."""
    every, again, said, seen = [], [], [], []
    for _ in range(cases):
        records, truth = searched(rng, seeds=seeds)
        belief = believe(records, AXES, draws=400)
        assert belief is not None
        inside = np.array([b.score.low <= t <= b.score.high for b, t in zip(belief.designs, truth, strict=True)])
        retested = np.array([bool(r.retests) for r in records])
        every.append(inside.mean())
        again.append(inside[retested].mean())
        said.append(np.array([b.on_front for b in belief.designs]))
        seen.append(on_front(np.array([r.costs.trainable if r.costs else 0 for r in records]), truth))
    s, m = np.concatenate(said), np.concatenate(seen)
    return {
        "covers": float(np.mean(every)),
        "covers, retested": float(np.mean(again)),
        "said, so, how many": reliability(s, m),
        "Brier": float(np.mean((s - m) ** 2)),
    }


def runs_apart(rng: np.random.Generator, cases: int) -> float:
    """How often 5 runs a group with no difference are told apart at 5 %."""
    return float(np.mean([compare_runs(*rng.normal(0.8, 0.02, (2, 5)).tolist()).p < 0.05 for _ in range(cases)]))


def main(cases: int) -> None:
    """Prints each figure as it comes, and writes them all."""
    rng = np.random.default_rng(0)
    results: dict[str, Any] = {"cases": cases}

    def tell(name: str, value: Any) -> None:
        results[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)

    started = time.process_time()
    for seeds in (3, 5, 10):
        tell(f"t-interval, {seeds} seeds: covers", seeds_cover(rng, cases, seeds))
    tell("better than, by seed, 15 pairs, no difference: false positives (level 0.05)", false_by_seed(rng, cases))
    for seeds in (3, 10):
        false, covers = by_example(rng, cases, seeds)
        tell(f"better than, by example, {seeds} seeds, 15 pairs, no difference: false positives", false)
        tell(f"difference by example, {seeds} seeds: covers", covers)
    tell("the truly best is in the set of 25; the set's size", best_is_kept(rng, cases))
    tell("runs, 5 against 5, no difference: false positives", runs_apart(rng, max(cases // 5, 20)))
    for name, n in itertools.product(CURVES, (8, 15, 30)):
        tell(f"fitted curve, {name}, {n} sizes: covers", curves_cover(rng, max(cases // 4, 20), name, n))
    for seeds in (3, 10):
        tell(f"whole searches, 40 designs, {seeds} seeds", whole_searches(rng, max(cases // 10, 10), seeds))
    for kind, n, noise in itertools.product(("edge", "cloud", "failures"), (20, 60), (0.005, 0.015)):
        tell(f"{kind}, {n} designs, noise {noise}", shrunken(rng, max(cases // 10, 10), kind, n, noise))
    for noise in (0.005, 0.015):
        tell(f"edge, 60 designs, noise {noise}, prior known", known_prior(rng, max(cases // 10, 10), 60, noise))
    results["processor seconds"] = round(time.process_time() - started)
    (HERE / "results" / "calibration.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
