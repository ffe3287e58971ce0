"""From a table's columns to what a language model learns: chats, and answers to choose from.

Each reader appends to `errors`, as those in `examples`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peftscape.search import examples
from peftscape.spaces.words import nearest

if TYPE_CHECKING:
    from peftscape.search.tables import Table

_ROLES = ("system", "user", "assistant", "tool")
#: What a chat needs besides its shape.
ANSWERED = "one of them by the assistant, but not the first"


def read_chats(table: Table, column: str, errors: list[str]) -> list[str]:
    """The column's lists of messages, each as JSON; a chat without an answer of the assistant is an error."""
    chats: list[str] = []
    for i, value in enumerate(table.column(column)):
        chat = parsed(value)
        if not is_chat(chat):
            errors.append(
                f'task.messages: row {i + 1} of {table.source} is no list of messages such as {{"role": "user", '
                f'"content": "..."}}, {ANSWERED}'
            )
            return []
        chats.append(json.dumps([{"role": m["role"], "content": m["content"]} for m in chat], ensure_ascii=False))
    return chats


def is_chat(chat: Any) -> bool:
    """Whether it is a list of messages in which the assistant answers."""
    roles = [m["role"] for m in chat] if are_messages(chat) else []
    return "assistant" in roles[1:] and roles[0] != "assistant" and set(roles) <= set(_ROLES)


def are_messages(value: Any) -> bool:
    """Whether it is a list of messages, of which there is one at least."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get(k), str) for m in value for k in ("role", "content"))
    )


def read_options(table: Table, column: str, errors: list[str]) -> list[tuple[str, ...]]:
    """The column's lists of answers (in CSV written as JSON lists), at least two different ones in each row."""
    found: list[tuple[str, ...]] = []
    for i, value in enumerate(table.column(column)):
        options = parsed(value)
        if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
            errors.append(f'task.options: row {i + 1} of {table.source} has no list of texts in "{column}"')
            return []
        if len(set(options)) < max(2, len(options)):
            errors.append(f"task.options: row {i + 1} of {table.source} needs at least 2 options, all different")
            return []
        found.append(tuple(options))
    return found


def right_options(
    table: Table, column: str, options: Sequence[tuple[str, ...]], errors: list[str]
) -> NDArray[np.int64]:
    """Which option of each row is right: the label is its number, from 0, or its text."""
    labels = examples.read_labels(table, column, errors)
    if len(labels) != len(options):
        return np.zeros(0, dtype=np.int64)
    right: list[int] = []
    for i, (label, answers) in enumerate(zip(labels, options, strict=True)):
        text = str(label)
        number = answers.index(text) if text in answers else int(text) if text.isdigit() else -1
        if not 0 <= number < len(answers):
            errors.append(f'task.label: "{text}" in row {i + 1} of {table.source} is no option, and no number of one')
            return np.zeros(0, dtype=np.int64)
        right.append(number)
    return np.array(right, dtype=np.int64)


def choice_words(choices: Mapping[str, str] | None, labels: Sequence[str], errors: list[str]) -> tuple[str, ...]:
    """The word of each class; the label itself where none are given."""
    if choices is None:
        return tuple(labels)
    errors += [f'task.choices: no label "{name}"{nearest(name, labels)}' for name in choices if name not in labels]
    if missing := [name for name in labels if name not in choices]:
        errors.append(f"task.choices: no word for the label{'s' * (len(missing) > 1)} {', '.join(missing)}")
        return tuple(labels)
    if len(set(choices.values())) < len(choices):
        errors.append("task.choices: two labels have the same word")
    return tuple(choices[name] for name in labels)


def parsed(value: Any) -> Any:
    """A nested value, written as JSON where the file has only strings."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple | np.ndarray) else value
    try:
        return json.loads(value)
    except ValueError:
        return None
