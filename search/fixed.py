"""Batches of few shapes: padded to size classes, so that what runs on one can run again on the next of its shape.

The lanes' rows of tokens are widened, and every text lies in a row of attention as long as the class of the longest.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from peftscape.search.packing import Batch, LengthClass, padded_lengths

#: Sizes of rows between two powers of two: at most a quarter is padding, and about a tenth on average.
STEPS = 4


def size_class(count: int) -> int:
    """The least size of at least so many: four of them to each power of two."""
    step = max(1, (1 << max(count - 1, 1).bit_length() - 1) // STEPS)
    return -(-count // step) * step


def fixed(batch: Batch) -> Batch:
    """A packed batch on the CPU in the shape of its class; `tokens` alone are as many as there are."""
    lanes, old = batch.ids.shape
    width = size_class(old)
    length = int(padded_lengths(np.array(max(c.length for c in batch.classes))))
    rows = np.arange(lanes * batch.examples)
    lengths = (batch.last - batch.first + 1).reshape(-1) + batch.ahead
    every = LengthClass(length, rows, rows // batch.examples, torch.arange(length) < lengths[:, None])

    def moved(flat: Tensor) -> Tensor:
        return flat + flat // old * (width - old)

    def wide(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - old))

    scored, scored_rows = batch.scored, batch.scored_rows
    if scored is not None and scored_rows is not None:
        more = size_class(len(scored)) - len(scored)
        scored = torch.cat([moved(scored), scored.new_ones(more)])
        scored_rows = torch.cat([scored_rows, scored_rows.new_full((more,), len(rows))])
    return replace(
        batch,
        ids=wide(batch.ids),
        positions=wide(batch.positions),
        types=None if batch.types is None else wide(batch.types),
        first=moved(batch.first),
        last=moved(batch.last),
        tokens=moved(batch.tokens),
        classes=(every,),
        prompts=tuple(None if p is None else moved(p) for p in batch.prompts),
        longest=(length,) * lanes,
        scored=scored,
        scored_rows=scored_rows,
    )
