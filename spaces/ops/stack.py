"""Lanes' tensors of unequal size under one leading dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """lanes x largest sizes, zeros where a tensor is smaller; gradients go back in each one's own dtype."""
    stacked: Tensor = _Stack.apply(dtype, *tensors)  # type: ignore[no-untyped-call]
    return stacked


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.shapes = [(t.shape, t.dtype) for t in tensors]
        largest = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        equal = all(list(t.shape) == largest for t in tensors)
        out = (torch.empty if equal else torch.zeros)(len(tensors), *largest, dtype=dtype, device=tensors[0].device)
        for i, t in enumerate(tensors):
            _corner(out[i], t.shape).copy_(t)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        parts = [
            _corner(grad[i], shape).to(dtype) if ctx.needs_input_grad[i + 1] else None
            for i, (shape, dtype) in enumerate(ctx.shapes)
        ]
        return (None, *parts)


def _corner(x: Tensor, shape: torch.Size) -> Tensor:
    """The part of a padded tensor that is its own."""
    for dim, size in enumerate(shape):
        x = x.narrow(dim, 0, size)
    return x
