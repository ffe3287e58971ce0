"""From a table's columns to words and their labels.

Each reader appends to `errors`, as those in `examples`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftscape.search.language_examples import parsed
from peftscape.search.splits import Split
from peftscape.search.tables import Table
from peftscape.search.task_config import SplitName

Words = list[tuple[str, ...]]
Tags = list[tuple[str, ...]]

#: The label of words outside of all entities; it comes first, where it is known only by its name.
OUTSIDE = "O"


def tagged_splits(
    tables: Mapping[SplitName, Table], columns: Mapping[str, str], errors: list[str]
) -> tuple[tuple[str, ...], dict[SplitName, Split]]:
    """The labels by id, and the splits that are given, of the columns `tokens` and `tags`.

    Rows without words are left out. Labels that the data does not name are those of all splits.
    """
    tokens, tags = columns["tokens"], columns["tags"]
    read = {name: read_tagged(table, tokens, tags, errors) for name, table in tables.items()}
    labels = tables["train"].class_names.get(tags) or _found(labels for _, rows in read.values() for labels in rows)
    ids = {label: i for i, label in enumerate(labels)}
    splits: dict[SplitName, Split] = {}
    for name, (words, rows) in read.items():
        unseen = Counter(label for row in rows for label in row if label not in ids)
        if unseen:
            shown = ", ".join(f'"{label}" ({count} words)' for label, count in unseen.most_common(8))
            errors.append(f"task.tags: {tables[name].source} has labels that the training data does not: {shown}")
        targets = objects([np.array([ids.get(label, -1) for label in row], dtype=np.int64) for row in rows])
        splits[name] = Split([" ".join(row) for row in words], None, targets, words=words)
    return tuple(labels), splits


def read_tagged(table: Table, tokens: str, tags: str, errors: list[str]) -> tuple[Words, Tags]:
    """Words and their labels by name, row by row: lists, in CSV written as JSON lists."""
    words, labels = _lists(table, "tokens", tokens, errors), _lists(table, "tags", tags, errors)
    if words is None or labels is None:
        return [], []
    names = table.class_names.get(tags)
    for i, (row, own) in enumerate(zip(words, labels, strict=True), start=1):
        if len(row) != len(own):
            errors.append(f"task.tags: row {i} of {table.source} has {len(own)} labels for {len(row)} words")
            return [], []
        if not all(isinstance(word, str) for word in row):
            errors.append(f'task.tokens: row {i} of {table.source} has more than words in "{tokens}"')
            return [], []
        if wrong := [label for label in own if not _is_label(label, names)]:
            expected = f"ids below {len(names)} or their names" if names else "words or whole numbers"
            errors.append(f"task.tags: row {i} of {table.source} has the label {wrong[0]!r}; {expected} were expected")
            return [], []
    kept = [(row, own) for row, own in zip(words, labels, strict=True) if row]
    return (
        [tuple(row) for row, _ in kept],
        [tuple(names[label] if names and isinstance(label, int) else str(label) for label in own) for _, own in kept],
    )


def objects(rows: Sequence[Any]) -> NDArray[Any]:
    """An array of these objects, which numpy does not look into."""
    out = np.empty(len(rows), dtype=object)
    for i, row in enumerate(rows):
        out[i] = row
    return out


def _lists(table: Table, key: str, column: str, errors: list[str]) -> list[list[Any]] | None:
    rows = [parsed(value) for value in table.column(column)]
    if wrong := [i for i, row in enumerate(rows, start=1) if not isinstance(row, list | tuple)]:
        errors.append(f'task.{key}: row {wrong[0]} of {table.source} has no list in "{column}"')
        return None
    return [list(row) for row in rows]


def _is_label(label: Any, names: Sequence[str] | None) -> bool:
    if isinstance(label, int) and not isinstance(label, bool):
        return label >= 0 if names is None else 0 <= label < len(names)
    return isinstance(label, str) and (label in names if names else bool(label.strip()))


def _found(rows: Any) -> tuple[str, ...]:
    """All labels that there are: numbers by value, words in order, the outside first."""
    found = {label for row in rows for label in row}
    whole = all(label.isdecimal() for label in found)
    return tuple(sorted(found, key=lambda label: (label != OUTSIDE, int(label) if whole else 0, label)))
