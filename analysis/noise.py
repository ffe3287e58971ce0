"""Noise: how sure a score is, what a test set can show, and what noise may have kept off the front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.front import Objective, finite, non_dominated
from peftscape.analysis.measures import direction_of
from peftscape.spaces.record import COSTS, Record

_CORRELATIONS = frozenset({"matthews", "pearson", "spearman"})
# No sampling error is known from the value alone.
_NO_SHARE = frozenset({"r2", "bleu", "chrf", "rouge_l"})


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds the truth at the stated level; `n` values or examples made it."""

    mean: float
    low: float
    high: float
    n: int


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """mean +- t_{(1 + level) / 2, n - 1} s / sqrt(n), with s the standard deviation over n - 1.

    It holds what repeating the values would vary: for the test scores of several seeds the luck of training,
    not the luck of which test examples were drawn. One value gives an interval without bounds.

    Raises:
        ValueError: if there is no value, one is not finite, or level is not between 0 and 1.
    """
    from scipy.special import stdtrit

    _check_level(level)
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"expected finite values, found {array.tolist()}")
    mean, n = float(array.mean()), int(array.size)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stdtrit(n - 1, (1 + level) / 2) * array.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def proportion_interval(p: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a proportion p seen on n examples (Wilson 1927), never outside [0, 1].

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Raises:
        ValueError: if p or level is not between 0 and 1, or n is not positive.
    """
    z = _z((1 + _check_level(level)) / 2)
    if not 0 <= p <= 1 or n < 1:
        raise ValueError(f"expected a proportion of a positive number of examples, found {p} of {n}")
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), n)


def smallest_difference(
    n_test: int, p: float, *, level: float = 0.95, correlation: float = 0.5, power: float = 0.5
) -> float:
    """The smallest difference between two designs' accuracies that a test set of this size can show.

    d = (z_{(1 + level) / 2} + z_{power}) sqrt(2 p (1 - p) (1 - correlation) / n_test)

    Both designs, of accuracy about p, answer the same questions, and `correlation` is how alike they are
    right and wrong (0: independently, as on two test sets). A true difference of d is found significant with
    probability `power`; 0.5 is where the interval of the difference just leaves zero. 500 questions at
    p = 0.95: 0.019 with correlation 0.5, 0.027 with 0.

    Raises:
        ValueError: if n_test is not positive or a share is out of range.
    """
    if n_test < 1 or not 0 <= p <= 1 or not 0 <= correlation <= 1 or not 0.5 <= power < 1:
        raise ValueError(f"out of range: n_test {n_test}, p {p}, correlation {correlation}, power {power}")
    z = _z((1 + _check_level(level)) / 2) + _z(power)
    return z * math.sqrt(2 * p * (1 - p) * (1 - correlation) / n_test)


def standard_error(metric: str, value: float, n: int) -> float:
    """The sampling error of a metric's value on n examples; NaN where its value alone does not say it.

    Shares (accuracy, and F1 as an approximation): sqrt(p (1 - p) / n) with p drawn to the middle by two
    successes and two failures (Agresti and Coull 1998), so that a perfect score is not free of error.
    Correlations (Matthews, Pearson, Spearman): (1 - r^2) / sqrt(n - 1).
    """
    if n < 2 or not math.isfinite(value) or metric in _NO_SHARE or direction_of(metric) == "minimize":
        return math.nan
    if metric in _CORRELATIONS:
        return (1 - min(1.0, value * value)) / math.sqrt(n - 1)
    if not 0 <= value <= 1:
        return math.nan
    p = (value * n + 2) / (n + 4)
    return math.sqrt(p * (1 - p) / (n + 4))


def validation_error(record: Record) -> float:
    """The standard error of a record's mean validation score.

    The metric's sampling error, which more seeds on the same examples do not make smaller, and the error of
    the mean over seeds where there are several: sqrt(sampling^2 + s^2 / seeds). What is unknown counts 0.
    """
    sampling = standard_error(record.metric, record.validation, record.n_validation)
    seeds = [score.validation for score in record.scores]
    training = float(np.std(seeds, ddof=1)) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    return math.hypot(0.0 if math.isnan(sampling) else sampling, training)


def is_share(record: Record) -> bool:
    """Whether a record's score is a share of examples: between 0 and 1, as all others of its metric are."""
    known = not math.isnan(standard_error(record.metric, record.validation, record.n_validation))
    return known and record.metric not in _CORRELATIONS


def retest_interval(record: Record, level: float = 0.95) -> Interval | None:
    """The t-interval of the test scores of a record's retests; None where there are none."""
    scores = [score.test for score in record.retests if score.test is not None]
    return t_interval(scores, level) if scores else None


def validation_interval(record: Record, level: float = 0.95) -> Interval | None:
    """The interval of a record's validation score that the number of validation examples leaves.

    Wilson's for a metric that is a share; the value and 1.96 standard errors for a correlation; None else.
    """
    value, n = record.validation, record.n_validation
    error = standard_error(record.metric, value, n)
    if math.isnan(error):
        return None
    if is_share(record):
        return proportion_interval(value, n, level)
    return Interval(value, value - 1.96 * error, value + 1.96 * error, n)


def candidates(
    records: Sequence[Record], objectives: Sequence[Objective], n: int | None = None, *, errors: float = 1.0
) -> tuple[Record, ...]:
    """The designs to retest: the front's members, then those that noise may have kept off it.

    A record is within noise of the front where it would be a member if its validation score were better by
    `errors` standard errors. (The difference of two designs that answer the same questions, half alike, has
    the standard error of one of them.) Costs are exact. Validation alone decides; test scores are not read.

    Members come first: the best, then by how much each adds to what is no dearer. Those near follow, nearest
    first. Of equal designs (one digest) only the first counts.

    Args:
        n: at most so many, or all where None.
        errors: the width of the band in standard errors; 0 leaves the front alone.

    Raises:
        ValueError: if n or errors is negative.
        ObjectiveError: if no record has an objective's metric.
    """
    if (n is not None and n < 0) or errors < 0:
        raise ValueError(f"expected no negative number, found n {n}, errors {errors}")
    able, values = finite(records, objectives)
    directions = [objective.direction for objective in objectives]
    member = non_dominated(values, directions)
    losses = values * np.where([way == "maximize" for way in directions], -1.0, 1.0)
    noisy = np.array([objective.name not in COSTS for objective in objectives], dtype=bool)
    band = errors * np.array([validation_error(record) for record in able])
    ranked = []
    for i, record in enumerate(able):
        rest = np.delete(losses, i, axis=0) if member[i] else losses[member]
        rest = rest[(rest != losses[i]).any(axis=1)]  # an equal point says nothing about this one
        gain = _gain(losses[i], rest, noisy)
        if member[i]:
            first = bool(noisy.any() and (losses[i, noisy] <= losses[:, noisy].min(axis=0)).any())
            ranked.append(((0, not first, -gain), record))
        elif -gain < band[i] and noisy.any():  # a tie with what is cheaper would not make it a member
            ranked.append(((1, False, -gain), record))
    ranked.sort(key=lambda pair: (*pair[0], pair[1].number))
    chosen: dict[str, Record] = {}
    for _, record in ranked:
        chosen.setdefault(record.digest or f"#{record.number}", record)
    return tuple(chosen.values())[:n]


def _gain(point: NDArray[np.float64], rest: NDArray[np.float64], noisy: NDArray[np.bool_]) -> float:
    """How much better in quality `point` is than the best of `rest` that is no dearer; negative: worse."""
    rivals = rest[(rest[:, ~noisy] <= point[~noisy]).all(axis=1)]
    if not len(rivals) or not noisy.any():
        return math.inf
    # With several metrics a rival is passed as soon as one of them is better: the largest difference.
    return float((rivals[:, noisy] - point[noisy]).max(axis=1).min())


def _check_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, found {level}")
    return level


def _z(share: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(share))
