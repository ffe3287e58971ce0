"""Where the lanes' own matrices lie, as kernels read it: one table of 64-bit integers, copied to the device once.

A table depends on addresses and sizes alone. Trained tensors stay where they are from step to step, so that nearly
every call finds its table made; gradients are slices of one new tensor and need none. Where one has to be made, its
numbers go to the device from pinned memory, so that the CPU does not wait for what runs there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

from peftscape.spaces.ops.device import keep, upload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: One tensor with zeros where a lane's is smaller (lanes x ...), or a tensor of its own for each lane.
Own: TypeAlias = "Tensor | Sequence[Tensor]"

_TABLES: OrderedDict[Any, dict[str, Tensor]] = OrderedDict()
_LIMIT = 4096  # tables, of some kilobytes each


@dataclass(frozen=True)
class Where:
    """The lanes' tensors of one name: where each starts, and its size along the dimension in which they differ.

    Args:
        tensors: what autograd sees: one stacked tensor, or one a lane.
        addresses: bytes, by lane.
        sizes: of the dimension in which lanes may differ, as it lies in memory.
    """

    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]
    stacked: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def starts(self) -> list[int]:
        """How much of that size all lanes before one have together."""
        return [0, *accumulate(self.sizes)][:-1]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def aligned(self) -> bool:
        """Whether every lane's tensor starts at a multiple of 16 bytes."""
        return all(address % 16 == 0 for address in self.addresses)


def where(own: Own, dim: int) -> Where:
    """Look where tensors lie; `dim` (without the lanes' dimension) is the one in which they differ."""
    import torch

    if isinstance(own, torch.Tensor):
        own = own.contiguous()
        step = own.stride(0) * own.element_size()
        addresses = tuple(own.data_ptr() + i * step for i in range(len(own)))
        return Where((own,), addresses, (own.shape[dim + 1],) * len(own), True)
    lanes = tuple(t.contiguous() for t in own)
    if len({t.dtype for t in lanes}) > 1:
        raise TypeError(f"lanes hold one tensor in several precisions: {sorted({str(t.dtype) for t in lanes})}")
    return Where(lanes, tuple(t.data_ptr() for t in lanes), tuple(t.shape[dim] for t in lanes), False)


def table(key: Any, device: torch.device, make: Callable[[], dict[str, Sequence[int]]]) -> dict[str, Tensor]:
    """The columns that `make` gives, on the device: made once for each key."""
    import torch

    found = _TABLES.get((device, key))
    if found is None:
        columns = make()
        flat = upload([n for column in columns.values() for n in column], torch.int64, device)
        found = dict(zip(columns, torch.split(flat, [len(column) for column in columns.values()]), strict=True))
        _TABLES[device, key] = found
        if len(_TABLES) > _LIMIT:
            _TABLES.popitem(last=False)
    else:
        _TABLES.move_to_end((device, key))
    keep(found.values())
    return found


def split(flat: Tensor, found: Where, shape: Callable[[int], tuple[int, ...]]) -> tuple[Tensor, ...]:
    """A flat gradient as the tensors that it belongs to; `shape` of a lane from its size."""
    import torch

    if found.stacked:
        return (flat.view(len(found.sizes), *shape(found.largest)),)
    shapes = [shape(size) for size in found.sizes]
    parts = torch.split(flat, [torch.Size(s).numel() for s in shapes])
    return tuple(part.view(s) for part, s in zip(parts, shapes, strict=True))
