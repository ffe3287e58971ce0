"""Shrinkage: what noisy scores say of true ones, by an empirical Bayes model that pulls lucky winners back.

theta_i = f(c_i) + u_i,  u_i ~ G,   y_i | theta_i ~ N(theta_i, s_i^2)

theta_i is what design i truly scores, y_i what was seen with standard error s_i, and f a polynomial in the log
of the cost c_i. G takes any shape, as most designs are ordinary, some have failed, and few pass an upper edge:
f comes with a mixture of one to three normals fitted by EM (Dempster et al. 1977), chosen by BIC; then the
weights of a grid of narrow normals take a few steps of EM from there, which stops short of the spiky maximum
(Kiefer and Wolfowitz 1956; Laird 1978). The prior's own uncertainty comes from refits with Dirichlet weights
(the weighted likelihood bootstrap of Newton and Raftery 1994).

That prior ranks designs well and its intervals are too narrow (they covered 89 to 95 %): each score has helped to
shape the prior that it is pulled by. Intervals come from a smoother one, a single step of EM with normals wider
than the noise, and cover 94 to 97 % in the same cases (`benchmarks/calibration.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.analysis.front import non_dominated
from peftscape.spaces.record import Direction

Floats = NDArray[np.float64]
FEWEST = 6
"""With fewer scores than this a prior cannot be learnt, and scores count as they are."""
MOST = 1500
"""The prior is learnt from so many designs at most, drawn at random, and then holds for all."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws (draws x designs) of true scores; `shrunk` says whether a prior was learnt or scores taken as seen.

    `draws` say which designs pass which, `smooth` (from the smoother prior) how far each could be from its mean.
    `blur` is the scores' error over the standard deviation of true scores of like cost: where it is large, scores
    show little of the shape of the prior, which front probabilities hang on.
    """

    draws: Floats
    smooth: Floats
    shrunk: bool
    blur: float = math.inf

    @property
    def mean(self) -> Floats:
        """The posterior mean of each design."""
        return np.asarray(self.draws.mean(axis=0))

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """The central interval of each design, from the smoother prior."""
        tail = 50 * (1 - level)
        low, high = np.percentile(self.smooth, [tail, 100 - tail], axis=0)
        return low, high


@dataclass(frozen=True, eq=False)
class _Mixture:
    weights: Floats
    means: Floats
    variances: Floats
    slope: Floats
    likelihood: float


def posterior(
    seen: ArrayLike,
    errors: ArrayLike,
    cost: ArrayLike | None = None,
    *,
    draws: int = 1000,
    refits: int | None = None,
    seed: int = 0,
) -> Posterior:
    """True scores given the scores seen, their standard errors and the costs of their designs.

    Args:
        seen: one score a design, in the metric's units.
        errors: its standard error; 0 where it is exact.
        cost: what the design costs, not negative; the prior's middle follows its log.
        draws: how many draws of all designs to return.
        refits: how often the prior is learnt anew; fewer for many designs, which say more of it.

    Raises:
        ValueError: if shapes differ, or a value is not finite or an error or cost negative.
    """
    y, s = np.asarray(seen, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    c = np.zeros(len(y)) if cost is None else np.asarray(cost, dtype=np.float64)
    if not (y.ndim == 1 and y.shape == s.shape == c.shape):
        raise ValueError(f"expected one score, error and cost a design, found shapes {y.shape}, {s.shape}, {c.shape}")
    if not (np.isfinite([*y, *s, *c]).all() and (s >= 0).all() and (c >= 0).all()):
        raise ValueError("expected finite scores, and errors and costs that are not negative")
    rng = np.random.default_rng(seed)
    n = len(y)
    if n < FEWEST or not s.any() or np.ptp(y) == 0:
        plain = y + s * rng.standard_normal((draws, n))
        return Posterior(plain, plain, shrunk=False)
    basis = _basis(c)
    scale = float(y.std())
    z, e2 = (y - y.mean()) / scale, (s / scale) ** 2
    some = rng.choice(n, MOST, replace=False) if n > MOST else np.arange(n)
    own, own2, own_basis, m = z[some], e2[some], basis[some], len(some)
    fits = [_fit(own, own2, own_basis, np.ones(m), k) for k in (1, 2, 3) if 4 * k <= m]
    chosen = min(fits, key=lambda fit: _bic(fit, m))
    parts = chosen.weights.size
    refits = refits or (20 if n <= 500 else 6 if n <= MOST else 3)
    found: list[Floats] = []
    smooth: list[Floats] = []
    for size in np.diff(np.linspace(0, draws, refits + 1).astype(int)):
        weights = rng.dirichlet(np.ones(m)) * m
        start = _fit(own, own2, own_basis, weights, parts)
        for into, prior in ((found, _CLOSE), (smooth, _SMOOTH)):
            shaped = _shape(start, own, own2, own_basis, weights, *prior)
            into.append(_draw(shaped, z, e2, basis, int(size), rng))
    back = [np.concatenate(parts_) * scale + y.mean() for parts_ in (found, smooth)]
    return Posterior(back[0], back[1], shrunk=True, blur=math.sqrt(float(np.median(own2))) / _spread(chosen))


def _spread(fit: _Mixture) -> float:
    """The standard deviation that the middle half of true scores of one cost has; a few failures do not move it."""
    rng = np.random.default_rng(0)
    part = rng.choice(len(fit.weights), 2000, p=fit.weights)
    low, high = np.quantile(fit.means[part] + np.sqrt(fit.variances[part]) * rng.standard_normal(2000), [0.25, 0.75])
    return float(high - low) / 1.349


def _basis(cost: Floats) -> Floats:
    """Powers of the standardised log cost: none for a single cost or few designs, then one, then two."""
    x = np.log1p(cost)
    if np.ptp(x) == 0 or len(x) < 8:
        return np.empty((len(x), 0))
    x = (x - x.mean()) / x.std()
    return np.column_stack([x, x * x - 1])[:, : 1 if len(x) < 25 else 2]


def _fit(z: Floats, e2: Floats, basis: Floats, weights: Floats, parts: int, steps: int = 60) -> _Mixture:
    """EM for a mixture of normals with known noise and a shared trend; `weights` are the designs' counts."""
    slope = np.zeros(basis.shape[1])
    if basis.shape[1]:
        full = np.column_stack([np.ones(len(z)), basis])
        root = np.sqrt(weights)[:, None]
        slope = np.linalg.lstsq(full * root, z * root[:, 0], rcond=None)[0][1:]
    rest = z - basis @ slope
    spread = float(np.average((rest - np.average(rest, weights=weights)) ** 2, weights=weights))
    mu = np.quantile(rest, np.linspace(0, 1, 2 * parts + 1)[1::2])
    tau = np.full(parts, max(spread - float(e2.mean()), 0.05 * spread))
    if parts > 1:
        tau = tau * np.linspace(1.0, 0.2, parts)  # a wide lower part, a narrow upper one
    share = np.full(parts, 1 / parts)
    floor = 1e-3 * spread + 1e-12
    likelihood = -math.inf
    for _ in range(steps):
        total = tau[None, :] + e2[:, None]
        centre = (basis @ slope)[:, None] + mu[None, :]
        log = np.log(share) - 0.5 * (np.log(2 * np.pi * total) + (z[:, None] - centre) ** 2 / total)
        top = log.max(axis=1, keepdims=True)
        norm = top[:, 0] + np.log(np.exp(log - top).sum(axis=1))
        now = float(weights @ norm)
        if now - likelihood < 1e-4:
            break
        likelihood = now
        r = np.exp(log - norm[:, None]) * weights[:, None]
        gain = tau[None, :] / total
        theta = centre + gain * (z[:, None] - centre)
        left = tau[None, :] * e2[:, None] / total
        mass = r.sum(axis=0) + 1e-9
        # One part's worth of a design at the overall spread keeps a variance from falling to nothing.
        off = theta - (basis @ slope)[:, None]
        mu = (r * off).sum(axis=0) / mass
        tau = np.maximum(((r * ((off - mu) ** 2 + left)).sum(axis=0) + 0.1 * spread) / (mass + 1), floor)
        share = mass / mass.sum()
        if basis.shape[1]:
            precision = (r / tau).sum(axis=1)
            target = (r / tau * (theta - mu)).sum(axis=1) / precision
            root = np.sqrt(precision)
            slope = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
    return _Mixture(share, mu, tau, slope, likelihood)


