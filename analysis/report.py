"""The report: one HTML file that answers first, then shows, then says how to repeat it."""

import json
import math
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from peftscape.analysis import units
from peftscape.analysis.ablation import Step, missing
from peftscape.analysis.figures import front_figure, hovers, spread_of
from peftscape.analysis.findings import Findings, find
from peftscape.analysis.fit import Curve, leaders
from peftscape.analysis.front import best_under, finite, front, knee
from peftscape.analysis.measures import Imported, measure, measured
from peftscape.analysis.more_figures import (
    curve_traces,
    heat_figure,
    importance_figure,
    marginal_figures,
    tuning_figure,
)
from peftscape.analysis.noise import retest_interval
from peftscape.analysis.notes import spent
from peftscape.analysis.page import render
from peftscape.analysis.picks import Pick, picks
from peftscape.analysis.sources import Study
from peftscape.analysis.table import cost_text, spread
from peftscape.spaces.record import Record

_SIZES = ("Small", "Medium", "Large")
FLOOR = 0.02
"""Interactions below this share are the forest's own noise, and not shown."""


def write_report(study: Study, path: str | Path) -> Path:
    """Writes the study as one self-contained HTML file, which makes no request to anywhere.

    All text from records, configuration and environment is escaped. The file holds plotly.js once (about
    5 MB).

    Raises:
        OSError: if the file cannot be written.
    """
    found = find(study)
    return render(
        "report.html",
        path,
        **_contents(study, found),
        extras=_extras(study, found),
        figures=_figures(study, found),
        hovers=hovers(study),
    )


def _figures(study: Study, found: Findings) -> list[dict[str, Any]]:
    """A figure for each cost that some trial with a score has, the study's own with the fits and first."""
    recommended = picks(study)
    figures = []
    for cost in sorted(units.shown(measured(study.records)), key=lambda cost: cost.name != study.cost.name):
        fits = curve_traces(found.curves) if cost.name == study.cost.name else ()
        figure = front_figure(study, cost, recommended, fits)
        if any(trace["x"] for trace in figure["data"]):
            figures.append({"name": cost.short, **figure})
    return figures


def _extras(study: Study, found: Findings) -> dict[str, Any]:
    """The figures beside the front, by the id of the element that shows them."""
    metric = study.quality.name
    figures = {
        "tuning": tuning_figure(found.tuning, metric) if found.tuning else None,
        "importance": importance_figure(found.importances) if found.importances else None,
        **{f"marginal{i}": figure for i, figure in enumerate(marginal_figures(found.marginals, metric))},
        "heat": heat_figure(found.heat) if found.heat else None,
    }
    return {name: figure for name, figure in figures.items() if figure}


def _findings(study: Study, found: Findings) -> dict[str, Any]:
    """What the template shows of the findings, as rows of text."""
    belief = found.belief
    likely = [d for d in belief.designs if d.member or d.on_front >= 0.2] if belief else []
    inside = {r.number: i for i, r in enumerate(found.members)}
    likely.sort(key=lambda d: (study.cost.value(d.record), inside.get(d.record.number, 0)))
    cost = next(iter(units.shown([study.cost.name])), units.SHOWN[0])
    whole = found.curves.get("all methods")
    fits = [
        (
            name,
            curve.text(),
            f"{units.amount(curve.low, cost.unit)} to {units.amount(curve.high, cost.unit)}",
            str(curve.sizes),
            f"{curve.errors[curve.kind]:.3f}",
        )
        for name, curve in found.curves.items()
    ]
    return {
        "kind": belief.kind if belief else "",
        "likely": [
            {
                **_row(d.record, study),
                "member": d.member,
                "chance": f"{d.on_front:.0%}",
                "shrunken": f"{units.score(d.score.mean)} ({units.score(d.score.low)} to {units.score(d.score.high)})",
                "cost": cost_text(d.record, cost),
            }
            for d in likely[:40]
        ],
        "alike": [_row(record, study) for record in found.alike],
        "fits": fits,
        "refused": _refused(found),
        "expected": _expected(whole, study) if whole else [],
        "prices": _prices(whole, cost.unit) if whole else [],
        "leaders": [
            (name, units.amount(low, cost.unit), units.amount(high, cost.unit))
            for name, low, high in leaders(found.curves)
        ],
        "path": [
            (step.change, f"{units.score(step.score)} ± {units.score(1.96 * step.error)}", _origin(step))
            for step in found.path
        ],
        "gaps": len(missing(found.path)),
        "pairs": [(" and ".join(i.knobs), f"{i.share:.0%}") for i in found.interactions if i.share >= FLOOR][:6],
        "paired": bool(found.interactions),
        "extra": sorted(_extras(study, found)),
        "hours": _hours(found),
    }


