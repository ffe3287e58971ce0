"""Tokens of words: a word may be several, and the first of them carries its label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.search.encoding import BATCH_TEXTS, EncodedSplit, Ids
from peftscape.search.tables import TaskError
from peftscape.search.token_examples import objects

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftscape.search.splits import Split


def encode_words(split: Split, tokenizer: Any, max_length: int) -> EncodedSplit:
    """The tokens of texts that are lists of words, special tokens included, cut on the right at `max_length`.

    Words behind the cut, and those that the tokenizer makes nothing of, are in no target.

    Raises:
        TaskError: the tokenizer does not say which word a token is of, or a text has no token.
    """
    rows = word_tokens(tokenizer, split.words or [], max_length)
    firsts = [first_tokens(row.words) for row in rows]
    if empty := [i for i, first in enumerate(firsts) if not first.any()]:
        raise TaskError("task", [f"{len(empty)} texts have no tokens (the first is text {empty[0] + 1})"])
    targets = [target[row.words[first]] for target, row, first in zip(split.targets, rows, firsts, strict=True)]
    types = [row.types for row in rows if row.types is not None]
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    cut = sum(row.cut for row in rows)
    return EncodedSplit([row.ids for row in rows], types or None, objects(targets), cut, lengths, words=firsts)


@dataclass(frozen=True, eq=False)
class Row:
    """A text's tokens, their types if there are any, which word each is of (-1: none), and whether the text was cut."""

    ids: Ids
    types: Ids | None
    words: Ids
    cut: bool


def word_tokens(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int) -> list[Row]:
    """The tokens of each text. Raises TaskError as `encode_words`."""
    if not tokenizer.is_fast:
        raise TaskError("task", ["this tokenizer does not say where its words stand; take one with a tokenizer.json"])
    special = tokenizer.num_special_tokens_to_add(False)
    if max_length <= special:
        raise TaskError("task", [f"max_length: {max_length} leaves no room beside {special} special tokens"])
    blank = " " if _joins_words(tokenizer) else ""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    rows: list[Row] = []
    try:
        for start in range(0, len(texts), BATCH_TEXTS):
            some = [[blank + word for word in text] for text in texts[start : start + BATCH_TEXTS]]
            rows += _rows(tokenizer, some, max_length)
    finally:
        tokenizer.truncation_side = side
    return rows


def _rows(tokenizer: Any, texts: list[list[str]], max_length: int) -> list[Row]:
    settings: dict[str, Any] = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False}
    batch = tokenizer(texts, truncation=False, **settings)
    cut = [len(ids) > max_length for ids in batch["input_ids"]]
    if any(cut):
        batch = tokenizer(texts, truncation=True, max_length=max_length, **settings)
    types = batch.get("token_type_ids")
    return [
        Row(
            np.array(ids, dtype=np.int64),
            None if types is None else np.array(types[i], dtype=np.int64),
            np.array([-1 if word is None else word for word in batch.word_ids(i)], dtype=np.int64),
            cut[i],
        )
        for i, ids in enumerate(batch["input_ids"])
    ]


def first_tokens(numbers: Ids) -> NDArray[np.bool_]:
    """Which tokens are the first of their words, from the word that each token is of."""
    first: NDArray[np.bool_] = (numbers >= 0) & (np.diff(numbers, prepend=-1) != 0)
    return first


def _joins_words(tokenizer: Any) -> bool:
    """Whether it makes other tokens of a word behind a blank, and puts none before it itself.

    Byte-level tokenizers (GPT-2, RoBERTa, Llama 3) do; transformers' examples load them with add_prefix_space=True.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}
    parts = state.get("pretokenizers", [state])
    return any(part.get("type") == "ByteLevel" and not part.get("add_prefix_space") for part in parts)
