"""Where records come from: a run folder, an Optuna storage, JSON lines, CSV, or HF peft's result files."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftscape.analysis.front import Objective, ObjectiveError, parse_objectives
from peftscape.analysis.measures import Imported, is_cost, measured
from peftscape.analysis.outcomes import of_score
from peftscape.analysis.peft_results import is_peft_folder, read_peft
from peftscape.analysis.rows import RowsError, flat_objects, imported, read_csv
from peftscape.spaces.record import COSTS, Failure, Record, RecordError, Score, State
from peftscape.spaces.seal import broken

RETEST, ABLATION = ".retest", ".ablation"
"""The studies of a study's retests and of its ablation path are called by its name with these at the end."""


class SourceError(ValueError):
    """A source that cannot be read; the message says what was expected."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Records with what is needed to repeat them.

    `source` is what `load` was given, fit to be shown (no password); `elapsed_s` the time from the first
    trial's start to the last trial's end, pauses included; `ended_s` the seconds from that start to each
    trial's end, by number, where the source knows them; `ablations` the records that were made for the path
    from a textbook design to the best and count nowhere else; `notes` what was odd in the source; `spent` what
    the search spent and on what, by name (`search.account.Account`), over all its sessions: `wall_s` of it is
    the search's own time, without pauses, and by a clock that no change of the date moves.
    """

    name: str
    source: str
    records: tuple[Record, ...]
    objectives: tuple[Objective, ...]
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    environment: Mapping[str, Any] = field(default_factory=dict, hash=False)
    elapsed_s: float | None = None
    ended_s: Mapping[int, float] = field(default_factory=dict, hash=False)
    ablations: tuple[Record, ...] = ()
    notes: tuple[str, ...] = ()
    spent: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def quality(self) -> Objective:
        """The objective that is a metric: the first that is not a cost, else the records' own metric."""
        named = [objective for objective in self.objectives if not is_cost(objective.name)]
        return named[0] if named else _default_objectives(self.records)[0]

    @property
    def cost(self) -> Objective:
        """The objective that quality is weighed against: the first that is a cost, else a cost the records have."""
        named = [objective for objective in self.objectives if is_cost(objective.name)]
        return named[0] if named else _default_objectives(self.records)[-1]

    @property
    def imported(self) -> bool:
        """Whether the records are other people's runs, whose costs are columns."""
        return any(isinstance(record, Imported) for record in self.records)

    def aimed(self, objectives: Sequence[Objective] | str) -> "Study":
        """The study with other objectives; of imported runs the first that is no cost becomes the quality.

        Raises:
            ObjectiveError: if text does not name objectives, or no record has one of them.
        """
        known = measured(self.records)
        if isinstance(objectives, str):
            objectives = parse_objectives(objectives, metrics=known)
        records = self.records
        metrics = [objective for objective in objectives if not is_cost(objective.name)]
        if self.imported and metrics:
            first = metrics[0]
            if first.name not in known:
                raise ObjectiveError(f'no record has "{first.name}". They have: {", ".join(known)}')
            records = tuple(
                r.aimed(first.name, first.direction) if isinstance(r, Imported) else r for r in self.records
            )
        return dataclasses.replace(self, records=records, objectives=tuple(objectives))

    def _repr_html_(self) -> str:
        """The front as a table, for notebooks."""
        from peftscape.analysis.table import study_html

        return study_html(self)


def load(source: str | Path, *, name: str | None = None) -> Study:
    """The study in a run folder, an Optuna storage, JSON lines, CSV, or a folder of HF peft's results.

    A run folder has `study.db`; a storage is a URL or a `.db` file. JSON lines hold this package's records, or
    flat objects, which are read as the rows of a CSV file are (`rows.imported`).

    In an Optuna storage a trial's record is the JSON in its user attribute `record`; a trial without one is
    listed with the state that Optuna knows, but for those that wait to be started. Retests are the trials of
    the study NAME.retest, each with the user attribute `retest`. The study's user attributes `config`,
    `environment` and `objectives` are read where they are.

    Args:
        name: which study, where a storage holds several.

    Raises:
        SourceError: if the source does not exist, holds no or several studies, or a record is not valid.
    """
    text = str(source)
    if "://" in text:
        return _load_storage(text, name, shown=_masked(text))
    path = Path(source)
    if path.is_dir():
        if not (path / "study.db").is_file():
            if is_peft_folder(path):
                return _load_peft(path)
            raise SourceError(f"{path}: expected a run folder with study.db, or HF peft's result files; not there")
        return _load_storage(f"sqlite:///{path / 'study.db'}", name, shown=text)
    if not path.is_file():
        raise SourceError(f"{path}: no such file or folder")
    with path.open("rb") as file:
        is_sqlite = file.read(16).startswith(b"SQLite format 3")
    if is_sqlite:
        return _load_storage(f"sqlite:///{path}", name, shown=text)
    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            return _from_rows(path, read_csv(path))
        flat = flat_objects(path.read_text(encoding="utf-8").splitlines())
        return _from_rows(path, flat) if flat else _load_lines(path)
    except RowsError as error:
        raise SourceError(str(error)) from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not text: {error}") from None


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
        raise SourceError(_several(study.study_name, errors))
    if retests is not None:
        _add_retests(records, retests.get_trials(deepcopy=False), notes)
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
        notes=tuple(notes),
        spent=_spent(attrs),
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


