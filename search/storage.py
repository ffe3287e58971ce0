"""A run's folder: the Optuna storage, which is the one truth, and beside it adapters and the report.

Trials carry their record as a user attribute, written before `tell`, with a seal; retests are trials of a second
study, `NAME.retest`, in the same storage. Any Optuna tool works on both. Whatever writes, or reads in order to
write, does so under the study's lock.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscape.analysis import sources
from peftscape.analysis.front import Objective, front, parse_objectives
from peftscape.search import integrity
from peftscape.search.database import ADAPTERS, FILE, one_transaction, open_database
from peftscape.search.disk import writing
from peftscape.search.rung_study import PROMOTED, SCORES, StudyRungs, waits
from peftscape.search.s3delta_space import STRUCTURES, params_of
from peftscape.search.stored_config import config_changes, plain
from peftscape.spaces.record import NewerRecordError, Record, RecordError
from peftscape.spaces.seal import SEAL, seal
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.config import SearchConfig
    from peftscape.search.rungs import Rungs
    from peftscape.search.workers import Workers
    from peftscape.spaces.design import Design
    from peftscape.spaces.space import Space

# A trial is tried three times; then it is what ends its process, or it will not be known.
TRIES = 3
# A copy of the study is made this often, and never for more than a fiftieth of the time.
COPY_EVERY_S, COPY_SHARE = 60.0, 50
ANOTHER = "this folder holds another search; use another --out, or --fork for a new study that knows this one's results"


class EnqueuedError(ValueError):
    """A trial that somebody enqueued has parameters that are no design of the space."""

    def __init__(self, trial: Any, why: str) -> None:
        self.trial = trial
        super().__init__(f"it was enqueued with parameters that are no design of this space: {why}")


class Storage:
    """The studies of one run.

    Args:
        out: the run's folder; made if it is not there.
        config: of the search; one that differs from the folder's own is refused (its budget may differ).
        url: of a PostgreSQL database, for workers on several machines; `study.db` in the folder without.
        say: told what was found damaged.

    Raises:
        InputError: if the folder holds another search, with the differences; or its file is damaged.
        DiskError: if there is no room.
    """

    def __init__(
        self, out: Path, config: SearchConfig, url: str | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.out, self.config = out, config
        self.objectives: tuple[Objective, ...] = parse_objectives(config.search.objectives)
        self._where = out / FILE
        self._copied, self._took = time.monotonic(), 0.0
        self._records: dict[int, Record] = {}
        self.trials: list[Any] = []  # Optuna's, as of the last look: those in flight are read anew at each
        self._current = False  # whether nothing was written here since
        # As of the last look: how many trials there are, and of them how many wait at a rung, or for a new session.
        self._asked = self.waiting = self.left = 0
        self._front: tuple[Record, ...] | None = None
        try:
            self._open(url, say)
        except RecordError as error:
            if url is not None or isinstance(error, NewerRecordError):
                raise InputError(config.name, [str(error)]) from None
            self._records.clear()
            self.close()
            integrity.restore(self._where, str(error), say)
            self._open(url, say)

    def _open(self, url: str | None, say: Callable[[str], None]) -> None:
        with writing(self._where):
            self._database, self.lock = open_database(self.out, url, self.config.name, say)
            with self.lock():
                self._open_studies(self.config)
                self.refresh()

    def _open_studies(self, config: SearchConfig) -> None:
        import optuna

        def study(name: str, directions: list[str]) -> Any:
            return optuna.create_study(
                study_name=name, storage=self._database, directions=directions, load_if_exists=True
            )

        self._study = study(config.name, [o.direction for o in self.objectives])
        self._retests = study(f"{config.name}{sources.RETEST}", [self.objectives[0].direction])
        self._id = self._database.get_study_id_from_name(config.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([o.name for o in self.objectives])
        known = self.attr("config")
        if known is None:
            self._study.set_user_attr("config", plain(config))
            self._study.set_user_attr("objectives", config.search.objectives)
        elif differences := config_changes(known, plain(config)):
            raise InputError(str(self.out), [*differences, ANOTHER])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._current = False
        with writing(self._where), self.lock():
            yield

    # -- trials -----------------------------------------------------------------------------------------------------

    def ask(self, space: Space, worker: str = "") -> tuple[Any, Design]:
        """The next trial, now this worker's, and its design, from a sampler made for its number.

        Whoever asks holds the lock since the last `refresh`, or is alone on the study.

        Raises:
            EnqueuedError: somebody enqueued it, and its parameters are no design; it is this worker's.
        """
        from peftscape.search.samplers import sampler

        search, trials = self.config.search, self.trials if self._current else None
        with self._writing():
            known = params_of(self.attr(STRUCTURES), space, self._asked) if search.sampler == "s3delta" else None
            self._study.sampler = sampler(search.sampler, search.seed, self._asked, known, trials)
            trial = self._study.ask()
            self._asked = max(self._asked, trial.number + 1)
            with one_transaction(self._database):  # before its design: asking for that may be what ends a process
                trial.set_user_attr("worker", worker)
                trial.set_user_attr("tries", trial.user_attrs.get("tries", 0) + 1)
            try:
                with one_transaction(self._database):
                    return trial, space.suggest(trial)
            except (KeyError, ValueError) as error:
                if "fixed_params" not in self._trial(trial.number).system_attrs:
                    raise
                raise EnqueuedError(trial, str(error)) from None

    def enqueue(self, params: Mapping[str, Any], textbook: str | None = None, *, again: bool = False) -> None:
        """Ask for a design before the sampler's own; one that was asked for before only `again`."""
        attrs = {"textbook": textbook} if textbook else None
        with self._writing():
            self._study.enqueue_trial(dict(params), user_attrs=attrs, skip_if_exists=not again)

    def add(self, trial: Any) -> None:
        """A trial that the sampler shall know of; it has no record and is no result of this study."""
        with self._writing():
            self._study.add_trial(trial)

    def tell(self, trial: Any, record: Record, worker: str = "") -> bool:
        """Write the record, then its values; what failed, was stopped or was never trained is told as pruned.

        TPE asks again for what it was told had failed; pruned trials it ranks behind all complete ones, and NSGA-II and
        GP leave them out. While a trial waits at a rung it is running, which TPE takes for a bad one. Made-up values
        for what was stopped guided no sampler better (`benchmarks/telling.py`).

        Returns:
            False if the trial is no longer this worker's: it was taken for dead, and another has the trial.
        """
        from optuna.trial import TrialState

        with self._writing():
            found = self._trial(record.number)
            if found.state != TrialState.RUNNING or found.user_attrs.get("worker", "") != worker:
                return False
            done = record.state == "complete"
            plain = record.to_json()
            values = [float(o.value(record)) for o in self.objectives] if done else None
            with one_transaction(self._database):
                self._set(record.number, "record", plain)
                self._set(record.number, SEAL, seal(plain, values, found.params))
            if done:
                self._study.tell(record.number, values)
            else:
                self._study.tell(record.number, state=TrialState.PRUNED)
        self._keep(record)
        return True

    def leave(self, number: int, *, counts: bool = False) -> None:
        """Let a trial in flight wait for another session; the try counts only if it was not this one's end."""
        from optuna.trial import TrialState

        with self._writing():
            trial = self._trial(number)
            # One that a full disk met on its way to waiting waits.
            if trial.state == TrialState.RUNNING and not waits(trial):
                self._set(number, "tries", max(0, trial.user_attrs.get("tries", 1) - (not counts)))
                self._database.set_trial_state_values(self._trial_id(number), state=TrialState.WAITING)

    def release(self, workers: Workers) -> tuple[int, list[Any]]:
        """Let trials of workers that are gone be asked for again, before all others.

        They keep their numbers, and so the trials after them theirs: a search that was interrupted asks its sampler
        what an unbroken one does.

        Returns:
            how many will be tried again, and those that were tried often enough; these are now this worker's.
        """
        from optuna.trial import TrialState

        given_up = []
        with self._writing():
            known = workers.all()
            running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            left = [t for t in running if not waits(t) and workers.dead(t.user_attrs.get("worker"), known)]
            for trial in left:
                if trial.user_attrs.get("tries", 1) < TRIES:
                    self.leave(trial.number, counts=True)
                else:
                    self._set(trial.number, "worker", workers.name)
                    given_up.append(trial)
            for name, said in known.items():
                if not said["ended"] and workers.dead(name, known):
                    workers.bury(name, said)
            # A retest is asked for and told in one breath, under the lock: what runs now was cut off there.
            for trial in self._retests.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                self._retests.tell(trial.number, state=TrialState.FAIL)
        return len(left) - len(given_up), given_up

    # -- rungs ------------------------------------------------------------------------------------------------------

    def rungs(self, rungs: Rungs, error: Callable[[float], float]) -> StudyRungs:
        """How far the study's trials have come, as the rungs compare them."""
        return StudyRungs(self._study, rungs, quality=0, error=error)

    def reach(self, record: Record, worker: str, marks: Mapping[str, Any]) -> bool:
        """Note that a trial was scored at one more rung; from then on it waits there.

        Args:
            record: of the trial as far as it is.
            marks: further attributes of the trial.

        Returns:
            False if the trial is no longer this worker's.
        """
        from optuna.trial import TrialState

        with self._writing():
            found = self._trial(record.number)
            if found.state != TrialState.RUNNING or found.user_attrs.get("worker", "") != worker:
                return False
            costs = [float(o.value(record)) for o in self.objectives[1:]]
            scores = [[rung.validation, *costs] for rung in record.rungs]
            with one_transaction(self._database):
                for name, value in {"record": record.to_json(), **marks, SCORES: scores}.items():
                    self._set(record.number, name, value)
        return True

    def go_on(self, number: int, worker: str) -> Any:
        """Send a trial on from its rung, now this worker's."""
        with self._writing():
            attrs = self._trial(number).user_attrs
            if attrs.get("worker") != worker:
                self._set(number, "worker", worker)
            self._set(number, PROMOTED, len(attrs[SCORES]))
            return self._trial(number)

    def stop(self, number: int, worker: str) -> bool:
        """End a trial at its rung: it is told with the record that it has there."""
        with self._writing():
            trial = self._trial(number)
            if trial.user_attrs.get("worker") != worker:
                self._set(number, "worker", worker)
            return self.tell(trial, replace(Record.from_json(trial.user_attrs["record"]), state="pruned"), worker)

    # -- records ----------------------------------------------------------------------------------------------------

    @property
    def records(self) -> list[Record]:
        """Of all trials that ended, as far as this worker has heard."""
        return list(self._records.values())

    def refresh(self) -> int:
        """Hear what other workers told; how many trials are in flight, of all workers. Those at a rung wait instead."""
        self.trials = trials = self._study.get_trials(deepcopy=False)
        self._asked, self._current = len(trials), True
        self.waiting = sum(map(waits, trials))
        # A trial that was enqueued waits too, and has not been tried.
        self.left = sum(trial.state.name == "WAITING" and "tries" in trial.user_attrs for trial in trials)
        for trial in trials:
            if trial.number not in self._records and trial.state.is_finished() and "known" not in trial.user_attrs:
                self._keep(sources.trial_record(trial, self._study))
        running: int = sum(trial.state.name == "RUNNING" for trial in trials)
        return running - self.waiting

    def _keep(self, record: Record) -> None:
        self._records[record.number] = record
        self._records = dict(sorted(self._records.items()))
        self._front = None

    def front(self, *more: Record) -> tuple[Record, ...]:
        """The records that none dominates; with `more` records as if they were told."""
        if more:
            return front([*self.records, *more], self.objectives)
        if self._front is None:
            self._front = front(self.records, self.objectives)
        return self._front

    def trained(self) -> int:
        """How many trials were trained, to whatever end; without refused designs and interrupted attempts."""
        return sum(r.costs is not None and (r.state != "pruned" or bool(r.curve)) for r in self.records)

    # -- retests ----------------------------------------------------------------------------------------------------

    def retests(self) -> list[dict[str, Any]]:
        """The rows of all retests that ended, those that failed with their `failure`."""
        trials = self._retests.get_trials(deepcopy=False)
        return [t.user_attrs["retest"] for t in trials if t.state.is_finished() and "retest" in t.user_attrs]

    def retested(self, tries: int = 1) -> set[tuple[int, int]]:
        """(trial, seed) of all retests that gave a score, or failed so often."""
        rows = self.retests()
        failed = Counter((row["of"], row["seed"]) for row in rows if "failure" in row)
        done = {(row["of"], row["seed"]) for row in rows if "failure" not in row}
        return done | {job for job, times in failed.items() if times >= tries}

    def add_retest(self, value: float | None, row: Mapping[str, Any]) -> None:
        """Keep a retest's score; without one, why it failed."""
        from optuna.trial import TrialState

        with self._writing():
            trial = self._retests.ask()
            trial.set_user_attr("retest", dict(row))
            self._retests.tell(trial, value, TrialState.FAIL if value is None else TrialState.COMPLETE)

    # -- the run ----------------------------------------------------------------------------------------------------

    def attrs(self) -> dict[str, Any]:
        return dict(self._study.user_attrs)

    def attr(self, name: str, default: Any = None) -> Any:
        return self._study.user_attrs.get(name, default)

    def set_attr(self, name: str, value: Any) -> None:
        with self._writing():
            self._study.set_user_attr(name, value)

    def study(self) -> sources.Study:
        """Everything there is, as analysis reads it."""
        import optuna

        name = f"{self._study.study_name}{sources.ABLATION}"
        known = name in optuna.get_all_study_names(self._database)
        ablations = optuna.load_study(study_name=name, storage=self._database) if known else None
        return sources.from_optuna(self._study, self._retests, ablations, source=str(self.out))

    def adapter_folder(self, number: int) -> Path:
        """Where the adapter of a trial lies."""
        return self.out / ADAPTERS / str(number)

    @property
    def is_shared(self) -> bool:
        """Whether workers on other machines may have the study too."""
        return bool(self._database.engine.dialect.name != "sqlite")

    def copy(self, *, now: bool = False) -> None:
        """Keep a copy of the study's file to go back to, if it is time."""
        if not self.is_shared and (now or time.monotonic() - self._copied > max(COPY_EVERY_S, COPY_SHARE * self._took)):
            started = time.monotonic()
            with self._writing():
                integrity.mark(self._where)
            self._copied = time.monotonic()
            self._took = self._copied - started

    def close(self) -> None:
        """Let go of the database."""
        self._database.remove_session()
        self._database.engine.dispose()
        self.lock.close()

    def _trial_id(self, number: int) -> int:
        return int(self._database.get_trial_id_from_study_id_trial_number(self._id, number))

    def _trial(self, number: int) -> Any:
        return self._database.get_trial(self._trial_id(number))

    def _set(self, number: int, name: str, value: Any) -> None:
        self._database.set_trial_user_attr(self._trial_id(number), name, value)
