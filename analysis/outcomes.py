"""Outcomes: what each test example gave in the retests, for tests paired by example and how alike designs err."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from peftscape.spaces.outcomes import unpack
from peftscape.spaces.record import Record, Score

Floats = NDArray[np.float64]
MOST_DESIGNS = 12
"""How alike designs err is measured on the pairs of so many."""


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> Floats | None:
    try:
        found = unpack(text)
    except ValueError:
        return None
    found.setflags(write=False)
    return found


def of_score(score: Score) -> Floats | None:
    """The outcomes of a retest; None where they are not known, or their mean is not its test score."""
    found = _read(score.outcomes) if score.outcomes and score.test is not None else None
    if found is None or abs(float(found.mean()) - (score.test or 0.0)) > 1e-3 * max(1.0, abs(score.test or 0.0)):
        return None
    return found


def of_record(record: Record) -> dict[int, Floats]:
    """The outcomes of a record's retests by seed."""
    return {score.seed: found for score in record.retests if (found := of_score(score)) is not None}


def shared(a: Record, b: Record) -> tuple[Floats, Floats] | None:
    """Both designs' outcomes (seeds x examples) of the seeds that both have; None without any."""
    one, two = of_record(a), of_record(b)
    seeds = sorted(one.keys() & two.keys())
    if not seeds or len({len(own[seed]) for own in (one, two) for seed in seeds}) > 1:
        return None
    return np.array([one[s] for s in seeds]), np.array([two[s] for s in seeds])


def likeness(records: Sequence[Record]) -> float | None:
    """How alike designs are right and wrong on the same test examples: the mean covariance of two designs'
    outcomes over the mean variance of one's, between 0 and 0.999; None with fewer than two designs' outcomes.
    """
    means, variances = [], []
    for record in records:
        own = list(of_record(record).values())
        if own and len({len(o) for o in own}) == 1:
            means.append(np.mean(own, axis=0))
            variances.append(float(np.mean([o.var() for o in own])))
    means = [m for m in means if len(m) == len(means[0])][:MOST_DESIGNS]
    if len(means) < 2 or not (spread := float(np.mean(variances))) > 0:
        return None
    covariance = np.mean([float(np.cov(a, b)[0, 1]) for a, b in itertools.combinations(means, 2)])
    return float(np.clip(covariance / spread, 0.0, 0.999))


def example_variance(records: Sequence[Record]) -> float | None:
    """The variance of one design's outcomes over test examples, the mean over all retests; None without outcomes.

    It gives metrics whose value alone does not say it (losses) the sampling error sqrt(variance / examples).
    """
    found = [float(own.var(ddof=1)) for r in records for own in of_record(r).values() if own.size > 1]
    return float(np.mean(found)) if found else None
