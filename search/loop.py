"""The loop of a search: fill the free lanes, train one step, evaluate and tell what has finished.

Lanes are at different steps of their own training; one that finishes, fails or is refused gives its place to the next
trial at once, while its neighbours train on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.analysis.front import front
from peftscape.search.adapter_folder import save
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.search.progress import show
from peftscape.search.session import Session, adapter_card, design_costs
from peftscape.spaces.presets import textbook
from peftscape.spaces.record import Costs, Failure, Record, Score
from peftscape.spaces.space_file import read_space

if TYPE_CHECKING:
    from peftscape.search.budget import Budget
    from peftscape.search.progress import SearchProgress
    from peftscape.search.storage import Storage
    from peftscape.spaces.design import Design

# Designs over a limit cost nothing to refuse, but a space with hardly any design under it should say so.
REFUSED_IN_A_ROW = 500
CURVE_POINTS = 20


@dataclass
class _Trial:
    """A trial in flight."""

    trial: Any
    design: Design
    costs: Costs
    textbook: str | None
    lanes: list[Lane] = field(default_factory=list)


class Loop:
    """A search in one process.

    Args:
        storage: asks Optuna for designs and keeps their records.
        budget: says what may still start.
    """

    def __init__(self, session: Session, storage: Storage, budget: Budget, progress: SearchProgress) -> None:
        self.session, self.storage, self.budget, self.progress = session, storage, budget, progress
        self.settings = session.config.search
        self.space = read_space(session.config.space, session.backbone.sites)
        self.cohort = session.cohort()
        self.running: list[_Trial] = []

    def run(self) -> None:
        if again := self.storage.release():
            self.progress.say(f"{again} trials of an interrupted session are trained again")
        if self.settings.textbook and self.storage.attr("textbook") is None:
            self._enqueue_textbook()
        for dropped in self.space.dropped:
            self.progress.say(f"left out of the space: {dropped}")
        try:
            self._fill()
            while self.cohort.lanes:
                self._step()
                if self.budget.over():
                    self._abandon()
                self._fill()
        finally:
            self.cohort.close()

    # -- what goes in -----------------------------------------------------------------------------------------------

    def _enqueue_textbook(self) -> None:
        inside = []
        for name, design in textbook().items():
            try:
                self.storage.enqueue(self.space.params(design), name)
                inside.append(name)
            except ValueError:
                continue  # this space has no such design
        self.storage.set_attr("textbook", inside)

    def _fill(self) -> None:
        session = self.session
        while len(self.cohort.lanes) + self.settings.seeds <= max(self.settings.lanes, self.settings.seeds):
            if not self._may_start() or (trial := self._ask()) is None:
                return
            self.running.append(trial)
            for i in range(self.settings.seeds):
                lane = new_lane(
                    trial.design,
                    seed=self.settings.seed + i,
                    steps=session.steps,
                    backbone=session.backbone,
                    head=session.head,
                    name=str(trial.trial.number),
                )
                prepare(lane, self.cohort)
                trial.lanes.append(lane)
            if trial.design.solo:
                self._train_alone(trial)
            else:
                self.cohort.admit(*trial.lanes)

    def _may_start(self) -> bool:
        waiting = [lane.steps - lane.step for lane in self.cohort.lanes]
        return self.budget.may_start(
            begun=self.storage.trained() + len(self.running),
            in_flight_steps=sum(waiting),
            in_flight=len(waiting),
            steps=self.session.steps * self.settings.seeds,
            retests=self.settings.retest_seeds * (len(self._front()) + 1),
        )

    def _ask(self) -> _Trial | None:
        """The next design that is possible and within the limits; the others are told at once, untrained."""
        session = self.session
        for _ in range(REFUSED_IN_A_ROW):
            trial, design = self.storage.ask(self.space)
            price = design_costs(session, design)
            name = trial.user_attrs.get("textbook")
            found = _Trial(trial, design, price, name if name != design.label else None)
            errors = design.check(session.backbone.sites)
            limit = self.budget.trainable
            if limit is not None and price.trainable > limit:
                errors.append(f"{price.trainable:,} trained parameters are over the limit of {limit:,}")
            if not errors:
                return found
            self.storage.tell(trial, self._record(found, "pruned", Failure(kind="limit", message="; ".join(errors))))
        self.progress.say(f"{REFUSED_IN_A_ROW} designs in a row were over the limits: the search ends here")
        return None

    # -- training ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        started = time.perf_counter()
        self.cohort.step()
        self.budget.measured(time.perf_counter() - started, len(self.cohort.lanes))
        done = [lane for lane in self.cohort.lanes if lane.done]
        if done:
            scores = self._scores(done)
            self.cohort.retire(*done)
            self._tell_finished(scores)
        self._show("search")

    def _scores(self, lanes: list[Lane]) -> dict[int, float]:
        """Validation scores of lanes by their identity; a score that is not finite fails its lane."""
        session = self.session
        good = [lane for lane in lanes if lane.failure is None]
        if not good:
            return {}
        started = time.perf_counter()
        logits = self.cohort.predict(session.data.validation, *good)
        self.budget.lane_evaluation_s = (time.perf_counter() - started) / len(good)
        scores = {}
        for lane, rows in zip(good, logits, strict=True):
            score = session.task.metric.score(rows, session.data.validation.targets)
            if np.isfinite(score):
                scores[id(lane)] = score
            else:
                lane.failure = Failure(kind="not finite", message=f"the score is {score}", step=lane.step)
        return scores

    def _train_alone(self, trial: _Trial) -> None:
        """A design that needs the backbone for itself: the others wait."""
        others = list(self.cohort.lanes)
        self.cohort.retire(*others)
        scores: dict[int, float] = {}
        for lane in trial.lanes:
            self.cohort.admit(lane)
            while not lane.done and not self.budget.over():
                self.cohort.step()
                self._show("search")
            scores |= self._scores([lane]) if lane.done else {}
            self.cohort.retire(lane)
        self.cohort.admit(*others)
        self._tell_finished(scores)

    def _abandon(self) -> None:
        """Out of time: what is in flight is told as it is."""
        self.cohort.retire(*self.cohort.lanes)
        for trial in self.running:
            failure = Failure(kind="out of time", message="the budget's time was over", step=trial.lanes[0].step)
            self.storage.tell(trial.trial, self._record(trial, "pruned", failure))
        self.running.clear()

    # -- what comes out ---------------------------------------------------------------------------------------------

    def _tell_finished(self, scores: dict[int, float]) -> None:
        for trial in [t for t in self.running if all(lane.done for lane in t.lanes)]:
            self.running.remove(trial)
            failure = next((lane.failure for lane in trial.lanes if lane.failure), None)
            record = self._record(trial, "failed" if failure else "complete", failure, scores)
            self.storage.tell(trial.trial, record)
            self.storage.set_attr("spent_s", self.budget.elapsed_s())
            if any(r.number == record.number for r in self._front()):
                self._keep_adapter(trial)

    def _record(
        self,
        trial: _Trial,
        state: Any,
        failure: Failure | None = None,
        scores: dict[int, float] | None = None,
    ) -> Record:
        metric = self.session.task.metric
        lanes = trial.lanes if state == "complete" else []
        return Record(
            number=trial.trial.number,
            state=state,
            design=trial.design.json(),
            digest=trial.design.digest,
            label=trial.design.label,
            textbook=trial.textbook,
            metric=metric.name,
            direction=metric.direction,
            n_validation=len(self.session.task.validation),
            scores=tuple(
                Score(seed=lane.seed, validation=(scores or {})[id(lane)], wall_s=lane.wall_s) for lane in lanes
            ),
            costs=trial.costs,
            curve=_curve(trial.lanes, self.settings.batch_size),
            wall_s=sum(lane.wall_s for lane in trial.lanes),
            failure=failure,
        )

    def _keep_adapter(self, trial: _Trial) -> None:
        """Save the adapter of a design that is on the front, and drop those that no longer are."""
        session, lane = self.session, trial.lanes[0]
        folder = self.storage.adapter_folder(trial.trial.number)
        save(lane.adapter(), adapter_card(session, trial.design, lane.seed), session.backbone, session.head, folder)
        keep = {str(r.number) for r in self._front()}
        for old in folder.parent.iterdir():
            if old.name not in keep:
                for file in old.iterdir():
                    file.unlink()
                old.rmdir()

    def _front(self) -> tuple[Record, ...]:
        return front(self.storage.records, self.storage.objectives)

    def _show(self, phase: str) -> None:
        records = [r for r in self.storage.records if r.state == "complete"]
        show(self.progress, phase, self.budget, self.storage, done=len(records), running=len(self.running))


def _curve(lanes: list[Lane], batch: int) -> tuple[tuple[int, float], ...]:
    """The training loss of the first seed, averaged over blocks of steps: (examples seen, loss)."""
    losses = lanes[0].losses if lanes else []
    blocks = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, len(losses)) or 1)
    return tuple((int(b[-1] + 1) * batch, float(np.mean([losses[i] for i in b]))) for b in blocks if len(b))