def _bic(fit: _Mixture, n: int) -> float:
    return (3 * fit.weights.size - 1 + fit.slope.size) * math.log(n) - 2 * fit.likelihood


_CLOSE, _SMOOTH = (8, 0.5, 1.5), (1, 1.4, 2.0)
"""Steps of EM, the grid's normals in standard errors, and how much wider than the mixture it starts."""


def _shape(
    fit: _Mixture, z: Floats, e2: Floats, basis: Floats, weights: Floats, steps: int, kernel: float, start: float
) -> _Mixture:
    """The prior of any shape: a grid of normals of width `kernel` times the noise, weighted by a few steps of EM."""
    rest = z - basis @ fit.slope
    noise = float(np.sqrt(np.median(e2)))
    ends = np.linspace(rest.min() - noise, rest.max() + noise, 30)
    grid = np.unique(np.concatenate([ends, np.quantile(rest, np.linspace(0, 1, 40))]))
    gaps = np.maximum(np.gradient(grid), 1e-9)
    width = np.maximum(0.7 * gaps, kernel * noise) ** 2
    # Started wider than the mixture, so that few steps leave the tails wide where few designs lie.
    wide = start * np.sqrt(fit.variances)
    share = (fit.weights / wide * np.exp(-0.5 * ((grid[:, None] - fit.means) / wide) ** 2)).sum(axis=1) + 1e-6
    share = share * gaps / (share * gaps).sum()
    total = width + e2[:, None]
    seen = np.maximum(np.exp(-0.5 * (rest[:, None] - grid) ** 2 / total) / np.sqrt(total), 1e-300)
    for _ in range(steps):
        r = seen * share
        share = weights @ (r / r.sum(axis=1, keepdims=True))
        share = np.maximum(share / share.sum(), 1e-12)
    return _Mixture(share, grid, width, fit.slope, math.nan)


