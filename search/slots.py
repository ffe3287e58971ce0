"""Fixed addresses for lanes that come and go: a captured step reads and writes there, whoever's tensors they are."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peftscape.search.groups import Stage
    from peftscape.search.lane import Lane


@dataclass
class Slots:
    """Where the tensors of a layout's lanes lie, lane by lane, and the numbers of its groups: nothing else does."""

    tensors: list[list[Tensor]]
    numbers: list[Tensor]
    taken: list[weakref.ref[Lane]]

    @classmethod
    def of(cls, lanes: Sequence[Lane], stages: Sequence[Stage]) -> Slots:
        tensors = [[torch.empty_like(value, requires_grad=False) for value in lane.tensors.values()] for lane in lanes]
        numbers = [torch.empty_like(value) for row in _numbers(stages) for value in row.values()]
        return cls(tensors, numbers, list(map(weakref.ref, lanes)))

    @torch.no_grad()
    def take(self, lanes: Sequence[Lane], stages: Sequence[Stage]) -> None:
        """Move these lanes in."""
        for i, (lane, slots) in enumerate(zip(lanes, self.tensors, strict=True)):
            before = self.taken[i]()
            if before is not lane and before is not None:
                for value, slot in zip(before.tensors.values(), slots, strict=True):
                    if value.data_ptr() == slot.data_ptr():
                        value.data = slot.clone()
            self.taken[i] = weakref.ref(lane)
            for value, slot in zip(lane.tensors.values(), slots, strict=True):
                if value.data_ptr() != slot.data_ptr():
                    slot.copy_(value)
                    value.data = slot
        own = iter(self.numbers)
        for numbers in _numbers(stages):
            for name, value in numbers.items():
                slot = next(own)
                if value is not slot:
                    numbers[name] = slot.copy_(value)


def _numbers(stages: Sequence[Stage]) -> list[dict[str, Tensor]]:
    return [group.numbers for stage in stages for group in stage.groups]
