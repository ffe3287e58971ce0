"""The `[task]` table: what may be written in it, and the tables of data it leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from string import Formatter
from typing import Literal

from peftscape.search.embedded import EMBEDDED_TASKS
from peftscape.search.metrics import METRICS
from peftscape.search.tables import Table, TaskError, is_file_name, read_dataset, read_file
from peftscape.spaces.words import nearest

Kind = Literal["classification", "regression", "lm", "multiple_choice", "token_classification"]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
KINDS: tuple[Kind, ...] = ("classification", "regression", "lm", "multiple_choice", "token_classification")
#: What only tasks of these kinds read.
_ONLY: Mapping[str, tuple[Kind, ...]] = {
    "prompt": ("lm",), "completion": ("lm",), "messages": ("lm",), "loss_on": ("lm",),
    "choices": ("multiple_choice",), "options": ("multiple_choice",), "normalise": ("multiple_choice",),
    "template": ("multiple_choice",), "tokens": ("token_classification",), "tags": ("token_classification",),
}  # fmt: skip
_COLUMNS = ("text", "pair", "label", "prompt", "completion", "messages", "options", "tokens", "tags")

# The names under which published datasets keep their validation data; `train` and `test` have no others.
_VALIDATION_NAMES = ("validation", "dev", "valid", "val")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The `[task]` table of a search: what to learn, from which data.

    Either `name`, an embedded task, or `path`: a CSV, TSV, JSON lines or Parquet file, a folder, or the id of
    a dataset of the hub (`subset` is its configuration, such as `mrpc` of GLUE). `train`, `validation` and
    `test` are files (without `path`, or inside it) or names of splits.

    A size is a fraction of the training rows, or a count of which at most a fifth of the rows is taken; it
    matters only where that split is not given. `max_train` and `max_test` cap the
    rows of a split, each class in proportion.
    `kind` None: regression where the labels are decimal numbers. `metric` None: accuracy, pearson or loss.

    `lm` learns texts: of one column (`text`), of `prompt` and `completion`, or of chats (`messages`, with the
    tokenizer's template); `loss_on` says whether all tokens count or only those that answer, as by default where there
    is a prompt. `multiple_choice` learns and ranks answers by their log-likelihood behind the text: the words of the
    classes (`choices`, by label; the labels themselves where it is None), or those of a column of lists (`options`,
    with the right one's number or text in `label`). `template` makes the prompt, `"{text}\\nAnswer:"`; `normalise`
    divides by the answer's bytes.

    `token_classification` labels words: the columns `tokens` ("tokens" by default) and `tags` ("tags") hold lists of
    words and of their labels, by name or as ids of classes that the data names.
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
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    options: str | None = None
    tokens: str | None = None
    tags: str | None = None
    choices: Mapping[str, str] | None = None
    template: str | None = None
    loss_on: Literal["completion", "all"] | None = None
    normalise: bool = False
    kind: Kind | None = None
    metric: str | None = None
    validation_size: int | float = 500
    test_size: int | float = 2000
    seed: int = 0
    max_train: int | None = None
    max_test: int | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by key."""
        if self.messages is not None:
            return {"messages": self.messages}
        if self.prompt is not None and self.completion is not None:
            return {"prompt": self.prompt, "completion": self.completion}
        if self.kind == "lm":
            return {"text": self.text}
        if self.kind == "token_classification":
            return {"tokens": self.tokens or "tokens", "tags": self.tags or "tags"}
        pair = {} if self.pair is None else {"pair": self.pair}
        options = {} if self.options is None else {"options": self.options}
        return {"text": self.text, **pair, **options, "label": self.label}

    @property
    def source(self) -> str:
        """What the data is called in messages and reports."""
        return self.name or self.path or self.train or "task"


def raise_all(config: TaskConfig, errors: list[str]) -> None:
    """Raises a TaskError that carries all errors, if there are any."""
    if errors:
        raise TaskError(config.source, errors)


def task_kind(config: TaskConfig) -> Kind | None:
    """The kind as far as the configuration says it; None where the labels have to be read for it."""
    return config.kind or (EMBEDDED_TASKS[config.name].kind if config.name in EMBEDDED_TASKS else None)


