"""What attention of padded rows costs on a processor: moving tokens there and back, and a softmax of few scores.

Both are written for what is slow there. Torch's `index_copy_` takes several times as long as `index_select`, a softmax
of rows of 16 in bfloat16 ten times as long as in float32, and `matmul` copies whatever is not contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftscape.spaces.ops.choose import takes_second_derivatives


class _Move(torch.autograd.Function):
    """One to one, so the backward is a move as well."""

    @staticmethod
    def forward(ctx: Any, there: Sequence[Tensor], back: Sequence[Tensor], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.there, ctx.back = there, back
        rows = torch.cat([*parts, parts[0].new_zeros(1, parts[0].shape[1])])
        return tuple(rows.index_select(0, where) for where in there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *move(grads, ctx.back, ctx.there)


def move(parts: Sequence[Tensor], there: Sequence[Tensor], back: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Rows in another order: row i of each output is row there[i] of all parts, zeros where that is behind the last.

    Args:
        parts: each rows x width.
        there: for each output the rows' numbers, counted through all parts; `back` undoes it.
    """
    moved: tuple[Tensor, ...] = _Move.apply(there, back, *parts)  # type: ignore[no-untyped-call]
    return moved


class _Attention(torch.autograd.Function):
    """softmax(scale Q K^T + bias) V, its softmax in float32 at least; the backward is the formula, written out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        scores = _rows(torch.bmm(_flat(q), _flat(k).transpose(1, 2)), q)
        exact = torch.promote_types(q.dtype, torch.float32)
        weights = torch.softmax(torch.add(bias.to(exact), scores, alpha=scale), dim=-1).to(q.dtype)
        of_q, of_k = ctx.needs_input_grad[:2]
        ctx.save_for_backward(q if of_k else None, k if of_q else None, v if of_q or of_k else None, weights)
        ctx.scale = scale
        return _rows(torch.bmm(_flat(weights), _flat(v)), q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        own, flat = _flat(grads[0]), _flat(weights)
        of_q = of_k = of_v = None
        if ctx.needs_input_grad[2]:
            of_v = _rows(torch.bmm(flat.transpose(1, 2), own), grads[0])
        if v is not None:
            exact = torch.promote_types(flat.dtype, torch.float32)
            of_weights = torch.bmm(own, _flat(v).transpose(1, 2)).to(exact)
            of_scores = torch._softmax_backward_data(of_weights, flat.to(exact), -1, exact)
            of_scores = of_scores.mul_(ctx.scale).to(flat.dtype)
            of_q = _rows(torch.bmm(of_scores, _flat(k)), grads[0]) if k is not None else None
            of_k = _rows(torch.bmm(of_scores.transpose(1, 2), _flat(q)), grads[0]) if q is not None else None
        return of_q, of_k, of_v, None, None


def row_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T + bias) V for each row and head.

    Args:
        q, k, v: rows x heads x tokens x head_dim, as many heads in each.
        bias: what is added to the scores, of a shape that broadcasts.
    Returns:
        rows x heads x tokens x head_dim.
    """
    if bias.requires_grad or takes_second_derivatives():
        return torch.matmul(torch.softmax(torch.matmul(q * scale, k.transpose(2, 3)) + bias, dim=-1), v)
    out: Tensor = _Attention.apply(q, k, v, bias, scale)  # type: ignore[no-untyped-call]
    return out


def _flat(x: Tensor) -> Tensor:
    """One array of matrices."""
    return x.reshape(-1, *x.shape[2:])


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """rows x heads of matrices again."""
    return x.view(*like.shape[:2], *x.shape[1:])