def _refused(found: Findings) -> list[tuple[str, str]]:
    """Each reason for no curve, with those whom it concerns."""
    reasons: dict[str, list[str]] = {}
    for name, why in found.refused.items():
        reasons.setdefault(why, []).append(name)
    return [(", ".join(names), why) for why, names in reasons.items()]


def _expected(curve: Curve, study: Study) -> list[tuple[str, str, str, str]]:
    """The quality expected at round costs within the data and at ten times beyond, with both intervals."""
    limits = _steps(curve.low, curve.high)
    costs = [float(limit) for limit in limits if curve.low <= limit <= curve.high][:7]
    rows = []
    for cost in [*costs, 10 * curve.high]:
        found = curve.at(cost)
        curve_text, new_text = (
            f"{units.score(low)} to {units.score(high)}"
            for low, high in ((found.low, found.high), (found.new_low, found.new_high))
        )
        said = _limit(study, cost) + (" (extrapolated)" if found.extrapolated else "")
        rows.append((said, units.score(found.value), curve_text, new_text))
    return rows


def _prices(curve: Curve, unit: str) -> list[tuple[str, str, str]]:
    """The cost expected for qualities between the curve's ends, and one above."""
    low, high = (curve.at(end).value for end in (curve.low, curve.high))
    rows = []
    for share in (0.25, 0.5, 0.75, 1.1):
        found = curve.cost_for(low + share * (high - low))
        ends = [units.amount(end, unit) if end is not None else "not reached" for end in (found.low, found.high)]
        said = "not reached" if found.cost is None else units.amount(found.cost, unit)
        said += " (extrapolated)" if found.cost is not None and found.extrapolated else ""
        rows.append((units.score(low + share * (high - low)), said, " to ".join(ends)))
    return rows if high != low else []


def _steps(low: float, high: float) -> tuple[float, ...]:
    """Round limits from low to high; where they lie close together, as memory does, evenly spaced ones."""
    found: tuple[float, ...] = units.round_limits(low, high)
    if len(found) < 3 and high > low:
        found = (*(tick for tick in units.log_ticks(low, high)[0] if tick >= low), math.ceil(high))
    return found


def _origin(step: Step) -> str:
    if step.number is None:
        return "predicted"
    return f"recorded for this path ({step.number})" if step.ablation else f"recorded, #{step.number}"


def _hours(found: Findings) -> list[tuple[str, list[str]]]:
    """The best score to expect of each method within a few budgets of device time."""
    budgets = (600.0, 3600.0, 36_000.0)
    rows = []
    for name, curve in found.tuning.items():
        longest = curve.seconds_each * len(curve.trials)
        cells = [units.score(curve.after(b)) if b <= longest else "–" for b in budgets]
        if any(cell != "–" for cell in cells):
            rows.append((name, cells))
    return rows


