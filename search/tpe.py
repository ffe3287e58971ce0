"""Optuna's TPE, which looks at a study once for each trial that it suggests, not once for each group of its knobs.

With groups and `constant_liar` TPE reads all trials, ranks them and divides them into good and bad anew for every
group: of the preset `unified` that is two dozen times a trial, and most of the time that asking takes. Whoever asks
here holds the study's lock, so nothing changes in between.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma, default_gamma_multiobjective
from optuna.trial import FrozenTrial, TrialState


class ReadOnce:
    """A study whose trials are as they were when first asked for, or as they are known to be."""

    def __init__(self, study: optuna.Study, known: Sequence[FrozenTrial] | None = None) -> None:
        self._study, self._trials = study, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        if self._trials is None:
            self._trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in self._trials if states is None or trial.state in states]


class OfEachKind(ReadOnce):
    """A study with the first trial of each set of knobs: all that finding groups takes."""

    def _get_trials(self, *args: Any, **more: Any) -> list[FrozenTrial]:
        found: dict[frozenset[str], FrozenTrial] = {}
        for trial in super()._get_trials(*args, **more):
            found.setdefault(frozenset(trial.distributions), trial)
        return list(found.values())


class TPE(TPESampler):  # type: ignore[misc]  # Optuna is not type-checked here
    """Suggests what `optuna.samplers.TPESampler` suggests; made anew for each trial, like all samplers here.

    Args:
        known: the study's trials as they are now; the one that it suggests for may be missing. Read if not given.
    """

    def __init__(self, *, known: Sequence[FrozenTrial] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._known = known

    #: The good and the bad trials, once they are known.
    _halves: tuple[list[FrozenTrial], list[FrozenTrial]] | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See the parent class."""
        found: dict[str, BaseDistribution] = super().infer_relative_search_space(
            cast(optuna.Study, OfEachKind(study, self._known)), trial
        )
        return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See the parent class."""
        found: dict[str, Any] = super().sample_relative(
            cast(optuna.Study, ReadOnce(study, self._known)), trial, search_space
        )
        return found

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Of candidates near good trials the one that is likelier there than near bad ones by the most."""
        good, bad = self._halves = self._halves or self._divided(study, trial)
        near_good = self._build_parzen_estimator(study, search_space, good, handle_below=True)
        near_bad = self._build_parzen_estimator(study, search_space, bad, handle_below=False)
        candidates = near_good.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(candidates, self._compute_acquisition_func(candidates, near_good, near_bad))
        return {name: knob.to_external_repr(best[name]) for name, knob in search_space.items()}

    def _divided(self, study: optuna.Study, trial: FrozenTrial) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        others = [t for t in study._get_trials(deepcopy=False, states=states) if t.number != trial.number]
        ended = sum(t.state != TrialState.RUNNING for t in others)
        count = default_gamma_multiobjective if len(study.directions) > 1 else default_gamma
        found: tuple[list[FrozenTrial], list[FrozenTrial]] = _split_trials(study, others, count(ended))
        return found