def with_columns(config: TaskConfig) -> TaskConfig:
    """The configuration with the columns of an embedded task that is of prompts and completions."""
    if config.name in EMBEDDED_TASKS and EMBEDDED_TASKS[config.name].pairs:
        return replace(config, prompt="prompt", completion="completion")
    return config


def config_errors(config: TaskConfig) -> list[str]:
    """What is wrong with the keys themselves, before any file is opened."""
    errors = [
        f"task.{key}: {getattr(config, key)!r} is not text"
        for key in ("name", "path", "subset", *SPLITS, *_COLUMNS, "template", "metric")
        if not isinstance(getattr(config, key), str | (type(None) if key not in ("text", "label") else str))
    ]
    if errors:
        return errors
    if config.name is not None:
        if config.name not in EMBEDDED_TASKS:
            errors.append(f'task.name: no embedded task "{config.name}"{nearest(config.name, EMBEDDED_TASKS)}')
        for field in fields(config):
            fixed = field.name in ("path", "subset", *SPLITS, *_COLUMNS)
            if fixed and getattr(config, field.name) != (None if field.default is MISSING else field.default):
                errors.append(f"task.{field.name}: the embedded tasks have their own data; give name or {field.name}")
        if config.name in EMBEDDED_TASKS:
            errors += _embedded_kind(config)
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
    errors += _language_errors(config)
    if config.metric is not None and config.metric not in METRICS:
        errors.append(f'task.metric: no metric "{config.metric}"{nearest(config.metric, METRICS)}')
    for key, size in (("validation_size", config.validation_size), ("test_size", config.test_size)):
        if not (_is_whole(size, 1) or (isinstance(size, float) and 0 < size < 1)):
            errors.append(f"task.{key}: {size!r} is neither a count of 1 or more nor a fraction between 0 and 1")
    if not _is_whole(config.seed, 0) or config.seed >= 2**32:
        errors.append(f"task.seed: {config.seed!r} is not a whole number from 0 to 2**32 - 1")
    for key, most in (("max_train", config.max_train), ("max_test", config.max_test)):
        if most is not None and not _is_whole(most, 1):
            errors.append(f"task.{key}: {most!r} is not a whole number of 1 or more")
    return errors


def _embedded_kind(config: TaskConfig) -> list[str]:
    """An embedded task of labelled texts can be learnt by its words too."""
    own = EMBEDDED_TASKS[str(config.name)].kind
    kinds = (own, "multiple_choice") if own == "classification" else (own,)
    if config.kind is None or config.kind in kinds:
        return []
    return [f'task.kind: "{config.name}" is {" or ".join(kinds)}, not "{config.kind}"']


def _language_errors(config: TaskConfig) -> list[str]:
    """What is wrong with the keys of language modelling."""
    kind = task_kind(config)
    errors = [
        f"task.{key}: only for kind = {' or '.join(kinds)}"
        for key, kinds in _ONLY.items()
        if getattr(config, key) and kind not in kinds
    ]
    if (config.prompt is None) != (config.completion is None):
        errors.append("task.completion: prompt and completion go together; texts without a prompt are text = COLUMN")
    if config.messages is not None and config.prompt is not None:
        errors.append("task.messages: chats have no further prompt; give messages, or prompt and completion")
    if config.loss_on == "completion" and config.messages is None and with_columns(config).prompt is None:
        errors.append('task.loss_on: "completion" needs a prompt and a completion, or messages')
    if config.choices is not None and config.options is not None:
        errors.append("task.options: each row has its own options already; give choices or options")
    if config.choices is not None and not all(isinstance(word, str) and word for word in config.choices.values()):
        errors.append('task.choices: a word for each label was expected, as in {negative = "bad", positive = "good"}')
    if config.template is not None:
        errors += _template_errors(config.template)
    return errors


def _template_errors(template: str) -> list[str]:
    try:
        names = [name for _, name, *_ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        return [f"task.template: {error}; write {{{{ and }}}} for braces"]
    if strange := [name for name in names if name not in ("text", "pair")]:
        return [f'task.template: no "{{{strange[0]}}}"; there are {{text}} and {{pair}}']
    return [] if "text" in names else ['task.template: "{text}" is missing from it']


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
