"""How errors speak: the nearest valid name, and all errors of one file at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(word: str, known: Iterable[str]) -> str:
    """`. Did you mean "x"?` for the closest known word, or what there is when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5) or [n for n in names if word and word in n][:1]
    if close:
        return f'. Did you mean "{close[0]}"?'
    shown = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
    return f". There are: {shown}" if names else ""


class InputError(ValueError):
    """What a user wrote cannot be done; carries every error found, not the first one.

    Args:
        where: the file or the thing that was read.
        errors: one line each, in the user's own terms.
    """

    def __init__(self, where: str, errors: Sequence[str]) -> None:
        self.where, self.errors = where, tuple(errors)
        head = f"{where}: {len(errors)} error{'s' if len(errors) != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {e}" for e in errors)]))


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=unique)`: an object in which no key comes twice. Raises ValueError."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'"{key[:60]}" is given twice')
        found[key] = value
    return found
