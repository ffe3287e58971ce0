"""Compared runs as JSON, as a table in the terminal and as one HTML file."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscape.analysis import units
from peftscape.analysis.attainment import attainment
from peftscape.analysis.figures import STYLES, layout
from peftscape.analysis.front import Objective
from peftscape.analysis.measures import is_cost
from peftscape.analysis.noise import t_interval
from peftscape.analysis.page import render
from peftscape.analysis.runs import Compared, Group, Progress

if TYPE_CHECKING:
    from rich.table import Table


def compared_json(found: Compared) -> dict[str, Any]:
    """Everything there is, as JSON values; a number that is not known is null."""
    return {
        "objectives": [{"name": axis.name, "direction": axis.direction} for axis in found.objectives],
        "reference": dict(found.reference),
        "ideal": dict(found.ideal),
        "groups": [
            {
                "name": group.name,
                "runs": list(group.runs),
                "hypervolume": list(group.finals),
                "by_trial": _series(group.trials),
                "by_time_s": _series(group.time) if group.time else None,
                "spent": [dict(spent) for spent in group.spent],
            }
            for group in found.groups
        ],
        "tests": [
            {
                "a": a,
                "b": b,
                "difference": test.difference,
                "low": test.low,
                "high": test.high,
                "p": test.p,
                "p_corrected": test.corrected,
                "repeats_needed": test.needed,
                "attained_more_by_a": found.attained[a, b].most_a,
                "attained_more_by_b": found.attained[a, b].most_b,
                "attainment_p": found.attained[a, b].p,
            }
            for (a, b), test in found.tests.items()
        ],
        "notes": list(found.notes),
    }


def _series(progress: Progress) -> dict[str, list[float | None]]:
    rows = {"at": progress.at, "mean": progress.mean, "low": progress.low, "high": progress.high}
    return {name: [float(v) if math.isfinite(v) else None for v in values] for name, values in rows.items()}


def compared_tables(found: Compared) -> "list[Table | str]":
    """What the terminal shows: the groups, the tests between them, and what was taken for granted."""
    from rich.table import Table
    from rich.text import Text

    groups = Table(title="Hypervolume reached, a share of the box between reference and best", box=None)
    for head, side in (("group", "left"), ("runs", "right"), ("mean", "right"), ("95 %", "right"), ("trials", "right")):
        groups.add_column(head, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in _group_rows(found):
        groups.add_row(*(Text(cell) for cell in row))
    shown: list[Table | str] = [groups]
    if found.tests:
        tests = Table(title="Differences between groups", box=None)
        for head in ("a", "b", "a - b (95 %)", "p, corrected", "repeats needed", "attained more by a / b (p)"):
            tests.add_column(head, overflow="fold")
        for row in test_rows(found):
            tests.add_row(*(Text(cell) for cell in row))
        shown.append(tests)
    return [*shown, *said(found)]


def said(found: Compared) -> list[str]:
    """What was compared, in sentences."""
    corner = ", ".join(f"{axis.name} {_amount(found.reference[axis.name], axis)}" for axis in found.objectives)
    best = ", ".join(f"{axis.name} {_amount(found.ideal[axis.name], axis)}" for axis in found.objectives)
    lines = [f"Reference: {corner}; best seen: {best}; costs on a log axis."]
    if found.tests:
        lines.append(
            "p: permutation test of the difference of means, Holm-corrected. Repeats needed: runs a group that a true "
            "difference of this size takes to be found at 5 % with probability 0.8. Attained more: the largest share "
            "of runs by which one group reaches a point that the other does not."
        )
    return [*lines, *filter(None, map(_spent, found.groups)), *found.notes]


_PARTS = {
    "training_s": "training", "evaluation_s": "evaluation", "retest_s": "retests", "waiting_s": "waiting",
    "lost_s": "lost to failures",
}  # fmt: skip


def _spent(group: Group) -> str | None:
    """What a group's runs spent and on what, on average; None where one of them kept no account."""
    if not group.spent or not all(group.spent):
        return None

    def mean(name: str) -> str:
        return units.seconds(math.fsum(spent.get(name, 0.0) for spent in group.spent) / len(group.spent))

    parts = ", ".join(f"{words} {mean(name)}" for name, words in _PARTS.items())
    return f"Spent by {group.name}, a run: {mean('wall_s')}; of all its workers together {parts}."


