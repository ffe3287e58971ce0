"""Tokens for language models, with a mark on each that counts: it is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peftscape.search.encoding import Choices, EncodedSplit, Ids
from peftscape.search.language import Language, Spans, prompts_of, said
from peftscape.search.tables import TaskError

if TYPE_CHECKING:
    from peftscape.search.task import Split

Marks = NDArray[np.bool_]
Marked = tuple[Ids, Marks]


def encode_language(split: Split, language: Language, tokenizer: Any, max_length: int) -> EncodedSplit:
    """What the model learns of each example, at most `max_length` tokens.

    Longer plain texts go on in a further example, and those of a single token are left out. Of a prompt whose
    completion counts the beginning is left out, and what the completion has beyond the length; of chats, and of prompts
    that count themselves, their end. Of a chat whose first answer lies beyond the length that answer stays, with what
    stands just before it. A completion ends with the tokenizer's end token.

    Raises:
        TaskError: an example has no token to predict.
    """
    texts, spans = said(language, split, tokenizer)
    # A chat's template writes the special tokens itself.
    rows = _marked(tokenizer, texts, spans, special=language.form != "chat")
    if language.form == "completion" and tokenizer.eos_token_id is not None:
        rows = [_ended(row, tokenizer.eos_token_id) for row in rows]
    long = sum(len(ids) > max_length for ids, _ in rows)
    owners = None
    if language.form == "text":
        blocks = [_blocks(row, max_length) for row in rows]
        owners = np.repeat(np.arange(len(rows)), [len(b) for b in blocks])
        rows, cut = [block for some in blocks for block in some], 0
    else:
        shortened = _shortened_chat if language.form == "chat" else _shortened
        rows, cut = [shortened(row, max_length, tokenizer) for row in rows], long
    targets = split.targets if language.form != "text" else np.zeros(len(rows), dtype=np.float32)
    return _split(rows, targets, cut, owners=owners)


def encode_answers(split: Split, tokenizer: Any, max_length: int) -> EncodedSplit:
    """The completions behind their prompts, which have the special tokens in them and are tokens by themselves.

    Raises:
        TaskError: an example has no token to predict.
    """
    read, written = (_marked(tokenizer, t, None, special=False) for t in (split.texts, split.completions or []))
    rows = [
        (np.append(a, b), np.repeat([False, True], [len(a), len(b)]))
        for (a, _), (b, _) in zip(read, written, strict=True)
    ]
    if tokenizer.eos_token_id is not None:
        rows = [_ended(row, tokenizer.eos_token_id) for row in rows]
    cut = sum(len(ids) > max_length for ids, _ in rows)
    return _split([_shortened(row, max_length, tokenizer) for row in rows], split.targets, cut)


def encode_choices(split: Split, language: Language, tokenizer: Any, max_length: int) -> EncodedSplit:
    """Every answer of every example behind its prompt, to be ranked by log-likelihood."""
    prompts = prompts_of(language, split)
    texts: list[str] = []
    spans: list[Spans] = []
    example, column, scale = [], [], []
    for i, prompt in enumerate(prompts):
        for j, answer in enumerate(language.answers(split, i)):
            texts.append(prompt + answer)
            spans.append([(len(prompt), len(texts[-1]))])
            example.append(i)
            column.append(j)
            scale.append(len(answer.strip().encode()) if language.normalise else 1)
    rows = _marked(tokenizer, texts, spans, special=True)
    cut = len({i for i, (ids, _) in zip(example, rows, strict=True) if len(ids) > max_length})
    rows = [_shortened(row, max_length, tokenizer) for row in rows]
    choices = Choices(np.array(example), np.array(column), np.array(scale, dtype=np.float64))
    return _split(rows, split.targets, cut, choices)


def _split(
    rows: Sequence[Marked], targets: NDArray[Any], cut: int, choices: Choices | None = None, owners: Ids | None = None
) -> EncodedSplit:
    if not rows:
        raise TaskError("task", ["no text has two tokens, of which the second could be predicted"])
    ids, marks = [row for row, _ in rows], [_predicted(mark) for _, mark in rows]
    if silent := [i for i, mark in enumerate(marks) if not mark.any()]:
        raise TaskError(
            "task", [f"{len(silent)} examples have no token to predict (the first is example {silent[0] + 1})"]
        )
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    return EncodedSplit(ids, None, targets, cut, lengths, scored=marks, choices=choices, owners=owners)


def _predicted(mark: Marks) -> Marks:
    """Without the first token, which nothing stands before."""
    mark = mark.copy()
    mark[:1] = False
    return mark


def _marked(tokenizer: Any, texts: Sequence[str], spans: Sequence[Spans] | None, *, special: bool) -> list[Marked]:
    """Tokens of each text; those that reach into its spans are marked, or all where there are none."""
    by_place = spans is not None
    if by_place and not tokenizer.is_fast:
        raise TaskError("task", ["this tokenizer does not say where its tokens stand; take one with a tokenizer.json"])
    batch = tokenizer(
        list(texts), return_attention_mask=False, return_offsets_mapping=by_place, add_special_tokens=special,
        truncation=False, verbose=False,
    )  # fmt: skip
    ids = [np.array(row, dtype=np.int64) for row in batch["input_ids"]]
    if spans is None:
        return [(row, np.ones(len(row), dtype=np.bool_)) for row in ids]
    return [(row, _inside(o, s)) for row, o, s in zip(ids, batch["offset_mapping"], spans, strict=True)]


def _inside(offsets: Sequence[tuple[int, int]], spans: Spans) -> Marks:
    """Which tokens reach into a span. A token reaches back to the end of the one before: blanks are often trimmed."""
    marks = np.zeros(len(offsets), dtype=np.bool_)
    before = 0
    for i, (start, end) in enumerate(offsets):
        marks[i] = any(first < end and min(before, start) < last for first, last in spans)
        before = max(before, end)
    return marks


def _ended(row: Marked, end: int) -> Marked:
    ids, mark = row
    if len(ids) and ids[-1] == end:
        return ids, np.append(mark[:-1], True)
    return np.append(ids, end), np.append(mark, True)


def _blocks(row: Marked, length: int) -> list[Marked]:
    """Consecutive pieces; one of a single token predicts nothing and is left out."""
    ids, mark = row
    pieces = [(ids[i : i + length], mark[i : i + length]) for i in range(0, max(len(ids), 1), length)]
    return [p for p in pieces if len(p[0]) > 1]


def _shortened(row: Marked, length: int, tokenizer: Any) -> Marked:
    """At most `length` tokens: a start token, the prompt's last ones, and the completion's first."""
    ids, mark = row
    if len(ids) <= length:
        return row
    prompt = int(mark.argmax())
    start = int(prompt > 0 and ids[0] == tokenizer.bos_token_id)
    completion = min(len(ids) - prompt, length - start - int(prompt > start))
    kept = np.r_[0:start, prompt - (length - start - completion) : prompt + completion]
    return ids[kept], mark[kept]


def _shortened_chat(row: Marked, length: int, tokenizer: Any) -> Marked:
    """At most `length` tokens: the first ones, if some of the first answer is among them; else that answer's."""
    ids, mark = row
    if len(ids) <= length or mark[1:length].any():
        return ids[:length], mark[:length]
    first = int(mark.argmax())
    end = first + int(np.append(mark[first:], False).argmin())
    return _shortened((ids[:end], mark[:end]), length, tokenizer)
