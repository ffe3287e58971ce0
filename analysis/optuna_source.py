"""A study out of Optuna: trials, retests, the ablation path, and what was spent."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peftscape.analysis.front import Objective, ObjectiveError, parse_objectives
from peftscape.analysis.outcomes import of_score
from peftscape.analysis.study import FailedRetest, SourceError, Study, default_objectives, several
from peftscape.spaces.record import COSTS, Failure, Record, RecordError, Score, State
from peftscape.spaces.seal import broken

RETEST, ABLATION = ".retest", ".ablation"
"""The studies of a study's retests and of its ablation path are called by its name with these at the end."""


def from_optuna(study: Any, retests: Any = None, ablations: Any = None, *, source: str = "") -> Study:
    """The study in an `optuna.Study`, with the `optuna.Study` of its retests and that of its ablation path.

    Raises:
        SourceError: if a record is not valid.
    """
    notes: list[str] = []
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.name != "WAITING" and "known" not in t.user_attrs]
    attrs = study.user_attrs
    records: dict[int, Record] = {}
    made: list[Record] = []
    errors: list[str] = []
    for trial in trials:
        try:
            records[trial.number] = trial_record(trial, study)
        except RecordError as error:
            errors.append(f"trial {trial.number}: {error}")
    for trial in ablations.get_trials(deepcopy=False) if ablations is not None else ():
        try:
            made += [Record.from_json(trial.user_attrs["record"])] if "record" in trial.user_attrs else []
        except RecordError as error:
            errors.append(f"ablation trial {trial.number}: {error}")
    if errors:
        raise SourceError(several(study.study_name, errors))
    failed = _add_retests(records, retests.get_trials(deepcopy=False), notes) if retests is not None else []
    starts = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    ordered = tuple(records.values())
    return Study(
        name=study.study_name,
        source=source or study.study_name,
        records=ordered,
        objectives=_objectives(attrs, ordered),
        config=attrs.get("config", {}),
        environment=attrs.get("environment", {}),
        elapsed_s=(max(ends) - min(starts)).total_seconds() if starts and ends else None,
        ended_s={
            trial.number: (trial.datetime_complete - min(starts)).total_seconds()
            for trial in trials
            if trial.datetime_complete and starts
        },
        ablations=tuple(made),
        failed_retests=tuple(failed),
        notes=tuple(notes),
        spent=_spent(attrs),
        alone=dict(attrs.get("alone") or {}),
    )


def _spent(attrs: Mapping[str, Any]) -> dict[str, float]:
    """The accounts of all sessions, added up; their wall-clock time counts once where they ran side by side."""
    accounts = [value for key, value in attrs.items() if key.startswith("worker/")]
    if not accounts:
        return {}
    left_out = ("beat", "ended", "joined_s", "wall_s", "promised_s", "promised_examples", "unsaved_s")
    names = [name for name in accounts[0] if name not in left_out]
    total = {name: sum(account.get(name, 0) for account in accounts) for name in names}
    wall = max(account["joined_s"] + account["wall_s"] for account in accounts)
    return {"sessions": len(accounts), "wall_s": wall, **total}


_STATES: dict[str, State] = {"RUNNING": "running", "PRUNED": "pruned", "FAIL": "failed", "COMPLETE": "failed"}


def trial_record(trial: Any, study: Any) -> Record:
    """The record of an Optuna trial, or one that says that it has none.

    Raises:
        RecordError: it is not valid, or not the one that was sealed.
    """
    data = trial.user_attrs.get("record")
    if data is not None:
        if problem := broken(trial):
            raise RecordError(problem)
        return Record.from_json(data)
    state = _STATES[trial.state.name]
    message = "Optuna calls it complete, but it has no record" if trial.state.name == "COMPLETE" else ""
    message = message or str(trial.system_attrs.get("fail_reason") or "it ended without a record")
    first = _metric(study)
    return Record(
        number=trial.number,
        state=state,
        design={},
        digest="",
        label=f"trial {trial.number}",
        metric=first.name,
        direction=first.direction,
        n_validation=0,
        scores=(),
        costs=None,
        wall_s=trial.duration.total_seconds() if trial.duration else 0.0,
        failure=Failure(kind="no record", message=message) if state == "failed" else None,
    )


def _metric(study: Any) -> Objective:
    """The metric of a study's trials, as far as the study says it."""
    for objective in _objectives(study.user_attrs, ()):
        if objective.name not in COSTS:
            return objective
    return Objective("score", "maximize")


def _add_retests(records: dict[int, Record], trials: Sequence[Any], notes: list[str]) -> list[FailedRetest]:
    """Gives each record the scores of its finished retests; says which could not be used, and which failed."""
    scores: dict[int, list[Score]] = {}
    failed: list[FailedRetest] = []
    unfinished = 0
    for trial in trials:
        retest = trial.user_attrs.get("retest")
        if retest is None:
            unfinished += trial.state.name != "WAITING"
            continue
        of = retest.get("of")
        if isinstance(retest.get("failure"), Mapping) and of in records:
            failed.append(_failed_retest(retest))
            continue
        if not {"seed", "validation"} <= retest.keys():
            notes.append(f"a retest of trial {of} lacks its seed or score, and was left out")
            continue
        score = Score(**{key: value for key, value in retest.items() if key in _SCORE})
        if score.outcomes is not None and of_score(score) is None:
            notes.append(f"the outcomes of trial {of} with seed {score.seed} cannot be read, and are not used")
        values = [value for value in (score.validation, score.test) if value is not None]
        if of not in records:
            notes.append(f"a retest of trial {of}, which is not in the study, was left out")
        elif not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            notes.append(f"the retest of trial {of} with seed {score.seed} gave no finite score")
        elif any(score.seed == other.seed for other in scores.get(of, ())):
            notes.append(f"trial {of} was retested twice with seed {score.seed}; the first counts")
        else:
            scores.setdefault(of, []).append(score)
    if unfinished:
        notes.append(f"{unfinished} retests are running or were cut off, and are not counted")
    for number, found in scores.items():
        own = records[number]
        retests = (*own.retests, *sorted(found, key=lambda score: score.seed))
        records[number] = dataclasses.replace(own, retests=retests)
    return failed


def _failed_retest(row: Mapping[str, Any]) -> FailedRetest:
    why = row["failure"]
    failure = Failure(kind=str(why.get("kind")), message=str(why.get("message")), step=why.get("step"))
    return FailedRetest(of=row["of"], seed=row.get("seed", -1), failure=failure, wall_s=row.get("wall_s", 0.0))


_SCORE = {f.name for f in dataclasses.fields(Score)}


def _objectives(attrs: Mapping[str, Any], records: Sequence[Record]) -> tuple[Objective, ...]:
    """What the study says its objectives are: text, or pairs of name and direction; else the default."""
    given = attrs.get("objectives") or dict(attrs.get("config") or {}).get("objectives")
    if isinstance(given, Mapping):
        given = list(given.items())
    if isinstance(given, (list, tuple)) and given:
        given = ",".join(part if isinstance(part, str) else ":".join(map(str, part)) for part in given)
    if isinstance(given, str) and given:
        try:
            return parse_objectives(given)
        except ObjectiveError as error:
            raise SourceError(f"the study's {error}") from None
    return default_objectives(records) if records else ()
