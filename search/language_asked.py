"""Prompts to be answered: what a model is asked where that which it writes is scored."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.search.encoding import Asked, EncodedSplit
from peftscape.search.language import rendered
from peftscape.search.language_encoding import encode_answers, encode_language
from peftscape.search.seq2seq_encoding import encode_pairs

if TYPE_CHECKING:
    from peftscape.search.language import Language
    from peftscape.search.task import Split


def encode_asked(
    split: Split, language: Language, tokenizer: Any, max_length: int, *, pairs: bool = False
) -> EncodedSplit:
    """The prompts of a split, and the completions to compare with; no answer gets longer than the longest of these.

    Of a chat the assistant's last message is wanted, and all before it is the prompt, by the tokenizer's template with
    its generation prompt. Prompts lose their beginning as in training.

    Raises:
        TaskError: an example has no token to predict.
    """
    chat = language.form == "chat"
    if chat:
        split = last_answers(split, tokenizer)
        encoded = encode_answers(split, tokenizer, max_length)
    else:
        learnt = encode_pairs if pairs else encode_language
        encoded = learnt(split, replace(language, loss_on="completion"), tokenizer, max_length)
    assert encoded.scored is not None
    own = zip(encoded.ids, encoded.scored, strict=True)
    prompts = encoded.sources or [ids[: int(mark.argmax())] for ids, mark in own]
    most = max(int(mark.sum()) for mark in encoded.scored)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    asked = Asked(prompts, most, answer_ends(tokenizer, chat=chat), decode)
    wanted = np.array([text.strip() for text in split.completions or ()], dtype=object)
    return replace(encoded, targets=wanted, asked=asked)


def last_answers(split: Split, tokenizer: Any) -> Split:
    """Chats as prompts, written by the template, with the assistant's last message as completion."""
    prompts, answers = [], []
    for chat in map(json.loads, split.texts):
        last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
        prompts.append(rendered(chat[:last], tokenizer, answer=True))
        answers.append(chat[last]["content"])
    return replace(split, texts=prompts, completions=answers)


def answer_ends(tokenizer: Any, *, chat: bool) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's end, and the mark that the template puts behind what is said.

    Chat models often have a mark of their own for the end of a turn (Gemma: `<end_of_turn>`), beside `<eos>`.
    """
    ends = {tokenizer.eos_token_id} - {None}
    if chat:
        words = "yes"
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
        behind = rendered(turn, tokenizer).rpartition(words)[2].lstrip()
        first = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
        marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends |= marks & set(first)
    return frozenset(ends)
