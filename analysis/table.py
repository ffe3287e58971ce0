"""Tables: the front in the terminal, and the front and all trials as JSON."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftscape.analysis import units
from peftscape.analysis.belief import believe
from peftscape.analysis.front import Objective, finite, front, hypervolume
from peftscape.analysis.measures import is_cost, measure, measured
from peftscape.analysis.noise import Interval, retest_interval, validation_interval
from peftscape.analysis.states import STOPPED, counted, kind_of
from peftscape.analysis.study import Study
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
    belief = believe(study.records, chosen) if any(not is_cost(axis.name) for axis in chosen) else None
    title = Text(f"{study.name}: front of {' and '.join(objective.name for objective in chosen)}")
    kinds = [kind_of(record) for record in study.records]
    caption = f"{len(members)} of {len(study.records)} trials; selected by validation"
    caption += "".join(f"; {n} {kind}" for kind in (STOPPED, "failed") if (n := kinds.count(kind)))
    tested = any(record.retests for record in members)
    table = Table(title=title, caption=caption)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("design", overflow="fold", min_width=12)
    names = {study.cost.name, *(objective.name for objective in chosen)}  # all five do not fit 80 columns
    shown = units.shown(names & set(measured(study.records)))
    extra = (["test (95 %)"] if tested else []) + (["on front"] if belief else [])
    for head in (study.quality.name, *extra, *(cost.short.lower() for cost in shown)):
        table.add_column(head, justify="right", no_wrap=True)
    for record in members:
        interval = retest_interval(record)
        name = record.title
        costs = [cost_text(record, cost) for cost in shown]
        # Text, not markup: a label such as "[red]" is shown as it is.
        known = [spread(interval)] if tested else []
        known += [f"{belief.by_number[record.number].on_front:.0%}"] if belief else []
        table.add_row(str(record.number), Text(name), units.score(record.validation), *known, *costs)
    if belief:
        said = "probability" if belief.kind == "probability" else "sensitivity, of single scores, not a probability"
        said += ", rough in the middle" if belief.rough else ""
        table.caption = f"{caption}. On front: {said}"
    return table


def cost_text(record: Record, cost: units.Cost) -> str:
    """A record's cost with its unit, or a dash."""
    value = measure(record, cost.name)
    return units.seconds(value) if cost.unit == "s" else units.amount(value, cost.unit)


def spread(interval: Interval | None) -> str:
    """An interval as mean ± half its width; the mean and "one seed" where it has no bounds."""
    if interval is None:
        return "–"
    if not math.isfinite(interval.low):
        return f"{units.score(interval.mean)} (one seed)"
    return f"{units.score(interval.mean)} ± {units.score((interval.high - interval.low) / 2)}"


def front_json(
    study: Study, objectives: Sequence[Objective] | None = None, *, everything: bool = False
) -> dict[str, Any]:
    """The front as JSON values: its members' records, values and intervals, and its hypervolume.

    The hypervolume's reference is the worst value of each objective among the complete trials, and stands
    beside it: hypervolumes compare only where the reference is the same. With `everything`, "runs" lists every
    record in the same form, failed ones too; `on_front` says which are members, `front_probability` or
    `front_sensitivity` how much that holds against noise.
    """
    chosen = tuple(objectives or study.objectives)
    able, values = finite(study.records, chosen)
    directions = [objective.direction for objective in chosen]
    worst = [
        float(column.min() if way == "maximize" else column.max()) if len(able) else None
        for column, way in zip(values.T, directions, strict=True)
    ]
    volume = None if None in worst else hypervolume(values, directions, [w for w in worst if w is not None])
    members = front(study.records, chosen)
    inside = {record.number for record in members}
    belief = believe(study.records, chosen) if any(not is_cost(axis.name) for axis in chosen) else None

    def entry(record: Record) -> dict[str, Any]:
        own = dict(_entry(record))
        own["name"] = record.label
        own["on_front"] = record.number in inside
        own["values"] = {axis.name: _number(measure(record, axis.name)) for axis in chosen}
        known = belief.by_number.get(record.number) if belief else None
        if belief and known:
            own[f"front_{belief.kind}"] = round(known.on_front, 4)
            own["shrunken"] = [known.score.mean, known.score.low, known.score.high]
        return own

    found: dict[str, Any] = {
        "study": study.name,
        "objectives": [{"name": axis.name, "direction": axis.direction} for axis in chosen],
        "hypervolume": volume,
        "reference": {axis.name: value for axis, value in zip(chosen, worst, strict=True)},
        "notes": list(study.notes),
        "members": [entry(record) for record in members],
    }
    if everything:
        found["runs"] = [entry(record) for record in study.records]
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def front_html(members: Sequence[Record], objectives: Sequence[Objective]) -> str:
    """Records as an HTML table with one column an objective, all text escaped, for notebooks."""
    heads = "".join(f"<th>{html.escape(axis.name)}</th>" for axis in objectives)
    rows = []
    for record in members:
        cells = []
        for axis in objectives:
            (cost,) = units.shown([axis.name]) or (None,)
            cells.append(cost_text(record, cost) if cost else units.score(measure(record, axis.name)))
        values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><td>{record.number}</td><td>{html.escape(record.label)}</td>{values}</tr>")
    head = f"<thead><tr><th>#</th><th>design</th>{heads}</tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def study_html(study: Study) -> str:
    """A study's name, its trials by state and its front as HTML, for notebooks."""
    said = counted(study.records) or "no trials"
    members = front(study.records, study.objectives) if study.objectives else ()
    title = f"<p><b>{html.escape(study.name)}</b>: {html.escape(said)}; {len(members)} on the front</p>"
    return title + front_html(members, study.objectives)


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
