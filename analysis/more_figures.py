"""Figures beside the front: fitted curves, tuning curves, importances, marginal means, layers by sites."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peftscape.analysis import units
from peftscape.analysis.figures import ACCENT, INK, QUIET, STYLES, layout
from peftscape.analysis.fit import Curve
from peftscape.analysis.heat import Heat
from peftscape.analysis.importance import Importance, Level
from peftscape.analysis.tuning import TuningCurve
from peftscape.spaces.record import Record

_BAND = "rgba(31,41,51,0.10)"


def curve_traces(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """The whole's curve with its band, dashed where it extrapolates, and each method's, hidden until asked for."""
    traces: list[dict[str, Any]] = []
    whole = curves.get("all methods")
    if whole:
        costs, points = whole.line()
        low, high = [p.low for p in points], [p.high for p in points]
        band = {"x": [*costs, *costs[::-1]], "y": [*high, *low[::-1]], "fill": "toself", "fillcolor": _BAND}
        quiet = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
        traces.append({**quiet, **band, "name": "fit's 95 % band, test scale", "line": {"width": 0}})
    colours = [INK, *(colour for colour, _ in STYLES)]
    for (name, curve), colour in zip(curves.items(), colours, strict=False):
        first = name == "all methods"
        costs, points = curve.line()
        line = {"color": colour, "width": 2 if first else 1.5, "dash": "dash"}
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"fit, {html.escape(name)}",
                "x": costs,
                "y": [p.value for p in points],
                "line": line,
                "visible": True if first else "legendonly",
                "hoverinfo": "skip",
            }
        )
    return traces


def tuning_figure(curves: Mapping[str, TuningCurve], metric: str) -> dict[str, Any]:
    """The expected best for so much training, with the whole's band."""
    data: list[dict[str, Any]] = []
    whole = curves.get("all methods")
    if whole:
        n = whole.work.tolist()
        band = {"x": [*n, *n[::-1]], "y": [*whole.high.tolist(), *whole.low.tolist()[::-1]], "fill": "toself"}
        quiet = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
        data.append({**quiet, **band, "fillcolor": _BAND, "line": {"width": 0}, "name": "95 % band"})
    colours = [INK, *(colour for colour, _ in STYLES)]
    for (name, curve), colour in zip(curves.items(), colours, strict=False):
        width = 2.2 if name == "all methods" else 1.4
        trace = {"type": "scatter", "mode": "lines", "name": html.escape(name), "x": curve.work.tolist()}
        data.append({**trace, "y": curve.expected.tolist(), "line": {"color": colour, "width": width}})
    stopped = any((curve.work < curve.trials).any() for curve in curves.values())
    made = layout("Whole trainings' worth of work" if stopped else "Trials", f"best {metric} to expect, validation")
    made["xaxis"] |= {"type": "log", "tickmode": "auto"}
    return {"data": data, "layout": {**made, "height": 420}}


def rung_figure(records: Sequence[Record], metric: str) -> dict[str, Any] | None:
    """Validation scores on the way, of trials that were stopped at a rung and of those that came to the end."""
    groups: dict[str, list[Record]] = {"to the end": [], "stopped at a rung": []}  # the second is drawn above
    for record in records:
        if record.rungs and record.state in ("pruned", "complete"):
            groups["to the end" if record.state == "complete" else "stopped at a rung"].append(record)
    if not groups["stopped at a rung"]:
        return None
    data = []
    for (name, group), (colour, symbol) in zip(groups.items(), (("#9cc4e4", "circle"), (ACCENT, "x")), strict=True):
        x: list[float | None] = []
        y: list[float | None] = []
        said: list[str] = []
        for record in group:
            points = [(rung.examples, rung.validation) for rung in record.rungs]
            points += [(record.curve[-1][0], record.validation)] if record.scores and record.curve else []
            x += [*(at for at, _ in points), None]  # None ends a line
            y += [*(score if math.isfinite(score) else None for _, score in points), None]
            said += [html.escape(f"#{record.number} {record.label}")] * (len(points) + 1)
        marker = {"color": colour, "symbol": symbol, "size": 7}
        trace = {"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "text": said}
        hover = "%{text}: %{y:.3f} after %{x:,} examples<extra></extra>"
        data.append({**trace, "marker": marker, "line": {"color": colour, "width": 1}, "hovertemplate": hover})
    made = layout("examples seen", f"{metric}, validation")
    made["xaxis"] |= {"tickmode": "auto"}
    return {"data": data, "layout": {**made, "height": 420}}


def importance_figure(found: Mapping[str, Sequence[Importance]]) -> dict[str, Any]:
    """Bars of fANOVA shares, a group a target."""
    knobs = list(dict.fromkeys(i.knob for items in found.values() for i in items[:8]))[:12][::-1]
    data = []
    for (target, items), (colour, _) in zip(found.items(), STYLES, strict=False):
        share = {i.knob: i.variance for i in items}
        values = [v if math.isfinite(v := share.get(k, 0.0)) else 0.0 for k in knobs]
        names = [html.escape(k) for k in knobs]
        bar = {"type": "bar", "orientation": "h", "name": html.escape(target), "y": names, "x": values}
        data.append({**bar, "marker": {"color": colour}, "hovertemplate": "%{y}: %{x:.2f}<extra></extra>"})
    made = layout("share of the variance that each explains (fANOVA)", "")
    made["xaxis"] |= {"type": "linear", "tickmode": "auto", "range": [0, 1]}
    made["yaxis"].pop("tickformat")
    made["legend"] |= {"y": 1.02, "yanchor": "bottom"}  # below, it would cover the title of so low a figure
    return {"data": data, "layout": {**made, "height": 160 + 46 * len(knobs), "barmode": "group"}}


def marginal_figures(found: Mapping[str, Sequence[Level]], metric: str) -> list[dict[str, Any]]:
    """A figure a knob: a number's mean scores as a curve with its 95 % band, a choice's as points with intervals."""
    return [
        (_curve if sum(level.at is not None for level in levels) > 2 else _choices)(knob, levels, metric, style)
        for (knob, levels), style in zip(found.items(), STYLES, strict=False)
    ]


def _curve(knob: str, levels: Sequence[Level], metric: str, style: tuple[str, str]) -> dict[str, Any]:
    colour, symbol = style
    shown = [level for level in levels if level.at is not None]
    at = [float(level.at or 0) for level in shown]
    mean = [level.interval.mean for level in shown]
    low, high = ([b if math.isfinite(b) else m for b, m in zip(ends, mean, strict=True)] for ends in _ends(shown))
    band = {"x": [*at, *at[::-1]], "y": [*high, *low[::-1]], "fill": "toself", "fillcolor": _BAND, "line": {"width": 0}}
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": at,
        "y": mean,
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "symbol": symbol, "size": 7},
        "text": [f"{html.escape(level.name)}, {level.interval.n} designs" for level in shown],
        "hovertemplate": "%{text}: %{y:.3f}<extra></extra>",
        "showlegend": False,
    }
    made = layout(html.escape(knob), f"mean {metric}, 95 %")
    if min(at) > 0 and max(at) / min(at) >= 10:
        ticks, names = units.log_ticks(min(at) / 1.2, max(at) * 1.2)
        names = [name if tick >= 1 else f"{tick:g}" for tick, name in zip(ticks, names, strict=True)]
        made["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": names}
    else:
        made["xaxis"] |= {"type": "linear", "tickmode": "auto"}
    # A band of two or three designs can be wider than all scores: it is cut, lest it flatten the curve.
    reach = max(1.5 * (max(mean) - min(mean)), 1e-3)
    bottom, top = max(min(low), min(mean) - reach), min(max(high), max(mean) + reach)
    made["yaxis"] |= {"range": [bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom)]}
    quiet = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    return {"data": [{**quiet, **band}, trace], "layout": {**made, "height": 320}}


