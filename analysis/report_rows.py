"""The report's rows: trials, cards and limits as text with what each sorts by."""

import json
import math
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peftscape.analysis import units
from peftscape.analysis.figures import spread_of
from peftscape.analysis.findings import Findings
from peftscape.analysis.front import best_under, finite
from peftscape.analysis.measures import Imported, measure, measured
from peftscape.analysis.noise import retest_interval
from peftscape.analysis.picks import Pick, picks
from peftscape.analysis.states import last_score, state_of
from peftscape.analysis.study import Study
from peftscape.analysis.table import cost_text, spread
from peftscape.spaces.record import Record

_SIZES = ("Small", "Medium", "Large")


def cards(study: Study, found: Findings) -> list[dict[str, Any]]:
    """One card a size; sizes whose best design is the same share a card."""
    cards: list[dict[str, Any]] = []
    for size, pick in zip(_SIZES, picks(study), strict=False):
        if cards and cards[-1]["number"] == pick.record.number:
            cards[-1]["size"] += f" and {size.lower()}"
            cards[-1]["limit"] = limit_text(study, pick.limit)
        else:
            cards.append({"size": size, "limit": limit_text(study, pick.limit), **_card(study, pick, found)})
    return cards


def limit_text(study: Study, limit: float) -> str:
    """A limit of the study's cost in words."""
    cost = next(iter(units.shown([study.cost.name])), units.SHOWN[0])
    said = units.seconds(limit) if cost.unit == "s" else units.amount(limit, cost.unit)
    return f"{said} {cost.short.lower()}" if cost.unit else f"{said} parameters"


def costs_of(study: Study) -> tuple[units.Cost, ...]:
    """The costs that the study's tables show."""
    if not study.records or not isinstance(study.records[0], Imported):  # asked for every row: no pass over all
        return units.SHOWN
    return units.shown(measured(study.records[:50]))


def _card(study: Study, pick: Pick, found: Findings) -> dict[str, Any]:
    record, cheaper = pick.record, pick.cheaper
    interval = retest_interval(record)
    return {
        **row(record, study),
        "chance": found.chance(record.number),
        "interval": spread_of(record),
        "seeds": interval.n if interval else 0,
        "facts": [(cost.short, cost_text(record, cost)) for cost in costs_of(study)],
        "command": _command(study, record),
        "cheaper": row(cheaper, study) if cheaper else None,
    }


def _command(study: Study, record: Record) -> str:
    """What exports the design's adapter from a run's folder; from any other source, what trains the design.

    Other people's runs left neither an adapter nor a design of this package: their name is what repeats them.
    """
    if study.imported:
        return ""
    if "://" in study.source or Path(study.source).is_file():
        design = shlex.quote(json.dumps(record.design, ensure_ascii=False, default=str))
        name = f"design-{record.number}.json"
        return f"printf %s {design} > {name}; peftscape train {name} --out adapter-{record.number}"
    return f"peftscape export {shlex.quote(study.source)} --trial {record.number} adapter-{record.number}"


def row(record: Record, study: Study, members: Collection[int] = ()) -> dict[str, Any]:
    """A record as the tables show it: each cell with its text and what it sorts by."""
    shown = costs_of(study)
    costs = [measure(record, cost.name) for cost in shown]
    return {
        "number": record.number,
        "label": record.label,
        "textbook": record.textbook,
        "state": state_of(record),
        "member": record.number in members,
        "validation": (units.score(last_score(record)), _key(last_score(record))),
        "test": (spread(retest_interval(record)), _key(record.test)),
        "costs": [(cost_text(record, cost), _key(value)) for cost, value in zip(shown, costs, strict=True)],
        "wall": (units.seconds(record.wall_s), _key(record.wall_s)),
        "design": json.dumps(record.design, ensure_ascii=False, default=str),
    }


def _key(value: float) -> str:
    """What a cell sorts by; empty cells go last."""
    return repr(float(value)) if math.isfinite(value) else ""


def limits_of(study: Study) -> list[dict[str, Any]]:
    """The best design under each of several round limits of the study's cost."""
    axes = (study.quality, study.cost)
    _, values = finite(study.records, axes)
    if not len(values) or study.cost.direction != "minimize":
        return []
    limits = steps(float(values[:, 1].min()), float(values[:, 1].max()))
    best = best_under(study.records, limits, quality=study.quality, cost=study.cost.name)
    rows: list[dict[str, Any]] = []
    for limit, record in zip(limits, best, strict=True):
        if record is not None:
            same = bool(rows) and rows[-1]["number"] == record.number
            rows.append({"limit": limit_text(study, limit), "same": same, **row(record, study)})
    return rows


def steps(low: float, high: float) -> tuple[float, ...]:
    """Round limits from low to high; where they lie close together, as memory does, evenly spaced ones."""
    found: tuple[float, ...] = units.round_limits(low, high)
    if len(found) < 3 and high > low:
        found = (*(tick for tick in units.log_ticks(low, high)[0] if tick >= low), math.ceil(high))
    return found
