"""A smaller design of the same kind, where the one that was suggested costs more than it may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peftscape.spaces.design import Design, Placement
from peftscape.spaces.space import Space

# Halving sizes reaches 1 from 2**16 in as many turns.
TURNS = 16


def within(design: Design, space: Space, fits: Callable[[Design], bool]) -> Design | None:
    """The design with its sizes halved, all at once, until it fits; else with ever fewer placements; None if none does.

    Sizes stay among those that the space holds.
    """
    placements = design.placements
    while placements:
        found = replace(design, placements=placements)
        for _ in range(TURNS):
            smaller = replace(found, placements=tuple(_halved(p, found, space) for p in found.placements))
            if smaller == found:
                break
            found = smaller
            if fits(found):
                return found
        placements = placements[:-1]
        if placements and fits(shorter := replace(design, placements=placements)) and _holds(shorter, space):
            return shorter
    return None


def _halved(placement: Placement, design: Design, space: Space) -> Placement:
    """With its size halved, if the space has that."""
    knob = placement.method.size_knob
    size = getattr(placement.method, knob) if knob else None
    if knob is None or not isinstance(size, int) or size < 2:
        return placement
    method: Any = placement.method
    for smaller in (size // 2, size // 4):
        try:
            candidate = replace(placement, method=replace(method, **{knob: smaller}))
            changed = tuple(candidate if p is placement else p for p in design.placements)
            if _holds(replace(design, placements=changed), space):
                return candidate
        except ValueError:
            continue
    return placement


def _holds(design: Design, space: Space) -> bool:
    try:
        space.params(design)
    except ValueError:
        return False
    return True
