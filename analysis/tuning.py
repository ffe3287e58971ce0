"""Tuning curves: the best score to expect for so much training, for each method and for the whole space."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.analysis.states import STOPPED, kind_of
from peftscape.spaces.record import Direction, Record

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TuningCurve:
    """The best validation score to expect after `trials`, with a 95 % band, and the work and seconds they take.

    `work` is in whole trainings: what so many trials train on average, of which some are stopped early.
    """

    trials: NDArray[np.int64]
    work: Floats
    expected: Floats
    low: Floats
    high: Floats
    seconds_each: float

    def after(self, seconds: float) -> float:
        """The expected best within so many device seconds; NaN where not one trial fits or time is unknown."""
        n = int(seconds / self.seconds_each) if self.seconds_each > 0 else 0
        return float(self.expected[min(n, len(self.expected)) - 1]) if n else math.nan


def expected_best(scores: ArrayLike, direction: Direction = "maximize") -> Floats:
    """E[best of n of the N scores drawn without replacement], for n = 1 ... N.

    E_n = sum_i y_(i) C(i - 1, n - 1) / C(N, n), the unbiased form (Tang et al. 2020, arXiv:2011.09621) of Dodge
    et al. (2019, arXiv:1909.03004). Trials are taken as exchangeable: a search that learns does better than its
    curve, which is of the space under its sampler.

    Raises:
        ValueError: if a score is not finite.
    """
    y = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(y).all():
        raise ValueError("expected finite scores")
    sign = 1.0 if direction == "maximize" else -1.0
    return np.asarray(sign * (_shares(len(y)) @ np.sort(sign * y)))


@functools.cache
def _shares(n: int) -> Floats:
    """For draws of k (rows) of n scores, the chance that the i-th smallest (columns) is the best."""
    shares = np.zeros((n, n))
    row = np.full(n, 1.0 / n)
    for k in range(1, n + 1):
        if k > 1:
            row = row * np.maximum(np.arange(n) - k + 2, 0) * k / ((k - 1) * (n - k + 1))
        shares[k - 1] = row
    return shares


def tuning_curve(
    records: Sequence[Record], *, resamples: int = 200, seed: int = 0, most: int = 400
) -> TuningCurve | None:
    """The tuning curve of complete and failed records; None with fewer than three complete ones.

    The band is of bootstrap resamples of the records; it is too narrow at the right end, where a resample
    cannot hold a better score than the best seen, so that curves are cut at half of the trials. Failed and
    stopped trials count with the worst complete score, and cost the share of a training that they had: n of N trials
    drawn without replacement cost n mean(share) on average. What was never trained costs none.
    """
    complete = [record.validation for record in records if record.state == "complete"]
    if len(complete) < 3:
        return None
    direction = next(record.direction for record in records if record.state == "complete")
    worst = min(complete) if direction == "maximize" else max(complete)
    lost = [record for record in records if kind_of(record) in ("failed", STOPPED)]
    scores = np.array([*complete, *[worst] * len(lost)])
    share = (len(complete) + math.fsum(_shares_trained(lost, records))) / len(scores)
    rng = np.random.default_rng(seed)
    if len(scores) > most:
        scores = rng.choice(scores, most, replace=False)
    reach = max(3, len(scores) // 2)
    expected = expected_best(scores, direction)[:reach]
    sign = 1.0 if direction == "maximize" else -1.0
    resampled = np.sort(sign * rng.choice(scores, (resamples, len(scores))), axis=1)
    again = sign * (resampled @ _shares(len(scores))[:reach].T)
    low, high = np.percentile(again, [2.5, 97.5], axis=0)
    walls = [record.wall_s for record in records if record.wall_s > 0]
    each = math.fsum(walls) / len(walls) if walls else 0.0
    trials = np.arange(1, reach + 1)
    return TuningCurve(trials, np.asarray(trials * share, dtype=np.float64), expected, low, high, each)


def _shares_trained(lost: Sequence[Record], records: Sequence[Record]) -> list[float]:
    """How much of a whole training each of these had; all of it where nobody says."""
    whole = max((r.curve[-1][0] for r in records if r.state == "complete" and r.curve), default=0)
    return [min(1.0, r.curve[-1][0] / whole) if r.curve and whole else 1.0 for r in lost]


def tuning_curves(records: Sequence[Record], groups: Mapping[str, Sequence[Record]]) -> dict[str, TuningCurve]:
    """The curves of the whole space ("all methods") and of each group that has enough trials."""
    found = {name: tuning_curve(members) for name, members in (("all methods", records), *groups.items())}
    return {name: curve for name, curve in found.items() if curve is not None}
