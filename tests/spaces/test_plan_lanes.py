"""Lanes in a limit of memory, against every way to cut them."""

from __future__ import annotations

import itertools
import random

from peftscape.spaces.plan_lanes import groups

WEIGHTS = 100


def fewest(alone: list[int], limit: int) -> int:
    """The fewest parts that fit, over all ways to cut the lanes in their order; single lanes always may stand."""
    for cuts in range(len(alone)):
        for places in itertools.combinations(range(1, len(alone)), cuts):
            ends = [0, *places, len(alone)]
            parts = [alone[a:b] for a, b in itertools.pairwise(ends)]
            if all(len(p) == 1 or WEIGHTS + sum(x - WEIGHTS for x in p) <= limit for p in parts):
                return len(parts)
    raise AssertionError


def test_lanes_are_cut_into_as_few_parts_as_fit() -> None:
    source = random.Random(0)
    for _ in range(200):
        alone = [WEIGHTS + source.randrange(1, 60) for _ in range(source.randrange(1, 8))]
        limit = source.randrange(WEIGHTS, WEIGHTS + 150)
        parts = groups(alone, WEIGHTS, limit)
        assert [i for part in parts for i in part] == list(range(len(alone)))
        assert len(parts) == fewest(alone, limit)
        for part in parts:
            assert len(part) == 1 or WEIGHTS + sum(alone[i] - WEIGHTS for i in part) <= limit


def test_a_correction_and_no_limit() -> None:
    assert groups([150] * 4, WEIGHTS, None) == [range(4)]
    assert groups([150] * 4, WEIGHTS, 200) == [range(2), range(2, 4)]
    assert groups([150] * 4, WEIGHTS, 200, correction=2.0) == [range(i, i + 1) for i in range(4)]
    assert groups([], WEIGHTS, 200) == []
