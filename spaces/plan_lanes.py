"""Which lanes go together in a limit of memory, from what their designs cost alone.

    weights + correction * sum(peak of a lane alone - weights) <= limit

A lane brings its states, what it keeps and its part of the widest step; the frozen weights are there once. The
correction is what was measured over what was predicted. What lanes of other parts hold meanwhile, their own tensors and
moments, is taken as small beside what a step keeps; a language model's chunk of logits is counted once a lane.
"""

from __future__ import annotations

from collections.abc import Sequence


def groups(alone: Sequence[int], weights: int, limit: int | None, correction: float = 1.0) -> list[range]:
    """Lanes in their order cut into as few parts as fit; one that does not fit alone is a part of its own.

    Args:
        alone: peak bytes of each lane's design alone (`Costs.peak_bytes`), the frozen weights included.
        weights: bytes of the frozen weights.
        limit: bytes there are, those of the weights included; None for no limit.
    """
    parts: list[range] = []
    start, used = 0, 0.0
    for i, peak in enumerate(alone):
        brings = correction * max(0, peak - weights)
        if limit is not None and i > start and weights + used + brings > limit:
            parts.append(range(start, i))
            start, used = i, 0.0
        used += brings
    return [*parts, range(start, len(alone))] if alone else []