def _choices(knob: str, levels: Sequence[Level], metric: str, style: tuple[str, str]) -> dict[str, Any]:
    colour, symbol = style
    common = sorted(levels, key=lambda level: -level.interval.n)[:8]
    shown = [level for level in levels if level in common]
    half = [level.interval.high - level.interval.mean for level in shown]
    means = [level.interval.mean for level in shown]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": means,
        "y": [html.escape(f"{level.name[:27]}…" if len(level.name) > 28 else level.name) for level in shown],
        "error_x": {
            "type": "data",
            "array": [h if math.isfinite(h) else 0.0 for h in half],
            "color": colour,
            "thickness": 1.4,
            "width": 4,
        },
        "marker": {"color": colour, "symbol": symbol, "size": 8},
        "text": [f"{html.escape(level.name)}, {level.interval.n} designs" for level in shown],
        "hovertemplate": "%{text}: %{x:.3f}<extra></extra>",
        "showlegend": False,
    }
    made = layout(f"mean {metric}, 95 %, by {html.escape(knob)}", "")
    gap = (max(means) - min(means)) * 0.35 or 0.05
    made["xaxis"] |= {"type": "linear", "tickmode": "auto", "nticks": 6, "range": [min(means) - gap, max(means) + gap]}
    made["yaxis"].pop("tickformat")
    made["yaxis"] |= {"autorange": "reversed", "type": "category"}
    return {"data": [trace], "layout": {**made, "height": 320}}


def _ends(levels: Sequence[Level]) -> tuple[list[float], list[float]]:
    return [level.interval.low for level in levels], [level.interval.high for level in levels]


def heat_figure(heat: Heat) -> dict[str, Any]:
    """Layers by sites: the gain over what is expected at the cost; cells with too few designs are empty."""
    gain = [[float(v) if math.isfinite(v) else None for v in row] for row in heat.gain.T]
    most = max(abs(v) for row in gain for v in row if v is not None) or 1e-9
    said = [
        [f"{int(n)} designs" + (f", ± {1.96 * e:.3f}" if math.isfinite(e) else "") for n, e in zip(ns, es, strict=True)]
        for ns, es in zip(heat.count.T, heat.error.T, strict=True)
    ]
    trace = {
        "type": "heatmap",
        "x": [f"layer {name}" if name != "all" else "all layers" for name in heat.layers],
        "y": [html.escape(site) for site in heat.sites],
        "z": gain,
        "text": said,
        "zmin": -most,
        "zmax": most,
        "colorscale": [[0, "#d55e00"], [0.5, "#ffffff"], [1, "#0072b2"]],
        "hovertemplate": "%{y}, %{x}: %{z:+.4f}, %{text}<extra></extra>",
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"title": {"text": "gain"}, "tickformat": "+.2~g", "outlinecolor": QUIET},
    }
    made = layout("", "")
    made["xaxis"] |= {"type": "category", "tickmode": "auto"}
    made["yaxis"] |= {"type": "category"}
    made["yaxis"].pop("tickformat")
    return {"data": [trace], "layout": {**made, "height": 140 + 34 * len(heat.sites)}}
