"""Optuna's TPE, reading a study's trials once for each that it suggests, not once for each group of its knobs.

`constant_liar` makes TPE read all trials anew for every group: of the preset `unified` that is two dozen times a trial,
and half of the time that asking takes on a database. Whoever asks here holds the study's lock, so nothing changes
in between.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

import optuna
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState


class ReadOnce:
    """A study whose trials are as they were when first asked for."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._trials: list[FrozenTrial] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        if self._trials is None:
            self._trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in self._trials if states is None or trial.state in states]


class TPE(TPESampler):  # type: ignore[misc]  # Optuna is not type-checked here
    """Suggests what `optuna.samplers.TPESampler` suggests."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, optuna.distributions.BaseDistribution]
    ) -> dict[str, Any]:
        """See the parent class."""
        found: dict[str, Any] = super().sample_relative(cast(optuna.Study, ReadOnce(study)), trial, search_space)
        return found
