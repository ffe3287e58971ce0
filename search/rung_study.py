"""Rungs on any Optuna study, with ask and tell: `Trial.report` and pruners refuse several objectives.

    study = optuna.create_study(directions=["maximize", "minimize"])
    rungs = StudyRungs(study, Rungs(count=2, factor=3), quality=0)
    while budget_left():
        trial = rungs.next() or study.ask()      # a waiting trial that may go on, else a fresh one
        for part in rungs.left(trial):           # what is left of its training, rung by rung
            values = train(trial, until=part)    # goes on from where it was
            if rungs.tell(trial, values) is not Verdict.GO_ON:
                break
    rungs.close()                                # those that still wait are told PRUNED

What a trial scored lies in its user attributes, so that another process, or the same one later, decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from peftscape.search.rungs import Entry, Rungs, Verdict, after

SCORES, PROMOTED, PROTECTED, FLOOR, BRACKET = (
    f"rungs:{name}" for name in ("values", "promoted", "protected", "floor", "bracket")
)


def waits(trial: Any) -> bool:
    """Whether an Optuna trial was scored at a rung and has not been told to go on from there."""
    attrs = trial.user_attrs
    return bool(trial.state.name == "RUNNING" and len(attrs.get(SCORES, ())) > attrs.get(PROMOTED, 0))


class StudyRungs:
    """Successive halving of an Optuna study's trials.

    Args:
        study: with two or more objectives.
        quality: which objective is learnt while training; the others are costs, known from the start.
        error: the standard error of the quality, if it is known; or a function that tells it of a quality's value.

    Raises:
        ValueError: if the study has no such objective, or no other.
    """

    def __init__(
        self, study: Any, rungs: Rungs, *, quality: int = 0, error: float | Callable[[float], float] = 0.0
    ) -> None:
        if not 0 <= quality < len(study.directions) or len(study.directions) < 2:
            raise ValueError(f"expected a quality and costs, found {len(study.directions)} objectives, {quality=}")
        self.study, self.rungs, self.quality, self.error = study, rungs, quality, error
        self._up = [direction.name == "MAXIMIZE" for direction in study.directions]
        self._trials: dict[int, Any] = {}

    def mark(self, trial: Any, *, protected: bool = False, floor: bool = False, slow: bool = False) -> None:
        """Say before its first rung that a trial is never stopped, is a baseline, or starts slowly."""
        trial.set_user_attr(PROTECTED, protected)
        trial.set_user_attr(FLOOR, floor)
        trial.set_user_attr(BRACKET, self.rungs.bracket(trial.number, slow=slow))

    def left(self, trial: Any) -> tuple[float, ...]:
        """The fractions of training at which a trial still has to be scored, the whole (1.0) last."""
        return (*self.rungs.fractions, 1.0)[len(trial.user_attrs.get(SCORES, ())) :]

    def tell(self, trial: Any, values: Sequence[float]) -> Verdict:
        """Score a trial at its next rung, or at the end, with all objectives' values in the study's order.

        At the end the study is told the values, and a trial that stops is told PRUNED; one that waits stays running.

        Raises:
            ValueError: if the values are not one an objective.
        """
        if len(values) != len(self._up):
            raise ValueError(f"expected {len(self._up)} values, found {len(values)}")
        known = [*trial.user_attrs.get(SCORES, ()), [float(v) for v in values]]
        if BRACKET not in trial.user_attrs:
            trial.set_user_attr(BRACKET, self.rungs.bracket(trial.number))
        trial.set_user_attr(SCORES, known)
        if len(known) > self.rungs.count:
            self.study.tell(trial, list(values))
            return Verdict.STOP
        self._trials[trial.number] = trial
        verdict = self.rungs.verdict(trial.number, self.entries())
        self._note(trial, verdict)
        return verdict

    def next(self) -> Any | None:
        """The waiting trial to go on with, as it was asked for in this process; None to ask for a fresh one."""
        # Those that wait in other processes are compared with, and promoted there.
        number = self.rungs.next(replace(e, ended=e.ended or e.key not in self._trials) for e in self.entries())
        if number is None:
            return None
        trial = self._trials[number]
        self._note(trial, Verdict.GO_ON)
        return trial

    def close(self) -> None:
        """Tell those that wait that they end here."""
        for entry in self.entries():
            if entry.key in self._trials and entry.waits:
                self._note(self._trials[entry.key], Verdict.STOP)

    def entries(self, trials: Sequence[Any] | None = None) -> list[Entry]:
        """All trials that have been scored, whoever trained them; of `trials`, where those were read just now."""
        trials = self.study.get_trials(deepcopy=False) if trials is None else trials
        return [self._entry(trial) for trial in trials if SCORES in trial.user_attrs]

    def _entry(self, trial: Any) -> Entry:
        attrs = trial.user_attrs
        rows = attrs[SCORES]
        sign = 1 if self._up[self.quality] else -1
        costs = [(v, up) for i, (v, up) in enumerate(zip(rows[0], self._up, strict=True)) if i != self.quality]
        return Entry(
            key=trial.number,
            # What is maximised, as a speed, is a cost by its reciprocal: rules look at logarithms.
            costs=tuple((1 / v if v else math.inf) if up else v for v, up in costs),
            scores=tuple(sign * row[self.quality] for row in rows),
            error=self.error(rows[-1][self.quality]) if callable(self.error) else self.error,
            promoted=attrs.get(PROMOTED, 0),
            protected=attrs.get(PROTECTED, False),
            floor=attrs.get(FLOOR, False),
            bracket=attrs.get(BRACKET, 0),
            ended=trial.state.is_finished(),
        )

    def _note(self, trial: Any, verdict: Verdict) -> None:
        from optuna.trial import TrialState

        entry = after(self._entry(self.study.trials[trial.number]), verdict)
        trial.set_user_attr(PROMOTED, entry.promoted)
        if verdict is Verdict.STOP:
            self.study.tell(trial, state=TrialState.PRUNED)
