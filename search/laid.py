"""What a pass of a cohort reads, made before it runs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from peftscape.search.fixed import Fixed

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
        """All that is no value of a tensor."""
        batch = self.batch
        shapes = tuple((t.shape, t.dtype) for t in self._tensors)
        lengths = tuple(0 if p is None else p.shape[1] for p in batch.prompts)
        return self.start, tuple(self.given), self.cached, shapes, lengths, batch.longest

    def anew(self) -> Laid:
        """The same tensors, with nothing found out about them yet."""
        return replace(self, batch=replace(self.batch))

    def copy_(self, other: Laid) -> None:
        """Take the values of another of this shape."""
        for mine, new in zip(self._tensors, other._tensors, strict=True):
            mine.copy_(new)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        assert isinstance(self.batch, Fixed)
        return (*self.batch.inputs, *self.given.values(), *([] if self.targets is None else [self.targets]))
