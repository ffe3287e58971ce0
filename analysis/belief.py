"""Belief: for every design an interval of its true score and how probable it is on the front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.front import Objective, finite, non_dominated
from peftscape.analysis.measures import is_cost
from peftscape.analysis.noise import Interval, standard_error
from peftscape.analysis.outcomes import example_variance, likeness
from peftscape.analysis.shrink import front_probability, posterior
from peftscape.spaces.record import Record

Floats = NDArray[np.float64]
ROUGH = 0.45
"""Beyond this blur (`shrink.Posterior`) front probabilities in the middle were off by about 0.1 in simulations."""
CORRELATION = 0.5
"""How alike two designs are right and wrong on the same examples, where no outcomes tell: half."""


@dataclass(frozen=True)
class Evidence:
    """What was seen of one design: its score on the scale of the test (where there is one) and the error.

    `error` is of comparisons: what all designs share, by answering the same examples, is not in it but in
    `common`. `rest` is the weight that validation has in the score: all of it without retests.
    """

    score: float
    error: float
    common: float
    rest: float


@dataclass(frozen=True)
class Believed:
    """One design: its shrunken score with its 95 % interval, and the share of draws that put it on the front."""

    record: Record
    score: Interval
    on_front: float
    member: bool


@dataclass(frozen=True)
class Belief:
    """What noise leaves of a front.

    `kind` is "probability" where repeated seeds say how much training varies, and "sensitivity" where scores
    are single ones: then it says how the front reacts to the error of the examples drawn, no more. `offset`
    is what the test differs from validation for like designs, `seed_sd` the standard deviation between seeds.
    `rough`: scores err so much that they do not show how true ones are spread, and the middle hangs on that.
    `drawn` says whether the error of the examples drawn is known, and in it: a loss betrays it by the outcomes of
    retests alone.
    """

    kind: Literal["probability", "sensitivity"]
    designs: tuple[Believed, ...]
    shrunk: bool
    seed_sd: float | None
    offset: float | None
    seeds: int
    correlation: float = CORRELATION
    measured: bool = False
    drawn: bool = True
    rough: bool = False
    by_number: Mapping[int, Believed] = field(default_factory=dict, repr=False, compare=False)


def believe(
    records: Sequence[Record],
    objectives: Sequence[Objective],
    *,
    correlation: float | None = None,
    draws: int = 1000,
) -> Belief | None:
    """The belief about a front's designs; None where nothing says how large the error of a score is.

    The first objective that is no cost is taken as noisy, all others as exact. The prior of the true scores
    is learnt from all designs, and follows their cost where there is one (`shrink.posterior`). Without a
    `correlation` it is measured from the retests' outcomes, where there are some.

    Raises:
        ObjectiveError: if no record has an objective's metric.
        ValueError: if no objective is a metric, or correlation is not in [0, 1).
    """
    if correlation is not None and not 0 <= correlation < 1:
        raise ValueError(f"expected a correlation in [0, 1), found {correlation}")
    measured = likeness(records) if correlation is None else None
    correlation = correlation if correlation is not None else CORRELATION if measured is None else measured
    noisy = next((i for i, objective in enumerate(objectives) if not is_cost(objective.name)), None)
    if noisy is None:
        raise ValueError("expected an objective that is a metric, found costs alone")
    able, values = finite(records, objectives)
    if not able:
        return None
    axes = [objectives[noisy], *(o for i, o in enumerate(objectives) if i != noisy)]
    others = np.delete(values, noisy, axis=1)
    costs = [i for i, axis in enumerate(axes[1:]) if is_cost(axis.name) and (others[:, i] >= 0).all()]
    cost = others[:, costs[0]] if costs else None
    found = evidence(able, cost, correlation=correlation)
    if found is None:
        return None
    seen, offset, offset_error, seed_sd, seeds = found
    scores = np.array([e.score for e in seen])
    errors = np.array([e.error for e in seen])
    after = posterior(scores, errors, cost, draws=draws if len(able) <= 1000 else min(draws, 500))
    drawn, smooth = after.draws, after.smooth
    # What stands on validation shares the doubt about the offset.
    rest = np.array([e.rest for e in seen])
    doubt = offset_error * np.random.default_rng(1).standard_normal((len(drawn), 1)) * rest
    drawn, smooth = drawn + doubt, smooth + doubt
    chance = front_probability(drawn, others, [axis.direction for axis in axes])
    shared = np.array([e.common for e in seen])
    wide = smooth + shared * np.random.default_rng(2).standard_normal((len(smooth), 1))
    low, high = np.percentile(wide, [2.5, 97.5], axis=0)
    each = example_variance(able)
    member = non_dominated(values, [objective.direction for objective in objectives])
    designs = tuple(
        Believed(r, Interval(float(m), float(lo), float(hi), len(r.scores) + len(r.retests)), float(c), bool(on))
        for r, m, lo, hi, c, on in zip(able, drawn.mean(axis=0), low, high, chance, member, strict=True)
    )
    return Belief(
        "probability" if seeds else "sensitivity",
        designs,
        after.shrunk,
        seed_sd,
        offset,
        seeds,
        correlation,
        measured is not None,
        any(math.isfinite(_sampling(r, r.validation, r.n_validation, each)) for r in able),
        after.blur > ROUGH,
        {design.record.number: design for design in designs},
    )


def evidence(
    records: Sequence[Record], cost: Floats | None = None, *, correlation: float = CORRELATION
) -> tuple[list[Evidence], float | None, float, float | None, int] | None:
    """Each record's score and errors; the test's offset and its error; the seeds' deviation and their number.

    A validation score has the error sqrt(sampling^2 (1 - correlation) + seeds^2 / k), with the deviation
    between seeds pooled over all designs that have several. Where designs were retested, validation is moved
    to the test's scale by the mean of (test - shrunken validation) over these, and both are averaged with
    weights 1 / error^2. None where neither sampling error nor seeds are known.
    """
    variance, freedom = _pooled([[s.validation for s in r.scores] for r in records])
    tested = [_tests(record) for record in records]
    test_variance, test_freedom = _pooled(tested)
    between = test_variance if test_freedom else variance
    if not freedom and not test_freedom:
        between = math.nan
    seeds = freedom + test_freedom
    each = example_variance(records)
    sampling = [_sampling(r, r.validation, r.n_validation, each) for r in records]
    if all(math.isnan(e) for e in sampling) and not seeds:
        return None
    share = 1 - correlation
    errors, common = [], []
    for record, error in zip(records, sampling, strict=True):
        drawn = 0.0 if math.isnan(error) else error * error
        luck = 0.0 if math.isnan(between) else (variance if freedom else between) / max(1, len(record.scores))
        errors.append(drawn * share + luck)
        common.append(drawn * correlation)
    scores = np.array([record.validation for record in records])
    offset, offset_error = None, 0.0
    again = [i for i, found in enumerate(tested) if found]
    if again:
        first = posterior(scores, np.sqrt(errors), cost, draws=200, refits=3).mean
        gaps = np.array([float(np.mean(tested[i])) - first[i] for i in again])
        offset = float(gaps.mean())
        offset_error = (
            float(gaps.std(ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else float(np.sqrt(errors[again[0]]))
        )
        scores = scores + offset
    n_test = next((s.n_test for i in again for s in records[i].retests if s.n_test), 0)
    seen = []
    for i, record in enumerate(records):
        score, var, rest = float(scores[i]), errors[i], 1.0
        drawn = _sampling(record, score, n_test, each) if again else math.nan
        # Moved to the test's scale, every score stands on the test's examples, whatever else it stands on.
        shared = common[i] if math.isnan(drawn) else drawn * drawn * correlation
        if tested[i]:
            k, mean = len(tested[i]), float(np.mean(tested[i]))
            drawn = 0.0 if math.isnan(drawn) else drawn * drawn
            luck = 0.0 if math.isnan(between) else between / k
            var_test = max(drawn * share + luck, 1e-18)
            rest = var_test / (var + var_test)
            score = (1 - rest) * mean + rest * score
            var = (1 - rest) ** 2 * var_test + rest**2 * var
        seen.append(Evidence(score, math.sqrt(var), math.sqrt(shared), rest))
    sd = math.sqrt(between) if seeds else None
    return seen, offset, offset_error, sd, seeds


def _sampling(record: Record, score: float, n: int, variance: float | None) -> float:
    """The error of a score on n examples, by the metric's form or else by the variance seen over examples."""
    known = standard_error(record.metric, score, n)
    return math.sqrt(variance / n) if math.isnan(known) and variance is not None and n > 1 else known


def _tests(record: Record) -> list[float]:
    return [s.test for s in record.retests if s.test is not None and math.isfinite(s.test)]


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The variance within groups, pooled, and its degrees of freedom."""
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    total = math.fsum(float(np.var(group, ddof=1)) * (len(group) - 1) for group in several)
    return (total / freedom if freedom else 0.0), freedom