def _amount(value: float, axis: Objective) -> str:
    return units.amount(value) if is_cost(axis.name) else units.score(value)


def _group_rows(found: Compared) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for group in found.groups:
        interval = t_interval(group.finals)
        bounds = f"{interval.low:.3f} to {interval.high:.3f}" if math.isfinite(interval.low) else "–"
        cells = (str(len(group.finals)), f"{interval.mean:.3f}", bounds, str(len(group.trials.at)))
        rows.append((group.name, *cells))
    return rows


def test_rows(found: Compared) -> list[tuple[str, ...]]:
    """A row a pair of groups."""
    rows: list[tuple[str, ...]] = []
    for (a, b), test in found.tests.items():
        gap = found.attained[a, b]
        rows.append(
            (
                a,
                b,
                f"{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f})",
                f"{test.corrected:.3g}",
                str(test.needed) if test.needed else "–",
                f"{gap.most_a:.0%} / {gap.most_b:.0%} ({gap.p:.2g})",
            )
        )
    return rows


def write_comparison(found: Compared, path: str | Path) -> Path:
    """Writes the comparison as one self-contained HTML file.

    Raises:
        OSError: if the file cannot be written.
    """
    figures = {"trials": _progress_figure([(g, g.trials) for g in found.groups], "Trials")}
    timed = [(g, g.time) for g in found.groups if g.time]
    if len(timed) == len(found.groups):
        figures["time"] = _progress_figure(timed, "Seconds since the first trial began")
    if len(found.objectives) == 2:
        figures["surfaces"] = _surface_figure(found)
    return render(
        "compare.html",
        path,
        figures=figures,
        title="Runs compared: " + " and ".join(axis.name for axis in found.objectives),
        groups=_group_rows(found),
        tests=test_rows(found),
        said=said(found),
        members=[(group.name, list(group.runs)) for group in found.groups],
        data=json.dumps(compared_json(found), allow_nan=False),
    )


def _progress_figure(rows: Sequence[tuple[Group, Progress]], title: str) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for i, (group, progress) in enumerate(rows):
        colour = STYLES[i % len(STYLES)][0]
        at = progress.at.tolist()
        if math.isfinite(float(progress.low[0])):
            low, high = (ends.clip(0, 1).tolist() for ends in (progress.low, progress.high))  # it is a share
            band = {"x": [*at, *at[::-1]], "y": [*high, *low[::-1]]}
            quiet = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False, "opacity": 0.2}
            data.append({**quiet, **band, "fill": "toself", "fillcolor": colour, "line": {"width": 0}})
        line = {"color": colour, "width": 2, "shape": "hv"}
        name = html.escape(f"{group.name}, {len(group.finals)} runs")
        data.append(
            {"type": "scatter", "mode": "lines", "name": name, "x": at, "y": progress.mean.tolist(), "line": line}
        )
    made = layout(title, "hypervolume, mean and 95 % band")
    made["xaxis"] |= {"type": "linear", "tickmode": "auto"}
    return {"data": data, "layout": {**made, "height": 440}}


def _surface_figure(found: Compared) -> dict[str, Any]:
    """The surface that half of each group's runs attained, in the objectives' scaled losses turned to qualities."""
    data: list[dict[str, Any]] = []
    for i, group in enumerate(found.groups):
        full = [points for points in group.points if len(points)]
        if not full:
            continue
        surface = attainment(group.points, ["minimize", "minimize"])
        if not len(surface):
            continue
        surface = surface[surface[:, 1].argsort()]
        line = {"color": STYLES[i % len(STYLES)][0], "width": 2, "shape": "hv"}
        x, y = (1 - surface[:, 1]).tolist(), (1 - surface[:, 0]).tolist()
        name = html.escape(group.name)
        data.append({"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": line})
    first, second = found.objectives
    made = layout(*(f"{axis.name}, reference 0 to best seen 1" for axis in (second, first)))
    made["xaxis"] |= {"type": "linear", "tickmode": "auto"}
    return {"data": data, "layout": {**made, "height": 440}}