def _load_storage(url: str, name: str | None, *, shown: str) -> Study:
    import optuna
    from optuna.storages import RDBStorage

    file = url.removeprefix("sqlite:///")
    if file != url and not Path(file).is_file():  # Optuna would make an empty database there
        raise SourceError(f"{shown}: no such file")
    storage = RDBStorage(url)
    try:
        names = [found for found in optuna.get_all_study_names(storage) if not found.endswith((RETEST, ABLATION))]
        if name not in names and (name or len(names) != 1):
            what = f'no study "{name}"' if name else "expected one study, or the name of one"
            raise SourceError(f"{shown}: {what}; it holds {', '.join(names) or 'none'}")
        name = name or names[0]
        study = optuna.load_study(study_name=name, storage=storage)
        there = optuna.get_all_study_names(storage)
        others = [
            optuna.load_study(study_name=name + end, storage=storage) if name + end in there else None
            for end in (RETEST, ABLATION)
        ]
        return from_optuna(study, *others, source=shown)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _load_peft(folder: Path) -> Study:
    records, notes, errors = read_peft(folder)
    if errors:
        raise SourceError(_several(str(folder), errors))
    axes = _default_objectives(records)
    return Study(name=folder.resolve().name, source=str(folder), records=records, objectives=axes, notes=tuple(notes))


def _from_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Study:
    records, notes = imported(rows, source=str(path))
    axes = _default_objectives(records)
    return Study(name=path.stem, source=str(path), records=records, objectives=axes, notes=notes)


def _load_lines(path: Path) -> Study:
    records: list[Record] = []
    errors: list[str] = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            if line.strip():
                records.append(Record.from_json(json.loads(line)))
        except (RecordError, json.JSONDecodeError, AttributeError) as error:
            errors.append(f"line {i}: {error}")
    twice = sorted(number for number, n in Counter(record.number for record in records).items() if n > 1)
    errors += [f"two records have number {number}" for number in twice]
    if errors:
        raise SourceError(_several(str(path), errors))
    ordered = tuple(records)
    return Study(name=path.stem, source=str(path), records=ordered, objectives=_default_objectives(ordered))


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


def _add_retests(records: dict[int, Record], trials: Sequence[Any], notes: list[str]) -> None:
    """Gives each record the scores of its finished retests; says which could not be used."""
    scores: dict[int, list[Score]] = {}
    unfinished = 0
    for trial in trials:
        retest = trial.user_attrs.get("retest")
        if retest is None:
            unfinished += trial.state.name != "WAITING"
            continue
        of = retest.get("of")
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
        notes.append(f"{unfinished} retests are running or failed, and are not counted")
    for number, found in scores.items():
        own = records[number]
        retests = (*own.retests, *sorted(found, key=lambda score: score.seed))
        records[number] = dataclasses.replace(own, retests=retests)


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
    return _default_objectives(records) if records else ()


def _default_objectives(records: Sequence[Record]) -> tuple[Objective, ...]:
    """The metric of the records against trained parameters, or the first cost that imported runs have."""
    scored = [record for record in records if record.scores] or list(records)
    metric = (scored[0].metric, scored[0].direction) if scored else ("score", "maximize")
    if not any(isinstance(record, Imported) for record in records):
        return (Objective(*metric), Objective("trainable", "minimize"))
    names = measured(records)
    costs = [name for name in ("trainable", *names) if name in names and is_cost(name)]
    return (Objective(*metric), *(Objective(name, "minimize") for name in costs[:1]))


def _several(where: str, errors: Sequence[str]) -> str:
    more = [f"... and {len(errors) - 10} more"] if len(errors) > 10 else []
    return "\n  ".join([f"{where}: {len(errors)} errors", *errors[:10], *more])


def _masked(url: str) -> str:
    """The URL without its password: reports are shown to others."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
