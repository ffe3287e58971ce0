"""Picks: the designs to recommend, the best under each of a few limits of cost."""

import math
from dataclasses import dataclass

from peftscape.analysis import units
from peftscape.analysis.front import best_under, finite, front
from peftscape.analysis.noise import standard_error
from peftscape.analysis.study import Study
from peftscape.spaces.record import Record


@dataclass(frozen=True)
class Pick:
    """The best design under a limit of the study's cost, and the cheapest that is as good within noise."""

    limit: int
    record: Record
    cheaper: Record | None


def picks(study: Study, names: int = 3) -> tuple[Pick, ...]:
    """The best design under each of `names` round limits of the study's cost, spread evenly (in ratio) over the front.

    `cheaper` is the cheapest complete record whose validation score is within one standard error of the
    best's, where it costs less: the one-standard-error rule (Breiman et al. 1984).
    """
    cost = study.cost
    if cost.direction != "minimize":  # no limit from above makes sense then
        return ()
    able, values = finite(front(study.records, (study.quality, cost)), (study.quality, cost))
    if not able:
        return ()
    low, high = max(1.0, float(values[:, 1].min())), max(1.0, float(values[:, 1].max()))
    limits = []
    for i in range(1, names + 1):
        spot = low * (high / low) ** (i / names)
        limits.append(units.round_limits(spot, spot)[0])
    if len(set(limits)) < names and high > low:  # a narrow range, as of memory: the members' own costs
        spots = sorted(float(v) for v in values[:, 1])
        limits = [math.ceil(spots[math.ceil(i * (len(spots) - 1) / names)]) for i in range(1, names + 1)]
    best = best_under(study.records, limits, quality=study.quality, cost=cost.name)
    return tuple(
        Pick(limit, record, _cheaper(study, record))
        for limit, record in zip(limits, best, strict=True)
        if record is not None
    )


def _cheaper(study: Study, best: Record) -> Record | None:
    """The cheapest record within one standard error of `best`, where it is cheaper."""
    error = standard_error(best.metric, best.validation, best.n_validation)
    sign = 1 if study.quality.direction == "maximize" else -1
    if math.isnan(error):
        return None
    cost = study.cost
    near = [
        record
        for record in finite(study.records, (study.quality, cost))[0]
        if sign * (best.validation - record.validation) <= error and cost.value(record) < cost.value(best)
    ]
    return min(near, key=lambda record: (cost.value(record), -sign * record.validation), default=None)
