"""How examples become texts of a language model, and which of their tokens count.

A text is said with the characters that count: all of them, a completion behind its prompt, or the assistant's turns.
What a sequence-to-sequence model reads and what it has to say are the same two parts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.task import Split

Form = Literal["text", "completion", "chat", "choices"]
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Language:
    """What a language model is asked.

    Args:
        form: whole texts, prompts with completions, chats, or prompts with answers to choose from.
        loss_on: the tokens that count: those of completions and answers, or all.
        choices: the word of each class; empty where each example has options of its own.
        template: the prompt of an answer, with `{text}` and `{pair}` in it.
        normalise: whether an answer's log-likelihood is divided by its bytes.
    """

    form: Form
    loss_on: Literal["completion", "all"]
    choices: tuple[str, ...] = ()
    template: str | None = None
    normalise: bool = False

    def words(self) -> list[str]:
        """All of it as words, for a fingerprint."""
        return [self.form, self.loss_on, *self.choices, self.template or "", str(self.normalise)]

    def json(self) -> dict[str, Any]:
        """All of it as JSON values, for an adapter's card."""
        return {**vars(self), "choices": list(self.choices)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Language:
        """The inverse of `json`. Raises TypeError for other keys."""
        return cls(**{**value, "choices": tuple(value["choices"])})

    def prompt(self, text: str, pair: str | None) -> str:
        """The prompt of a question."""
        if self.template is None:
            return text if pair is None else f"{text}\n{pair}"
        return self.template.format(text=text, pair=pair or "")

    def answers(self, split: Split, i: int) -> tuple[str, ...]:
        """The answers to choose from, each as it follows the prompt: behind a blank, as in lm-evaluation-harness."""
        prompt = self.prompt(split.texts[i], split.pairs[i] if split.pairs else None)
        blank = "" if prompt[-1:].isspace() else " "
        return tuple(
            word if word[0].isspace() else blank + word
            for word in (split.options[i] if split.options else self.choices)
        )


def said(language: Language, split: Split, tokenizer: Any) -> tuple[list[str], list[Spans] | None]:
    """The text of each example with all that the model learns of it, and its characters that count (None: all).

    Of answers to choose from it is the right one that is learnt.
    """
    if language.form == "text":
        return split.texts, None
    if language.form == "chat":
        chats = [_chat(json.loads(chat), tokenizer, i) for i, chat in enumerate(split.texts)]
        texts, spans = [text for text, _ in chats], [spans for _, spans in chats]
    else:
        prompts, ends = split.texts, split.completions or []
        if language.form == "choices":
            prompts = prompts_of(language, split)
            ends = [language.answers(split, i)[int(split.targets[i])] for i in range(len(split))]
        texts = [a + b for a, b in zip(prompts, ends, strict=True)]
        spans = [[(len(a), len(text))] for a, text in zip(prompts, texts, strict=True)]
    return texts, None if language.loss_on == "all" else spans


def prompts_of(language: Language, split: Split) -> list[str]:
    """The prompts of questions with answers to choose from."""
    pairs: Sequence[str | None] = split.pairs or [None] * len(split)
    return [language.prompt(text, pair) for text, pair in zip(split.texts, pairs, strict=True)]


def rendered(messages: list[dict[str, str]], tokenizer: Any, *, answer: bool = False) -> str:
    """A chat by the tokenizer's template; with `answer` up to where the assistant begins to speak.

    Raises:
        InputError: the tokenizer has no template, or its template refuses these messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError("task.messages", ["the tokenizer has no chat template; give prompt and completion instead"])
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except TemplateError as error:
        roles, begins = ", ".join(m["role"] for m in messages), messages[0]["content"][:60]
        why = f'the template refuses the chat that begins with "{begins}" (messages by {roles}): {error}'
        raise InputError("task.messages", [why]) from None


def _chat(messages: list[dict[str, str]], tokenizer: Any, row: int) -> tuple[str, Spans]:
    """A chat by the tokenizer's template, and what the assistant says in it, the mark of its end included."""
    text = rendered(messages, tokenizer)
    spans: Spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, until = rendered(messages[:i], tokenizer, answer=True), rendered(messages[: i + 1], tokenizer)
            if not until.startswith(before) or not text.startswith(until):
                why = "the template writes earlier messages anew, so that the assistant's words cannot be told"
                raise InputError("task.messages", [f"row {row + 1}: {why}"])
            # A blank behind the mark may be the beginning of the next turn's first token.
            spans.append((len(before), max(len(before), len(until.rstrip()))))
    return text, spans
