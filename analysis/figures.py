"""Figures: the front against a cost, as plotly's JSON, with all trials behind it."""

import html
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from peftscape.analysis import units
from peftscape.analysis.front import Objective, front
from peftscape.analysis.measures import Imported, measured
from peftscape.analysis.noise import is_share, retest_interval, validation_interval
from peftscape.analysis.picks import Pick
from peftscape.analysis.states import last_score, state_of
from peftscape.analysis.study import Study
from peftscape.analysis.table import cost_text, spread
from peftscape.spaces.record import Record

INK, QUIET, ACCENT = "#1f2933", "#9aa5b1", "#c2410c"

# Okabe and Ito's colours, told apart by colour-blind readers, and a symbol each for those who print in grey.
STYLES = (
    ("#0072b2", "circle"),
    ("#e69f00", "square"),
    ("#009e73", "triangle-up"),
    ("#cc79a7", "diamond"),
    ("#56b4e9", "triangle-down"),
    ("#d55e00", "pentagon"),
    ("#8a6d00", "hexagon"),
    ("#5b5ea6", "star"),
)


def front_figure(
    study: Study,
    cost: units.Cost,
    recommended: Sequence[Pick] = (),
    fits: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Quality against one cost on a log axis: all trials, the front, its retests; `{"data", "layout"}`.

    The front is formed anew for this cost, from validation. A trial of zero cost stands left of a dotted
    line, since a log axis has no zero. `customdata` holds trial numbers, for which `hovers` has the text.
    """
    axes = (study.quality, Objective(cost.name, "minimize"))
    placed = [
        record
        for record in study.records
        if record.metric == study.quality.name
        and math.isfinite(axes[1].value(record))
        and math.isfinite(last_score(record))
    ]
    members = front(study.records, axes) if placed else ()
    positive = [value for record in placed if (value := axes[1].value(record)) > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
    has_zero = len(positive) < len(placed)
    pad = max(math.log10(high / low) * 0.06, 1e-6 if high > low else 0.1)
    zero = 10 ** (math.log10(low) - 3 * pad)

    def x(record: Record) -> float:
        return axes[1].value(record) or zero

    start, end = (zero if has_zero else low) * 10 ** (-pad * 1.2), high * 10 ** (pad * 1.2)
    values, labels = units.log_ticks(low * 10**-pad, high * 10**pad)
    shapes = []
    if has_zero:
        values, labels = [zero, *values], ["0", *labels]
        edge = math.sqrt(zero * low)
        line = {"color": QUIET, "dash": "dot", "width": 1}
        shapes = [{"type": "line", "xref": "x", "yref": "paper", "x0": edge, "x1": edge, "y0": 0, "y1": 1}]
        shapes[0]["line"] = line
    data = [*map(dict, fits), *_trials(placed, members, x), *_front(members, axes[0], x, end), *_retests(members, x)]
    unit = f" ({cost.unit})" if cost.unit else ""
    made = layout(f"{cost.title}{unit}", study.quality.name + ("" if study.imported else ", validation"))
    made["xaxis"] |= {"tickvals": values, "ticktext": labels, "range": [math.log10(start), math.log10(end)]}
    made["shapes"] = shapes
    made["annotations"] = _annotations(recommended, axes, x)
    band = _range(members, placed)
    if band:
        made["yaxis"]["range"] = band
    return {"data": data, "layout": made}


def hovers(study: Study) -> dict[int, str]:
    """What each trial was, for plotly's hover: lines of its small HTML, with all text escaped.

    In a study of more than a thousand trials the design's knobs are left out for all but the front's members
    and the retested: they would be half of the file, and the table of all trials has them.
    """
    chosen = {r.number for r in front(study.records, study.objectives)} if study.objectives else set()
    few = len(study.records) <= 1000
    return {r.number: _hover(r, few or r.number in chosen or bool(r.retests)) for r in study.records}


def family(record: Record) -> str:
    """The method of a design with one, "combined" for several, "head only" for none."""
    placements = record.design.get("placements", ())
    methods = {str(p.get("method")) for p in placements if isinstance(p, Mapping)}
    if len(methods) > 1:
        return "combined"
    return methods.pop().replace("_", " ") if methods else "head only" if record.design else "unknown"


def _trials(placed: Sequence[Record], members: Sequence[Record], x: Any) -> list[dict[str, Any]]:
    """A trace for each method's complete trials, the most frequent first, and one for those stopped early."""
    groups: dict[str, list[Record]] = {}
    for record in placed:
        if record.state == "complete":
            groups.setdefault(family(record), []).append(record)
    ranked = sorted(groups, key=lambda name: (-len(groups[name]), name))
    if len(ranked) > len(STYLES):
        rest = [record for name in ranked[len(STYLES) - 1 :] for record in groups[name]]
        ranked = ranked[: len(STYLES) - 1]
        groups |= {"other methods": rest}
        ranked.append("other methods")
    size = 8 if len(placed) <= 300 else 5
    inside = {record.number for record in members}
    traces = []
    early = [record for record in placed if record.state != "complete"]
    if early:
        marker = {"color": QUIET, "symbol": "x-thin", "size": 6, "line": {"color": QUIET, "width": 1.2}}
        traces.append(_points(early, "stopped early, score at the last rung", x, marker))
    for name, (color, symbol) in zip(ranked, STYLES, strict=False):
        opacity = [1.0 if record.number in inside else 0.45 for record in groups[name]]
        marker = {"color": color, "symbol": symbol, "size": size, "opacity": opacity, "line": {"width": 0}}
        traces.append(_points(groups[name], html.escape(name), x, marker))
    return traces


def _points(records: Sequence[Record], name: str, x: Any, marker: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x(record) for record in records],
        "y": [last_score(record) for record in records],
        "customdata": [record.number for record in records],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": dict(marker),
    }


