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

    Words behind the cut, and those that the tokenizer makes nothing of, are in no target. A text without any token of
    its words is left out, and counted among those that are cut.

    Raises:
        TaskError: the tokenizer does not say which word a token is of, or no text has a token.
    """
    rows = word_tokens(tokenizer, split.words or [], max_length)
    kept = [i for i, row in enumerate(rows) if (row.words >= 0).any()]
    if not kept:
        raise TaskError("task", ["the tokenizer makes no token of any text's words"])
    cut = sum(row.cut or bool((row.words < 0).all()) for row in rows)
    rows, labels = [rows[i] for i in kept], split.targets[kept]
    firsts = [first_tokens(row.words) for row in rows]
    targets = [target[row.words[first]] for target, row, first in zip(labels, rows, firsts, strict=True)]
    types = [row.types for row in rows if row.types is not None]
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    return EncodedSplit([row.ids for row in rows], types or None, objects(targets), cut, lengths, words=firsts)


@dataclass(frozen=True, eq=False)
class Row:
    """A text's tokens, their types if there are any, which word each is of (-1: none), and whether the text was cut.

    A token that is but the blank before a word is of none: Llama 3 and Qwen 2 make one before digits.
    """

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
            rows += _rows(tokenizer, some, max_length, blanks=bool(blank))
    finally:
        tokenizer.truncation_side = side
    return rows


def _rows(tokenizer: Any, texts: list[list[str]], max_length: int, *, blanks: bool) -> list[Row]:
    """The tokens of texts, before each of whose words a blank was put or not."""
    settings: dict[str, Any] = {
        "is_split_into_words": True, "return_attention_mask": False, "return_offsets_mapping": blanks, "verbose": False
    }  # fmt: skip
    batch = tokenizer(texts, truncation=False, **settings)
    cut = [len(ids) > max_length for ids in batch["input_ids"]]
    if any(cut):
        batch = tokenizer(texts, truncation=True, max_length=max_length, **settings)
    types = batch.get("token_type_ids")
    return [
        Row(
            np.array(ids, dtype=np.int64),
            None if types is None else np.array(types[i], dtype=np.int64),
            _words(batch.word_ids(i), texts[i], batch["offset_mapping"][i] if blanks else None),
            cut[i],
        )
        for i, ids in enumerate(batch["input_ids"])
    ]


def _words(numbers: list[int | None], text: list[str], places: list[tuple[int, int]] | None) -> Ids:
    """Which word each token is of, from its place in that word, before which a blank stands if places are given."""
    words = np.array([-1 if number is None else number for number in numbers], dtype=np.int64)
    if places is not None:
        sizes = np.array([len(word) for word in text] + [0])[words]
        words[(np.array(places).reshape(-1, 2)[:, 1] <= 1) & (sizes > 1)] = -1
    return words


def first_tokens(numbers: Ids) -> NDArray[np.bool_]:
    """Which tokens are the first of their words, from the word that each token is of."""
    first: NDArray[np.bool_] = (numbers >= 0) & (np.diff(numbers, prepend=-1) != 0)
    return first


def _joins_words(tokenizer: Any) -> bool:
    """Whether it makes other tokens of a word behind a blank, and puts none before it itself.

    Byte-level tokenizers (GPT-2, RoBERTa, Llama 3) do; transformers' examples load them with add_prefix_space=True. So
    do those that write "▁" for a blank and put none before every word (Gemma).
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    before, norm = state.get("pre_tokenizer") or {}, state.get("normalizer") or {}
    for part in before.get("pretokenizers", [before]):
        if part.get("type") == "ByteLevel" and not part.get("add_prefix_space"):
            return True
        if part.get("type") == "Metaspace":
            return bool(part.get("prepend_scheme", "always") != "always")
    steps = norm.get("normalizers", [norm])
    blanks = any(step.get("type") == "Replace" and step.get("content") == "▁" for step in steps)
    return blanks and not any(step.get("type") == "Prepend" for step in steps)
