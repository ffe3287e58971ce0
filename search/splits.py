"""Splits: examples with their targets, and what is cut from the training rows where it is not given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftscape.search import examples
from peftscape.search.task_config import Kind, SplitName, TaskConfig


@dataclass(frozen=True, eq=False)
class Split:
    """Examples: texts, second texts of pairs, and targets (int64 class ids, or float32 numbers).

    For language models `texts` are the prompts where there are `completions`, and chats as JSON; `options` are the
    answers of each example where these differ, and targets the numbers of the right ones. Where words are labelled,
    these are the `words`, joined by blanks in `texts`, and a target holds the class ids of a text's words.
    """

    texts: list[str]
    pairs: list[str] | None
    targets: NDArray[Any]
    completions: list[str] | None = None
    options: list[tuple[str, ...]] | None = None
    words: list[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: NDArray[np.bool_]) -> Split:
        """The examples where `rows` is true, in their order."""
        kept = np.flatnonzero(rows)

        def some(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in kept]

        texts = [self.texts[i] for i in kept]
        lists = (some(self.completions), some(self.options), some(self.words))
        return Split(texts, some(self.pairs), self.targets[kept], *lists)

    def examples(self) -> list[tuple[str, str]]:
        """What a model sees of each example: its text and its second text, or its completion."""
        return list(zip(self.texts, self.pairs or self.completions or [""] * len(self), strict=True))

    def labels(self) -> NDArray[Any]:
        """The targets end to end: those of all words where words are labelled."""
        if self.words is None:
            return self.targets
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.targets])


def carve(config: TaskConfig, kind: Kind, splits: dict[SplitName, Split]) -> tuple[SplitName, ...]:
    """Cut the splits that are not given from the training rows, and all to their caps, in place; names those cut."""
    carved: list[SplitName] = []
    # Test first, so that it stays the same when the size of the validation split changes.
    held_out: list[tuple[SplitName, int | float]] = [
        ("test", config.test_size),
        ("validation", config.validation_size),
    ]
    for stream, (name, size) in enumerate(held_out, start=1):
        if name not in splits:
            rows = _taken(splits["train"], kind, _count(size, len(splits["train"])), (config.seed, stream))
            splits[name], splits["train"] = splits["train"].take(rows), splits["train"].take(~rows)
            carved.append(name)
    most: list[tuple[SplitName, int | None]] = [("train", config.max_train), ("test", config.max_test)]
    for stream, (name, limit) in enumerate(most, start=3):
        surplus = len(splits[name]) - (limit or len(splits[name]))
        if surplus > 0:
            splits[name] = splits[name].take(~_taken(splits[name], kind, surplus, (config.seed, stream)))
    return tuple(carved)


def empty_splits(splits: Collection[tuple[SplitName, Split]]) -> list[str]:
    """One error for each split without rows."""
    return [
        f"task.{name}: no rows are left; the training data is too small to cut it from"
        for name, split in splits
        if not len(split)
    ]


def _count(size: int | float, rows: int) -> int:
    """How many of `rows` to set aside: a fraction as it is, a count up to a fifth of them."""
    return max(1, round(size * rows) if isinstance(size, float) else min(size, rows // 5))


def _taken(split: Split, kind: Kind, size: int, seed: tuple[int, int]) -> NDArray[np.bool_]:
    """Which rows to set aside; numbers and labelled words have no classes to keep in proportion."""
    by_class = kind in ("classification", "multiple_choice") and split.options is None
    classes = split.targets if by_class else np.zeros(len(split), dtype=np.int64)
    return examples.take_stratified(classes, size, seed)
