"""Whether the statistics keep their promises: python benchmarks/calibration.py [CASES]  (default 1,000).

Simulated searches with known truth: coverage of 95 % intervals with 3 and 10 seeds, the reliability of front
probabilities (against plain resampling around the scores seen), the false positives of "better than" under no
difference, the coverage of fitted curves for new designs, and how often the truly best is in its set.
"""

import itertools
import sys

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.compare import as_good_as_best, holm, paired
from peftscape.analysis.fit import fit_curve
from peftscape.analysis.noise import t_interval
from peftscape.analysis.shrink import front_probability, posterior

Floats = NDArray[np.float64]
EDGES = (0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01)


def search(rng: np.random.Generator, kind: str, n: int, noise: float) -> tuple[Floats, Floats, Floats]:
    """Costs, true scores and scores seen: an edge with a tail below, a symmetric cloud, or an edge with failures."""
    cost = np.exp(rng.uniform(np.log(1e3), np.log(3e6), n))
    edge = 0.955 - 0.8 * (cost + 500) ** -0.28
    if kind == "edge":
        truth = edge - rng.gamma(1.2, 0.02, n)
    elif kind == "cloud":
        truth = edge + rng.normal(0, 0.015, n)
    else:
        truth = edge - np.where(rng.random(n) < 0.2, rng.uniform(0.2, 0.7, n), rng.gamma(1.5, 0.015, n))
    return cost, truth, truth + rng.normal(0, noise, n)


def on_front(cost: Floats, quality: Floats) -> Floats:
    """1 where a design is on the front."""
    order = np.argsort(cost)
    member = np.empty(len(cost))
    member[order] = quality[order] >= np.maximum.accumulate(quality[order])
    return member


def table(said: Floats, seen: Floats) -> str:
    """said/seen (how many) a bin of said."""
    cells = []
    for low, high in itertools.pairwise(EDGES):
        inside = (said >= low) & (said < high)
        if inside.any():
            cells.append(f"{said[inside].mean():.2f}/{seen[inside].mean():.2f} ({inside.sum()})")
    return "  ".join(cells)


def main(cases: int) -> None:
    """Prints a line a figure."""
    rng = np.random.default_rng(0)
    for seeds in (3, 5, 10):
        held = []
        for _ in range(cases):
            found = t_interval(rng.normal(0.9, 0.01, seeds).tolist())
            held.append(found.low <= 0.9 <= found.high)
        print(f"t-interval, {seeds} seeds: covers {np.mean(held):.3f}")
    false = 0
    for _ in range(cases):
        luck = rng.normal(0.9, 0.01, (6, 4))
        ps = [paired(luck[i].tolist(), luck[j].tolist()).p for i in range(6) for j in range(i)]
        false += bool((holm(ps) < 0.05).any())
    print(f"better than, 15 pairs, no difference: a false positive in {false / cases:.3f} (level 0.05)")
    held = []
    for _ in range(cases):
        truth = rng.normal(0.9, 0.01, 25)
        held.append(as_good_as_best(truth + rng.normal(0, 0.01, 25), np.full(25, 0.01))[truth.argmax()])
    print(f"the truly best is in the set of 25: {np.mean(held):.3f}")
    for n in (8, 15, 30):
        new, band = [], []
        for case in range(max(cases // 5, 20)):
            cost = np.exp(rng.uniform(7, 16, n))
            curve = fit_curve(cost, 0.95 - 0.8 * cost**-0.25 + rng.normal(0, 0.01, n), refits=100, seed=case)
            for c in np.exp(rng.uniform(np.log(curve.low), np.log(curve.high), 5)):
                found, true = curve.at(float(c)), 0.95 - 0.8 * c**-0.25
                band.append(found.low <= true <= found.high)
                new.append(found.new_low <= true + rng.normal(0, 0.01) <= found.new_high)
        print(f"fitted curve, {n} sizes: band covers {np.mean(band):.3f}, new designs {np.mean(new):.3f}")
    for kind in ("edge", "cloud", "failures"):
        for n in (20, 60):
            for noise in (0.005, 0.015):
                said, plain, seen, held = [], [], [], []
                for case in range(max(cases // 10, 10)):
                    cost, truth, scores = search(rng, kind, n, noise)
                    after = posterior(scores, np.full(n, noise), cost, draws=400, seed=case)
                    low, high = after.interval()
                    held.append(np.mean((low <= truth) & (truth <= high)))
                    said.append(front_probability(after.draws, cost, ["maximize", "minimize"]))
                    raw = scores + noise * rng.standard_normal((400, n))
                    plain.append(front_probability(raw, cost, ["maximize", "minimize"]))
                    seen.append(on_front(cost, truth))
                s, p, m = np.concatenate(said), np.concatenate(plain), np.concatenate(seen)
                print(f"\n{kind}, {n} designs, noise {noise}: shrunken intervals cover {np.mean(held):.3f}")
                print(f"  shrunken  {table(s, m)}  Brier {np.mean((s - m) ** 2):.4f}")
                print(f"  resampled {table(p, m)}  Brier {np.mean((p - m) ** 2):.4f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
