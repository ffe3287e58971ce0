"""Batches of few shapes: padded to size classes, so that what runs on one can run again on the next of its shape.

The lanes' rows of tokens are widened and every text lies in a row of attention as long as its class. Where texts lie is
found on the device, from tensors that each batch brings, so that nothing but these differs from batch to batch.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from peftscape.search.packing import LENGTH_CLASSES, Batch, LengthClass
from peftscape.spaces.text import Text

#: Sizes of rows between two powers of two: an eighth of the work goes into padding, on average.
STEPS = 4
#: What of a batch may be other tensors in the next of its shape.
_GIVEN = ("ids", "positions", "types", "first", "last", "prompts", "scored", "scored_rows", "context")


class Fixed(Batch):
    """A batch whose tensors have the shapes of its class; `tokens` and `slots` alone have as many as there are."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All that differs between batches of one shape."""
        values = [getattr(self, name) for name in _GIVEN]
        flat = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
        return (*(t for t in flat if t is not None), self.classes[0].valid)

    def placed(self) -> Tensor:
        begin = (self.first.reshape(-1) - self.ahead)[:, None]
        (rows,) = self.classes
        token = begin + torch.arange(rows.length, device=begin.device)
        return token.where(rows.valid, self.ids.numel()).reshape(-1)

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        first, last = (t.reshape(-1, 1) for t in (self.first, self.last))
        token = first + torch.arange(self.classes[0].length, device=first.device)
        row = torch.arange(len(first), device=first.device)[:, None].expand_as(token)
        inside = token <= last
        return token.where(inside, 0).reshape(-1), row.where(inside, len(first)).reshape(-1)

    @cached_property
    def layout(self) -> Text:
        lanes, width = self.ids.shape
        place = torch.arange(width, device=self.first.device)
        ahead = self.ahead.view(lanes, -1)
        begin = self.first - ahead - torch.arange(lanes, device=place.device)[:, None] * width
        lengths = self.last - self.first + 1 + ahead
        row = (place[:, None] >= begin[:, None]).sum(dim=2) - 1  # texts lie one behind the other
        own, length = place - begin.gather(1, row), lengths.gather(1, row)
        inside = own < length
        row = row.where(inside, self.examples)
        own, length = own.where(inside, 0), length.where(inside, 0)
        if self.context is None:
            return Text(row, own, length, self.examples, known=self.longest)
        context = self.context.view(lanes, -1).gather(1, row.clamp(max=self.examples - 1)).where(inside, 0)
        return Text(row, own, length, self.examples, context, known=self.longest)


def size_class(count: int) -> int:
    """The least size of at least so many: four of them to each power of two."""
    step = max(1, (1 << max(count - 1, 1).bit_length() - 1) // STEPS)
    return -(-count // step) * step


def length_class(length: int) -> int:
    """The class of a text of so many tokens."""
    last = LENGTH_CLASSES[-1]
    return next((one for one in LENGTH_CLASSES if length <= one), -(-length // last) * last)


def fixed(batch: Batch) -> Fixed:
    """A packed batch on the CPU in the shape of its class."""
    lanes, old = batch.ids.shape
    width = size_class(old)
    length = length_class(max(c.length for c in batch.classes))
    rows = np.arange(lanes * batch.examples)
    lengths = (batch.last - batch.first + 1).reshape(-1) + batch.ahead
    valid = torch.arange(length) < lengths[:, None]
    every = LengthClass(length, rows, rows // batch.examples, valid)

    def moved(flat: Tensor) -> Tensor:
        return flat + flat // old * (width - old)

    def wide(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.nn.functional.pad(values, (0, width - old))

    known = {f.name: getattr(batch, f.name) for f in fields(batch)}
    row_of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    place = torch.cat([torch.arange(n) for n in lengths.tolist()])
    known |= {
        "ids": wide(batch.ids), "positions": wide(batch.positions), "types": wide(batch.types),
        "first": moved(batch.first), "last": moved(batch.last), "tokens": moved(batch.tokens),
        "slots": row_of * length + place, "classes": (every,), "longest": (length,) * lanes,
        "prompts": tuple(None if p is None else moved(p) for p in batch.prompts),
    }  # fmt: skip
    if batch.scored is not None and batch.scored_rows is not None:
        more = size_class(len(batch.scored)) - len(batch.scored)
        filling = batch.scored.new_ones(more), batch.scored.new_full((more,), len(rows))
        known["scored"] = torch.cat([moved(batch.scored), filling[0]])
        known["scored_rows"] = torch.cat([batch.scored_rows, filling[1]])
    return Fixed(**known)
