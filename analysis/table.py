"""Tables: the front in the terminal, and the front and all trials as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftscape.analysis import units
from peftscape.analysis.front import Objective, finite, front, hypervolume
from peftscape.analysis.noise import Interval, retest_interval, validation_interval
from peftscape.analysis.sources import Study
from peftscape.spaces.record import Record

if TYPE_CHECKING:
    from rich.table import Table


def front_table(study: Study, objectives: Sequence[Objective] | None = None) -> "Table":
    """The front for the terminal: each member with its validation score, test interval and costs.

    Of the costs, those that are objectives and the trained parameters; `front_json` and the report have
    them all.
    """
    from rich.table import Table
    from rich.text import Text

    chosen = tuple(objectives or study.objectives)
    members = front(study.records, chosen)
    title = Text(f"{study.name}: front of {' and '.join(objective.name for objective in chosen)}")
    caption = f"{len(members)} of {len(study.records)} trials; selected by validation"
    table = Table(title=title, caption=caption)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("design", overflow="fold", min_width=12)
    names = {"trainable", *(objective.name for objective in chosen)}  # all five do not fit 80 columns
    shown = [cost for cost in units.SHOWN if cost.name in names]
    for head in (study.quality.name, "test (95 %)", *(cost.short.lower() for cost in shown)):
        table.add_column(head, justify="right", no_wrap=True)
    for record in members:
        interval = retest_interval(record)
        name = record.label + (f" ({record.textbook})" if record.textbook else "")
        costs = [cost_text(record, cost) for cost in shown]
        # Text, not markup: a label such as "[red]" is shown as it is.
        table.add_row(str(record.number), Text(name), units.score(record.validation), spread(interval), *costs)
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
