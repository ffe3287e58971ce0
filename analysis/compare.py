"""Comparisons: which design is better than which, paired by example and seed, and corrected for being many."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.analysis.noise import Interval, standard_error
from peftscape.analysis.outcomes import shared
from peftscape.spaces.record import Record


@dataclass(frozen=True)
class Difference:
    """A minus B: the difference of means with its interval, a two-sided p, and P(A > B) = 1 - its one-sided p.

    `corrected` is p after Holm's correction for all comparisons of its list; alone it is p. `probability` is
    the posterior probability under a flat prior. `by_example` says whether the outcomes of the test examples
    were paired, and not the scores of seeds alone. `n` of the interval is the number of pairs.
    """

    a: int
    b: int
    interval: Interval
    p: float
    corrected: float
    probability: float
    by_example: bool = False


@dataclass(frozen=True)
class Luck:
    """How much the difference of two designs varies between seeds: a variance pooled over pairs of designs.

    Two or three seeds say so little of their own spread that a pair's variance is often near zero by chance
    (15 pairs without a difference then gave a false positive in 0.23 of cases): no pair's counts for less.
    """

    variance: float
    freedom: int


def paired(
    a: Sequence[float], b: Sequence[float], *, extra: float = 0.0, luck: Luck | None = None, level: float = 0.95
) -> Difference:
    """The difference of scores paired by seed: a t-test, with `extra` variance of the mean difference added.

    t = mean(d) / sqrt(s_d^2 / n + extra), with Welch and Satterthwaite's degrees of freedom. `extra` is for
    what pairs by seed do not vary: which test examples were drawn. With `luck` s_d^2 is at least its variance,
    and has its degrees of freedom.

    Raises:
        ValueError: if lengths differ or there are fewer than two pairs.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2 or not np.isfinite([*x, *y]).all():
        raise ValueError(f"expected at least two pairs of finite scores, found {len(x)} and {len(y)}")
    own, spare = _at_least(float((x - y).var(ddof=1)), len(x) - 1, luck)
    own /= len(x)
    freedom = (own + extra) ** 2 / (own**2 / spare) if own > 0 else math.inf
    return _difference(float((x - y).mean()), math.sqrt(own + extra), freedom, len(x), level)


def _at_least(variance: float, freedom: int, luck: Luck | None) -> tuple[float, int]:
    return (variance, freedom) if luck is None else (max(variance, luck.variance), max(freedom, luck.freedom))


def paired_by_example(a: ArrayLike, b: ArrayLike, *, luck: Luck | None = None, level: float = 0.95) -> Difference:
    """The difference of outcomes (seeds x examples), paired by example first and by seed second.

    With d_sj = a_sj - b_sj crossed at random: var = (MS_seed + MS_example - MS_rest) / (S J), with
    Satterthwaite's degrees of freedom; with one seed it is the paired t-test over examples, and says nothing
    of seeds. With `luck` MS_seed is at least what that gives. Source: the crossed two-way random model of
    Searle, Casella and McCulloch (1992).

    Raises:
        ValueError: if shapes differ or there are fewer than two examples.
    """
    d = np.atleast_2d(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))
    seeds, examples = d.shape
    if np.shape(a) != np.shape(b) or examples < 2:
        raise ValueError(f"expected equal shapes of seeds x examples, found {np.shape(a)} and {np.shape(b)}")
    mean = float(d.mean())
    by_example, by_seed = d.mean(axis=0), d.mean(axis=1)
    ms_example = seeds * float(by_example.var(ddof=1))
    if seeds == 1:
        return _difference(mean, math.sqrt(ms_example / examples), examples - 1, examples, level)
    own, spare = _at_least(float(by_seed.var(ddof=1)), seeds - 1, luck)
    ms_seed = examples * own
    rest = d - by_example - by_seed[:, None] + mean
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (examples - 1))
    total = ms_seed + ms_example - ms_rest
    if total < max(ms_seed, ms_example):  # no component of variance is negative
        total = max(ms_seed, ms_example)
    parts = ms_seed**2 / spare + ms_example**2 / (examples - 1)
    parts += ms_rest**2 / ((seeds - 1) * (examples - 1))
    freedom = total**2 / parts if parts else math.inf
    return _difference(mean, math.sqrt(total / (seeds * examples)), freedom, examples, level)


def _difference(mean: float, error: float, freedom: float, n: int, level: float) -> Difference:
    from scipy.special import stdtr, stdtrit

    freedom = min(freedom, 1e9)
    if error == 0:
        sure = 0.5 if mean == 0 else float(mean > 0)
        return Difference(-1, -1, Interval(mean, mean, mean, n), float(mean == 0), float(mean == 0), sure)
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    better = float(stdtr(freedom, mean / error))
    p = 2 * min(better, 1 - better)
    return Difference(-1, -1, Interval(mean, mean - half, mean + half, n), p, p, better)


def holm(ps: ArrayLike) -> NDArray[np.float64]:
    """Holm's corrected p values (1979): the i-th smallest of m times (m - i), made monotone, at most 1."""
    p = np.asarray(ps, dtype=np.float64)
    order = np.argsort(p)
    scaled = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    found = np.empty(len(p))
    found[order] = np.minimum(scaled, 1.0)
    return found


