"""Bands: the two forms of a fitted curve, and the values that each may have at a cost at 95 %.

Both bands invert a likelihood ratio: they hold every value v for which the best curve of the form through v
fits nearly as well as the best curve. Nothing is resampled, so they are the same at every call. (Percentiles
of resampled fits covered 0.90 where 0.95 was asked.)
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
EXPONENTS = np.geomspace(0.001, 3.0, 160)
MONOTONE_95 = 2.26916
"""The 0.95 quantile of the likelihood ratio of a rising curve's value (Banerjee and Wellner 2001, table 2)."""


def law(x: Floats, y: Floats) -> tuple[float, float, float]:
    """a, b, g of a - b exp(-g x), b >= 0, by least squares on a grid of g."""
    middle, _, b, a, loss = _laws(x, y)
    i = int(np.argmin(loss))
    g = float(EXPONENTS[i])
    return float(a[i]), float(b[i] * math.exp(g * middle)), g


def _laws(x: Floats, y: Floats) -> tuple[float, Floats, Floats, Floats, Floats]:
    """For each exponent: the powers exp(-g (x - mean x)), b, a and the residual sum of squares."""
    middle = float(x.mean())
    powers = np.exp(np.clip(-EXPONENTS[:, None] * (x - middle)[None, :], -700, 700))
    off = powers - powers.mean(axis=1, keepdims=True)
    scale = (off * off).sum(axis=1)
    b = np.maximum(-(off @ (y - y.mean())) / np.where(scale > 0, scale, 1.0), 0.0)
    a = y.mean() + b * powers.mean(axis=1)
    return middle, powers, b, a, ((a[:, None] - b[:, None] * powers - y) ** 2).sum(axis=1)


def law_band(x: Floats, y: Floats, at: Floats) -> tuple[Floats, Floats]:
    """The values v with min RSS(f(at) = v) <= RSS (1 + t^2 / (n - 3)), t the 0.975 quantile: the profile likelihood.

    For a given g the law is linear in a and b: v lies within sqrt((s^2 t^2 - (RSS_g - RSS)) h_g) of that g's
    curve, with h_g = 1/n + (p(at) - mean p)^2 / sum (p - mean p)^2 and p = c^-g. The band is the union over g.
    """
    from scipy.special import stdtrit

    n = len(x)
    middle, powers, b, a, loss = _laws(x, y)
    spare = max(n - 3, 1)
    room = float(loss.min()) / spare * float(stdtrit(spare, 0.975)) ** 2 - (loss - loss.min())
    keep = room >= 0
    mean = powers.mean(axis=1, keepdims=True)
    scale = ((powers - mean) ** 2).sum(axis=1, keepdims=True)
    there = np.exp(np.clip(-EXPONENTS[:, None] * (at - middle)[None, :], -700, 700))
    lever = 1 / n + (there - mean) ** 2 / np.where(scale > 0, scale, 1.0)
    reach = np.sqrt(np.maximum(room, 0)[:, None] * lever)
    curve = a[:, None] - b[:, None] * there
    return (curve - reach)[keep].min(axis=0), (curve + reach)[keep].max(axis=0)


def rising(x: Floats, y: Floats, at: Floats) -> Floats:
    """The isotonic fit (as scikit-learn's, by scipy, which that calls) at `at`, linear between sizes."""
    sizes, means, counts = by_size(x, y)
    return np.asarray(np.interp(at, sizes, _isotonic(means, counts)))


def by_size(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """The distinct sizes, the mean at each, and how many values it has."""
    sizes, place, counts = np.unique(np.round(x, 9), return_inverse=True, return_counts=True)
    return sizes, np.bincount(place, weights=y) / counts, counts.astype(np.float64)


def rising_band(x: Floats, y: Floats, at: Floats) -> tuple[Floats, Floats]:
    """The values v with RSS(rising, f(at) = v) - RSS(rising) <= 2.27 s^2, without bounds beyond the data's ends.

    s^2 comes from each size's distance to the line between its neighbours (Gasser, Sroka and Jennen-Steinmetz
    1986), and the quantile is widened as t is against the normal for its degrees of freedom, about n / 2.
    Between two sizes the band is level: of a rising curve no more is known there.
    """
    from scipy.special import stdtrit

    sizes, means, counts = by_size(x, y)
    t = (sizes[2:] - sizes[1:-1]) / (sizes[2:] - sizes[:-2])
    off = t * means[:-2] + (1 - t) * means[2:] - means[1:-1]
    own = t * t / counts[:-2] + (1 - t) ** 2 / counts[2:] + 1 / counts[1:-1]
    variance = float(np.mean(off * off / own))
    wider = (float(stdtrit(len(sizes) / 2, 0.975)) / 1.959964) ** 2
    limit = MONOTONE_95 * variance * wider
    found: dict[tuple[int, int], tuple[float, float]] = {}
    lows, highs = np.empty(len(at)), np.empty(len(at))
    for i, spot in enumerate(at):
        gap = (int(np.searchsorted(sizes, spot - 1e-8, "left")), int(np.searchsorted(sizes, spot + 1e-8, "right")))
        if gap not in found:
            found[gap] = _rising_at(means, counts, gap, limit)
        lows[i], highs[i] = found[gap]
    return lows, highs


def _rising_at(y: Floats, w: Floats, gap: tuple[int, int], limit: float) -> tuple[float, float]:
    """The least and largest value between the sizes before gap[0] and those from gap[1] on."""
    first, last = gap
    left, right = _isotonic(y[:first], w[:first]), _isotonic(y[last:], w[last:])
    free = float((w * (_isotonic(y, w) - y) ** 2).sum())
    pool = np.concatenate([left, y[first:last], right])

    def cost(v: float) -> float:
        fitted = np.concatenate([np.minimum(left, v), np.full(last - first, v), np.maximum(right, v)])
        return float((w * (fitted - y) ** 2).sum()) - free

    # The cost is convex in v, and least at one of the levels of both sides or between them.
    levels = np.unique(np.append(pool, pool.mean()))
    best = float(levels[int(np.argmin([cost(float(v)) for v in levels]))])
    spread = float(np.ptp(y)) + math.sqrt(limit) + 1e-9
    ends = []
    for sign in (-1, 1):
        inside, outside = best, best + sign * 4 * spread
        if cost(outside) <= limit:
            ends.append(sign * math.inf)
            continue
        for _ in range(45):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if cost(middle) <= limit else (inside, middle)
        ends.append(inside)
    return ends[0], ends[1]


def _isotonic(y: Floats, w: Floats) -> Floats:
    from scipy.optimize import isotonic_regression  # scikit-learn calls this one, and takes 2 s to import

    return np.asarray(isotonic_regression(y, weights=w).x) if len(y) else y