def _draw(fit: _Mixture, z: Floats, e2: Floats, basis: Floats, size: int, rng: np.random.Generator) -> Floats:
    total = fit.variances[None, :] + e2[:, None]
    centre = (basis @ fit.slope)[:, None] + fit.means[None, :]
    log = np.log(fit.weights) - 0.5 * (np.log(total) + (z[:, None] - centre) ** 2 / total)
    share = np.exp(log - log.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    edges = np.cumsum(share, axis=1)
    edges[:, -1] = 1.0
    row = np.arange(len(z))
    # One search for all designs: each one's edges lie between its number and the next.
    spots = np.searchsorted((edges + row[:, None]).ravel(), rng.random((size, len(z))) + row, side="right")
    part = np.minimum(spots - row * len(fit.weights), len(fit.weights) - 1)
    gain = fit.variances / total
    middle = centre + gain * (z[:, None] - centre)
    sd = np.sqrt(gain * e2[:, None])
    return np.asarray(middle[row, part] + sd[row, part] * rng.standard_normal(part.shape))


def front_probability(draws: Floats, costs: ArrayLike, directions: Sequence[Direction], limit: int = 400) -> Floats:
    """The share of draws in which each design is on the front of its drawn quality and its exact other objectives.

    `directions` begin with the quality's. `costs` is designs x the other objectives. With more than one of
    these, at most `limit` draws are used.
    """
    other = np.asarray(costs, dtype=np.float64).reshape(draws.shape[1], -1)
    quality = draws if directions[0] == "maximize" else -draws
    if other.shape[1] == 0:
        return np.asarray((quality == quality.max(axis=1, keepdims=True)).mean(axis=0))
    if other.shape[1] == 1:
        cost = other[:, 0] if directions[1] == "minimize" else -other[:, 0]
        order = np.argsort(cost, kind="stable")
        best = np.maximum.accumulate(quality[:, order], axis=1)
        # Of designs that cost the same the best counts: compare with the last of each group.
        last = np.searchsorted(cost[order], cost[order], side="right") - 1
        member = np.empty(draws.shape[1])
        member[order] = (quality[:, order] >= best[:, last]).mean(axis=0)
        return member
    # A design that even at its best draw is beaten by others at their worst is never a member.
    hopes = np.column_stack([quality.max(axis=0), other])
    ways: list[Direction] = ["maximize", *directions[1:]]
    sure = np.column_stack([quality.min(axis=0), other])
    sign = np.where([way == "maximize" for way in ways], -1.0, 1.0)
    able = np.array([not ((sure * sign < h).all(axis=1)).any() for h in hopes * sign])
    chosen = draws[:limit]
    counts = np.zeros(draws.shape[1])
    for draw in quality[: len(chosen), able]:
        counts[able] += non_dominated(np.column_stack([draw, other[able]]), ways)
    return counts / len(chosen)
