"""Optuna's TPE, which looks at a study once for each trial that it suggests, not once for each group of its knobs.

With groups and `constant_liar` TPE reads all trials, ranks them, divides them into good and bad and looks through all
their knobs anew for every group: of the preset `unified` that is two dozen times a trial, and most of the time that
asking takes. Whoever asks here holds the study's lock, so nothing changes in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence
from typing import Any, cast

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma, default_gamma_multiobjective
from optuna.trial import FrozenTrial, TrialState


class ReadOnce:
    """A study whose trials are as they were when first asked for, or as they are known to be."""

    def __init__(self, study: optuna.Study, known: Sequence[FrozenTrial] | None = None) -> None:
        self._study, self._trials = study, known
        self._chosen: dict[tuple[TrialState, ...], list[FrozenTrial]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        if self._trials is None:
            self._trials = self._study.get_trials(deepcopy=False)
        wanted = tuple(TrialState) if states is None else tuple(s for s in TrialState if s in states)
        if wanted not in self._chosen:
            self._chosen[wanted] = [trial for trial in self._trials if trial.state in wanted]
        return self._chosen[wanted]


class Groups:
    """The knobs that all trials have or lack together, in Optuna's order, as sets of bits."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        kinds: dict[frozenset[str], FrozenTrial] = {}
        for trial in trials:
            kinds.setdefault(frozenset(trial.distributions), trial)
        # Of a knob whose domain changed, the first counts, as it does for Optuna.
        knobs = {name: knob for trial in reversed(kinds.values()) for name, knob in trial.distributions.items()}
        bits = {name: 1 << i for i, name in enumerate(knobs)}
        found: list[int] = []
        for kind in kinds:
            left = sum(bits[name] for name in kind)
            cut = []
            for group in found:
                cut += [group & left, group & ~left]
                left &= ~group
            found = [group for group in (*cut, left) if group]
        self.search_spaces = [{name: knobs[name] for name in knobs if bits[name] & group} for group in found]

    def calculate(self, study: optuna.Study, use_cache: bool = False) -> Groups:
        """What Optuna asks for its groups."""
        return self


class TPE(TPESampler):  # type: ignore[misc]  # Optuna is not type-checked here
    """Suggests what `optuna.samplers.TPESampler` suggests; made anew for each trial, like all samplers here.

    Args:
        known: the study's trials as they are now; the one that it suggests for may be missing. Read if not given.
    """

    def __init__(self, *, known: Sequence[FrozenTrial] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._known = known
        self._columns: dict[int, dict[str, dict[int, Any]]] = {}  # of each half: what each knob is in which trials

    #: The good and the bad trials, once they are known.
    _halves: tuple[list[FrozenTrial], list[FrozenTrial]] | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See the parent class."""
        once = ReadOnce(study, self._known)
        if self._group:
            self._group_decomposed_search_space = Groups(
                once._get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
            )
        found: dict[str, BaseDistribution] = super().infer_relative_search_space(cast(optuna.Study, once), trial)
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

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: optuna.Study
    ) -> dict[str, NDArray[Any]]:
        """What these trials have for all of these knobs, knob by knob."""
        columns = self._columns.get(id(trials))
        if columns is None:
            columns = self._columns[id(trials)] = defaultdict(dict)
            for row, trial in enumerate(trials):
                for name, value in self._get_params(trial, study).items():
                    columns[name][row] = value
        first, *others = (columns[name] for name in search_space)
        rows = [row for row in first if all(row in other for other in others)]
        return {
            name: np.asarray([knob.to_internal_repr(columns[name][row]) for row in rows])
            for name, knob in search_space.items()
        }
