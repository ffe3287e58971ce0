"""Attainment: what a share of several searches reached, where two groups differ in it, and hypervolume by trial."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.analysis.front import Objective, hypervolume
from peftscape.analysis.measures import measure
from peftscape.spaces.record import Direction, Record


def attainment(sets: Sequence[ArrayLike], directions: Sequence[Direction], share: float = 0.5) -> NDArray[np.float64]:
    """The points that at least `share` of the sets attain: each dominates or equals no more than it must.

    The empirical attainment surface (Grunert da Fonseca et al. 2001) of two or three objectives, computed by
    moocore; share 0.5 is the median surface, 1 what every set reached. A point is attained by a set that has
    a point nowhere worse.

    Raises:
        ValueError: if there is no set with a point, share is not in (0, 1], or a value is not finite.
    """
    import moocore

    arrays = [np.asarray(points, dtype=np.float64).reshape(-1, len(directions)) for points in sets]
    if not any(len(a) for a in arrays) or not 0 < share <= 1:
        raise ValueError(f"expected sets with points and a share in (0, 1], found {len(arrays)} and {share}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("expected finite values")
    sign = np.where([way == "maximize" for way in directions], -1.0, 1.0)
    needed = int(np.ceil(share * len(arrays) - 1e-9))
    full = [a for a in arrays if len(a)]
    if needed > len(full):  # an empty set attains nothing
        return np.empty((0, len(directions)))
    points = np.concatenate(full) * sign
    ids = np.repeat(np.arange(1, len(full) + 1), [len(a) for a in full])
    levels = moocore.eaf(points, ids, percentiles=[100 * needed / len(full)])
    return np.asarray(levels[:, :-1] * sign)


def hypervolume_by_trial(
    records: Sequence[Record], objectives: Sequence[Objective], reference: Sequence[float]
) -> NDArray[np.float64]:
    """The hypervolume of the first 1, 2, ... records' front; records that are not complete add nothing."""
    sign = np.where([objective.direction == "maximize" for objective in objectives], -1.0, 1.0)
    rows = [
        [measure(record, objective.name) if record.state == "complete" else math.nan for objective in objectives]
        for record in records
    ]
    losses = np.array(rows, dtype=np.float64).reshape(len(rows), len(objectives)) * sign
    return volumes(losses, (np.asarray(reference, dtype=np.float64) * sign).tolist())


def volumes(losses: NDArray[np.float64], corner: Sequence[float]) -> NDArray[np.float64]:
    """The hypervolume of the first 1, 2, ... rows, smaller being better; rows with NaN add nothing."""
    ways: list[Direction] = ["minimize"] * losses.shape[1]
    kept = np.empty((0, losses.shape[1]))
    volume, found = 0.0, []
    for point in losses:
        inside = bool(np.isfinite(point).all() and (point < np.asarray(corner)).all())
        if inside and not (kept <= point).all(axis=1).any():
            kept = np.vstack([kept[~(point <= kept).all(axis=1)], point])
            volume = hypervolume(kept, ways, corner)
        found.append(volume)
    return np.array(found)


@dataclass(frozen=True)
class AttainmentDifference:
    """Where a larger share of one group's runs attained a point than of the other's: the largest such gaps.

    `most_a` and `most_b` are the largest shares by which A and B lead, `at_a` and `at_b` the points (losses,
    smaller is better) where they do, `p` that of a permutation test of the larger gap (Fonseca et al. 2011).
    """

    most_a: float
    most_b: float
    at_a: tuple[float, ...]
    at_b: tuple[float, ...]
    p: float


def attainment_difference(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], *, permutations: int = 2000, seed: int = 0
) -> AttainmentDifference:
    """The largest differences of two groups' empirical attainment functions, and a test of them.

    All points whose coordinates are some run's are looked at, which holds every value that the difference
    takes; of more than about 20,000 such points, each objective's coordinates are thinned evenly. The test
    relabels runs: all ways where there are at most `permutations`, else so many drawn.

    Raises:
        ValueError: if a group has no run.
    """
    sets = [np.asarray(points, dtype=np.float64) for points in (*a, *b)]
    if not len(a) or not len(b):
        raise ValueError(f"expected runs in both groups, found {len(a)} and {len(b)}")
    objectives = max(points.shape[1] for points in sets if points.ndim == 2)
    sets = [points.reshape(-1, objectives) for points in sets]
    most = max(2, int(20_000 ** (1 / objectives)))
    axes = [np.unique(np.concatenate([points[:, i] for points in sets])) for i in range(objectives)]
    axes = [
        axis[np.unique(np.linspace(0, len(axis) - 1, most).round().astype(int))] if len(axis) > most else axis
        for axis in axes
    ]
    if not all(len(axis) for axis in axes):
        return AttainmentDifference(0.0, 0.0, (), (), 1.0)
    grid = np.array(list(itertools.product(*axes)))
    reached = np.array([_reached(points, grid) for points in sets], dtype=np.float64)
    n, k = len(sets), len(a)
    gap = reached[:k].mean(axis=0) - reached[k:].mean(axis=0)
    seen = float(np.abs(gap).max())
    rng = np.random.default_rng(seed)
    total = math.comb(n, k)
    ways = (
        itertools.combinations(range(n), k)
        if total <= permutations
        else (rng.choice(n, k, replace=False) for _ in range(permutations))
    )
    hits = done = 0
    everything = reached.sum(axis=0)
    for way in ways:
        first = reached[list(way)].sum(axis=0)
        hits += bool(np.abs(first / k - (everything - first) / (n - k)).max() >= seen - 1e-12)
        done += 1
    p = hits / done if total <= permutations else (hits + 1) / (done + 1)
    high, low = int(gap.argmax()), int(gap.argmin())
    return AttainmentDifference(
        max(0.0, float(gap[high])), max(0.0, -float(gap[low])), tuple(grid[high].tolist()), tuple(grid[low].tolist()), p
    )


def _reached(points: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the grid's points a set attains: it has a point nowhere worse."""
    found = np.zeros(len(grid), dtype=bool)
    for point in points:
        found |= (point <= grid).all(axis=1)
    return found
