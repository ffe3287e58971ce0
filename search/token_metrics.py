"""Scores of labelled words: whole entities, as seqeval counts them (CoNLL's way), or words one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: seqeval's function for a metric of entities: a type and its words, right if both are.
ENTITY_SCORES = {"entity_f1": "f1_score", "entity_precision": "precision_score", "entity_recall": "recall_score"}

_ENTITY_LABEL = re.compile(r"O|[BIES]-.+", re.DOTALL)


def label_errors(name: str, labels: Sequence[str]) -> list[str]:
    """What keeps a metric of entities from being told: labels of no IOB scheme, or a package that is missing."""
    if name not in ENTITY_SCORES:
        return []
    errors = []
    if other := [label for label in labels if not _ENTITY_LABEL.fullmatch(label)]:
        wanted = 'labels such as "O", "B-PER", "I-PER" (IOB or IOBES) were expected'
        errors.append(f'task.metric: "{name}" is of entities, and {wanted}, not "{other[0]}"; take "token_accuracy"')
    if find_spec("seqeval") is None:
        errors.append(f'task.metric: "{name}" needs the package seqeval: pip install seqeval')
    return errors


def words_score(
    name: str, labels: Sequence[str], logits: Sequence[NDArray[Any] | None], targets: Sequence[NDArray[Any]]
) -> float:
    """The score of all words.

    Args:
        labels: by id.
        logits: of each text, words x labels; None where there are none.
        targets: of each text its words' label ids.

    Returns:
        0 to 1; NaN where logits are missing or not finite. An undefined F1, precision or recall is 0, in silence.

    Raises:
        ValueError: if a text has other words in the logits than in the targets, or there are no words.
    """
    said = _said(name, logits, targets)
    if said is None:
        return float("nan")
    if name == "token_accuracy":
        return float((np.concatenate(said) == np.concatenate(list(targets))).mean())
    from seqeval import metrics  # type: ignore[import-untyped,unused-ignore]

    truth, found = ([[labels[i] for i in row] for row in rows] for rows in (targets, said))
    return float(getattr(metrics, ENTITY_SCORES[name])(truth, found, zero_division=0))


def words_scores(
    name: str, logits: Sequence[NDArray[Any] | None], targets: Sequence[NDArray[Any]]
) -> NDArray[np.float64] | None:
    """One value a text whose mean is the score: of words one by one, every word weighs alike; None for entities."""
    if name != "token_accuracy":
        return None
    said = _said(name, logits, targets)
    if said is None:
        return np.full(len(targets), np.nan)
    right = np.array([(a == b).sum() for a, b in zip(said, targets, strict=True)], dtype=np.float64)
    return right * (len(targets) / sum(map(len, targets)))


def _said(
    name: str, logits: Sequence[NDArray[Any] | None], targets: Sequence[NDArray[Any]]
) -> list[NDArray[np.int64]] | None:
    """The likeliest label of each word; None where logits are missing or not finite."""
    if len(logits) != len(targets) or not sum(map(len, targets)):
        raise ValueError(f"{name}: logits of {len(logits)} texts for {len(targets)}; as many with words were expected")
    given = [row for row in logits if row is not None]
    if len(given) < len(logits) or not all(np.isfinite(row).all() for row in given):
        return None
    if wrong := [i for i, (a, b) in enumerate(zip(given, targets, strict=True)) if a.ndim != 2 or len(a) != len(b)]:
        i = wrong[0]
        raise ValueError(f"{name}: text {i} has logits of shape {given[i].shape} for {len(targets[i])} words")
    return [row.argmax(axis=1) for row in given]
