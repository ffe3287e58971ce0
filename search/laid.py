"""What a pass of a cohort reads, made before it runs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from peftscape.search.packing import Batch


@dataclass(frozen=True)
class Laid:
    """A batch on the device, and where the pass begins.

    Args:
        start: the layer to begin with.
        given: states by the number of layers that they have passed, see `Forward.states`.
        cached: whether states were looked up at all; then the last layer runs on for what the head reads.
        targets: of the examples, where the losses do not look them up.
    """

    batch: Batch
    start: int = 0
    given: Mapping[int, Tensor] = field(default_factory=dict)
    cached: bool = False
    targets: Tensor | None = None

    @property
    def shape(self) -> Hashable:
        """What may differ, for the same lanes and a batch of `fixed`, besides the tensors' values."""
        return self.start, tuple(self.given), tuple(tensor.shape for tensor in self._tensors)

    def anew(self) -> Laid:
        """The same tensors, with nothing found out about them yet."""
        return replace(self, batch=replace(self.batch))

    def copy_(self, other: Laid) -> None:
        """Take the values of another of this shape."""
        for mine, new in zip(self._tensors, other._tensors, strict=True):
            mine.copy_(new)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        batch = self.batch
        found = [
            batch.ids, batch.positions, batch.types, batch.first, batch.last, batch.classes[0].valid, batch.scored,
            batch.scored_rows, batch.context, *batch.prompts, *self.given.values(), self.targets,
        ]  # fmt: skip
        return tuple(tensor for tensor in found if tensor is not None)
