"""Where records come from: a run folder, an Optuna storage, JSON lines, CSV, or HF peft's result files."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftscape.analysis.optuna_source import ABLATION, RETEST, from_optuna, trial_record
from peftscape.analysis.peft_results import is_peft_folder, read_peft
from peftscape.analysis.rows import RowsError, flat_objects, imported, read_csv
from peftscape.analysis.study import FailedRetest, SourceError, Study, default_objectives, several
from peftscape.spaces.record import Record, RecordError

__all__ = ["ABLATION", "RETEST", "FailedRetest", "SourceError", "Study", "from_optuna", "load", "trial_record"]


def load(source: str | Path, *, name: str | None = None) -> Study:
    """The study in a run folder, an Optuna storage, JSON lines, CSV, or a folder of HF peft's results.

    A run folder has `study.db`; a storage is a URL (of several studies one as URL#NAME) or a `.db` file. JSON lines
    hold this package's records, or flat objects, which are read as the rows of a CSV file are (`rows.imported`).

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
        url, _, own = text.partition("#")
        return _load_storage(url, name or own or None, shown=_masked(text))
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
            what = f'no study "{name}"' if name else "expected one study, or which: URL#NAME"
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
        raise SourceError(several(str(folder), errors))
    axes = default_objectives(records)
    return Study(name=folder.resolve().name, source=str(folder), records=records, objectives=axes, notes=tuple(notes))


def _from_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Study:
    records, notes = imported(rows, source=str(path))
    axes = default_objectives(records)
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
        raise SourceError(several(str(path), errors))
    ordered = tuple(records)
    return Study(name=path.stem, source=str(path), records=ordered, objectives=default_objectives(ordered))


def _masked(url: str) -> str:
    """The URL without its password: reports are shown to others."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