def better_than(records: Sequence[Record], *, correlation: float = 0.5, level: float = 0.95) -> tuple[Difference, ...]:
    """All pairs of the records that share two retest seeds or more: test differences, Holm-corrected.

    Where both have the outcomes of the same examples, these are paired, by example first and by seed second
    (`paired_by_example`). Else scores are paired by seed, and the variance of the test examples drawn,
    2 e^2 (1 - correlation), is added, with e the metric's sampling error, since all seeds answer the same
    examples. No pair's variance between seeds counts for less than all pairs' pooled. `a` and `b` are trial
    numbers. Larger is better only for a metric that is maximised: `probability` is of a larger score, or of a
    smaller one for a minimised metric.
    """
    found = []
    luck = seed_luck(records)
    for a, b in itertools.combinations(records, 2):
        difference = _designs(a, b, correlation, luck, level)
        if difference is not None:
            chance = difference.probability if a.direction == "maximize" else 1 - difference.probability
            found.append(replace(difference, a=a.number, b=b.number, probability=chance))
    corrected = holm([d.p for d in found]) if found else ()
    return tuple(replace(d, corrected=float(p)) for d, p in zip(found, corrected, strict=True))


def seed_luck(records: Sequence[Record]) -> Luck | None:
    """The variance between seeds of two designs' difference, the mean over pairs that share two seeds or more.

    Where all share S seeds this is twice the residual mean square of designs x seeds, the mixed model of a
    design, a seed and their residual, with (designs - 1) (S - 1) degrees of freedom; else S is the least shared.
    """
    tests = [_by_seed(record) for record in records]
    gaps = []
    for x, y in itertools.combinations(tests, 2):
        common = x.keys() & y.keys()
        if len(common) > 1:
            gaps.append([x[s] - y[s] for s in common])
    if not gaps:
        return None
    freedom = (sum(len(own) > 1 for own in tests) - 1) * (min(map(len, gaps)) - 1)
    return Luck(float(np.mean([np.var(gap, ddof=1) for gap in gaps])), freedom)


def _by_seed(record: Record) -> dict[int, float]:
    return {s.seed: s.test for s in record.retests if s.test is not None}


def _designs(a: Record, b: Record, correlation: float, luck: Luck | None, level: float) -> Difference | None:
    outcomes = shared(a, b)
    if outcomes is not None and len(outcomes[0]) > 1:
        return replace(paired_by_example(*outcomes, luck=luck, level=level), by_example=True)
    x, y = _by_seed(a), _by_seed(b)
    common = sorted(x.keys() & y.keys())
    if len(common) < 2:
        return None
    extra = (1 - correlation) * sum(e * e for e in map(_sampling, (a, b)))
    return paired([x[s] for s in common], [y[s] for s in common], extra=extra, luck=luck, level=level)


def _sampling(record: Record) -> float:
    n = next((s.n_test for s in record.retests if s.n_test), 0)
    error = standard_error(record.metric, record.test, n)
    return 0.0 if math.isnan(error) else error


def as_good_as_best(
    scores: ArrayLike, errors: ArrayLike, freedom: float = math.inf, *, level: float = 0.95
) -> NDArray[np.bool_]:
    """Which designs no other beats significantly: a set that holds the truly best with probability `level`.

    Design i is left out where some j has score_j - score_i > t sqrt(e_i^2 + e_j^2), t the one-sided quantile
    at 1 - (1 - level) / (n - 1): Bonferroni's form of multiple comparisons with the best (Hsu 1981), which does
    not forget that the best was picked by its score. Larger scores are better.
    """
    from scipy.special import stdtrit

    y, e = np.asarray(scores, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    n = len(y)
    if n < 2:
        return np.ones(n, dtype=bool)
    t = float(stdtrit(min(freedom, 1e9), 1 - (1 - level) / (n - 1)))
    keep = np.ones(n, dtype=bool)
    for block in np.array_split(np.arange(n), -(-n // 400)):  # blocks bound the memory of n x n comparisons
        lead = y[None, :] - y[block, None]
        keep[block] = ~(lead > t * np.sqrt(e[None, :] ** 2 + e[block, None] ** 2) + 1e-15).any(axis=1)
    return keep


@dataclass(frozen=True)
class Optimism:
    """What selection promised too much: the mean of (selected validation score - test mean) over the retested.

    `interval` is a t-interval over designs. A positive mean says that validation looked better than the test.
    """

    interval: Interval
    designs: int


def optimism(records: Sequence[Record]) -> Optimism | None:
    """How much better the retested designs looked when they were selected; None with no test score.

    It holds both what selecting the luckiest adds and how the two sets differ in difficulty. For a metric that
    is minimised the sign is turned, so that positive is always too rosy.
    """
    from peftscape.analysis.noise import t_interval

    gaps = [
        (r.validation - r.test) * (1 if r.direction == "maximize" else -1)
        for r in records
        if r.state == "complete" and math.isfinite(r.test) and math.isfinite(r.validation)
    ]
    return Optimism(t_interval(gaps), len(gaps)) if gaps else None
