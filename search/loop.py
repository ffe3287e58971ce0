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
from peftscape.search.disk import DiskError
from peftscape.search.folders import prune
from peftscape.search.progress import show, stopped
from peftscape.search.rungs import Verdict
from peftscape.search.session import Session, adapter_card
from peftscape.search.stopping import HangError
from peftscape.search.trial import Trial
from peftscape.spaces.record import Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from peftscape.search.budget import Budget
    from peftscape.search.lane import Lane
    from peftscape.search.progress import SearchProgress
    from peftscape.search.storage import Storage
    from peftscape.search.workers import Workers

# How often a worker that has nothing to do, or too little, looks whether the others are done, or gone.
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
        self._in_vain_until = 0.0  # a look at the study takes longer than a small model's step
        budget.evaluations = len(session.stops)

    def run(self) -> None:
        """Search until the budget says stop and no other worker has a trial in flight."""
        self.asking.begin()
        try:
            while True:
                try:
                    self._fill()
                    if self.running:
                        self._step()
                    elif self._others_are_done():
                        break
                    else:
                        continue
                except HangError:  # the end of the time cut it short
                    self._let_go(*self.running, why="the time was over")
                if self.budget.over() and self.running:
                    self._let_go(*self.running, why="the time was over")
                elif late := self._too_many():
                    self._let_go(*late, why="there was no time left for it")
            self._close()
        finally:
            self._leave()

    def _close(self) -> None:
        """Nothing more may start: what waits at a rung ends there."""
        if self.asking.comparing is not None:
            self.asking.comparing.close()
            if words := stopped(self.storage.records):
                self.progress.say(words)

    def _leave(self) -> None:
        """Whatever ended the loop: trials in flight wait for the next session, saved as far as they are."""
        for trial in self.running:
            try:
                self.storage.leave(trial.number)
            except DiskError as error:  # what ended the loop is told; the trial is free when this worker is gone
                self.progress.say(f"trial {trial.number} could not be left: {error.why}")
        self.cohort.close()

    # -- what goes in -----------------------------------------------------------------------------------------------

    def _fill(self, *, again: bool = False) -> None:
        """Ask for trials while there are places; not `again` at each step where nothing could start just now."""
        if time.monotonic() < self._in_vain_until and not again:
            return
        places = max(min(self.settings.lanes, self.cohort.memory.width or self.settings.lanes), self.settings.seeds)
        while len(self._open()) + self.settings.seeds <= places and not self.budget.over():
            if any(trial.suspect for trial in self.running):
                break  # beside one that may end the process, others would be tried in vain
            trial = self.asking.next(*self._in_flight())
            if trial is None:
                self._in_vain_until = time.monotonic() + LOOK_S
                break
            self._begin(trial)
        self._arrange()

    def _begin(self, trial: Trial) -> None:
        """Give a trial its lanes, which go on from where they were saved if they were."""
        self.running.append(trial)
        for i in range(self.settings.seeds):
            seed = self.settings.seed + i
            lane = self.cohort.begin(trial.design, seed=seed, steps=self.session.steps, name=str(trial.number))
            if isinstance(lane, Failure):
                trial.lanes.clear()
                self._tell(trial, lane)
                return
            trial.lanes.append(lane)
            if lane.score is not None:  # it had ended when the trial was left
                trial.scores[lane.seed] = lane.score

    def _open(self) -> list[Lane]:
        return [lane for trial in self.running for lane in trial.open]

    def _in_flight(self) -> tuple[int, int]:
        """Steps still to do, to the trials' next rungs or their ends, and lanes."""
        return sum(trial.owed for trial in self.running), len(self._open())

    def _too_many(self) -> list[Trial]:
        """The latest trials that would have to go for the others to end in time; one always stays."""
        steps, lanes = self._in_flight()
        late: list[Trial] = []
        for trial in reversed(self.running[1:]):
            if not self.budget.cannot_finish(steps, lanes):
                break
            late.append(trial)
            steps, lanes = steps - trial.owed, lanes - len(trial.open)
        return late

    def _arrange(self) -> None:
        """The lanes that train now: all, or a single one that needs the backbone for itself while the others wait."""
        alone = [lane for trial in self.running if trial.alone for lane in trial.open]
        wanted = alone[:1] or self._open()
        if {id(lane) for lane in wanted} != {id(lane) for lane in self.cohort.lanes}:
            self.cohort.retire(*self.cohort.lanes)
            self.cohort.admit(*wanted)

    def _others_are_done(self) -> bool:
        """Whether no other worker has a trial in flight; waits a little where one has, and takes up what was left."""
        self.asking.release()
        if self.budget.over() or not self.storage.refresh():
            # What was released, or told meanwhile, may leave room for more.
            return self.budget.over() or not self._may_go_on()
        self.session.guards["stop"].check()
        with self.budget.account.spending("waiting_s"):
            time.sleep(LOOK_S)
        self._show()
        return False

    def _may_go_on(self) -> bool:
        before = len(self.running)
        self._fill(again=True)
        return len(self.running) > before

    # -- training ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._settle()  # what was left at a rung, or at its end
        if not self.cohort.lanes:
            return
        lanes = list(self.cohort.lanes)
        started = time.perf_counter()
        self.cohort.step()
        self.budget.measured(time.perf_counter() - started, len(lanes))
        self._settle()
        self.budget.promise(*self._in_flight())
        self._show()

    def _settle(self) -> None:
        """Score the lanes that have come to a rung or to their end; compare or tell the trials of which all have."""
        self._score([lane for trial in self.running for lane in trial.unscored])
        for trial in [t for t in self.running if not t.open]:
            self._in_vain_until = 0.0
            if trial.at_rung:
                self._compare(trial)
            else:
                self._tell(trial)
        self._arrange()

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
                lane.score = score if lane.done else None
            else:
                lane.failure = Failure(kind="not finite", message=f"the score is {score}", step=lane.step)
        self.cohort.keep(*(lane for lane in good if lane.score is not None and not trials[id(lane)].done))

    # -- what comes out ---------------------------------------------------------------------------------------------

    def _let_go(self, *trials: Trial, why: str) -> None:
        """Trials that cannot end in time wait for a session that has some, saved as far as they are."""
        self.cohort.put_by(*(lane for trial in trials for lane in trial.lanes))
        for trial in trials:
            self.running.remove(trial)
            self.storage.leave(trial.number)
            self.progress.say(f"trial {trial.number} waits for another session: {why}")
        self._arrange()

    def _compare(self, trial: Trial) -> None:
        """A trial at a rung goes on, or gives its place to another: it waits, saved, or is stopped."""
        comparing, others = self.asking.comparing, self._in_flight()
        assert comparing is not None
        trial.pass_rung()
        verdict = comparing.judge(trial, *others, lambda: self.cohort.put_by(*trial.lanes))
        if verdict is Verdict.GO_ON:
            return
        self.running.remove(trial)
        if verdict is Verdict.WAIT:
            return
        self.cohort.forget(*trial.lanes)
        if verdict is None:
            self._lost(trial)
        else:
            self._told()

    def _tell(self, trial: Trial, failure: Failure | None = None) -> None:
        record = trial.record(self.session, failure)
        # The adapter first: a record whose adapter could not be written would be one without it for ever.
        with self.storage.lock():
            self.storage.refresh()  # what others told meanwhile has a place on the front too
            if record.state == "complete" and record in self.storage.front(record):
                self._keep_adapter(trial)
            told = self.storage.tell(trial.trial, record, self.workers.name)
            prune(self.storage.out / ADAPTERS, {r.number for r in self.storage.front()})
        self.running.remove(trial)
        self.cohort.forget(*trial.lanes)
        if not told:
            self._lost(trial)
        elif record.state != "complete":
            self.budget.account.lose(trial.wall_s)
        self._told()

    def _told(self) -> None:
        self.storage.copy()
        self.interim(len(self.storage.records))

    def _lost(self, trial: Trial) -> None:
        self.budget.account.lose(trial.wall_s)
        self.progress.say(f"trial {trial.number} was taken up by another worker; this one's result is dropped")

    def _keep_adapter(self, trial: Trial) -> None:
        lane = trial.lanes[0]
        folder = self.storage.adapter_folder(trial.number)
        card = adapter_card(self.session, trial.design, lane.seed)
        save(lane.adapter(), card, self.session.backbone, self.session.head, folder)

    def _show(self) -> None:
        done = sum(record.state == "complete" for record in self.storage.records)
        show(self.progress, "search", self.budget, self.storage, done=done, running=len(self.running))
