"""What a study's results depend on beyond its configuration: model, data, space and libraries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.search.environment import versions
from peftscape.search.fingerprint import describe

if TYPE_CHECKING:
    from peftscape.search.session import Session
    from peftscape.spaces.space import Space

# Whose next major version may train or suggest otherwise.
LIBRARIES = ("peftscape", "torch", "transformers", "optuna")


def identity(session: Session, space: Space) -> dict[str, Any]:
    """Plain values, equal for sessions whose results may stand side by side."""
    model = describe(session.backbone, session.config.head)
    task = session.task.describe()
    return {
        "model": {"weights": model["weights"], "config": model["config"], "dtype": model["dtype"]},
        "data": {name: task[name] for name in ("fingerprint", "rows", "labels", "kind", "metric")},
        "space": hashlib.sha256(repr((space.slots, space.layers, space.training)).encode()).hexdigest(),
        "versions": {name: found for name, found in versions().items() if name in LIBRARIES},
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs so that results must not be mixed, one line each."""
    found = [
        f"model.{key}: was {was!r:.60}, is {new['model']['config'][key]!r:.60}"
        for key, was in old["model"]["config"].items()
        if key in new["model"]["config"] and new["model"]["config"][key] != was
    ]
    if old["model"]["dtype"] != new["model"]["dtype"]:
        found.append(f"model.dtype: was {old['model']['dtype']}, is {new['model']['dtype']}")
    if not found and old["model"]["weights"] != new["model"]["weights"]:
        found.append("model: the weights are others than those the study was begun with")
    data = [
        f"data.{key}: was {was!r:.60}, is {new['data'][key]!r:.60}"
        for key, was in old["data"].items()
        if key != "fingerprint" and new["data"].get(key) != was
    ]
    if not data and old["data"]["fingerprint"] != new["data"]["fingerprint"]:
        data.append("data: texts or labels are others than those the study was begun with")
    found += data
    for name, was in old["versions"].items():
        now = new["versions"].get(name)
        if now is not None and _major(now) != _major(was):
            found.append(f"{name}: was {was}, is {now}")
    # Another version may write the same designs otherwise; within one, other words are another space.
    same = old["versions"].get("peftscape") == new["versions"].get("peftscape")
    if same and old["space"] != new["space"]:
        found.append("space: its name is the same, its designs are others")
    return found


def _major(number: str) -> tuple[str, ...]:
    """What must be equal: the first number, and of versions before 1.0 the second too."""
    parts = tuple(number.split("."))
    return parts[:2] if parts[0] == "0" else parts[:1]
