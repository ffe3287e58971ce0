"""Tokens of a task: every text once, unpadded, cut at the length that the model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peftscape.search.tables import TaskError

if TYPE_CHECKING:
    from peftscape.search.language import Language
    from peftscape.search.task import Split, Task

Ids = NDArray[np.int64]

#: The log-likelihood of an option that is not there: finite, and below that of any text.
NO_OPTION = -1e9

# Tokenizers keep offsets and strings beside the ids (about 200 bytes a token) until a batch is converted.
BATCH_TEXTS = 1024


@dataclass(frozen=True, eq=False)
class Choices:
    """Sequences that are answers to choose from: of which example, its how manieth, and what to divide by."""

    example: Ids
    column: Ids
    scale: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts that a model has to go on from, by itself: what it writes is scored, not how likely a text is.

    `most` tokens are written at most, and one of `ends` is the last; `decode` makes text of the others.
    """

    prompts: list[Ids]
    most: int
    ends: frozenset[int]
    decode: Callable[[list[int]], str]


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """Token ids of each example, special tokens included, without padding.

    `types` are token type ids, None where the tokenizer makes none. `lengths` counts tokens after cutting, `cut` the
    examples that were too long, or left out with none of their words a token. `scored` marks the tokens that a language
    model has to predict, in any but the first place; with `choices` every sequence is one answer, and an example has
    several; with `owners` an example is a part of a longer text, and that text's number; with `words`, which mark the
    first token of each labelled word, a target holds the labels of those words. For an encoder-decoder `sources` are
    what its encoder reads, where that is not what it writes. With `asked` the targets are texts.
    """

    ids: list[Ids]
    types: list[Ids] | None
    targets: NDArray[Any]
    cut: int
    lengths: Ids
    scored: list[NDArray[np.bool_]] | None = None
    choices: Choices | None = None
    owners: Ids | None = None
    sources: list[Ids] | None = None
    asked: Asked | None = None
    words: list[NDArray[np.bool_]] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def answers(self, rows: NDArray[Any], width: int) -> NDArray[Any]:
        """Log-likelihoods, lanes x examples x options, from lanes x sequences x 2; very low where there is no option.

        Outputs that are not rows of answers stay as they are.
        """
        if self.choices is None:
            return rows
        out = np.full((len(rows), len(self), width), NO_OPTION, dtype=rows.dtype)
        out[:, self.choices.example, self.choices.column] = -rows[..., 0] / self.choices.scale
        return out


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """A task and the tokens of its three splits."""

    task: Task
    train: EncodedSplit
    validation: EncodedSplit
    test: EncodedSplit


def encode(task: Task, tokenizer: Any, max_length: int, *, pairs: bool = False) -> EncodedTask:
    """The task in tokens of a transformers tokenizer, at most `max_length` each, special tokens included.

    Texts are cut on the right; of a pair, the longer text first. Those of a language model: see `encode_language`,
    and with `pairs`, for an encoder-decoder, `encode_pairs`; of texts whose words are labelled `encode_words`.

    Raises:
        TaskError: if `max_length` leaves no room for text, or an example has no token at all.
    """
    if task.kind == "token_classification":
        return _words_task(task, tokenizer, max_length)
    if task.language is not None:
        return _language_task(task, task.language, tokenizer, max_length, pairs)
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


def _words_task(task: Task, tokenizer: Any, max_length: int) -> EncodedTask:
    from peftscape.search.token_encoding import encode_words

    return EncodedTask(task, *(encode_words(split, tokenizer, max_length) for split in task.splits().values()))


def _language_task(task: Task, language: Language, tokenizer: Any, max_length: int, pairs: bool) -> EncodedTask:
    from peftscape.search.language_asked import encode_asked
    from peftscape.search.language_encoding import encode_choices, encode_language
    from peftscape.search.seq2seq_encoding import encode_pair_choices, encode_pairs

    if max_length < 2:
        raise TaskError(task.name, [f"max_length: {max_length} leaves no token to predict"])
    learnt, ranked = (encode_pairs, encode_pair_choices) if pairs else (encode_language, encode_choices)
    held_out = ranked if language.form == "choices" else learnt
    if task.metric.kind == "generation":
        held_out = partial(encode_asked, pairs=pairs)
    train = learnt(task.train, language, tokenizer, max_length)
    validation, test = (held_out(s, language, tokenizer, max_length) for s in (task.validation, task.test))
    return EncodedTask(task, train, validation, test)


def encode_split(split: Split, tokenizer: Any, max_length: int) -> EncodedSplit:
    """The tokens of one split."""
    ids: list[Ids] = []
    types: list[Ids] = []
    cut = 0
    for start in range(0, len(split), BATCH_TEXTS):
        stop = start + BATCH_TEXTS
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
