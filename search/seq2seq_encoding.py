"""Tokens for encoder-decoders: what the encoder reads and what the decoder writes, of which every token counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peftscape.search.encoding import Choices, EncodedSplit, Ids
from peftscape.search.language import Language, prompts_of
from peftscape.search.tables import TaskError

if TYPE_CHECKING:
    from peftscape.search.task import Split


def encode_pairs(split: Split, language: Language, tokenizer: Any, max_length: int) -> EncodedSplit:
    """Prompts for the encoder and completions for the decoder, at most `max_length` tokens each, cut on the right.

    Raises:
        TaskError: the task has whole texts or chats instead, or a text has no tokens.
    """
    if language.form == "choices":
        written = [language.answers(split, i)[int(split.targets[i])].strip() for i in range(len(split))]
        return _split(prompts_of(language, split), written, tokenizer, max_length, split.targets)
    if split.completions is None or language.loss_on != "completion":
        why = "an encoder-decoder writes one text from another; give columns prompt and completion"
        raise TaskError("task", [f"{why}, and no loss_on" if split.completions is not None else why])
    return _split(split.texts, split.completions, tokenizer, max_length, split.targets)


def encode_pair_choices(split: Split, language: Language, tokenizer: Any, max_length: int) -> EncodedSplit:
    """Every answer of every example, to be ranked by its log-likelihood after the example's prompt."""
    prompts, written, example, column = [], [], [], []
    for i, prompt in enumerate(prompts_of(language, split)):
        for j, answer in enumerate(language.answers(split, i)):
            prompts.append(prompt)
            written.append(answer.strip())
            example.append(i)
            column.append(j)
    scale = [len(answer.encode()) if language.normalise else 1 for answer in written]
    choices = Choices(np.array(example), np.array(column), np.array(scale, dtype=np.float64))
    return _split(prompts, written, tokenizer, max_length, split.targets, choices)


def _split(
    read: Sequence[str], written: Sequence[str], tokenizer: Any, length: int, targets: NDArray[Any],
    choices: Choices | None = None,
) -> EncodedSplit:  # fmt: skip
    end = tokenizer.eos_token_id
    sources = tokenizer(list(read), return_attention_mask=False, verbose=False)["input_ids"]
    aims = tokenizer(text_target=list(written), return_attention_mask=False, verbose=False)["input_ids"]
    if end is not None:
        # mBART's rows may end in the end and the language, which the decoder starts with.
        aims = [row if end in row[-2:] else [*row, end] for row in aims]
    cut = sum(len(a) > length or len(b) > length for a, b in zip(sources, aims, strict=True))
    source_ids, ids = _shortened(sources, length), _shortened(aims, length)
    lengths = np.array([len(a) + len(b) for a, b in zip(source_ids, ids, strict=True)], dtype=np.int64)
    if empty := sum(not len(a) or not len(b) for a, b in zip(source_ids, ids, strict=True)):
        raise TaskError("task", [f"{empty} texts have no tokens"])
    scored = [np.ones(len(row), dtype=np.bool_) for row in ids]
    return EncodedSplit(ids, None, targets, cut, lengths, scored=scored, choices=choices, sources=source_ids)


def _shortened(rows: Sequence[Sequence[int]], length: int) -> list[Ids]:
    """The first tokens of each, and its last, which ends it."""
    return [np.array([*row[: length - 1], row[-1]] if len(row) > length else row, dtype=np.int64) for row in rows]
