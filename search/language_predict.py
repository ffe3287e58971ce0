"""What an adapter of a language model says of texts: their loss, the most likely answer, or what follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.search.encoding import NO_OPTION, EncodedSplit
from peftscape.search.language import rendered
from peftscape.search.language_asked import answer_ends
from peftscape.search.language_encoding import encode_choices, encode_language
from peftscape.search.language_examples import ANSWERED, are_messages, is_chat, parsed
from peftscape.search.seq2seq_encoding import encode_pair_choices, encode_pairs
from peftscape.search.tables import TaskError
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftscape.search.adapter import Adapter
    from peftscape.search.language import Language


def probabilities(names: Sequence[str], logits: NDArray[Any]) -> dict[str, Any]:
    """The likeliest of these names, and how likely each is."""
    raised = np.exp(logits.astype(np.float64) - logits.max())
    row = (raised / raised.sum()).tolist()
    return {
        "label": names[int(np.argmax(row))],
        "score": max(row),
        "probabilities": dict(zip(names, row, strict=True)),
    }


def said_of(
    adapter: Adapter,
    language: Language,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    options: Sequence[Sequence[str]] | None,
    batch_size: int,
) -> list[dict[str, Any]]:
    """See `Adapter.predict`. Raises InputError with what does not fit."""
    from peftscape.search.task import Split

    tokenizer = adapter.tokenizer()
    for name, given in (("pairs", pairs), ("options", options)):
        if given is not None and len(given) != len(texts):
            raise InputError("predict", [f"{len(given)} {name} for {len(texts)} texts"])
    learnt, ranked = (encode_language, encode_choices)
    if adapter.backbone.sites.decoder_layers:
        learnt, ranked = (encode_pairs, encode_pair_choices)
    second = None if pairs is None else list(pairs)
    targets = np.zeros(len(texts), dtype=np.int64)
    try:
        if language.form == "choices":
            if not language.choices and options is None:
                raise InputError("predict", ["options: the adapter chooses among answers to each text; give them"])
            answers = None if language.choices or options is None else [tuple(row) for row in options]
            split = Split(list(texts), second, targets, options=answers)
            encoded = ranked(split, language, tokenizer, adapter.card.max_length)
        else:
            if language.form == "completion" and second is None:
                raise InputError(
                    "predict", ["completions: the adapter says how likely these are; `generate` makes some"]
                )
            if wrong := [i for i, text in enumerate(texts) if language.form == "chat" and not is_chat(parsed(text))]:
                raise InputError("predict", [f"text {i} is no list of messages as JSON, {ANSWERED}" for i in wrong[:5]])
            encoded = learnt(Split(list(texts), None, targets, second), language, tokenizer, adapter.card.max_length)
    except TaskError as error:
        raise InputError("predict", list(error.errors)) from None
    found = adapter.encoded_logits(encoded, batch_size=batch_size)
    if language.form == "choices":
        names = answers if answers is not None else [adapter.labels] * len(texts)
        return [probabilities(name, row[row > NO_OPTION]) for name, row in zip(names, found, strict=True)]
    sums = _by_text(found, encoded.owners, len(texts))
    if silent := np.flatnonzero(sums[:, 1] == 0).tolist():
        raise InputError("predict", [f"text {i} has no token to predict" for i in silent[:5]])
    return [
        {"loss": float(loss / tokens), "perplexity": float(np.exp(np.float64(loss / tokens))), "tokens": int(tokens)}
        for loss, tokens in sums
    ]


def _by_text(rows: NDArray[Any], owners: NDArray[np.int64] | None, count: int) -> NDArray[np.float64]:
    """Sums over the examples into which a long text was cut."""
    sums = np.zeros((count, 2), dtype=np.float64)
    np.add.at(sums, np.arange(count) if owners is None else owners, rows)
    return sums


def continued(adapter: Adapter, language: Language, prompts: Sequence[str], most: int, batch_size: int) -> list[str]:
    """See `Adapter.generate`."""
    from peftscape.search.cohort import EVALUATION_TOKENS, Cohort
    from peftscape.search.generation import in_chunks

    tokenizer = adapter.tokenizer()
    chat = language.form == "chat"
    texts = [
        rendered(_messages(p), tokenizer, answer=True)
        if chat
        else language.prompt(p, None)
        if language.form == "choices"
        else p
        for p in prompts
    ]
    ids = [np.array(tokenizer(text, add_special_tokens=not chat)["input_ids"], dtype=np.int64) for text in texts]
    if empty := [i for i, row in enumerate(ids) if not len(row)]:
        raise InputError("generate", [f"prompt {i} has no tokens" for i in empty[:5]])
    room, two = adapter.backbone.sites.max_positions, adapter.backbone.sites.decoder_layers > 0
    ahead = 0 if two else adapter.design.position_shift()
    if room and (long := [i for i, row in enumerate(ids) if len(row) + ahead + (not two) > room]):
        why = f"tokens, which leaves no room in the model's {room:,} positions"
        why += f", of which the design takes {ahead:,}" if ahead else ""
        raise InputError("generate", [f"prompt {i} has {len(ids[i]):,} {why}" for i in long[:5]])
    nothing = np.zeros(len(ids), dtype=np.float32)
    split = EncodedSplit(ids, None, nothing, 0, np.array([len(row) for row in ids]))
    cohort = Cohort(adapter.backbone, adapter.head, split, batch_size=batch_size)
    cohort.admit(adapter.lane())
    ends = answer_ends(tokenizer, chat=chat)
    found = [""] * len(ids)
    try:
        for rows, (said,) in in_chunks(cohort, ids, most=most, ends=ends, tokens=EVALUATION_TOKENS, size=batch_size):
            for i, row in zip(rows, said, strict=True):
                found[i] = tokenizer.decode(row, skip_special_tokens=True)
    finally:
        cohort.close()
    return found


def _messages(prompt: str) -> list[dict[str, str]]:
    """A chat as JSON, or the words of a user."""
    try:
        value = json.loads(prompt)
    except ValueError:
        value = None
    return value if are_messages(value) else [{"role": "user", "content": prompt}]
