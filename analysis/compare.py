"""Comparisons: which design is better than which, paired and corrected, and what runs reached against each other."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.analysis.noise import Interval, standard_error
from peftscape.spaces.record import Record


@dataclass(frozen=True)
class Difference:
    """A minus B: the difference of means with its interval, a two-sided p, and P(A > B) = 1 - its one-sided p.

    `corrected` is p after Holm's correction for all comparisons of its list; alone it is p. `probability` is
    the posterior probability under a flat prior. `n` is the number of pairs.
    """

    a: int
    b: int
    interval: Interval
    p: float
    corrected: float
    probability: float


def paired(a: Sequence[float], b: Sequence[float], *, extra: float = 0.0, level: float = 0.95) -> Difference:
    """The difference of scores paired by seed: a t-test, with `extra` variance of the mean difference added.

    t = mean(d) / sqrt(s_d^2 / n + extra), with Welch and Satterthwaite's degrees of freedom. `extra` is for
    what pairs by seed do not vary: which test examples were drawn.

    Raises:
        ValueError: if lengths differ or there are fewer than two pairs.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2 or not np.isfinite([*x, *y]).all():
        raise ValueError(f"expected at least two pairs of finite scores, found {len(x)} and {len(y)}")
    own = float((x - y).var(ddof=1)) / len(x)
    freedom = (own + extra) ** 2 / (own**2 / (len(x) - 1)) if own > 0 else math.inf
    return _difference(float((x - y).mean()), math.sqrt(own + extra), freedom, len(x), level)


def paired_by_example(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Difference:
    """The difference of outcomes (seeds x examples), paired by example first and by seed second.

    With d_sj = a_sj - b_sj crossed at random: var = (MS_seed + MS_example - MS_rest) / (S J), with
    Satterthwaite's degrees of freedom; with one seed it is the paired t-test over examples, and says nothing
    of seeds. Source: the crossed two-way random model of Searle, Casella and McCulloch (1992).

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
    ms_seed = examples * float(by_seed.var(ddof=1))
    rest = d - by_example - by_seed[:, None] + mean
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (examples - 1))
    total = ms_seed + ms_example - ms_rest
    if total < max(ms_seed, ms_example):  # no component of variance is negative
        total = max(ms_seed, ms_example)
    parts = ms_seed**2 / (seeds - 1) + ms_example**2 / (examples - 1)
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
    """All pairs of the records that share two retest seeds or more: test differences paired by seed, Holm-corrected.

    The variance of the test examples drawn, 2 e^2 (1 - correlation), is added, with e the metric's sampling
    error, since all seeds answer the same examples. `a` and `b` are trial numbers. Larger is better only for
    a metric that is maximised: `probability` is of a larger score, or of a smaller one for a minimised metric.
    """
    found = []
    for a, b in itertools.combinations(records, 2):
        x = {s.seed: s.test for s in a.retests if s.test is not None}
        y = {s.seed: s.test for s in b.retests if s.test is not None}
        common = sorted(x.keys() & y.keys())
        if len(common) < 2:
            continue
        errors = [_sampling(record) for record in (a, b)]
        extra = (1 - correlation) * sum(e * e for e in errors)
        one, two = [x[s] for s in common], [y[s] for s in common]
        difference = paired(one, two, extra=extra, level=level)
        chance = difference.probability if a.direction == "maximize" else 1 - difference.probability
        found.append(replace(difference, a=a.number, b=b.number, probability=chance))
    corrected = holm([d.p for d in found]) if found else ()
    return tuple(replace(d, corrected=float(p)) for d, p in zip(found, corrected, strict=True))


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
    for i in range(n):
        keep[i] = not (y - y[i] > t * np.sqrt(e * e + e[i] ** 2) + 1e-15).any()
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


@dataclass(frozen=True)
class RunComparison:
    """Final values (hypervolumes, or best scores) of two groups of repeated runs.

    `p` is of the exact or sampled permutation test of the difference of means; `needed` the repeats a side
    that a difference of this size, if true, would need to be found at 5 % with probability 0.8.
    """

    difference: float
    low: float
    high: float
    p: float
    needed: int | None


def compare_runs(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> RunComparison:
    """Whether runs of one kind end higher than those of another: Welch's interval and a permutation test.

    needed = 2 (z_0.975 + z_0.8)^2 s^2 / d^2 + 1, with s^2 the pooled variance.

    Raises:
        ValueError: if a group has fewer than two runs.
    """
    from scipy import stats

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"expected at least two runs a group, found {len(x)} and {len(y)}")
    gap = float(x.mean() - y.mean())
    spread = (float(x.var(ddof=1)) * (len(x) - 1) + float(y.var(ddof=1)) * (len(y) - 1)) / (len(x) + len(y) - 2)
    if spread == 0:
        return RunComparison(gap, gap, gap, float(gap == 0), None if gap == 0 else 2)
    interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(level)
    tested = stats.permutation_test(
        (x, y),
        lambda p, q, axis: p.mean(axis=axis) - q.mean(axis=axis),
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    needed = None if gap == 0 else math.ceil(2 * (1.959964 + 0.841621) ** 2 * spread / gap**2 + 1)
    return RunComparison(gap, float(interval.low), float(interval.high), float(tested.pvalue), needed)
