"""Tasks: labelled texts split into training, validation and test data, and their tokens.

    task = load_task(TaskConfig(name="trec6"))
    data = encode(task, tokenizer, max_length=128)

Selection sees the validation split only. Where none is given it is carved from the training rows, stratified,
by the task's own seed: every trial of a search and every seed of a retest is judged on the same examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftscape.search import examples, language_examples, token_examples
from peftscape.search.embedded import EMBEDDED_TASKS, MissingPackageError
from peftscape.search.encoding import EncodedSplit, EncodedTask, encode
from peftscape.search.language import Language
from peftscape.search.metrics import Metric
from peftscape.search.splits import Split, carve, empty_splits
from peftscape.search.tables import Table, TaskError, is_file_name
from peftscape.search.task_config import (
    Kind,
    SplitName,
    TaskConfig,
    config_errors,
    raise_all,
    read_tables,
    task_kind,
    with_columns,
)
from peftscape.search.task_metric import DEFAULT_METRIC, task_metric

__all__ = [
    "DEFAULT_METRIC",
    "EncodedSplit",
    "EncodedTask",
    "Split",
    "Task",
    "TaskConfig",
    "TaskError",
    "check_task",
    "encode",
    "load_task",
]

_HEAD_ROWS = 200  # how much of a file `check_task` reads


@dataclass(frozen=True, eq=False)
class Task:
    """Labelled texts in three splits with a metric. `labels` are the classes by id, empty for regression.

    `carved` names the splits that were cut from the training rows because they were not given.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    metric: Metric
    train: Split
    validation: Split
    test: Split
    seed: int
    carved: tuple[SplitName, ...] = ()
    language: Language | None = None

    @property
    def num_outputs(self) -> int:
        """What a model gives for each example: a number for each class or option, or 1; for language modelling 2."""
        if self.kind == "lm":
            return 2
        options = (len(o) for split in self.splits().values() for o in split.options or ())
        return len(self.labels) or max(options, default=1)

    def splits(self) -> dict[SplitName, Split]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def fingerprint(self) -> str:
        """SHA-256 of kind, labels and all examples of all splits, in order; the metric is not part of it."""
        digest = hashlib.sha256()

        def add(*words: str) -> None:
            for word in words:
                raw = word.encode("utf-8", "surrogatepass")
                digest.update(len(raw).to_bytes(8, "little") + raw)  # lengths, so that no two contents run alike

        add("peftscape.task.1", self.kind, *self.labels)
        if self.language is not None:
            add(*self.language.words())
        for name, split in self.splits().items():
            add(name, str(len(split)), *split.texts)
            add("pairs" if split.pairs is not None else "single", *(split.pairs or []))
            for answers in (split.completions, *(split.options or ())):
                add(*(answers or ()))
            for words in split.words or ():
                add(str(len(words)), *words)
            digest.update(split.labels().astype("<i8" if self.labels else "<f4").tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The task in plain JSON values, for a report.

        `seen_in_training` counts held-out examples whose text is a training text as well: a leak, if many.
        """
        train = set(self.train.examples())
        held_out: dict[SplitName, Split] = {"validation": self.validation, "test": self.test}
        return {
            "name": self.name,
            "kind": self.kind,
            "labels": list(self.labels),
            "num_outputs": self.num_outputs,
            "metric": self.metric.name,
            "direction": self.metric.direction,
            "seed": self.seed,
            "rows": {name: len(split) for name, split in self.splits().items()},
            "carved": list(self.carved),
            "class_counts": {
                name: np.bincount(split.labels(), minlength=len(self.labels)).tolist() if self.labels else []
                for name, split in self.splits().items()
            },
            "seen_in_training": {name: sum(e in train for e in s.examples()) for name, s in held_out.items()},
            "fingerprint": self.fingerprint(),
        }


def load_task(config: TaskConfig) -> Task:
    """Reads, checks and splits the data of a task.

    Raises:
        TaskError: with every error found: keys, files, columns, missing values, labels.
    """
    errors = config_errors(config)
    raise_all(config, errors)
    config = with_columns(config)
    try:
        tables = read_tables(config)
    except MissingPackageError as error:
        raise TaskError(config.source, [f"task.name: {error}"]) from None
    for table in tables.values():
        errors += _table_errors(config, table)
    raise_all(config, errors)
    kind, labels, splits = _examples(config, tables, errors)
    language = _language(config, kind, labels, splits, errors)
    classes = len(labels) if splits["train"].options is None else None
    chosen = task_metric(config, kind, classes, errors, labels if kind == "token_classification" else ())
    raise_all(config, errors)
    carved = carve(config, kind, splits)
    errors += empty_splits(splits.items())
    raise_all(config, errors)
    return Task(config.source, kind, labels, chosen, **splits, seed=config.seed, carved=carved, language=language)


def check_task(config: TaskConfig) -> list[str]:
    """The errors that the keys, the headers and the first rows show; nothing is fetched."""
    errors = config_errors(config)
    if errors:
        return errors
    config = with_columns(config)
    try:
        if config.name is not None:
            EMBEDDED_TASKS[config.name].paths()
            embedded = EMBEDDED_TASKS[config.name]
            task_metric(config, config.kind or embedded.kind, len(embedded.classes), errors)
            if config.choices is not None:
                language_examples.choice_words(config.choices, embedded.classes, errors)
            return errors
        if config.path is not None and not is_file_name(config.path) and not Path(config.path).expanduser().is_dir():
            return errors  # a dataset of the hub: not asked before the search starts
        tables = read_tables(config, limit=_HEAD_ROWS)
    except MissingPackageError as error:
        return [f"task.name: {error}"]
    except TaskError as error:
        return list(error.errors)
    for table in tables.values():
        errors += _table_errors(config, table)
    if errors:
        return errors
    if config.kind == "token_classification":
        labels, _ = token_examples.tagged_splits(tables, config.columns, errors)
        task_metric(config, config.kind, None, errors, labels)
        return errors
    if config.kind == "lm" or config.options is not None:
        for table in tables.values():
            _language_split(config, table, errors)
        task_metric(config, config.kind or "lm", None, errors)
        return errors
    # Classes can be told from all rows only, so of the labels only what holds for each row is said here.
    raw = {name: examples.read_labels(table, config.label, errors) for name, table in tables.items()}
    kind = config.kind or ("classification" if config.label in tables["train"].class_names else None)
    kind = kind or examples.infer_kind(raw["train"])
    for name, table in tables.items():
        for key in config.columns.keys() - {"label"}:
            examples.read_texts(table, key, config.columns[key], errors)
        if kind == "regression":
            examples.numbers(table, config.label, raw[name], errors)
    task_metric(config, kind, None, errors)
    return errors


def _table_errors(config: TaskConfig, table: Table) -> list[str]:
    """Missing columns and missing rows of one table."""
    columns = config.columns
    if config.name is not None:
        columns = {"text": "text"} | ({} if task_kind(config) == "lm" else {"label": "label"})
        if config.prompt is not None:
            columns = {"prompt": "prompt", "completion": "completion"}
    errors = examples.missing_columns(table, columns)
    return errors if errors or table.rows else [f"task.path: {table.source} has no rows"]


def _examples(
    config: TaskConfig, tables: Mapping[SplitName, Table], errors: list[str]
) -> tuple[Kind, tuple[str, ...], dict[SplitName, Split]]:
    """The splits that are given, with targets, and what the training labels say they are."""
    given = task_kind(config)
    if given == "lm" or config.options is not None:
        return given or "lm", (), {name: _language_split(config, table, errors) for name, table in tables.items()}
    if given == "token_classification":
        labels, splits = token_examples.tagged_splits(tables, config.columns, errors)
        if len(labels) < 2 and not errors:
            errors.append(f"task.tags: {config.source} has {len(labels)} labels; two or more were expected")
        return given, labels, splits
    raw = {name: examples.read_labels(table, config.label, errors) for name, table in tables.items()}
    train = tables["train"]
    kind: Kind = config.kind or (
        "classification" if config.label in train.class_names else examples.infer_kind(raw["train"])
    )
    labels = ()
    if kind != "regression":
        labels = examples.class_names(train, config.label, raw["train"], errors)
    splits = {}
    for name, table in tables.items():
        texts = examples.read_texts(table, "text", config.text, errors)
        pairs = None if config.pair is None else examples.read_texts(table, "pair", config.pair, errors)
        targets: NDArray[Any]
        if kind != "regression":
            targets = examples.class_ids(table, config.label, raw[name], labels, errors)
        else:
            targets = examples.numbers(table, config.label, raw[name], errors)
        splits[name] = Split(texts, pairs, targets)
    return kind, labels, splits


def _language_split(config: TaskConfig, table: Table, errors: list[str]) -> Split:
    """Texts for a language model: whole, behind prompts, as chats, or with options of their own."""
    if config.messages is not None:
        texts, completions = language_examples.read_chats(table, config.messages, errors), None
    elif config.prompt is not None and config.completion is not None:
        texts = examples.read_texts(table, "prompt", config.prompt, errors)
        completions = examples.read_texts(table, "completion", config.completion, errors)
    else:
        texts, completions = examples.read_texts(table, "text", config.text, errors), None
    if config.options is None:
        return Split(texts, None, np.zeros(len(texts), dtype=np.float32), completions)
    pairs = None if config.pair is None else examples.read_texts(table, "pair", config.pair, errors)
    options = language_examples.read_options(table, config.options, errors)
    right = language_examples.right_options(table, config.label, options, errors)
    return Split(texts, pairs, right, options=options)


def _language(
    config: TaskConfig, kind: Kind, labels: tuple[str, ...], splits: Mapping[SplitName, Split], errors: list[str]
) -> Language | None:
    """How examples become a language model's texts; None for classification and regression."""
    if kind == "multiple_choice":
        words = () if config.options is not None else language_examples.choice_words(config.choices, labels, errors)
        return Language("choices", "completion", words, config.template, config.normalise)
    if kind != "lm":
        return None
    if config.messages is None and splits["train"].completions is None:
        return Language("text", "all")
    return Language("chat" if config.messages is not None else "completion", config.loss_on or "completion")
