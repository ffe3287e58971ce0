"""Seals: a digest kept beside JSON values, by which a change or damage on the disk shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

SEAL = "seal"
"""The user attribute of a trial that holds the seal of its record."""


def seal(record: Mapping[str, Any], values: Sequence[float] | None, params: Mapping[str, Any]) -> str:
    """SHA-256 of a trial's record, the values it was told with, and its parameters."""
    told = [record, list(values) if values is not None else None, dict(params)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def broken(trial: Any) -> str | None:
    """What is wrong with the seal of an ended Optuna trial; None if it is whole, or of a time before seals."""
    attrs = trial.user_attrs
    if SEAL not in attrs or "record" not in attrs or not trial.state.is_finished():
        return None
    if seal(attrs["record"], trial.values, trial.params) != attrs[SEAL]:
        return "its seal is not that of its record, values and parameters: the study was changed or damaged"
    return None
