"""The `[task]` table: what may be written in it, and the tables of data it leads to."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

from peftscape.search.embedded import EMBEDDED_TASKS
from peftscape.search.metrics import METRICS
from peftscape.search.tables import Table, TaskError, is_file_name, read_dataset, read_file
from peftscape.spaces.words import nearest

Kind = Literal["classification", "regression"]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
KINDS: tuple[Kind, ...] = ("classification", "regression")

# The names under which published datasets keep their validation data; `train` and `test` have no others.
_VALIDATION_NAMES = ("validation", "dev", "valid", "val")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The `[task]` table of a search: what to learn, from which data.

    Either `name`, an embedded task, or `path`: a CSV, TSV, JSON lines or Parquet file, a folder, or the id of
    a dataset of the hub (`subset` is its configuration, such as `mrpc` of GLUE). `train`, `validation` and
    `test` are files (without `path`, or inside it) or names of splits.

    A size is a fraction of the training rows, or a count of which at most a fifth of the rows is taken; it
    matters only where that split is not given. `max_train` caps the training rows, each class in proportion.
    `kind` None: regression where the labels are decimal numbers. `metric` None: accuracy, or pearson.
    """

    name: str | None = None
    path: str | None = None
    subset: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    kind: Kind | None = None
    metric: str | None = None
    validation_size: int | float = 500
    test_size: int | float = 2000
    seed: int = 0
    max_train: int | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by key."""
        pair = {} if self.pair is None else {"pair": self.pair}
        return {"text": self.text, **pair, "label": self.label}

    @property
    def source(self) -> str:
        """What the data is called in messages and reports."""
        return self.name or self.path or self.train or "task"


def raise_all(config: TaskConfig, errors: list[str]) -> None:
    """Raises a TaskError that carries all errors, if there are any."""
    if errors:
        raise TaskError(config.source, errors)


def config_errors(config: TaskConfig) -> list[str]:
    """What is wrong with the keys themselves, before any file is opened."""
    errors = [
        f"task.{key}: {getattr(config, key)!r} is not text"
        for key in ("name", "path", "subset", *SPLITS, "text", "pair", "label", "metric")
        if not isinstance(getattr(config, key), str | (type(None) if key not in ("text", "label") else str))
    ]
    if errors:
        return errors
    if config.name is not None:
        if config.name not in EMBEDDED_TASKS:
            errors.append(f'task.name: no embedded task "{config.name}"{nearest(config.name, EMBEDDED_TASKS)}')
        for field in fields(config):
            fixed = field.name in ("path", "subset", *SPLITS, "text", "pair", "label")
            if fixed and getattr(config, field.name) != (None if field.default is MISSING else field.default):
                errors.append(f"task.{field.name}: the embedded tasks have their own data; give name or {field.name}")
        if config.kind == "regression":
            errors.append('task.kind: the embedded tasks are classification, not "regression"')
    elif config.path is None and config.train is None:
        errors.append(f"task.path: needed, or task.name ({', '.join(EMBEDDED_TASKS)})")
    if config.path is not None and is_file_name(config.path) and config.train is not None:
        errors.append("task.train: path names the file of the training data already")
    given = [value for value in (config.train, config.validation, config.test) if value is not None]
    given += [config.path] if config.path is not None and is_file_name(config.path) else []
    if len(set(given)) < len(given):
        errors.append(f"task.test: train, validation and test must differ, not {', '.join(given)}")
    if config.kind is not None and config.kind not in KINDS:
        errors.append(f'task.kind: no kind "{config.kind}"{nearest(str(config.kind), KINDS)}')
    if config.metric is not None and config.metric not in METRICS:
        errors.append(f'task.metric: no metric "{config.metric}"{nearest(config.metric, METRICS)}')
    for key, size in (("validation_size", config.validation_size), ("test_size", config.test_size)):
        if not (_is_whole(size, 1) or (isinstance(size, float) and 0 < size < 1)):
            errors.append(f"task.{key}: {size!r} is neither a count of 1 or more nor a fraction between 0 and 1")
    if not _is_whole(config.seed, 0) or config.seed >= 2**32:
        errors.append(f"task.seed: {config.seed!r} is not a whole number from 0 to 2**32 - 1")
    if config.max_train is not None and not _is_whole(config.max_train, 1):
        errors.append(f"task.max_train: {config.max_train!r} is not a whole number of 1 or more")
    return errors


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def read_tables(config: TaskConfig, limit: int | None = None) -> dict[SplitName, Table]:
    """The table of each split that is given, at least that of training."""
    if config.name is not None:
        train, test = EMBEDDED_TASKS[config.name].tables()
        return {"train": train} if test is None else {"train": train, "test": test}
    if config.path is None or is_file_name(config.path) or is_file_name(config.train or ""):
        return _files(config, limit)
    try:
        found = read_dataset(config.path, config.subset, limit=limit)
    except TaskError as error:
        raise TaskError(config.source, [f"task.path: {line}" for line in error.errors]) from None
    wanted: dict[SplitName, str | None] = {name: getattr(config, name) for name in SPLITS}
    errors = [
        f'task.{name}: no split "{split}" in {config.path}{nearest(split, found)}'
        for name, split in wanted.items()
        if split is not None and split not in found
    ]
    taken = set(wanted.values())
    wanted["train"] = wanted["train"] or ("train" if len(found) > 1 else next(iter(found), "train"))
    free = [name for name in _VALIDATION_NAMES if name in found and name not in taken]
    wanted["validation"] = wanted["validation"] or next(iter(free), None)
    wanted["test"] = wanted["test"] or ("test" if "test" in found and "test" not in taken else None)
    if wanted["train"] not in found and not errors:
        errors.append(f'task.train: no split "train" in {config.path}; it has {", ".join(found) or "none"}')
    raise_all(config, errors)
    return {name: found[split] for name, split in wanted.items() if split is not None}


def _files(config: TaskConfig, limit: int | None) -> dict[SplitName, Table]:
    folder = Path(config.path) if config.path is not None and not is_file_name(config.path) else Path()
    train = config.train if config.train is not None else config.path
    named: dict[SplitName, str | None] = {
        "train": train,
        "validation": config.validation,
        "test": config.test,
    }
    tables: dict[SplitName, Table] = {}
    errors: list[str] = []
    for name, file in named.items():
        if file is not None:
            try:
                tables[name] = read_file(str(folder / file), limit=limit)
            except TaskError as error:
                key = "path" if name == "train" and config.train is None else name
                errors += [f"task.{key}: {line}" for line in error.errors]
    raise_all(config, errors)
    return tables
