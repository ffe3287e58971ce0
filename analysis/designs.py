"""Designs as a table: the methods, knobs, sites and layers that records differ in, for statistics over them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peftscape.analysis.measures import Imported
from peftscape.spaces.record import Record

Value = str | float
_NONE = "none"


def parts(design: Mapping[str, Any]) -> dict[str, dict[str, Value]]:
    """A design as {method: knobs} with its training under "training"; a method twice there has a number."""
    found: dict[str, dict[str, Value]] = {}
    for placement in design.get("placements", ()):
        if isinstance(placement, Mapping):
            name = str(placement.get("method"))
            while name in found:
                name += "'"
            found[name] = {str(k): _value(v) for k, v in _flat(placement) if k != "method"}
    training = design.get("training")
    if isinstance(training, Mapping) and training:
        found["training"] = {str(k): _value(v) for k, v in _flat(training)}
    return found


def features(record: Record) -> dict[str, Value]:
    """What every design has: its methods, sites, layers and training knobs, and how many parameters."""
    own = parts(record.design)
    training = own.pop("training", {})
    sites = sorted({s for p in own.values() for s in str(p.get("sites", p.get("target_modules", ""))).split("+") if s})
    layers = sorted({str(p["layers"]) for p in own.values() if "layers" in p})
    found: dict[str, Value] = {"methods": "+".join(sorted(own)) or _NONE}
    found |= {"sites": "+".join(sites)} if sites else {}
    found |= {"layers": " / ".join(layers)} if layers else {}
    found |= {f"training.{key}": value for key, value in training.items()}
    if record.costs is not None:
        found["adapter parameters"] = float(record.costs.adapter)
    elif isinstance(record, Imported) and "trainable" in record.columns:
        found["trained parameters"] = record.columns["trainable"][0]
    return found


def knobs(record: Record, method: str) -> dict[str, Value]:
    """One method's knobs in a design, with the training's; empty where the design lacks it."""
    own = parts(record.design)
    if method not in own:
        return {}
    training = {f"training.{key}": value for key, value in own.get("training", {}).items()}
    return {**{f"{method}.{key}": value for key, value in own[method].items()}, **training}


def layer_list(value: Any, count: int) -> tuple[int, ...]:
    """The layers that a placement's `layers` names: "all", "0-5", "1,3" or a list."""
    if isinstance(value, (list, tuple)):
        return tuple(int(v) for v in value)
    text = str(value)
    if text == "all":
        return tuple(range(count))
    found: list[int] = []
    for part in text.split(","):
        if match := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part):
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def layer_count(records: Sequence[Record]) -> int:
    """One more than the largest layer that any design names; 1 where all say "all"."""
    named = [
        layer
        for record in records
        for placement in record.design.get("placements", ())
        if isinstance(placement, Mapping)
        for layer in layer_list(placement.get("layers", ()), 0)
    ]
    return max(named, default=0) + 1


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """A configuration as rows of dotted names and texts."""
    return {key: json.dumps(value).strip('"') for key, value in _flat(config)}


def is_number(values: Sequence[Value]) -> bool:
    """Whether a knob's values are numbers throughout."""
    return all(isinstance(v, float) and math.isfinite(v) for v in values)


def _flat(values: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def _value(value: Any) -> Value:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, (list, tuple)):
        plain = all(isinstance(v, (str, int)) for v in value)
        joiner = "+" if any(isinstance(v, str) for v in value) else ","
        return joiner.join(map(str, value)) if plain else json.dumps(value)
    return value if isinstance(value, str) else json.dumps(value)
