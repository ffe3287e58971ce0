"""Searches whose truth is known, for the tests' small simulations and the benchmarks' full ones."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import synthetic
from numpy.typing import NDArray

from peftscape.analysis.front import parse_objectives
from peftscape.analysis.noise import candidates
from peftscape.spaces.outcomes import pack
from peftscape.spaces.record import Record, Score

Floats = NDArray[np.float64]
AXES = parse_objectives("accuracy:max,trainable:min")
EDGES = (0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01)

# Rising curves over x = log(cost) from 7 to 16: laws, and what is none.
CURVES: dict[str, Callable[[Any], Any]] = {
    "law": lambda x: 0.95 - 0.8 * np.exp(-0.25 * x),
    "early law": lambda x: 0.9 - 20 * np.exp(-x),
    "line": lambda x: 0.5 + 0.03 * x,
    "sigmoid": lambda x: 0.6 + 0.3 / (1 + np.exp(-1.2 * (x - 11.5))),
    "step": lambda x: np.where(np.asarray(x) > 11, 0.9, 0.8),
    "flat": lambda x: 0.8 + 0.0 * np.asarray(x),
}


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


def answers(rng: np.random.Generator, truth: Floats, seeds: int, examples: int, luck: float) -> Floats:
    """Right or wrong answers, designs x seeds x examples: half of the examples are as hard for all designs alike.

    Seeds of a design answer alike in 7 of 10 of the others, and each seed's accuracy differs by `luck`.
    """
    n = len(truth)
    alike = rng.random(examples) < 0.5
    own = np.where(alike, rng.random(examples), rng.random((n, examples)))
    same = alike | (rng.random((n, 1, examples)) < 0.7)
    drawn = np.where(same, own[:, None, :], rng.random((n, seeds, examples)))
    share = np.clip(truth[:, None] + luck * rng.standard_normal((n, seeds)), 0, 1)
    return (drawn < share[:, :, None]).astype(float)


def searched(
    rng: np.random.Generator, *, designs: int = 40, seeds: int = 3, luck: float = 0.006, kind: str = "edge"
) -> tuple[list[Record], Floats]:
    """Records of a search with its candidates retested on 500 test examples, outcomes kept, and the true scores."""
    cost, truth, _ = search(rng, kind, designs, 0.0)
    truth = np.clip(truth, 0.02, 0.99)
    seen = answers(rng, truth, 1, 537, luck).mean(axis=(1, 2))
    made = [synthetic.record(i, float(v), int(c)) for i, (v, c) in enumerate(zip(seen, cost, strict=True))]
    again = [r.number for r in candidates(made, AXES)]
    given = answers(rng, truth, seeds, 500, luck)
    for i in again:
        scores = tuple(
            Score(seed=1000 + s, validation=0.9, test=float(row.mean()), n_test=500, outcomes=pack(row))
            for s, row in enumerate(given[i])
        )
        made[i] = synthetic.record(i, float(seen[i]), int(cost[i]), retests=scores)
    return made, truth


def on_front(cost: Floats, quality: Floats) -> Floats:
    """1 where a design is on the front."""
    order = np.argsort(cost)
    member = np.empty(len(cost))
    member[order] = quality[order] >= np.maximum.accumulate(quality[order])
    return member


def reliability(said: Floats, seen: Floats) -> list[tuple[float, float, int]]:
    """For each bin of what was said: its mean, the share in which it was so, and how many there are."""
    rows = []
    for low, high in itertools.pairwise(EDGES):
        inside = (said >= low) & (said < high)
        if inside.any():
            rows.append((round(float(said[inside].mean()), 3), round(float(seen[inside].mean()), 3), int(inside.sum())))
    return rows
