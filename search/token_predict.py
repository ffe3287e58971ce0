"""What an adapter says of the words of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.tables import TaskError
from peftscape.search.token_encoding import first_tokens, word_tokens
from peftscape.search.token_examples import objects
from peftscape.search.token_words import by_text
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftscape.search.adapter import Adapter


def labels_of_words(adapter: Adapter, texts: Sequence[Sequence[str]], batch_size: int) -> list[dict[str, Any]]:
    """See `Adapter.predict`; a text in one string is cut into words at its blanks."""
    words = [text.split() if isinstance(text, str) else list(text) for text in texts]
    names = adapter.labels or tuple(str(i) for i in range(adapter.card.outputs))
    if not words:
        return []
    numbers, found = word_logits(adapter, words, batch_size)
    answers = []
    for text, own, logits in zip(words, numbers, found, strict=True):
        raised = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        likely = raised / raised.sum(axis=1, keepdims=True)
        # A word that found no room behind a design's prompts has zeros.
        said = {i: row for i, row, given in zip(own.tolist(), likely, logits, strict=True) if given.any()}
        answers.append(
            {
                "words": text,
                "labels": [names[int(said[i].argmax())] if i in said else None for i in range(len(text))],
                "scores": [float(said[i].max()) if i in said else None for i in range(len(text))],
            }
        )
    return answers


@torch.no_grad()
def word_logits(
    adapter: Adapter, texts: Sequence[Sequence[str]], batch_size: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
    """Of each text which of its words have a token within the adapter's length, and their logits, words x labels.

    Raises:
        InputError: the backbone has no tokenizer that knows words.
    """
    try:
        rows = word_tokens(adapter.tokenizer(), texts, adapter.card.max_length)
    except TaskError as error:
        raise InputError("predict", list(error.errors)) from None
    marks = [first_tokens(row.words) for row in rows]
    numbers = [row.words[first] for row, first in zip(rows, marks, strict=True)]
    found = [np.zeros((len(own), adapter.card.outputs), dtype=np.float32) for own in numbers]
    kept = [i for i, own in enumerate(numbers) if len(own)]
    if not kept:
        return numbers, found
    rows, firsts = [rows[i] for i in kept], [marks[i] for i in kept]
    types = [row.types for row in rows if row.types is not None]
    lengths, targets = np.array([len(row.ids) for row in rows]), objects([numbers[i] for i in kept])
    split = EncodedSplit([row.ids for row in rows], types or None, targets, 0, lengths, words=firsts)
    cohort = Cohort(adapter.backbone, adapter.head, split, batch_size=batch_size)
    cohort.admit(adapter.lane())
    order = np.argsort(lengths, kind="stable")  # so that little is padded
    try:
        parts = [cohort.logits([order[i : i + batch_size]], split) for i in range(0, len(order), batch_size)]
    finally:
        cohort.close()
    for i, row in zip(kept, by_text(parts, order, split.targets)[0], strict=True):
        found[i] = row
    return numbers, found
