"""From a table's columns to texts and targets, and which rows to set aside.

Each reader appends to `errors`, so that all that is wrong with a task is told at once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peftscape.search.tables import Table
from peftscape.spaces.words import nearest

Kind = Literal["classification", "regression"]
Label = int | float | str

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")


def missing_columns(table: Table, columns: dict[str, str]) -> list[str]:
    """One error for each key (`text`, `pair`, `label`) whose column is missing; shows the columns."""
    seen = ", ".join(f'"{name}"' for name in table.names[:20]) + (" ..." if len(table.names) > 20 else "")
    errors = []
    for key, name in columns.items():
        if name not in table.names:
            near = nearest(name, table.names) if table.names else ""
            near = near if "Did you mean" in near else ""
            errors.append(f'task.{key}: no column "{name}" in {table.source}{near} (columns: {seen})')
    return errors


def read_texts(table: Table, key: str, column: str, errors: list[str]) -> list[str]:
    """The column as strings; empty cells and nested values are errors."""
    values = table.column(column)
    nested = [i for i, value in enumerate(values) if isinstance(value, (list, dict, tuple))]
    if nested:
        errors.append(f'task.{key}: "{column}" holds lists or tables, not text ({table.source}, row {nested[0] + 1})')
        return []
    empty = [i for i, value in enumerate(values) if _is_missing(value)]
    if empty:
        errors.append(
            f"task.{key}: {len(empty)} of {len(values)} rows of {table.source} have no "
            f'"{column}" (the first is row {empty[0] + 1})'
        )
    return [str(value) for value in values]


def read_labels(table: Table, column: str, errors: list[str]) -> list[Label]:
    """The column as numbers (of typed files) and words without surrounding blanks; empty cells are errors."""
    values = [_label(value) for value in table.column(column)]
    empty = [i for i, value in enumerate(values) if value is None]
    if empty:
        errors.append(
            f"task.label: {len(empty)} of {len(values)} rows of {table.source} have no "
            f'"{column}" (the first is row {empty[0] + 1})'
        )
    if column in table.class_names and values and set(values) == {-1}:
        errors.append(
            f"task.label: the labels of {table.source} are hidden (all -1); "
            'name another split, such as test = "validation"'
        )
    return [value for value in values if value is not None]


def infer_kind(labels: Sequence[Label]) -> Kind:
    """Regression if all labels are numbers and some are floats or are written with a point or an exponent."""
    whole = [isinstance(label, int) or bool(_INTEGER.fullmatch(str(label))) for label in labels]
    decimal = [isinstance(label, float) or bool(_DECIMAL.fullmatch(str(label))) for label in labels]
    numeric = all(a or b for a, b in zip(whole, decimal, strict=True))
    return "regression" if numeric and any(decimal) else "classification"


def class_names(table: Table, column: str, labels: Sequence[Label], errors: list[str]) -> tuple[str, ...]:
    """The classes in the order of their ids: as the source names them, else sorted (numbers by value)."""
    if column in table.class_names:
        names = table.class_names[column]
    else:
        found = {_name(label) for label in labels}
        whole = all(_INTEGER.fullmatch(name) for name in found)
        names = tuple(sorted(found, key=lambda name: (int(name) if whole else 0, name)))
    present = len(set(labels))
    if labels and present == 1:
        errors.append(f'task.label: all {len(labels)} rows of {table.source} have the label "{_name(labels[0])}"')
    elif present > len(labels) / 2:
        errors.append(
            f'task.label: {present} different labels in {len(labels)} rows of {table.source}: is "{column}" '
            'the column of the classes? For numbers to predict, kind = "regression"'
        )
    return names


def class_ids(
    table: Table, column: str, labels: Sequence[Label], names: Sequence[str], errors: list[str]
) -> NDArray[np.int64]:
    """The label of each row as a class id; labels that are not among `names` are errors."""
    if column in table.class_names:
        named = table.class_names[column]
        strange = [label for label in labels if not (isinstance(label, int) and 0 <= label < len(named))]
        words = [named[label] if isinstance(label, int) and 0 <= label < len(named) else "" for label in labels]
    else:
        words = [_name(label) for label in labels]
        strange = []
    ids = {name: i for i, name in enumerate(names)}
    unseen = Counter(word for word in words if word and word not in ids) + Counter(map(str, strange))
    if unseen:
        shown = ", ".join(f'"{name}" ({count} rows)' for name, count in unseen.most_common(8))
        errors.append(f"task.label: {table.source} has labels that the training data does not: {shown}")
    return np.array([ids.get(word, -1) for word in words], dtype=np.int64)


def numbers(table: Table, column: str, labels: Sequence[Label], errors: list[str]) -> NDArray[np.float32]:
    """The label of each row as a number; words and numbers that are not finite are errors."""
    values = [_number(label) for label in labels]
    words = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if words:
        errors.append(
            f"task.label: {len(words)} of {len(labels)} labels of {table.source} are not numbers, as "
            f'"{column}" = "{labels[words[0]]}" in row {words[0] + 1}; for classes, kind = "classification"'
        )
    return np.array(values, dtype=np.float32)


def take_stratified(classes: NDArray[np.int64], size: int, seed: tuple[int, int]) -> NDArray[np.bool_]:
    """Which rows to set aside: about `size`, each class in proportion, at least one row of each class left.

    Quotas are rounded by largest remainder. `RandomState`, for numpy freezes its stream: the same seed gives
    the same split with every version, as records that are compared across machines need.
    """
    _, ids = np.unique(classes, return_inverse=True)
    counts = np.bincount(ids)
    ideal = size * counts / len(classes)
    quotas = np.minimum(np.floor(ideal).astype(np.int64), counts - 1)
    for label in np.argsort(-(ideal - np.floor(ideal)), kind="stable"):
        if quotas.sum() < min(size, len(classes)) and quotas[label] < counts[label] - 1:
            quotas[label] += 1
    random = np.random.RandomState(seed)
    taken = np.zeros(len(classes), dtype=np.bool_)
    for label, quota in enumerate(quotas):
        taken[random.permutation(np.flatnonzero(ids == label))[:quota]] = True
    return taken


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _label(value: Any) -> Label | None:
    if _is_missing(value):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return str(value).strip()


def _name(label: Label) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _number(label: Label) -> float:
    try:
        return float(label)
    except ValueError:
        return math.nan
