"""Figures beside the front: fitted curves, tuning curves, importances, marginal means, layers by sites."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peftscape.analysis.figures import _STYLES, INK, QUIET, _layout
from peftscape.analysis.fit import Curve
from peftscape.analysis.importance import Heat, Importance, Level
from peftscape.analysis.tuning import TuningCurve

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
    colours = [INK, *(colour for colour, _ in _STYLES)]
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
    """The expected best after n trials, with the whole's band."""
    data: list[dict[str, Any]] = []
    whole = curves.get("all methods")
    if whole:
        n = whole.trials.tolist()
        band = {"x": [*n, *n[::-1]], "y": [*whole.high.tolist(), *whole.low.tolist()[::-1]], "fill": "toself"}
        quiet = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
        data.append({**quiet, **band, "fillcolor": _BAND, "line": {"width": 0}, "name": "95 % band"})
    colours = [INK, *(colour for colour, _ in _STYLES)]
    for (name, curve), colour in zip(curves.items(), colours, strict=False):
        width = 2.2 if name == "all methods" else 1.4
        trace = {"type": "scatter", "mode": "lines", "name": html.escape(name), "x": curve.trials.tolist()}
        data.append({**trace, "y": curve.expected.tolist(), "line": {"color": colour, "width": width}})
    layout = _layout("Trials", f"best {metric} to expect, validation")
    layout["xaxis"] |= {"type": "log", "tickmode": "auto"}
    return {"data": data, "layout": {**layout, "height": 420}}


def importance_figure(found: Mapping[str, Sequence[Importance]]) -> dict[str, Any]:
    """Bars of fANOVA shares, a group a target."""
    knobs = list(dict.fromkeys(i.knob for items in found.values() for i in items[:8]))[:12][::-1]
    data = []
    for (target, items), (colour, _) in zip(found.items(), _STYLES, strict=False):
        share = {i.knob: i.variance for i in items}
        values = [v if math.isfinite(v := share.get(k, 0.0)) else 0.0 for k in knobs]
        names = [html.escape(k) for k in knobs]
        bar = {"type": "bar", "orientation": "h", "name": html.escape(target), "y": names, "x": values}
        data.append({**bar, "marker": {"color": colour}, "hovertemplate": "%{y}: %{x:.2f}<extra></extra>"})
    layout = _layout("share of the variance that each explains (fANOVA)", "")
    layout["xaxis"] |= {"type": "linear", "tickmode": "auto", "range": [0, 1]}
    layout["yaxis"].pop("tickformat")
    layout["legend"] |= {"y": 1.02, "yanchor": "bottom"}  # below, it would cover the title of so low a figure
    return {"data": data, "layout": {**layout, "height": 160 + 46 * len(knobs), "barmode": "group"}}


def marginal_figure(found: Mapping[str, Sequence[Level]], metric: str) -> dict[str, Any]:
    """Mean scores at each level of the knobs that matter, with 95 % intervals."""
    data: list[dict[str, Any]] = []
    for (knob, levels), (colour, symbol) in zip(found.items(), _STYLES, strict=False):
        shown = sorted(levels, key=lambda level: -level.interval.n)[:8]
        shown = [level for level in levels if level in shown]
        half = [level.interval.high - level.interval.mean for level in shown]
        half = [h if math.isfinite(h) else 0.0 for h in half]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": html.escape(knob),
                "y": [html.escape(f"{knob}: {level.name}"[:60]) for level in shown],
                "x": [level.interval.mean for level in shown],
                "error_x": {"type": "data", "array": half, "color": colour, "thickness": 1.4, "width": 4},
                "marker": {"color": colour, "symbol": symbol, "size": 8},
                "text": [f"{level.interval.n} designs" for level in shown],
                "hovertemplate": "%{y}: %{x:.3f}, %{text}<extra></extra>",
            }
        )
    rows = sum(len(trace["y"]) for trace in data)
    means = [x for trace in data for x in trace["x"]]
    layout = _layout(f"mean {metric} of the designs at that level, 95 % t-interval", "")
    gap = (max(means) - min(means)) * 0.35 or 0.05 if means else 0.05
    layout["xaxis"] |= {"type": "linear", "tickmode": "auto"}
    layout["xaxis"] |= {"range": [min(means) - gap, max(means) + gap]} if means else {}
    layout["yaxis"].pop("tickformat")
    layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
    return {"data": data, "layout": {**layout, "height": 160 + 30 * rows}}


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
        "hovertemplate": "%{y}, %{x}: %{z:+.3f}, %{text}<extra></extra>",
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"title": {"text": "gain"}, "tickformat": "+.3f", "outlinecolor": QUIET},
    }
    layout = _layout("", "")
    layout["xaxis"] |= {"type": "category", "tickmode": "auto"}
    layout["yaxis"] |= {"type": "category"}
    layout["yaxis"].pop("tickformat")
    return {"data": [trace], "layout": {**layout, "height": 140 + 34 * len(heat.sites)}}
