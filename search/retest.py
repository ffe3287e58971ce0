"""Retests: what could be on the front is trained again with further seeds and scored once on the test data.

Which designs, in which order and with how many seeds is decided on validation scores alone, and the front is never
formed again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.analysis.belief import believe
from peftscape.analysis.noise import candidates
from peftscape.search.progress import show
from peftscape.search.retest_order import FIRST_SEEDS, Job, first_retests, next_retest
from peftscape.spaces.design import Design
from peftscape.spaces.outcomes import pack
from peftscape.spaces.record import Failure, Record, Score

if TYPE_CHECKING:
    from peftscape.search.budget import Budget
    from peftscape.search.guarded import Guarded
    from peftscape.search.lane import Lane
    from peftscape.search.progress import SearchProgress
    from peftscape.search.session import Session
    from peftscape.search.storage import Storage

# Retest seeds lie apart from the trials' own, whatever their number.
FIRST_SEED = 1000
# A retest that failed is tried once more, by a later session.
TRIES = 2


@dataclass
class _Retest:
    of: int
    lane: Lane


class _Plan:
    """Who is retested next: three seeds each of what the time allows, then where a place on the front is open."""

    def __init__(self, session: Session, storage: Storage, budget: Budget) -> None:
        self.settings, self.storage = session.config.search, storage
        self.fit = partial(budget.retests_that_fit, session.steps)
        self.complete = [r for r in storage.records if r.state == "complete"]
        found = candidates(self.complete, storage.objectives) if self.complete else ()
        self.designs = {r.number: Design.from_json(dict(r.design)) for r in found}
        self.begun: set[Job] = storage.retested(TRIES)
        self.jobs: list[Job] = []
        self.chosen = [number for number in self.designs if self._taken(number)]
        self._choose([*self.designs], self.fit())
        self.total = self.missing + self.settings.further_seeds
        self._doubt: dict[int, float] = {}

    def _seeds(self, count: int) -> list[int]:
        return [self.settings.seed + FIRST_SEED + i for i in range(count)]

    def _taken(self, number: int) -> int:
        return sum(of == number for of, _ in self.begun)

    @property
    def missing(self) -> int:
        """How many of the seeds that each candidate is to have were not begun."""
        return sum(max(0, self.settings.retest_seeds - self._taken(number)) for number in self.designs)

    def _choose(self, numbers: list[int], fit: float) -> None:
        """Take in as many designs as have the time for three seeds."""
        self.jobs = first_retests(numbers, self._seeds(self.settings.retest_seeds), self.begun, fit)
        self.chosen += [number for number in dict(self.jobs) if number not in self.chosen]

    def next(self, running: int) -> Job | None:
        """The next retest, beside so many; the same until it is begun."""
        others = [number for number in self.designs if number not in self.chosen]
        # There may be more time than was thought: an interval for one more design says more than a narrower one.
        if not self.jobs and others and (fit := self.fit() - running) >= FIRST_SEEDS:
            self._choose(others, fit)
        if self.jobs:
            return self.jobs[0]
        taken = {number: self._taken(number) for number in self.chosen}
        own, further = self.settings.retest_seeds, self.settings.further_seeds
        if not further and all(count >= own for count in taken.values()):
            return None
        doubt = self._doubt = self._doubt or _doubt(self.complete, self.storage, self.chosen)
        number = next_retest(doubt, taken, own, further)
        if number is None:
            return None
        return next((number, s) for s in self._seeds(own + further) if (number, s) not in self.begun)

    def begin(self, job: Job) -> None:
        """It is in flight, or has failed."""
        self.begun.add(job)
        self.jobs = [other for other in self.jobs if other != job]

    def heard(self) -> None:
        """There are new scores."""
        self._doubt = {}


def _doubt(complete: list[Record], storage: Storage, numbers: list[int]) -> dict[int, float]:
    """p (1 - p) of each design, p the probability that validation scores, those of retests too, give its place."""
    more: defaultdict[int, list[Score]] = defaultdict(list)
    for row in storage.retests():
        if "failure" not in row:
            more[row["of"]].append(Score(seed=row["seed"], validation=row["validation"]))
    seen = [replace(r, scores=(*r.scores, *more[r.number]), retests=()) for r in complete]
    belief = believe(seen, storage.objectives)
    chance = {} if belief is None else {number: design.on_front for number, design in belief.by_number.items()}
    return {number: (p := chance.get(number, 0.5)) * (1 - p) for number in numbers}


def retest(session: Session, storage: Storage, budget: Budget, progress: SearchProgress) -> None:
    """Train and score the further seeds of all candidates that the time allows, the most important designs first."""
    lanes = session.config.search.lanes
    plan = _Plan(session, storage, budget)
    cohort = session.cohort()
    running: list[_Retest] = []
    done = 0
    try:
        while True:
            waiting = [r.lane.steps - r.lane.step for r in running]
            while len(running) < lanes and budget.may_train(sum(waiting), len(waiting), session.steps):
                if (job := plan.next(len(running))) is None:
                    break
                number, seed = job
                design = plan.designs[number]
                if running and (design.solo or running[0].lane.design.solo):
                    break  # it needs the backbone for itself
                plan.begin(job)
                lane = cohort.begin(design, seed=seed, steps=session.steps)
                if isinstance(lane, Failure):
                    storage.add_retest(None, {"of": number, "seed": seed, "wall_s": 0.0, "failure": vars(lane)})
                    continue
                running.append(_Retest(number, lane))
                waiting.append(session.steps)
                cohort.admit(lane)
            if not running or budget.over():
                break
            started = time.perf_counter()
            cohort.step()
            budget.measured(time.perf_counter() - started, len(running))
            if ended := [r for r in running if r.lane.done]:
                started = time.perf_counter()
                _score(ended, session, storage, cohort)
                budget.scored(time.perf_counter() - started, len(ended))
                plan.heard()
                cohort.retire(*(r.lane for r in ended))
                cohort.forget(*(r.lane for r in ended))
                running = [r for r in running if r not in ended]
                done += len(ended)
            show(progress, "retest", budget, storage, done=done, running=len(running))
        if left := plan.missing + len(running):
            progress.say(f"{left} of {plan.total} retests did not fit in the time")
    finally:
        cohort.close()


def _score(done: list[_Retest], session: Session, storage: Storage, cohort: Guarded) -> None:
    """Keep what each gave on validation and test data; one without two finite scores is kept as failed."""
    good = [r.lane for r in done if r.lane.failure is None]
    data, metric = session.data, session.task.metric
    scores: dict[int, tuple[float, float, str | None]] = {}
    if good:
        on_validation, on_test = cohort.predict(data.validation, *good), cohort.predict(data.test, *good)
        for lane, first, second in zip(good, on_validation, on_test, strict=True):
            if lane.failure is not None:
                continue
            found = metric.score(first, data.validation.targets), metric.score(second, data.test.targets)
            if np.isfinite(found).all():
                each = metric.per_example(second, data.test.targets)
                scores[id(lane)] = (*found, None if each is None else pack(each))
            else:
                message = "the scores are {:g} on validation and {:g} on test data".format(*found)
                lane.failure = Failure(kind="not finite", message=message, step=lane.step)
    for r in done:
        row: dict[str, Any] = {"of": r.of, "seed": r.lane.seed, "wall_s": r.lane.wall_s}
        if r.lane.failure is not None:
            storage.add_retest(None, row | {"failure": vars(r.lane.failure)})
            continue
        validation, test, outcomes = scores[id(r.lane)]
        n_test = len(data.test.targets)
        row |= {"validation": validation, "test": test, "n_test": n_test, "outcomes": outcomes}
        storage.add_retest(test, row)
