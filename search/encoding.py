"""Tokens of a task: every text once, unpadded, cut at the length that the model takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peftscape.search.tables import TaskError

if TYPE_CHECKING:
    from peftscape.search.task import Split, Task

Ids = NDArray[np.int64]

# Tokenizers keep offsets and strings beside the ids (about 200 bytes a token) until a batch is converted.
_BATCH_TEXTS = 1024


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """Token ids of each example, special tokens included, without padding.

    `types` are token type ids, None where the tokenizer makes none. `lengths` counts tokens after cutting,
    `cut` the examples that were too long.
    """

    ids: list[Ids]
    types: list[Ids] | None
    targets: NDArray[Any]
    cut: int
    lengths: Ids

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """A task and the tokens of its three splits."""

    task: Task
    train: EncodedSplit
    validation: EncodedSplit
    test: EncodedSplit


def encode(task: Task, tokenizer: Any, max_length: int) -> EncodedTask:
    """The task in tokens of a transformers tokenizer, at most `max_length` each, special tokens included.

    Texts are cut on the right; of a pair, the longer text first.

    Raises:
        TaskError: if `max_length` leaves no room for text, or an example has no token at all.
    """
    special = tokenizer.num_special_tokens_to_add(task.train.pairs is not None)
    if max_length <= special:
        raise TaskError(task.name, [f"max_length: {max_length} leaves no room beside {special} special tokens"])
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        parts = {name: encode_split(split, tokenizer, max_length) for name, split in task.splits().items()}
    finally:
        tokenizer.truncation_side = side
    empty = [f"{name}: {n} texts have no tokens" for name, p in parts.items() if (n := int((p.lengths == 0).sum()))]
    if empty:
        raise TaskError(task.name, empty)
    return EncodedTask(task, parts["train"], parts["validation"], parts["test"])


def encode_split(split: Split, tokenizer: Any, max_length: int) -> EncodedSplit:
    """The tokens of one split."""
    ids: list[Ids] = []
    types: list[Ids] = []
    cut = 0
    for start in range(0, len(split), _BATCH_TEXTS):
        stop = start + _BATCH_TEXTS
        texts = split.texts[start:stop]
        pairs = None if split.pairs is None else split.pairs[start:stop]
        # Whole first, for tokenizers do not say which texts they cut; then the long ones again.
        batch = _tokens(tokenizer, texts, pairs, None)
        long = [i for i, row in enumerate(batch["input_ids"]) if len(row) > max_length]
        if long:
            second = None if pairs is None else [pairs[i] for i in long]
            short = _tokens(tokenizer, [texts[i] for i in long], second, max_length)
            for key, rows in short.items():
                for i, row in zip(long, rows, strict=True):
                    batch[key][i] = row
        cut += len(long)
        ids += [np.array(row, dtype=np.int64) for row in batch["input_ids"]]
        types += [np.array(row, dtype=np.int64) for row in batch.get("token_type_ids", ())]
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    return EncodedSplit(ids, types or None, split.targets, cut, lengths)


def _tokens(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, max_length: int | None
) -> dict[str, list[list[int]]]:
    limit = {"truncation": "longest_first", "max_length": max_length} if max_length else {"truncation": False}
    # `verbose` would warn of texts over the model's length, which are cut in the second pass.
    return dict(tokenizer(texts, pairs, return_attention_mask=False, verbose=False, **limit))
