"""The report: one HTML file that answers first, then shows, then says how to repeat it."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from peftscape.analysis import units
from peftscape.analysis.figures import front_figure, hovers
from peftscape.analysis.findings import Findings, find
from peftscape.analysis.front import front, knee
from peftscape.analysis.measures import measured
from peftscape.analysis.more_figures import (
    curve_traces,
    heat_figure,
    importance_figure,
    marginal_figures,
    rung_figure,
    tuning_figure,
)
from peftscape.analysis.notes import failed_runs, spent
from peftscape.analysis.page import render
from peftscape.analysis.picks import picks
from peftscape.analysis.predicted import PREDICTED, predicted_rows
from peftscape.analysis.report_findings import findings_rows
from peftscape.analysis.report_rows import cards, costs_of, limits_of, row
from peftscape.analysis.states import counted
from peftscape.analysis.study import Study


def write_report(study: Study, path: str | Path) -> Path:
    """Writes the study as one self-contained HTML file, which makes no request to anywhere.

    All text from records, configuration and environment is escaped. The file holds plotly.js once (about
    5 MB).

    Raises:
        OSError: if the file cannot be written.
    """
    found = find(study)
    extras = _extras(study, found)
    return render(
        "report.html",
        path,
        **_contents(study, found),
        extra=sorted(extras),
        extras=extras,
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
        "rungs": rung_figure(study.records, metric),
    }
    return {name: figure for name, figure in figures.items() if figure}


def _contents(study: Study, found: Findings) -> dict[str, Any]:
    """Everything that the template shows, as text and rows."""
    records = study.records
    members = front(records, (study.quality, study.cost))
    inside = {member.number for member in members}
    bend = knee(members, study.quality, study.cost.name)
    cost = next(iter(units.shown([study.cost.name])), units.SHOWN[0])
    return {
        **findings_rows(study, found),
        "cost_words": cost.title.split(" (")[0].lower(),
        "imported": study.imported,
        "title": study.name,
        "subtitle": _subtitle(study),
        "metric": study.quality.name,
        "counted": counted(records),
        "scored": any(record.scores or record.rungs for record in records),
        "total": len(records),
        "cards": cards(study, found),
        "knee": row(bend, study) if bend else None,
        "members": len(members),
        "heads": [cost.short for cost in costs_of(study)],
        "limits": limits_of(study),
        "rows": [row(record, study, inside) for record in records],
        "failed": failed_runs(study),
        "spent": spent(study),
        "predicted": predicted_rows(study),
        "predicted_note": PREDICTED,
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
        if isinstance(value, Mapping):
            value = next((value[k] for k in ("name", "source", "path", "id") if isinstance(value.get(k), str)), None)
        if isinstance(value, str):
            words.append(value)
    return " on ".join(words)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += _flat(value, name + ".") if isinstance(value, Mapping) else [(name, str(value))]
    return rows
