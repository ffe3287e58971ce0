"""The loop of a search: fill the free lanes, train one step, evaluate and tell what has finished.

Lanes are at different steps of their own training; one that finishes, fails or is refused gives its place to the next
trial at once, while its neighbours train on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from peftscape.search.adapter_folder import save
from peftscape.search.asking import Asking
from peftscape.search.database import ADAPTERS
from peftscape.search.folders import prune
from peftscape.search.lane import Lane, new_lane
from peftscape.search.progress import show
from peftscape.search.session import Session, adapter_card
from peftscape.search.stopping import HangError
from peftscape.search.trial import Trial
from peftscape.spaces.record import Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from peftscape.search.budget import Budget
    from peftscape.search.progress import SearchProgress
    from peftscape.search.storage import Storage
    from peftscape.search.workers import Workers

# How often a worker that has nothing to do looks whether the others are done, or gone.
LOOK_S = 0.5


class Loop:
    """A search in one process.

    Args:
        storage: asks Optuna for designs and keeps their records.
        workers: this process among those on the study.
        budget: says what may still start.
        interim: called now and then, with the number of records, to write what there is so far.
    """

    def __init__(
        self,
        session: Session,
        storage: Storage,
        workers: Workers,
        budget: Budget,
        progress: SearchProgress,
        interim: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.session, self.storage, self.workers = session, storage, workers
        self.budget, self.progress, self.interim = budget, progress, interim
        self.settings = session.config.search
        self.asking = Asking(session, storage, workers, budget, progress)
        self.cohort = session.cohort()
        self.running: list[Trial] = []

    def run(self) -> None:
        """Search until the budget says stop and no other worker has a trial in flight."""
        self.asking.begin()
        try:
            while True:
                self._fill()
                if not self.running:
                    if self._others_are_done():
                        return
                    continue
                try:
                    self._step()
                except HangError:  # the end of the time cut a step short
                    self._let_go(*self.running, why="the time was over")
                if self.budget.over() and self.running:
                    self._let_go(*self.running, why="the time was over")
                elif late := self._too_many():
                    self._let_go(*late, why="there was no time left for it")
        finally:
            self._leave()

    def _leave(self) -> None:
        """Whatever ended the loop: trials in flight wait for the next session, saved as far as they are."""
        for trial in self.running:
            self.storage.leave(trial.number)
        self.cohort.close()

    # -- what goes in -----------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        places = max(min(self.settings.lanes, self.cohort.memory.width or self.settings.lanes), self.settings.seeds)
        while len(self._open()) + self.settings.seeds <= places and not self.budget.over():
            if self.asking.exhausted or any(trial.suspect for trial in self.running):
                break  # beside one that may end the process, others would be tried in vain
            trial = self.asking.next(*self._in_flight())
            if trial is None:
                break
            self.running.append(trial)
            for i in range(self.settings.seeds):
                lane = new_lane(
                    trial.design,
                    seed=self.settings.seed + i,
                    steps=self.session.steps,
                    backbone=self.session.backbone,
                    head=self.session.head,
                    name=str(trial.number),
                )
                self.cohort.start(lane)
                trial.lanes.append(lane)
        self._arrange()

    def _open(self) -> list[Lane]:
        return [lane for trial in self.running for lane in trial.lanes if not lane.done]

    def _in_flight(self) -> tuple[int, int]:
        """Steps still to do, and lanes."""
        lanes = self._open()
        return sum(lane.steps - lane.step for lane in lanes), len(lanes)

    def _too_many(self) -> list[Trial]:
        """The latest trials that would have to go for the others to end in time; one always stays."""
        steps, lanes = self._in_flight()
        late: list[Trial] = []
        for trial in reversed(self.running[1:]):
            if not self.budget.cannot_finish(steps, lanes):
                break
            late.append(trial)
            open_ = [lane for lane in trial.lanes if not lane.done]
            steps, lanes = steps - sum(lane.steps - lane.step for lane in open_), lanes - len(open_)
        return late

    def _arrange(self) -> None:
        """The lanes that train now: all, or a single one that needs the backbone for itself while the others wait."""
        alone = [lane for trial in self.running if trial.alone for lane in trial.lanes if not lane.done]
        wanted = alone[:1] or self._open()
        if {id(lane) for lane in wanted} != {id(lane) for lane in self.cohort.lanes}:
            self.cohort.retire(*self.cohort.lanes)
            self.cohort.admit(*wanted)

    def _others_are_done(self) -> bool:
        """Whether no other worker has a trial in flight; waits a little where one has, and takes up what was left."""
        self.asking.release()
        if self.budget.over() or not self.storage.refresh():
            # What was released, or told meanwhile, may leave room for more.
            return self.budget.over() or self.asking.exhausted or not self._may_go_on()
        self.session.guards["stop"].check()
        with self.budget.account.spending("waiting_s"):
            time.sleep(LOOK_S)
        self._show()
        return False

    def _may_go_on(self) -> bool:
        before = len(self.running)
        self._fill()
        return len(self.running) > before

    # -- training ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        lanes = list(self.cohort.lanes)
        started = time.perf_counter()
        self.cohort.step()
        self.budget.measured(time.perf_counter() - started, len(lanes))
        done = [lane for lane in lanes if lane.done]
        if done:
            self._score(done)
            self._tell_finished()
            self._arrange()
        self.budget.promise(*self._in_flight())
        self._show()

    def _score(self, lanes: list[Lane]) -> None:
        """Score lanes on the validation data; a score that is not finite fails its lane."""
        session = self.session
        good = [lane for lane in lanes if lane.failure is None]
        if not good:
            return
        started = time.perf_counter()
        logits = self.cohort.predict(session.data.validation, *good)
        self.budget.evaluated(time.perf_counter() - started, len(good))
        trials = {id(lane): trial for trial in self.running for lane in trial.lanes}
        for lane, rows in zip(good, logits, strict=True):
            if lane.failure is not None:
                continue
            score = session.task.metric.score(rows, session.data.validation.targets)
            if np.isfinite(score):
                trials[id(lane)].scores[lane.seed] = score
            else:
                lane.failure = Failure(kind="not finite", message=f"the score is {score}", step=lane.step)

    # -- what comes out ---------------------------------------------------------------------------------------------

    def _let_go(self, *trials: Trial, why: str) -> None:
        """Trials that cannot end in time wait for a session that has some, saved as far as they are."""
        self.cohort.save(*(lane for trial in trials for lane in trial.lanes))
        for trial in trials:
            self.running.remove(trial)
            self.storage.leave(trial.number)
            self.progress.say(f"trial {trial.number} waits for another session: {why}")
        self._arrange()

    def _tell_finished(self) -> None:
        for trial in [t for t in self.running if t.done]:
            record = trial.record(self.session)
            # The adapter first: a record whose adapter could not be written would be one without it for ever.
            with self.storage.lock():
                if record.state == "complete" and record in self.storage.front(record):
                    self._keep_adapter(trial)
                told = self.storage.tell(trial.trial, record, self.workers.name)
                prune(self.storage.out / ADAPTERS, {r.number for r in self.storage.front()})
            self.running.remove(trial)
            if not told or record.state != "complete":
                self.budget.account.lose(trial.wall_s)
            if not told:
                self.progress.say(f"trial {trial.number} was taken up by another worker; this one's result is dropped")
            self.cohort.forget(*trial.lanes)
            self.storage.copy()
            self.interim(len(self.storage.records))

    def _keep_adapter(self, trial: Trial) -> None:
        lane = trial.lanes[0]
        folder = self.storage.adapter_folder(trial.number)
        card = adapter_card(self.session, trial.design, lane.seed)
        save(lane.adapter(), card, self.session.backbone, self.session.head, folder)

    def _show(self) -> None:
        done = sum(record.state == "complete" for record in self.storage.records)
        show(self.progress, "search", self.budget, self.storage, done=done, running=len(self.running))
