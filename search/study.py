"""The search: Optuna suggests designs, lanes train them, records keep what they gave.

    run_search(config, Path("runs/demo"))

Fill the free lanes, train one step, evaluate and tell what has finished, until the budget says stop; then retest
what could be on the front with further seeds on data that no selection saw, and write the report.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscape.search.budget import Budget, parameter_limit, parse_duration
from peftscape.search.progress import SearchProgress
from peftscape.search.storage import Storage
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.analysis.sources import Study
    from peftscape.search.config import SearchConfig


def run_search(
    config: SearchConfig,
    out: Path,
    *,
    more_trials: int | None = None,
    more_time_s: float | None = None,
    quiet: bool = False,
) -> Study:
    """Run a search in a folder, or go on with the one that is there; a finished one is read and returned.

    Args:
        out: gets `study.db` (an Optuna storage), `report.html`, and the front's adapters under `adapters/`.
        more_trials, more_time_s: extend the budget of the study that is there.

    Raises:
        InputError: with all that is wrong with the configuration, or if the folder holds another search.
    """
    from peftscape.analysis.report import write_report

    started = time.monotonic()
    storage = Storage(out, config)
    limits = _limits(storage, config, more_trials, more_time_s)
    if storage.attr("finished") and more_trials is None and more_time_s is None:
        return storage.study()
    storage.set_attr("finished", False)

    from peftscape.search.environment import environment
    from peftscape.search.loop import Loop
    from peftscape.search.retest import retest
    from peftscape.search.session import open_session

    with _terminable(), SearchProgress(quiet=quiet) as progress:
        session = open_session(config)
        storage.set_attr("environment", environment(session.backbone))
        budget = Budget(
            trials=limits["trials"],
            time_s=limits["time_s"],
            trainable=parameter_limit(config.budget.trainable, session.backbone.sites.parameters),
            spent_s=float(storage.attr("spent_s", 0.0)),
            started=started,
            retest_evaluations=1 + len(session.task.test) / len(session.task.validation),
        )
        try:
            Loop(session, storage, budget, progress).run()
            retest(session, storage, budget, progress)
            storage.set_attr("finished", True)
        finally:
            storage.set_attr("spent_s", budget.elapsed_s())
    study = storage.study()
    write_report(study, out / "report.html")
    return study


def _limits(
    storage: Storage, config: SearchConfig, more_trials: int | None, more_time_s: float | None
) -> dict[str, Any]:
    """The budget in force: the configuration's, or what earlier sessions extended it to, and now more."""
    time_s = parse_duration(config.budget.time) if config.budget.time else None
    own = {"trials": config.budget.trials, "time_s": time_s}
    known = storage.attr("limits")
    limits = dict(known["extended"]) if known and known["own"] == own else dict(own)
    if more_trials is not None:
        limits["trials"] = storage.trained() + more_trials
        limits["time_s"] = None if more_time_s is None else limits["time_s"]
    if more_time_s is not None:
        limits["time_s"] = float(storage.attr("spent_s", 0.0)) + more_time_s
        limits["trials"] = limits["trials"] if more_trials is not None else None
    if limits["trials"] is None and limits["time_s"] is None:
        raise InputError("budget", ["trials, time or both have to be limited"])
    storage.set_attr("limits", {"own": own, "extended": limits})
    return limits


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a search as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