def _front(members: Sequence[Record], quality: Objective, x: Any, end: float) -> list[dict[str, Any]]:
    """The front as steps (the best to be had at each cost), with its members ringed and their intervals."""
    if not members:
        return []
    intervals = [validation_interval(record) for record in members]
    xs, ys = [x(record) for record in members], [record.validation for record in members]
    steps = {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [*xs, end],
        "y": [*ys, ys[-1]],
        "line": {"shape": "hv", "color": INK, "width": 1.8},
        "hoverinfo": "skip",
    }
    ring = {"color": "rgba(255,255,255,0)", "size": 12, "line": {"color": INK, "width": 1.8}}
    rings = _points(members, "front members, 95 % interval", x, ring)
    rings["error_y"] = {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.mean if i else 0 for i in intervals],
        "arrayminus": [i.mean - i.low if i else 0 for i in intervals],
        "color": "rgba(31,41,51,0.35)",
        "thickness": 1.2,
        "width": 3,
    }
    return [steps, rings]


def _retests(members: Sequence[Record], x: Any) -> list[dict[str, Any]]:
    """Test means of the retested members with their t-intervals."""
    found = [(record, interval) for record in members if (interval := retest_interval(record))]
    if not found:
        return []
    trace = _points([record for record, _ in found], "test mean of the retests, 95 % t-interval", x, {})
    trace["y"] = [interval.mean for _, interval in found]
    trace["marker"] = {"color": ACCENT, "symbol": "diamond", "size": 8}
    halves = [interval.high - interval.mean for _, interval in found]
    # An interval without bounds (one seed) is drawn as none.
    halves = [half if math.isfinite(half) else 0 for half in halves]
    trace["error_y"] = {"type": "data", "array": halves, "color": ACCENT, "thickness": 1.6, "width": 5}
    return [trace]


