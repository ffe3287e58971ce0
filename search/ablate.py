"""Ablation: train the designs between the best textbook design and the best design that no trial has tried.

    ablate(Path("runs/demo"))

The path is `analysis.ablation`'s; its designs are trained as the trials were, and their records are the trials of
the study `NAME.ablation` in the same storage. They count nowhere else: not for the front, the sampler or the budget.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.analysis.ablation import ablation, ends, missing
from peftscape.analysis.sources import ABLATION, SourceError, Study, load
from peftscape.search.database import open_database
from peftscape.search.lane import new_lane
from peftscape.search.progress import SearchProgress
from peftscape.search.session import Session, design_costs, open_session
from peftscape.search.trial import Trial
from peftscape.spaces.design import Design
from peftscape.spaces.record import Failure
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.config import SearchConfig


def ablate(out: Path, *, storage_url: str | None = None, name: str | None = None, quiet: bool = False) -> Study:
    """Train what is missing on the path, write the report anew, and return the study with the records of it.

    The same call goes on where it stopped: what has a record is not trained again, whatever it gave.

    Args:
        out: a run's folder.
        storage_url: of the PostgreSQL database that holds the study, where it is not in the folder.
        name: which study, where the database holds several.

    Raises:
        SourceError: if there is no path: no complete textbook design, or it is the best one itself.
    """
    from peftscape.search.config_file import read_config

    source = storage_url or out
    study = load(source, name=name)
    found = ends(study.records)
    if found is None:
        raise SourceError(f"{out}: no path to train: no complete textbook design, or the best design is one")
    config = read_config(dict(study.config))
    tried = {record.digest for record in study.ablations}
    designs = []
    for step in missing(ablation(study.records, *found, study.ablations)):
        with suppress(InputError):  # a step that is no design, as full fine-tuning beside another, stays predicted
            designs.append(Design.from_json(dict(step)))
    designs = [design for design in designs if design.digest not in tried]
    if not designs:
        return study
    _train(designs, config, out, study.name, storage_url, quiet)
    from peftscape.analysis.report import write_report

    study = load(source, name=study.name)
    write_report(study, out / "report.html")
    return study


def _train(
    designs: list[Design], config: SearchConfig, out: Path, name: str, storage_url: str | None, quiet: bool
) -> None:
    """Train the designs, as many lanes at once as the search has, and write each record as its trial ends."""
    import optuna

    settings = config.search
    with SearchProgress(quiet=quiet, total=len(designs)) as progress:
        session = open_session(config)
        database, lock = open_database(out, storage_url, name, progress.say)
        try:
            with lock():
                study = optuna.create_study(study_name=name + ABLATION, storage=database, load_if_exists=True)
            waiting = list(designs)
            while waiting:
                width = 1 if waiting[0].solo else max(1, settings.lanes // settings.seeds)
                some = [d for d in waiting[:width] if d.solo == waiting[0].solo]
                waiting = [d for d in waiting if d not in some]
                with lock():
                    trials = [Trial(study.ask(), d, design_costs(session, d), None) for d in some]
                # A step of the path may be no design of this backbone: it is told as failed, and stays predicted.
                wrong = {trial.number: trial.design.check(session.backbone.sites) for trial in trials}
                _together([trial for trial in trials if not wrong[trial.number]], session)
                with lock():
                    for trial in trials:
                        _tell(study, trial, session, wrong[trial.number])
                progress.say(f"{len(designs) - len(waiting)} of {len(designs)} designs of the path are trained")
        finally:
            database.remove_session()
            database.engine.dispose()


def _together(trials: list[Trial], session: Session) -> None:
    """Train the trials' lanes side by side to the end, and score them on the validation data."""
    cohort = session.cohort()
    try:
        for trial in trials:
            for i in range(session.config.search.seeds):
                seed = session.config.search.seed + i
                lane = new_lane(
                    trial.design, seed=seed, steps=session.steps, backbone=session.backbone, head=session.head
                )
                cohort.start(lane)
                trial.lanes.append(lane)
        everyone = [lane for trial in trials for lane in trial.lanes if lane.failure is None]
        cohort.admit(*everyone)
        while cohort.lanes:
            cohort.step()
            done = [lane for lane in cohort.lanes if lane.done]
            good = [lane for lane in done if lane.failure is None]
            scores = _scores(good, session, cohort) if good else {}
            for trial in trials:
                trial.scores |= {lane.seed: scores[id(lane)] for lane in trial.lanes if id(lane) in scores}
            cohort.retire(*done)
    finally:
        cohort.close()


def _scores(lanes: list[Any], session: Session, cohort: Any) -> dict[int, float]:
    """Validation scores by lane; one that is not finite fails its lane."""
    data, found = session.data.validation, {}
    for lane, rows in zip(lanes, cohort.predict(data, *lanes), strict=True):
        score = session.task.metric.score(rows, data.targets)
        if np.isfinite(score):
            found[id(lane)] = score
        else:
            lane.failure = lane.failure or Failure(kind="not finite", message=f"the score is {score}", step=lane.step)
    return found


def _tell(study: Any, trial: Trial, session: Session, wrong: list[str]) -> None:
    from optuna.trial import TrialState

    record = trial.record(session, Failure(kind="not possible", message="; ".join(wrong)) if wrong else None)
    trial.trial.set_user_attr("record", record.to_json())
    if record.state == "complete":
        study.tell(trial.trial, record.validation)
    else:
        study.tell(trial.trial, state=TrialState.FAIL)
