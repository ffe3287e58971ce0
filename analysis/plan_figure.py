"""Where the memory goes: one stacked bar a design, as plotly's JSON and as a page that works offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PARTS = (
    ("weights", "Backbone's weights", "#9aa5b1"),
    ("trained", "Trained values", "#0072b2"),
    ("gradients", "Gradients", "#56b4e9"),
    ("optimiser", "Optimiser", "#5b5ea6"),
    ("activations", "Activations of the backbone", "#e69f00"),
    ("adapters", "Activations of the methods", "#d55e00"),
    ("copies", "Copies of trained values", "#cc79a7"),
    ("held", "Caches and weights made anew", "#8a6d00"),
    ("logits", "Logits and their loss", "#009e73"),
    ("working", "Height of a layer's backward", "#c2410c"),
    ("step", "Temporaries of the optimiser", "#1f2933"),
)
"""(key of `Memory.parts`, title, colour) of the parts of a bar, from the bottom up; Okabe and Ito's colours."""


def memory_figure(plans: Sequence[Mapping[str, Any]], limit_bytes: int | None = None) -> dict[str, Any]:
    """Stacked bars of peak memory, one a plan (`Plan.json()`); `{"data", "layout"}`.

    Args:
        limit_bytes: drawn as a line, a device's memory.
    """
    shown = [plan for plan in plans if plan["memory"] is not None]
    split = [plan["memory"]["parts"] for plan in shown]
    labels = [str(plan["design"]) for plan in shown]
    data = [
        {
            "type": "bar", "name": title, "x": labels, "y": [part.get(key, 0) / 1e9 for part in split],
            "marker": {"color": colour}, "hovertemplate": f"%{{x}}<br>{title}: %{{y:.2f}} GB<extra></extra>",
        }
        for key, title, colour in PARTS
        if any(part.get(key) for part in split)
    ]  # fmt: skip
    layout: dict[str, Any] = {
        "barmode": "stack",
        "template": "plotly_white",
        "yaxis": {"title": {"text": "Peak memory in training, GB"}},
        "legend": {"traceorder": "reversed"},
        "title": {"text": f"{shown[0]['model']}: where the memory goes" if shown else "nothing to show"},
    }
    if limit_bytes is not None:
        layout["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit_bytes / 1e9, "y1": limit_bytes / 1e9,
             "line": {"dash": "dot", "color": "#1f2933"}}
        ]  # fmt: skip
    return {"data": data, "layout": layout}


def memory_page(figure: Mapping[str, Any]) -> str:
    """A self-contained HTML page of the figure, plotly's script included."""
    import plotly.io

    page: str = plotly.io.to_html(dict(figure), include_plotlyjs=True, full_html=True)
    return page