def _annotations(recommended: Sequence[Pick], axes: Sequence[Objective], x: Any) -> list[dict[str, Any]]:
    """The recommended designs' numbers, each once."""
    seen: dict[int, dict[str, Any]] = {}
    for pick in recommended:
        if pick.record.number in seen or not math.isfinite(axes[1].value(pick.record)):
            continue
        seen[pick.record.number] = {
            "x": math.log10(x(pick.record)),
            "y": pick.record.validation,
            "text": f"<b>#{pick.record.number}</b>",
            "showarrow": True,
            "arrowhead": 0,
            "arrowwidth": 1,
            "arrowcolor": INK,
            "ax": -26,  # to the left of a member of the front, on the better side, there is no trial
            "ay": -24 if axes[0].direction == "maximize" else 24,
            "standoff": 7,
            "bgcolor": "rgba(255,255,255,0.85)",
            "font": {"size": 12, "color": INK},
        }
    return list(seen.values())


def _range(members: Sequence[Record], placed: Sequence[Record]) -> list[float] | None:
    """The quality axis: the front and the middle nine tenths of the trials, lest one bad trial squeeze it."""
    if not members:
        return None
    ends = [record.validation for record in members]
    for record in members:
        for interval in (validation_interval(record), retest_interval(record)):
            ends += [v for v in (interval.low, interval.high) if math.isfinite(v)] if interval else []
    if all(map(is_share, members)):  # a t-interval of few seeds may be wider than all that can be
        ends = [min(max(v, 0.0), 1.0) for v in ends]
    ordered = sorted(map(last_score, placed))
    cut = len(ordered) // 20
    low, high = min(*ends, ordered[cut]), max(*ends, ordered[-1 - cut])
    margin = (high - low) * 0.06 or 0.05
    # Room for the recommended designs' numbers, which stand below where less is better.
    return [low - margin * (1 if members[0].direction == "maximize" else 2), high + margin]


def layout(x_title: str, y_title: str) -> dict[str, Any]:
    axis = {
        "gridcolor": "#e4e7eb",
        "linecolor": QUIET,
        "showline": True,
        "zeroline": False,
        "automargin": True,
    }
    return {
        "xaxis": {**axis, "type": "log", "title": {"text": x_title, "standoff": 12}, "tickmode": "array"},
        "yaxis": {**axis, "title": {"text": html.escape(y_title), "standoff": 8}, "tickformat": ".3~f"},
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "font": {"size": 12}},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 56, "r": 16, "t": 16, "b": 40},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "#fff", "bordercolor": INK, "font": {"color": INK}},
        "height": 560,
    }


def _hover(record: Record, knobs: bool) -> str:
    def lines(text: str, most: int = 3) -> list[str]:
        wrapped = textwrap.wrap(text, 64, break_long_words=True)
        return [*wrapped[:most], *(["…"] if len(wrapped) > most else [])]

    state = state_of(record)
    head = f"#{record.number} {record.title}"
    where = "" if isinstance(record, Imported) else " in validation"
    body = [f"{state}; {record.metric}{where} {spread_of(record)}"]
    if interval := retest_interval(record):
        body.append(f"test {spread(interval)}, {interval.n} seed{'s' if interval.n > 1 else ''}")
    body += [f"{cost.short.lower()} {cost_text(record, cost)}" for cost in units.shown(measured([record]))]
    for placement in record.design.get("placements", ()) if knobs else ():
        body += lines(_words(placement))
    if knobs and (training := record.design.get("training")):
        body += lines("training " + _words(training))
    escaped = [html.escape(line) for line in body[:18]]
    return "<br>".join(["<b>" + "<br>".join(map(html.escape, lines(head))) + "</b>", *escaped])


def spread_of(record: Record) -> str:
    """A record's validation score with the interval that its number of examples leaves."""
    interval = validation_interval(record)
    if interval is None:
        return units.score(last_score(record))
    return f"{units.score(interval.mean)} ({units.score(interval.low)} to {units.score(interval.high)})"


def _words(value: Any) -> str:
    """A part of a design as `key value` pairs."""
    if not isinstance(value, Mapping):
        return json.dumps(value)
    shown = {key: v if isinstance(v, str) else json.dumps(v).replace('"', "") for key, v in value.items()}
    return ", ".join(f"{key} {v}" if key != "method" else v for key, v in shown.items())
