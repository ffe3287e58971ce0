"""The search: Optuna suggests designs, lanes train them, records keep what they gave.

    run_search(config, Path("runs/demo"))

Fill the free lanes, train one step, evaluate and tell what has finished, until the budget says stop; then retest
what could be on the front with further seeds on data that no selection saw, and write the report.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscape.search.account import Account
from peftscape.search.budget import Budget, parameter_limit, parse_bytes, parse_duration
from peftscape.search.crew import crew
from peftscape.search.database import CHECKPOINTS, REPORT, WORKERS
from peftscape.search.disk import writing
from peftscape.search.progress import SearchProgress
from peftscape.search.s3delta_space import STRUCTURES
from peftscape.search.stopping import HangError, Stop
from peftscape.search.storage import ANOTHER, Storage
from peftscape.search.workers import PREFIX, Workers
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.analysis.sources import Study
    from peftscape.search.config import SearchConfig
    from peftscape.search.guarded import Memory
    from peftscape.search.session import Session


def run_search(
    config: SearchConfig,
    out: Path,
    *,
    more_trials: int | None = None,
    more_time_s: float | None = None,
    quiet: bool = False,
    storage_url: str | None = None,
    fork: Path | None = None,
    workers: int = 1,
    started: float | None = None,
    helper: Stop | None = None,
) -> Study:
    """Run a search in a folder, or go on with the one that is there; a finished one is read and returned.

    Several processes may run the same search in one folder, or with one `storage_url`: they share its budget.

    Args:
        out: gets `study.db` (an Optuna storage), `report.html`, and the front's adapters under `adapters/`.
        more_trials, more_time_s: extend the budget of the study that is there.
        storage_url: of a PostgreSQL database that holds the study instead of `study.db`.
        fork: a run whose results a new study shall know; they guide it, and the best of them are tried again.
        workers: processes on this machine that share the search; the others end with this one.
        started: when the command was given, by `time.monotonic()`; its time counts from there.
        helper: stops a worker that another process started: it leaves retests and report to that.

    Raises:
        InputError: with all that is wrong with the configuration, or if the folder holds another search.
        DiskError: there is no room; all that was written before is whole, and the same call goes on.
        KeyboardInterrupt: it was stopped, and what was in flight is saved.
    """
    started = time.monotonic() if started is None else started
    with helper or Stop() as stop, SearchProgress(quiet=quiet) as progress:
        storage = Storage(out, config, storage_url, progress.say)
        try:
            limits = _limits(storage, config, more_trials, more_time_s)
            if not storage.attr("finished"):
                run = _Run(config, storage, limits, stop, progress, started, fork)
                with crew(workers - 1, config, out, storage_url):
                    run.run(to_the_end=helper is None)
            return storage.study()
        finally:
            storage.close()


class _Run:
    """One session of a study."""

    def __init__(
        self, config: SearchConfig, storage: Storage, limits: dict[str, Any], stop: Stop, progress: SearchProgress,
        started: float, fork: Path | None,
    ) -> None:  # fmt: skip
        self.config, self.storage, self.stop, self.progress, self.fork = config, storage, stop, progress, fork
        self.out = storage.out
        self.account = Account()
        folder = None if storage.is_shared else self.out / WORKERS
        self.workers = Workers(storage.attrs, storage.set_attr, storage.lock, folder, self.account)
        self.account.joined_s = _spent_s(storage)
        own = config.budget
        self.budget = Budget(
            trials=limits["trials"],
            time_s=limits["time_s"],
            trainable=None,
            peak_bytes=None if own.peak_bytes is None else parse_bytes(own.peak_bytes),
            adapter_bytes=None if own.adapter_bytes is None else parse_bytes(own.adapter_bytes),
            device_s=parse_duration(own.device_time) if own.device_time else None,
            examples=own.examples,
            spent_s=self.account.joined_s,
            started=started,
            batch=config.search.batch_size,
            step_limit_s=parse_duration(config.search.step_limit),
            account=self.account,
        )
        if (measured := storage.attr("report_s")) is not None:
            self.budget.reported(measured)
        self.reported = 0

    def run(self, *, to_the_end: bool = True) -> None:
        """Search, and to the end: retest, report. Whatever ends it, what was spent and found is in the study."""
        storage = self.storage
        self.workers.join()
        try:
            with self.account.spending("loading_s"):
                session = self._loaded()
            if session is not None:
                from peftscape.search.loop import Loop

                if self.config.search.sampler == "s3delta":
                    from peftscape.search.s3delta import find_structures

                    find_structures(session, storage, self.workers, self.budget, self.progress)
                Loop(session, storage, self.workers, self.budget, self.progress, self._interim).run()
            if to_the_end and self._is_last():
                if session is not None:
                    from peftscape.search.alone import measure_front

                    # Before the retests, which take what time there is; the front is the same after them.
                    with self.account.spending("evaluation_s"):
                        measure_front(session, storage, self.budget)
                    self._retest(session)
                self._report()
                storage.set_attr("finished", True)
        finally:
            self._end()

    def _loaded(self) -> Session | None:
        """The session, or None if the time was over before model and data were there."""
        limit = self.budget.patience_s()
        try:
            with self.stop.limit(limit):
                return self._session()
        except HangError:
            if not self.budget.over():
                why = f"not loaded within {limit:.0f} s, which is search.step_limit"
                raise InputError("model and data", [why]) from None
            self.progress.say("the time was over before model and data were loaded")
            return None

    def _session(self) -> Session:
        """What the configuration names, loaded; refused if it is not what the study was begun with."""
        from peftscape.search.checkpoint import Checkpoints
        from peftscape.search.environment import environment
        from peftscape.search.fork import learn
        from peftscape.search.identity import changes, identity
        from peftscape.search.session import open_session
        from peftscape.spaces.space_file import read_space

        storage, budget = self.storage, self.budget
        session = open_session(self.config)
        space = read_space(self.config.space, session.backbone.sites)
        now = identity(session, space)
        with storage.lock():
            known = storage.attr("identity")
            if known is None:
                storage.set_attr("identity", now)
                if self.fork is not None:
                    learn(self.fork, storage, space, self.progress.say)
            elif errors := changes(known, now):
                raise InputError(str(self.out), [*errors, ANOTHER])
            storage.set_attr("environment", environment(session.backbone))
            cut = {name: getattr(session.data, name).cut for name in ("train", "validation", "test")}
            storage.set_attr("cut", cut)
        if any(cut.values()):
            why = "longer than the model takes, or without a token"
            self.progress.say(f"{sum(cut.values())} texts are cut or left out: {why}")
        budget.trainable = parameter_limit(self.config.budget.trainable, session.backbone.sites.parameters)
        # A forward pass is a third of a step.
        validation, test = session.data.validation.ids, session.data.test.ids
        budget.evaluation_steps = len(validation) / self.config.search.batch_size / 3
        budget.retest_evaluations = 1 + len(test) / len(validation)
        session.guards = {
            "stop": self.stop, "patience_s": budget.patience_s, "over": budget.over, "account": self.account,
            "memory": _memory(session), "checkpoints": Checkpoints(self.out / CHECKPOINTS, self.progress.say),
        }  # fmt: skip
        return session

    def _is_last(self) -> bool:
        """Whether this worker is the one that retests: the first to ask among those that live."""
        while True:
            with self.storage.lock():
                holder = self.storage.attr("retests")
                if holder is None or self.workers.dead(holder, self.workers.all()):
                    self.storage.set_attr("retests", self.workers.name)
                    return True
            if self.workers.lives(holder):
                self.progress.say("another worker retests and writes the report")
                return False

    def _retest(self, session: Session) -> None:
        from peftscape.search.retest import retest

        self.budget.hear(self.workers.all(), self.workers.name)
        self.budget.retesting = True
        before, known = self.account.device_s, len(self.storage.retests())
        try:
            with self.account.spending("retest_s"):
                retest(session, self.storage, self.budget, self.progress)
        except HangError:
            self.progress.say("the time was over within a step of a retest")
        finally:
            # Steps and scores are measured one by one; what lies between them is not.
            self.account.device_s = max(self.account.device_s, before + 0.95 * self.account.retest_s)
            failed = [row for row in self.storage.retests()[known:] if "failure" in row]
            self.account.lose(sum(row["wall_s"] for row in failed), "retest_s")

    def _interim(self, records: int) -> None:
        """A report of what there is, after the first trials and whenever there are twice as many.

        It lies there whatever happens next, and says how long the last one will take.
        """
        due = records >= max(self.config.search.lanes, 2 * self.reported)
        if due and self.budget.left_s() > 4 * self.budget.report_s:
            self.reported = records
            self._report()

    def _report(self) -> None:
        from peftscape.analysis.report import write_report

        path = self.out / REPORT
        started = time.monotonic()
        self.budget.elapsed_s()
        self.workers.beat()
        part = self.out / f".{REPORT}.part"
        with self.account.spending("report_s"), writing(path):
            try:
                write_report(self.storage.study(), part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        took = time.monotonic() - started
        self.budget.reported(took)
        self.storage.set_attr("report_s", took)

    def _end(self) -> None:
        self.budget.promise(0, 0)
        elapsed = self.budget.elapsed_s()
        self.workers.rest()
        try:
            with self.storage.lock():
                self.workers.leave()
                self.storage.set_attr("spent_s", max(elapsed, float(self.storage.attr("spent_s", 0.0))))
                if self.storage.attr("retests") == self.workers.name:
                    self.storage.set_attr("retests", None)
            self.storage.copy(now=True)
        except Exception as error:  # what ended the session is told, not what this then met
            self.progress.say(f"the session's end could not be written: {error}")


def _memory(session: Session) -> Memory:
    """What lanes may take of the memory that is free now, the weights being there."""
    from peftscape.search.guarded import Memory
    from peftscape.search.memory import SHARE, free_bytes
    from peftscape.search.session import design_costs
    from peftscape.spaces.cost import model_bytes

    weights = model_bytes(session.backbone.sites, session.backbone.precision, session.backbone.computation)
    if (given := session.config.search.memory_limit) is not None:
        limit: int | None = parse_bytes(given)
    else:
        free = free_bytes(session.backbone.device)
        limit = None if free is None else weights + round(SHARE * free)
    return Memory(limit=limit, weights=weights, alone=lambda design: design_costs(session, design).peak_bytes)


def _spent_s(storage: Storage) -> float:
    """Seconds that all sessions so far took, those side by side once; a killed one's to its last sign of life."""
    attrs = storage.attrs()
    ends = [float(said["joined_s"] + said["wall_s"]) for key, said in attrs.items() if key.startswith(PREFIX)]
    return max(float(attrs.get("spent_s", 0.0)), *ends, 0.0)


