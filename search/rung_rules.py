"""Orders in which lanes of one rung deserve to go on: what `rungs` takes its places from.

A rule gets the lanes that have reached a rung as plain arrays and returns all of them, best first. Any prefix of the
order is a sensible choice, so that a rung may take as many as it has places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Order: TypeAlias = NDArray[np.intp]
Rule: TypeAlias = Callable[[Floats, Floats, Floats], Order]
"""(scores: n, larger is better; costs: n x k, smaller is better; standard errors of the scores: n) -> order: n."""

# Each lane is compared with at least so many others, however far apart their costs.
FEWEST_PEERS = 2
# In every so many places, one is for the best score whatever it costs: the dear end of a front is the most crowded.
QUALITY_EVERY = 3


def like_cost(scores: Floats, costs: Floats, errors: Floats) -> Order:
    """By what a lane scores beyond what the others lead one to expect at its cost.

    gap_i = score_i - max { score_j : j != i, log cost_j <= log cost_i + h }

    The expectation never falls as costs rise. It reaches a little (h, a kernel's width on the log axis) to the dearer
    side, and to the two nearest lanes at least, so that the cheapest lane is compared with others too: on an exact
    cost axis it would never be dominated, however bad. Three orders are dealt out: first an epsilon-net, the best of
    every cell of the cost axis whose gap is within its score's error; then two by gap for each one by score.
    """
    n, reach = len(scores), logs(costs)
    gaps = scores - expected(scores, reach)
    by_gap, by_score = np.lexsort((-scores, -gaps)), np.lexsort((-gaps, -scores))
    place, count = np.empty(n), np.arange(n)
    place[by_gap] = count + count // (QUALITY_EVERY - 1)
    place[by_score] = np.minimum(place[by_score], (count + 1) * QUALITY_EVERY - 1)
    net = _net(by_gap[gaps[by_gap] >= -np.sqrt(2) * errors[by_gap]], reach)
    place[net] = np.arange(len(net)) - n
    return np.argsort(place, kind="stable")


def logs(costs: Floats) -> Floats:
    """Costs on their log axes; a cost of zero lies a factor of two below the smallest that is not."""
    positive = np.where(costs > 0, costs, np.inf).min(axis=0)
    found: Floats = np.log(np.maximum(costs, np.where(np.isfinite(positive), positive / 2, 1.0)))
    return found


def expected(scores: Floats, reach: Floats) -> Floats:
    """The best score of the other lanes that cost no more, or hardly more; `reach` holds log costs, n x k.

    A single lane can expect no more than its own score.
    """
    n = len(scores)
    if n < 2:
        return scores.copy()
    scaled = reach / _widths(reach)
    if scaled.shape[1] == 1:
        return _expected_of_one_cost(scores, scaled[:, 0])
    beyond = (scaled[None, :, :] - scaled[:, None, :]).max(axis=2)  # [i, j]: how much dearer j is, in widths
    np.fill_diagonal(beyond, np.inf)
    nearest = np.sort(beyond, axis=1)[:, min(FEWEST_PEERS, n - 1) - 1]
    near = beyond <= np.maximum(1.0, nearest)[:, None]
    found: Floats = np.where(near, scores[None, :], -np.inf).max(axis=1)
    return found


def _expected_of_one_cost(scores: Floats, cost: Floats) -> Floats:
    """The same in n log n: along the sorted costs, the largest and second largest score so far."""
    order = np.argsort(cost, kind="stable")
    line, best = cost[order], scores[order]
    largest = np.maximum.accumulate(best)
    where = np.maximum.accumulate(np.where(best == largest, np.arange(len(best)), 0))
    first = np.r_[True, where[1:] != where[:-1]]  # a new leader: the leader before it is now the second
    runner_up = np.where(first, np.r_[-np.inf, largest[:-1]], best)
    second = np.maximum.accumulate(runner_up)
    farthest = np.maximum(line + 1.0, line[min(FEWEST_PEERS, len(line) - 1)])
    last = np.searchsorted(line, farthest, side="right") - 1
    found = np.empty_like(scores)
    found[order] = np.where(where[last] == np.arange(len(line)), second[last], largest[last])
    return found


def _widths(reach: Floats) -> Floats:
    """Half of Silverman's rule of thumb (1986, eq. 3.31) on each log cost; never below a factor of 1.1."""
    quarter, three = np.quantile(reach, [0.25, 0.75], axis=0)
    spread = np.minimum(reach.std(axis=0), (three - quarter) / 1.34)
    width: Floats = np.maximum(0.5 * 0.9 * spread * len(reach) ** -0.2, np.log(1.1))
    return width


def _net(contenders: Order, reach: Floats) -> Order:
    """The first contender of each cell; the cells are about sqrt(n) of equal width on each log cost."""
    low, span = reach.min(axis=0), np.ptp(reach, axis=0)
    cells = max(1, int(len(reach) ** (0.5 / reach.shape[1])))
    at = np.minimum((reach - low) / np.where(span > 0, span, 1.0) * cells, cells - 1).astype(int)
    first = np.unique(at[contenders], axis=0, return_index=True)[1]
    return contenders[np.sort(first)]


def crowding(scores: Floats, costs: Floats, errors: Floats) -> Order:
    """Non-dominated rank, then crowding distance, as NSGA-II sorts (Deb et al. 2002, IEEE TEC 6(2)).

    With exact costs the cheapest lane is always of the first rank and at its end: it is never stopped, however bad.
    """
    losses = _losses(scores, costs)
    found: list[int] = []
    for front in _fronts(losses):
        distance = np.zeros(len(front))
        for column in losses[front].T:
            order = np.argsort(column, kind="stable")
            line = column[order]
            distance[order[[0, -1]]] = np.inf
            if line[-1] > line[0]:
                distance[order[1:-1]] += (line[2:] - line[:-2]) / (line[-1] - line[0])
        found += front[np.lexsort((-scores[front], -distance))].tolist()
    return np.array(found, dtype=np.intp)


def epsilon_net(scores: Floats, costs: Floats, errors: Floats) -> Order:
    """Non-dominated rank, then farthest first from those chosen, beginning with the best score.

    The order of MO-ASHA (Schmucker et al. 2021, arXiv:2106.12639), on axes scaled to 1. For comparison.
    """
    losses = _losses(scores, costs)
    span = np.ptp(losses, axis=0)
    scaled = losses / np.where(span > 0, span, 1.0)
    found: list[int] = []
    for front in _fronts(losses):
        rows = scaled[front]
        chosen = [int(np.lexsort((*losses[front].T[:0:-1], losses[front, 0]))[0])]
        far = np.linalg.norm(rows - rows[chosen[0]], axis=1)
        far[chosen[0]] = -1.0
        while len(chosen) < len(front):
            chosen.append(int(np.argmax(far)))
            far = np.minimum(far, np.linalg.norm(rows - rows[chosen[-1]], axis=1))
            far[chosen[-1]] = -1.0
        found += front[chosen].tolist()
    return np.array(found, dtype=np.intp)


def quality(scores: Floats, costs: Floats, errors: Floats) -> Order:
    """By score alone, the cheaper of equals first, as ASHA with one objective. For comparison."""
    return np.lexsort((*costs.T, -scores))


def _losses(scores: Floats, costs: Floats) -> Floats:
    return np.column_stack([-scores, logs(costs)])


def _fronts(losses: Floats) -> Iterable[Order]:
    """The indices of the first front, of the next without it, and so on."""
    from peftscape.analysis.front import non_dominated

    left = np.arange(len(losses))
    while len(left):
        front = non_dominated(losses[left], ["minimize"] * losses.shape[1])
        yield left[front]
        left = left[~front]


RULES: dict[str, Rule] = {
    "crowding": crowding,
    "like-cost": like_cost,
    "epsilon-net": epsilon_net,
    "quality": quality,
}
"""The rules by name."""
