"""What designs cost as it was predicted before they were trained, against what was measured of them alone."""

import math
from collections.abc import Mapping
from typing import Any

from peftscape.analysis import units
from peftscape.analysis.study import Study
from peftscape.spaces.record import Record

Row = tuple[str, str, str, str, str]
"""Design, what, predicted, measured, error."""

PREDICTED = (
    "Each design trained alone for a few steps after the search, on texts of the length that costs are told for and "
    "without kept states. Peak memory: weights, what trains, moments and the most that a step has at once; on a "
    "processor what an operation takes inside itself is not seen. Seconds are predicted from FLOPs at the rate that "
    "the search reached with its lanes together, where kept states may spare it lower layers."
)

WHAT = (
    ("trainable", "Trained parameters", ""),
    ("adapter_bytes", "Adapter's file", "B"),
    ("peak_bytes", "Peak memory of a step", "B"),
    ("step_s", "Seconds a step", "s"),
)


def predicted_rows(study: Study) -> list[Row]:
    """A row a design and cost of those that the search measured alone (`Study.alone`), by number."""
    rows: list[Row] = []
    for record in study.records:
        found = study.alone.get(str(record.number))
        if not isinstance(found, Mapping) or record.costs is None:
            continue
        for name, title, unit in WHAT:
            told, seen = _predicted(name, record, found, study), _number(found.get(name))
            if math.isfinite(told) and seen > 0:
                label = f"#{record.number} {record.label}"
                rows.append((label, title, _amount(told, unit), _amount(seen, unit), f"{told / seen - 1:+.1%}"))
    return rows


def _predicted(name: str, record: Record, found: Mapping[str, Any], study: Study) -> float:
    """A cost as it was told; seconds from its FLOPs, at the rate at which the search itself trained."""
    assert record.costs is not None
    if name != "step_s":
        return float(getattr(record.costs, name))
    rate = search_rate(study)
    return record.costs.train_flops * _number(found.get("batch")) / rate if rate else math.nan


def search_rate(study: Study) -> float:
    """Training FLOPs a second that the search reached with its lanes together; 0 where it is not known.

    The seconds of trials that failed are not among those of training.
    """
    seconds = study.spent.get("training_s", 0.0)
    return training_work(study, failed=False) / seconds if seconds > 0 else 0.0


def training_work(study: Study, *, failed: bool) -> float:
    """Training FLOPs of all trials' lanes, those that `failed` too or not; a curve is that of the first of them."""
    seeds = int(dict(study.config.get("search") or {}).get("seeds", 1))
    trained = [r for r in study.records if r.costs and r.curve and (failed or r.state != "failed")]
    return float(sum(seeds * r.costs.train_flops * r.curve[-1][0] for r in trained if r.costs))


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.3g} s"
    return units.amount(value, unit) if unit else f"{value:,.0f}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