def _limits(
    storage: Storage, config: SearchConfig, more_trials: int | None, more_time_s: float | None
) -> dict[str, Any]:
    """The budget in force: the configuration's, or what earlier sessions extended it to, and now more."""
    time_s = parse_duration(config.budget.time) if config.budget.time else None
    own = {
        "trials": config.budget.trials, "time_s": time_s, "device_time": config.budget.device_time,
        "examples": config.budget.examples,
    }  # fmt: skip
    known = storage.attr("limits")
    if known:  # of a version that knew fewer
        known = {**known, "own": {**dict.fromkeys(own), **known["own"]}}
    limits = dict(known["extended"]) if known and known["own"] == own else dict(own)
    if more_trials is not None:
        limits["trials"] = storage.trained() + more_trials
        limits["time_s"] = None if more_time_s is None else limits["time_s"]
    if more_time_s is not None:
        limits["time_s"] = _spent_s(storage) + more_time_s
        limits["trials"] = limits["trials"] if more_trials is not None else None
    ends = (limits["trials"], limits["time_s"], config.budget.device_time, config.budget.examples)
    if all(end is None for end in ends):
        raise InputError("budget", ["trials, time, device_time or examples have to be limited"])
    new = {"own": own, "extended": limits}
    if new != known:
        storage.set_attr("limits", new)
        storage.set_attr("finished", False)
        if storage.attr(STRUCTURES) == []:  # for want of a budget: now there may be room
            storage.set_attr(STRUCTURES, None)
    return limits
