"""Retests: what could be on the front is trained again with further seeds and scored once on the test data.

Which designs and in which order is decided on validation scores alone, and the front is never formed again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.analysis.noise import candidates
from peftscape.search.progress import show
from peftscape.search.retest_order import retest_order
from peftscape.spaces.design import Design
from peftscape.spaces.outcomes import pack
from peftscape.spaces.record import Failure

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


def retest(session: Session, storage: Storage, budget: Budget, progress: SearchProgress) -> None:
    """Train and score the further seeds of all candidates that the time allows, the most important designs first."""
    settings = session.config.search
    jobs = _jobs(session, storage, budget)
    cohort = session.cohort()
    running: list[_Retest] = []
    total = len(jobs)
    try:
        while jobs or running:
            free = settings.lanes - len(running)
            waiting = [r.lane.steps - r.lane.step for r in running]
            while jobs and free > 0 and budget.may_train(sum(waiting), len(waiting), session.steps):
                number, design, seed = jobs[0]
                if running and (design.solo or running[0].lane.design.solo):
                    break  # it needs the backbone for itself
                del jobs[0]
                lane = cohort.begin(design, seed=seed, steps=session.steps)
                if isinstance(lane, Failure):
                    storage.add_retest(None, {"of": number, "seed": seed, "wall_s": 0.0, "failure": vars(lane)})
                    continue
                running.append(_Retest(number, lane))
                waiting.append(session.steps)
                cohort.admit(lane)
                free -= 1
            if not running or budget.over():
                break
            started = time.perf_counter()
            cohort.step()
            budget.measured(time.perf_counter() - started, len(running))
            done = [r for r in running if r.lane.done]
            if done:
                _score(done, session, storage, cohort)
                cohort.retire(*(r.lane for r in done))
                cohort.forget(*(r.lane for r in done))
                running = [r for r in running if r not in done]
            show(
                progress,
                "retest",
                budget,
                storage,
                done=total - len(jobs) - len(running),
                running=len(running),
            )
        left = len(jobs) + len(running)
        if left:
            progress.say(f"{left} of {total} retests did not fit in the time")
    finally:
        cohort.close()


def _jobs(session: Session, storage: Storage, budget: Budget) -> list[tuple[int, Design, int]]:
    settings = session.config.search
    seeds = [settings.seed + FIRST_SEED + i for i in range(settings.retest_seeds)]
    known = storage.retested(TRIES)
    complete = [r for r in storage.records if r.state == "complete"]
    found = candidates(complete, storage.objectives) if complete else ()
    designs = {r.number: Design.from_json(dict(r.design)) for r in found}
    order = retest_order(list(designs), seeds, known, budget.retests_that_fit(session.steps))
    return [(number, designs[number], seed) for number, seed in order]


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
