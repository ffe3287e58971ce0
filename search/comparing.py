"""Which trials go on at their rungs, in a study that several workers may share.

A trial that waits is a running one for Optuna, with what it scored in its attributes (`rung_study`) and its lanes in
the checkpoints; it belongs to no session, so any worker that has its checkpoints sends it on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.analysis.noise import standard_error
from peftscape.search.rung_study import BRACKET, FLOOR, PROTECTED
from peftscape.search.rungs import Rungs, Verdict

if TYPE_CHECKING:
    from peftscape.search.checkpoint import Checkpoints
    from peftscape.search.session import Session
    from peftscape.search.storage import Storage
    from peftscape.search.trial import Trial
    from peftscape.search.workers import Workers


class Comparing:
    """The rungs of a study, for one worker; all that it does, it does under the study's lock.

    Args:
        fits: whether steps can be trained beside (steps, lanes) that are in flight: (steps, lanes, more steps).
    """

    def __init__(
        self,
        session: Session,
        rungs: Rungs,
        storage: Storage,
        workers: Workers,
        fits: Callable[[int, int, int], bool],
    ) -> None:
        self.session, self.rungs, self.storage, self.workers, self.fits = session, rungs, storage, workers, fits
        self.checkpoints: Checkpoints | None = session.guards.get("checkpoints")
        metric, count = session.task.metric.name, len(session.task.validation)

        def error(score: float) -> float:
            return float(np.nan_to_num(standard_error(metric, score, count)))

        self._study = storage.rungs(rungs, error)

    def judge(self, trial: Trial, in_flight_steps: int, in_flight: int, put_by: Callable[[], None]) -> Verdict | None:
        """What becomes of a trial that was scored at a rung, noted in the study; None if another worker has it now.

        Args:
            in_flight_steps, in_flight: of this worker's other trials.
            put_by: saves the trial's lanes; called if it waits.
        """
        with self.storage.lock():
            self.storage.refresh()
            if not self.storage.reach(
                trial.record(self.session, state="running"), self.workers.name, self._marks(trial)
            ):
                return None
            entries = self._study.entries()
            verdict = self.rungs.verdict(trial.number, entries)
            rest = (self.session.steps - self.session.stops[len(trial.rungs) - 1]) * len(trial.lanes)
            if verdict is Verdict.GO_ON and not trial.safe and not self.fits(in_flight_steps, in_flight, rest):
                verdict = Verdict.WAIT
            if verdict is Verdict.GO_ON:
                self.storage.go_on(trial.number, self.workers.name)
            elif verdict is Verdict.WAIT:
                put_by()
            for number in self.rungs.stopped(entries):
                self._stop(number)
            return verdict

    def promoted(self, in_flight_steps: int, in_flight: int, *, needed: bool = False) -> Any | None:
        """The trial that goes on now, as Optuna has it, or None; asked after a `refresh` of the storage.

        Args:
            needed: one goes on if any waits, though there is no place for it yet.
        """
        if not self.storage.waiting:
            return None
        entries = self._study.entries(self.storage.trials)
        # What waits elsewhere is compared with, and sent on there.
        entries = [replace(e, ended=e.ended or (e.waits and not self._is_here(e.key))) for e in entries]
        number = self.rungs.next(entries, needed=needed)
        if number is None:
            return None
        saved = self.checkpoints is not None and self.checkpoints.has(number)
        passed = next(len(entry.scores) for entry in entries if entry.key == number)
        rest = self.session.steps - (self.session.stops[passed - 1] if saved else 0)
        if not self.fits(in_flight_steps, in_flight, rest * self.session.config.search.seeds):
            return None
        return self.storage.go_on(number, self.workers.name)

    def close(self) -> None:
        """The search ends: what waits here is stopped where it is.

        Where nothing is complete it goes on waiting, for a session that has more time.
        """
        with self.storage.lock():
            self.storage.refresh()
            if not any(record.state == "complete" for record in self.storage.records):
                return
            for entry in self._study.entries(self.storage.trials):
                if entry.waits and self._is_here(entry.key):
                    self._stop(entry.key)
            self.storage.refresh()

    def _stop(self, number: int) -> None:
        self.storage.stop(number, self.workers.name)
        if self.checkpoints is not None:
            self.checkpoints.drop_trial(number)

    def _is_here(self, number: int) -> bool:
        """Whether a trial that waits may go on here: workers of one folder share its checkpoints."""
        return not self.storage.is_shared or (self.checkpoints is not None and self.checkpoints.has(number))

    def _marks(self, trial: Trial) -> dict[str, Any]:
        """What the comparison has to know of a trial, where it matters."""
        if len(trial.rungs) > 1:
            return {}
        marks = {
            PROTECTED: trial.safe,
            FLOOR: trial.safe and trial.design.label == "head_only",
            BRACKET: self.rungs.bracket(trial.number, slow=trial.design.starts_slowly),
        }
        return {name: value for name, value in marks.items() if value}
