"""What goes into the lanes: the next design that is possible and within the limits, asked for under the lock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftscape.search.comparing import Comparing
from peftscape.search.rung_study import SCORES
from peftscape.search.s3delta_space import STRUCTURES
from peftscape.search.session import design_costs
from peftscape.search.shrink import within
from peftscape.search.storage import EnqueuedError
from peftscape.search.trial import Trial
from peftscape.spaces.design import Design
from peftscape.spaces.presets import textbook
from peftscape.spaces.record import Failure, Record
from peftscape.spaces.space_file import read_space

if TYPE_CHECKING:
    from peftscape.search.budget import Budget
    from peftscape.search.progress import SearchProgress
    from peftscape.search.session import Session
    from peftscape.search.storage import Storage
    from peftscape.search.workers import Workers
    from peftscape.spaces.record import Costs

# Designs over a limit cost nothing to refuse, but a space with hardly any design under it should say so.
REFUSED_IN_A_ROW = 100


class Asking:
    """Asks Optuna on behalf of one worker.

    Args:
        storage, workers: the study and those who share it.
        budget: says what may still start.
    """

    def __init__(
        self, session: Session, storage: Storage, workers: Workers, budget: Budget, progress: SearchProgress
    ) -> None:
        self.session, self.storage, self.workers = session, storage, workers
        self.budget, self.progress = budget, progress
        self.settings = session.config.search
        self.space = read_space(session.config.space, session.backbone.sites)
        self.exhausted = False  # whether nothing under the limits was found
        self.comparing = None
        if session.rungs is not None:
            self.comparing = Comparing(session, session.rungs, storage, workers, self.fits)

    def begin(self) -> None:
        """Take up what others left, and enqueue the textbook once."""
        self.release()
        with self.storage.lock():
            if self.settings.textbook and self.storage.attr("textbook") is None:
                inside = []
                for name, design in textbook().items():
                    try:
                        self.storage.enqueue(self.space.params(design), name)
                        inside.append(name)
                    except ValueError:
                        continue  # this space has no such design
                self.storage.set_attr("textbook", inside)
        for dropped in self.space.dropped:
            self.progress.say(f"left out of the space: {dropped}")

    def release(self) -> None:
        """Let trials of workers that are gone be tried again, or record that they never end."""
        again, given_up = self.storage.release(self.workers)
        if again:
            self.progress.say(f"{again} trials of an interrupted session are trained again")
        for frozen in given_up:
            tries = frozen.user_attrs.get("tries", 1)
            message = f"it was tried {tries} times, and each time its process ended before it did"
            self.storage.tell(frozen, self._record(frozen, Failure(kind="left running", message=message)), self._me)

    @property
    def _me(self) -> str:
        return self.workers.name

    def next(self, in_flight_steps: int, in_flight: int) -> Trial | None:
        """The next trial, if there is one that may start; designs over a limit are told at once, untrained.

        First those that an interrupted session left, then what waits at a rung and may go on, then fresh ones.
        Counting and asking is one thing: no other worker asks in between.
        """
        steps = self.session.steps * self.settings.seeds
        with self.storage.lock():
            running = self.storage.refresh()
            begun = self.storage.trained() + running + self.storage.waiting
            fresh = not self.exhausted and self.budget.may_start(
                begun=begun,
                in_flight_steps=in_flight_steps,
                in_flight=in_flight,
                steps=steps,
                retests=self._retests(),
                whole=self.session.steps,
            )
            found = self._possible() if fresh and self.storage.left else None
            if found is None and self.comparing is not None:
                # A search does not end without a design for want of places at its rungs.
                needed = not fresh and not running and not any(r.state == "complete" for r in self.storage.records)
                frozen = self.comparing.promoted(in_flight_steps, in_flight, needed=needed)
                found = self._trial(frozen, self.space.suggest(frozen)) if frozen is not None else None
            if found is None and fresh:
                found = self._possible()
            if found is not None:
                owed = (found.stops[-1] if found.safe else found.until) * self.settings.seeds
                self.budget.promise(in_flight_steps + owed, in_flight + self.settings.seeds)
                self.workers.beat()
            return found

    def fits(self, in_flight_steps: int, in_flight: int, steps: int) -> bool:
        """Whether so many more steps of a trial can be trained beside what is in flight."""
        return self.budget.fits(
            in_flight_steps=in_flight_steps,
            in_flight=in_flight,
            steps=steps,
            retests=self._retests(),
            whole=self.session.steps,
        )

    def _retests(self) -> int:
        """Lanes of the retest to come; the budget hears what others spent meanwhile."""
        self.budget.hear(self.workers.all(), self._me)
        return self.settings.retest_seeds * (len(self.storage.front()) + 1) + self.settings.further_seeds

    def _possible(self) -> Trial | None:
        for _ in range(REFUSED_IN_A_ROW):
            try:
                trial, design = self.storage.ask(self.space, self._me)
            except EnqueuedError as error:
                self.progress.say(f"trial {error.trial.number}: {error}")
                failure = Failure(kind="not possible", message=str(error))
                self.storage.tell(error.trial, self._record(error.trial, failure), self._me)
                continue
            found = self._trial(trial, design)
            errors = self._errors(design, found.costs)
            if not errors:
                return found
            failure = Failure(kind="limit", message="; ".join(errors))
            self.storage.tell(trial, found.record(self.session, failure, state="pruned"), self._me)
            if not self.storage.attr(STRUCTURES):  # a smaller one would be no structure, and take another's turn
                self._instead(design)
        self.exhausted = True
        self.progress.say(f"{REFUSED_IN_A_ROW} designs in a row were over the limits: the search ends here")
        return None

    def _errors(self, design: Design, costs: Costs) -> list[str]:
        return [*design.check(self.session.backbone.sites), *self.budget.over_limits(costs)]

    def _instead(self, design: Design) -> None:
        """Ask next for the nearest smaller design that is within the limits, if one is found."""
        smaller = within(design, self.space, lambda d: not self._errors(d, design_costs(self.session, d)))
        if smaller is not None and smaller.digest not in {record.digest for record in self.storage.records}:
            self.storage.enqueue(self.space.params(smaller))

    def _trial(self, trial: Any, design: Design) -> Trial:
        name = trial.user_attrs.get("textbook")
        price = design_costs(self.session, design)
        return Trial(
            trial,
            design,
            price,
            name,
            tries=trial.user_attrs.get("tries", 1),
            stops=self.session.stops,
            rungs=[row[0] for row in trial.user_attrs.get(SCORES, ())],
            safe=name is not None,
        )

    def _record(self, frozen: Any, failure: Failure) -> Record:
        """Of a trial that is not trained again; one that was left while it was asked for has no design yet."""
        try:
            return self._trial(frozen, self.space.suggest(frozen)).record(self.session, failure)
        except (KeyError, ValueError):
            metric = self.session.task.metric
            return Record(
                number=frozen.number, state="failed", design={}, digest="", label=f"trial {frozen.number}",
                metric=metric.name, direction=metric.direction, n_validation=len(self.session.data.validation),
                scores=(), costs=None, failure=failure,
            )  # fmt: skip
