"""Tables: the front in the terminal, and the front and all trials as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftscape.analysis import units
from peftscape.analysis.front import Objective, best_under, finite, front, hypervolume
from peftscape.analysis.noise import Interval, proportion_interval, standard_error, t_interval
from peftscape.analysis.sources import Study
from peftscape.spaces.record import Record

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Pick:
    """The best design under a limit of trained parameters, and the cheapest that is as good within noise."""

    limit: int
    record: Record
    cheaper: Record | None


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
    if 0 <= value <= 1 and record.metric not in ("matthews", "pearson", "spearman"):
        return proportion_interval(value, n, level)
    return Interval(value, value - 1.96 * error, value + 1.96 * error, n)


def picks(study: Study, names: int = 3) -> tuple[Pick, ...]:
    """The best design under each of `names` round parameter limits, spread evenly (in ratio) over the front.

    `cheaper` is the cheapest complete record whose validation score is within one standard error of the
    best's, where it costs less: the one-standard-error rule (Breiman et al. 1984).
    """
    cost = Objective("trainable", "minimize")
    able, values = finite(front(study.records, (study.quality, cost)), (study.quality, cost))
    if not able:
        return ()
    low, high = max(1.0, float(values[:, 1].min())), max(1.0, float(values[:, 1].max()))
    limits = []
    for i in range(1, names + 1):
        spot = low * (high / low) ** (i / names)
        limits.append(units.round_limits(spot, spot)[0])
    best = best_under(study.records, limits, quality=study.quality)
    return tuple(
        Pick(limit, record, _cheaper(study, record))
        for limit, record in zip(limits, best, strict=True)
        if record is not None
    )


def _cheaper(study: Study, best: Record) -> Record | None:
    """The cheapest record within one standard error of `best`, where it is cheaper."""
    error = standard_error(best.metric, best.validation, best.n_validation)
    sign = 1 if study.quality.direction == "maximize" else -1
    if math.isnan(error) or best.costs is None:
        return None
    cost = Objective("trainable", "minimize")
    near = [
        record
        for record in finite(study.records, (study.quality, cost))[0]
        if sign * (best.validation - record.validation) <= error and cost.value(record) < cost.value(best)
    ]
    return min(near, key=lambda record: (cost.value(record), -sign * record.validation), default=None)


def front_table(study: Study, objectives: Sequence[Objective] | None = None) -> "Table":
    """The front for the terminal: each member with its validation score, test mean and interval, and costs."""
    from rich.table import Table
    from rich.text import Text

    chosen = tuple(objectives or study.objectives)
    members = front(study.records, chosen)
    title = Text(f"{study.name}: front of {' and '.join(objective.name for objective in chosen)}")
    caption = f"{len(members)} of {len(study.records)} trials; selected by validation"
    table = Table(title=title, caption=caption)
    table.add_column("#", justify="right")
    table.add_column("design", overflow="fold", min_width=12)
    for head in (study.quality.name, "test (95 %)", *(cost.short for cost in units.SHOWN)):
        table.add_column(head, justify="right", no_wrap=head != "test (95 %)")
    for record in members:
        interval = retest_interval(record)
        name = record.label + (f" ({record.textbook})" if record.textbook else "")
        costs = [cost_text(record, cost) for cost in units.SHOWN]
        # Text, not markup: a label such as "[red]" is shown as it is.
        table.add_row(
            str(record.number), Text(name), units.score(record.validation), spread(interval), *costs
        )
    return table


def cost_text(record: Record, cost: units.Cost) -> str:
    """A record's cost with its unit, or a dash."""
    value = math.nan if record.costs is None else getattr(record.costs, cost.name)
    return units.amount(value, cost.unit)


def spread(interval: Interval | None) -> str:
    """An interval as mean ± half its width; the mean and "one seed" where it has no bounds."""
    if interval is None:
        return "–"
    if not math.isfinite(interval.low):
        return f"{units.score(interval.mean)} (one seed)"
    return f"{units.score(interval.mean)} ± {units.score((interval.high - interval.low) / 2)}"


def front_json(study: Study, objectives: Sequence[Objective] | None = None) -> dict[str, Any]:
    """The front as JSON values: its members' records and intervals, and its hypervolume.

    The hypervolume's reference is the worst value of each objective among the complete trials, and stands
    beside it: hypervolumes compare only where the reference is the same.
    """
    chosen = tuple(objectives or study.objectives)
    able, values = finite(study.records, chosen)
    directions = [objective.direction for objective in chosen]
    worst = [
        float(column.min() if way == "maximize" else column.max()) if len(able) else None
        for column, way in zip(values.T, directions, strict=True)
    ]
    volume = None if None in worst else hypervolume(values, directions, [w for w in worst if w is not None])
    return {
        "study": study.name,
        "objectives": [{"name": axis.name, "direction": axis.direction} for axis in chosen],
        "hypervolume": volume,
        "reference": {axis.name: value for axis, value in zip(chosen, worst, strict=True)},
        "members": [_entry(record) for record in front(study.records, chosen)],
    }


def trials_json(study: Study) -> dict[str, Any]:
    """Every trial as JSON values, with the configuration and environment that repeat the study."""
    return {
        "study": study.name,
        "source": study.source,
        "objectives": [{"name": axis.name, "direction": axis.direction} for axis in study.objectives],
        "config": dict(study.config),
        "environment": dict(study.environment),
        "notes": list(study.notes),
        "trials": [_entry(record) for record in study.records],
    }


def _entry(record: Record) -> Mapping[str, Any]:
    return {
        **record.to_json(),
        "validation": record.validation if math.isfinite(record.validation) else None,
        "validation_interval": _bounds(validation_interval(record)),
        "test": record.test if math.isfinite(record.test) else None,
        "test_interval": _bounds(retest_interval(record)),
    }


def _bounds(interval: Interval | None) -> list[float] | None:
    return [interval.low, interval.high] if interval and math.isfinite(interval.low) else None
