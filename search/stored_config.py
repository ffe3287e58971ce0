"""The configuration that a study keeps, and whether a search with another one may go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peftscape.search.config_file import config_from_json

if TYPE_CHECKING:
    from peftscape.search.config import SearchConfig


def plain(config: SearchConfig) -> dict[str, Any]:
    """A configuration as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return found


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two plain configurations that has to be equal, one line each."""
    return _differences(_comparable(old), _comparable(new))


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be equal: not the budget, nor how steps are run; what is not set is its default.

    How steps are run changes no result beyond rounding, but it does change peak bytes.
    """
    whole = plain(config_from_json(config))
    engine = ["step_limit", "memory_limit", "cuda_graphs"]
    if "peak_bytes" not in whole["search"]["objectives"]:
        engine += ["gradient_accumulation_steps", "gradient_checkpointing"]
    for key in engine:
        del whole["search"][key]
    del whole["budget"]
    return whole


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{at}.{k}" if at else k)]
    return [] if old == new else [f"{at}: was {old!r}, is {new!r}"]
