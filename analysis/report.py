"""The report: one HTML file that answers first, then shows, then says how to repeat it."""

import json
import math
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from peftscape.analysis import units
from peftscape.analysis.figures import front_figure, hovers, spread_of
from peftscape.analysis.front import Objective, best_under, finite, front, knee
from peftscape.analysis.noise import retest_interval
from peftscape.analysis.notes import notes, spent
from peftscape.analysis.picks import Pick, picks
from peftscape.analysis.sources import Study
from peftscape.analysis.table import cost_text, spread
from peftscape.spaces.record import Record

_SIZES = ("Small", "Medium", "Large")


def write_report(study: Study, path: str | Path) -> Path:
    """Writes the study as one self-contained HTML file, which makes no request to anywhere.

    All text from records, configuration and environment is escaped. The file holds plotly.js once (about
    5 MB).

    Raises:
        OSError: if the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    env = Environment(
        loader=PackageLoader("peftscape.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = env.get_template("report.html").render(
        **_contents(study),
        plotly=Markup(get_plotlyjs()),  # plotly's own code; nothing of a record is in it
        figures=Markup(_script_json(_figures(study))),
        hovers=Markup(_script_json(hovers(study))),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved, so that an interrupted report never replaces a whole one.
    beside = target.with_name(target.name + ".part")
    beside.write_text(text, encoding="utf-8")
    return beside.replace(target)


def _figures(study: Study) -> list[dict[str, Any]]:
    """A figure for each cost that some trial with a score has."""
    recommended = picks(study)
    figures = []
    for cost in units.SHOWN:
        figure = front_figure(study, cost, recommended)
        if any(trace["x"] for trace in figure["data"]):
            figures.append({"name": cost.short, **figure})
    return figures


def _contents(study: Study) -> dict[str, Any]:
    """Everything that the template shows, as text and rows."""
    records = study.records
    states = {state: [r for r in records if r.state == state] for state in ("complete", "pruned", "failed", "running")}
    members = front(records, (study.quality, Objective("trainable", "minimize")))
    bend = knee(members, study.quality, "trainable")
    return {
        "title": study.name,
        "subtitle": _subtitle(study),
        "metric": study.quality.name,
        "counts": {state: len(found) for state, found in states.items()},
        "total": len(records),
        "cards": _cards(study),
        "knee": _row(bend) if bend else None,
        "members": len(members),
        "heads": [cost.short for cost in units.SHOWN],
        "limits": _limits(study),
        "rows": [_row(record, {member.number for member in members}) for record in records],
        "failed": states["failed"],
        "spent": spent(study),
        "notes": [*notes(study), *study.notes],
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


def _cards(study: Study) -> list[dict[str, Any]]:
    """One card a size; sizes whose best design is the same share a card."""
    cards: list[dict[str, Any]] = []
    for size, pick in zip(_SIZES, picks(study), strict=False):
        if cards and cards[-1]["number"] == pick.record.number:
            cards[-1]["size"] += f" and {size.lower()}"
            cards[-1]["limit"] = units.amount(pick.limit)
        else:
            cards.append({"size": size, "limit": units.amount(pick.limit), **_card(study, pick)})
    return cards


def _card(study: Study, pick: Pick) -> dict[str, Any]:
    record, cheaper = pick.record, pick.cheaper
    run = shlex.quote(study.source)
    interval = retest_interval(record)
    return {
        **_row(record),
        "interval": spread_of(record),
        "seeds": interval.n if interval else 0,
        "facts": [(cost.short, cost_text(record, cost)) for cost in units.SHOWN],
        "command": f"peftscape export {run} --trial {record.number} adapter-{record.number}",
        "cheaper": _row(cheaper) if cheaper else None,
    }


def _row(record: Record, members: frozenset[int] | set[int] = frozenset()) -> dict[str, Any]:
    """A record as the tables show it: each cell with its text and what it sorts by."""
    costs = [math.nan if record.costs is None else getattr(record.costs, cost.name) for cost in units.SHOWN]
    return {
        "number": record.number,
        "label": record.label,
        "textbook": record.textbook,
        "state": "stopped early" if record.state == "pruned" else record.state,
        "member": record.number in members,
        "validation": (units.score(record.validation), _key(record.validation)),
        "test": (spread(retest_interval(record)), _key(record.test)),
        "costs": [(cost_text(record, cost), _key(value)) for cost, value in zip(units.SHOWN, costs, strict=True)],
        "wall": (units.seconds(record.wall_s), _key(record.wall_s)),
        "design": json.dumps(record.design, ensure_ascii=False, default=str),
    }


def _key(value: float) -> str:
    """What a cell sorts by; empty cells go last."""
    return repr(float(value)) if math.isfinite(value) else ""


def _limits(study: Study) -> list[dict[str, Any]]:
    """The best design under each of several round limits of trained parameters."""
    axes = (study.quality, Objective("trainable", "minimize"))
    _, values = finite(study.records, axes)
    if not len(values):
        return []
    limits = units.round_limits(float(values[:, 1].min()), float(values[:, 1].max()))
    best = best_under(study.records, limits, quality=study.quality)
    rows: list[dict[str, Any]] = []
    for limit, record in zip(limits, best, strict=True):
        if record is not None:
            same = bool(rows) and rows[-1]["number"] == record.number
            rows.append({"limit": units.amount(limit), "same": same, **_row(record)})
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += _flat(value, name + ".") if isinstance(value, Mapping) else [(name, str(value))]
    return rows


def _script_json(value: Any) -> str:
    """JSON that is safe inside <script>: no `<` is left, so that no text can close the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
