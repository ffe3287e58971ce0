"""Where each token of a lane stands in its text: for methods that read more than one token at a time.

Lanes are packed: a lane's tokens are its texts end to end, and what lies between texts belongs to none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Text:
    """The texts of a group of lanes; virtual tokens belong to theirs.

    Args:
        row: lanes x tokens, the number of the token's text within its lane; `texts` where there is none.
        place: lanes x tokens, from 0 at the text's first token.
        length: lanes x tokens, of the token's text.
        texts: texts of a lane.
        context: lanes x tokens; where a language model learns to predict, how many tokens of the token's text all
            others may read: its prompt. None where a whole text may be read by all its tokens.
        past: in generation, what a method has read of these texts: their first tokens fill it, and those that follow,
            one at a time, find it, since the method asks in the same order again.
        known: of each lane the length of its longest text, where that is known without asking the device.
        since: the least place of the tokens that are here; of those before it there are but rows that were kept.
    """

    row: Tensor
    place: Tensor
    length: Tensor
    texts: int
    context: Tensor | None = None
    past: dict[str, Tensor] | None = None
    known: tuple[int, ...] = ()
    since: int = 0
    _asked: Iterator[int] = field(default_factory=count, init=False)

    def sum(self, x: Tensor) -> Tensor:
        """lanes x tokens x width to lanes x texts x width."""
        lanes, _, width = x.shape
        index = self.row.unsqueeze(-1).expand(-1, -1, width)
        return x.new_zeros(lanes, self.texts + 1, width).scatter_add(1, index, x)[:, : self.texts]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each text, or its context: lanes x tokens x width to lanes x texts x width."""
        if self.past is None:
            return self._mean(x)
        key = f"{next(self._asked)} mean"
        if key not in self.past:
            self.past[key] = self._mean(x)
        return self.past[key]

    def _mean(self, x: Tensor) -> Tensor:
        ones = x.new_ones(*self.row.shape, 1)
        if self.context is not None:
            ones = (self.place < self.context).to(x.dtype).unsqueeze(-1)
            x = x * ones
        return self.sum(x) / self.sum(ones).clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:
        """Each text's row for each of its tokens: lanes x texts x width to lanes x tokens x width; 0 between texts."""
        import torch

        padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
        return padded.gather(1, self.row.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def rows(self, x: Tensor) -> Tensor:
        """A row for each text: lanes x tokens x width to lanes x texts x longest x width; 0 behind a text's end."""
        lanes, _, width = x.shape
        index = self._slots.unsqueeze(-1).expand(-1, -1, width)
        rows = x.new_zeros(lanes, self.texts * self.longest + 1, width)
        shape = (lanes, self.texts, self.longest, width)
        if self.past is None:
            return rows.scatter(1, index, x)[:, :-1].view(shape)
        key = f"{next(self._asked)} rows"
        if (before := self.past.get(key)) is not None:  # a text that is over may have been the longest
            rows[:, :-1].view(shape)[:, :, : before.shape[2]] = before[:, :, : self.longest]
        self.past[key] = rows.scatter(1, index, x)[:, :-1].view(shape)
        return self.past[key]

    def flat(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`, which may be those from `since` on alone; 0 between texts."""
        import torch

        lanes, _, count, width = rows.shape
        flat = rows.reshape(lanes, -1, width)
        flat = torch.cat([flat, flat.new_zeros(lanes, 1, width)], dim=1)
        slots = self._slots
        if count != self.longest:
            slots = (self.row * count + self.place - self.since).where(self.row < self.texts, self.texts * count)
        return flat.gather(1, slots.unsqueeze(-1).expand(-1, -1, width))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.known) if self.known else int(self.length.max())

    @cached_property
    def _slots(self) -> Tensor:
        """lanes x tokens: where each token lies in the flattened rows; the last slot is for those between texts."""
        slots = self.row * self.longest + self.place
        return slots.where(self.row < self.texts, self.texts * self.longest)

    def lanes(self, first: int, count: int) -> Text:
        """The texts of some neighbouring lanes."""
        row, place, length = (t.narrow(0, first, count) for t in (self.row, self.place, self.length))
        context = None if self.context is None else self.context.narrow(0, first, count)
        known = self.known[first : first + count]
        return replace(self, row=row, place=place, length=length, context=context, known=known)