def _contents(study: Study, found: Findings) -> dict[str, Any]:
    """Everything that the template shows, as text and rows."""
    records = study.records
    states = {state: [r for r in records if r.state == state] for state in ("complete", "pruned", "failed", "running")}
    members = front(records, (study.quality, study.cost))
    inside = {member.number for member in members}
    bend = knee(members, study.quality, study.cost.name)
    cost = next(iter(units.shown([study.cost.name])), units.SHOWN[0])
    return {
        **_findings(study, found),
        "cost_words": cost.title.split(" (")[0].lower(),
        "imported": study.imported,
        "title": study.name,
        "subtitle": _subtitle(study),
        "metric": study.quality.name,
        "counts": {state: len(found) for state, found in states.items()},
        "total": len(records),
        "cards": _cards(study, found),
        "knee": _row(bend, study) if bend else None,
        "members": len(members),
        "heads": [cost.short for cost in _costs(study)],
        "limits": _limits(study),
        "rows": [_row(record, study, inside) for record in records],
        "failed": states["failed"],
        "spent": spent(study),
        "notes": found.claims,
        "config": json.dumps(study.config, indent=2, ensure_ascii=False, default=str),
        "environment": _flat(study.environment),
        "source": study.source,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def _subtitle(study: Study) -> str:
    """The model and the task, where the configuration names them."""
    words = []
    for key in ("model", "task"):
        value = study.config.get(key)
        value = value.get("name", value.get("id")) if isinstance(value, Mapping) else value
        if isinstance(value, str):
            words.append(value)
    return " on ".join(words)


def _cards(study: Study, found: Findings) -> list[dict[str, Any]]:
    """One card a size; sizes whose best design is the same share a card."""
    cards: list[dict[str, Any]] = []
    for size, pick in zip(_SIZES, picks(study), strict=False):
        if cards and cards[-1]["number"] == pick.record.number:
            cards[-1]["size"] += f" and {size.lower()}"
            cards[-1]["limit"] = _limit(study, pick.limit)
        else:
            cards.append({"size": size, "limit": _limit(study, pick.limit), **_card(study, pick, found)})
    return cards


def _limit(study: Study, limit: float) -> str:
    """A limit of the study's cost in words."""
    cost = next(iter(units.shown([study.cost.name])), units.SHOWN[0])
    said = units.seconds(limit) if cost.unit == "s" else units.amount(limit, cost.unit)
    return f"{said} {cost.short.lower()}" if cost.unit else f"{said} parameters"


def _costs(study: Study) -> tuple[units.Cost, ...]:
    if not study.records or not isinstance(study.records[0], Imported):  # asked for every row: no pass over all
        return units.SHOWN
    return units.shown(measured(study.records[:50]))


def _card(study: Study, pick: Pick, found: Findings) -> dict[str, Any]:
    record, cheaper = pick.record, pick.cheaper
    interval = retest_interval(record)
    return {
        **_row(record, study),
        "chance": found.chance(record.number),
        "interval": spread_of(record),
        "seeds": interval.n if interval else 0,
        "facts": [(cost.short, cost_text(record, cost)) for cost in _costs(study)],
        "command": _command(study, record),
        "cheaper": _row(cheaper, study) if cheaper else None,
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


def _row(record: Record, study: Study, members: frozenset[int] | set[int] = frozenset()) -> dict[str, Any]:
    """A record as the tables show it: each cell with its text and what it sorts by."""
    shown = _costs(study)
    costs = [measure(record, cost.name) for cost in shown]
    return {
        "number": record.number,
        "label": record.label,
        "textbook": record.textbook,
        "state": "stopped early" if record.state == "pruned" else record.state,
        "member": record.number in members,
        "validation": (units.score(record.validation), _key(record.validation)),
        "test": (spread(retest_interval(record)), _key(record.test)),
        "costs": [(cost_text(record, cost), _key(value)) for cost, value in zip(shown, costs, strict=True)],
        "wall": (units.seconds(record.wall_s), _key(record.wall_s)),
        "design": json.dumps(record.design, ensure_ascii=False, default=str),
    }


def _key(value: float) -> str:
    """What a cell sorts by; empty cells go last."""
    return repr(float(value)) if math.isfinite(value) else ""


def _limits(study: Study) -> list[dict[str, Any]]:
    """The best design under each of several round limits of the study's cost."""
    axes = (study.quality, study.cost)
    _, values = finite(study.records, axes)
    if not len(values) or study.cost.direction != "minimize":
        return []
    limits = _steps(float(values[:, 1].min()), float(values[:, 1].max()))
    best = best_under(study.records, limits, quality=study.quality, cost=study.cost.name)
    rows: list[dict[str, Any]] = []
    for limit, record in zip(limits, best, strict=True):
        if record is not None:
            same = bool(rows) and rows[-1]["number"] == record.number
            rows.append({"limit": _limit(study, limit), "same": same, **_row(record, study)})
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += _flat(value, name + ".") if isinstance(value, Mapping) else [(name, str(value))]
    return rows
