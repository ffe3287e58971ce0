"""Attention in Triton beside prefixes of unequal length, one a lane, that are never joined to the sequence.

    out[r, h] = softmax(s Q[r, h] [P_k[l]; K[r, h']]^T + mask) [P_v[l]; V[r, h']]     l = owner[r], h' = h // group
with Q: rows x heads x T x e, K, V: rows x kv heads x T x e, P_k[l], P_v[l]: length[l] x (kv heads e), and a mask of
padding, causality and a sliding window over the sequence; a prefix is seen by every query of its lane. Backward, with
the weights p made again from their kept norm and delta = sum(dO * O):
    dV = p^T dO     dS = p (dO V^T - delta)     dQ = s dS K     dK = s dS^T Q     and likewise for the prefix, summed
over the rows and heads of its lane.

Source: FlashAttention-2's passes (Dao 2023, arXiv:2307.08691); prefixes as further keys are Li and Liang 2021
(arXiv:2101.00190), and visiting them in the same running softmax is what is done here.

Bytes that must move, with b bytes a number, H heads, G kv heads, S rows, P = sum of length[l] (held in m bytes):
    forward   b S T e (2 H + 2 G) + 2 m P G e + 4 S T H
    backward  b S T e (4 H + 4 G) + 4 m P G e + 12 S T H
where a concatenation writes and reads another 2 b S (T + length) G e. A query that may attend to nothing gives zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftscape.spaces.ops import fused_attention_backward as backward
from peftscape.spaces.ops import fused_attention_kernels as kernels
from peftscape.spaces.ops import fused_tile as tile
from peftscape.spaces.ops.addresses import Own, Where, split, table, where


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, keys: Own, values: Own, owner: Sequence[int], *,
                     valid: Tensor | None = None, causal: bool = False, window: int | None = None,
                     scale: float | None = None, lengths: Tensor | None = None) -> Tensor:  # fmt: skip
    """Attention of rows to their sequence and to their lane's prefix.

    Args:
        q, k, v: rows x heads x tokens x head_dim; k and v may have fewer heads (grouped queries).
        keys, values: each lane's own prefix, length x (kv heads * head_dim), or all stacked with zeros.
        owner: of each row, the number of its prefix in `keys`; -1 for none.
        valid: rows x tokens, False for padding.
        window: how far back a query sees, itself included.
        lengths: lanes, on the device, if prefixes are stacked: what of them is not padding.
    Returns:
        rows x tokens x heads x head_dim.
    """
    count = None if lengths is None else lengths.reshape(-1).to(torch.int64)
    mask = None if valid is None else valid.to(torch.uint8).contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan = _Plan(where(keys, 0), where(values, 0), tuple(owner), mask, causal, window, scale, count)
    q, k, v = map(tile.plain, (q, k, v))
    return _Attention.apply(plan, q, k, v, *plan.keys.tensors, *plan.values.tensors)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Plan:
    keys: Where
    values: Where
    owner: tuple[int, ...]
    valid: Tensor | None
    causal: bool
    window: int | None
    scale: float
    lengths: Tensor | None

    def columns(self, device: torch.device) -> dict[str, Tensor]:
        key = ("prefix", self.keys.addresses, self.keys.sizes, self.values.addresses)
        found = table(key, device, self._prefixes)
        # Which rows are whose changes with the batch, and is the same in all layers.
        found = found | table(("rows", len(self.keys.sizes), self.owner), device, self._rows)
        return found if self.lengths is None else found | {"size": self.lengths}

    def _prefixes(self) -> dict[str, Sequence[int]]:
        return {
            "keys": self.keys.addresses, "values": self.values.addresses, "size": self.keys.sizes,
            "before": self.keys.starts,
        }  # fmt: skip

    def _rows(self) -> dict[str, Sequence[int]]:
        lanes = range(len(self.keys.sizes))
        rows = sorted((r for r, lane in enumerate(self.owner) if lane >= 0), key=lambda r: self.owner[r])
        count = [self.owner.count(lane) for lane in lanes]
        return {
            "owner": self.owner, "rows": rows or [0], "count": count,
            "first": [sum(count[:lane]) for lane in lanes],
        }  # fmt: skip

    def shape(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """What all kernels are compiled for."""
        heads, width = q.shape[1], q.shape[3]
        return {
            "HEADS": heads, "GROUP": heads // k.shape[1], "WIDTH": width, "E": tile.block(width, 16, 256),
            "Q": tile.block(q.shape[2], 16, 64 if q.dtype != torch.float32 else 16), "num_stages": 2,
            "num_warps": 8 if width > 64 else 4,
        }  # fmt: skip

    def masks(self, dtype: torch.dtype) -> dict[str, Any]:
        """How the sequence is masked, and its keys a block."""
        return {
            "VALID": self.valid is not None, "CAUSAL": self.causal, "LOCAL": self.window is not None,
            "K": 32 if dtype != torch.float32 else 16,
        }  # fmt: skip

    @property
    def prefix(self) -> dict[str, Any]:
        return {"P": 16, "TYPE": tile.TYPES[self.keys.dtype]}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, *prefixes: Tensor) -> Tensor:
        c, (rows, heads, tokens, width) = plan.columns(q.device), q.shape
        out = torch.empty(rows, tokens, heads, width, dtype=q.dtype, device=q.device)
        norm = torch.empty(rows, tokens, heads, dtype=torch.float32, device=q.device)
        shape, masks = plan.shape(q, k), plan.masks(q.dtype)
        tile.launch(
            kernels.forward, (triton.cdiv(tokens, shape["Q"]), heads, rows), q, k, v, out, norm,
            norm if plan.valid is None else plan.valid, c["owner"], c["keys"], c["values"], c["size"],
            plan.scale / log(2), tokens, plan.window or 0, k.shape[1] * width, *_strides(q, k, v),
            **shape, **masks, **plan.prefix,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, norm, *prefixes)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        q, k, v, out, norm, *_ = ctx.saved_tensors
        c, (rows, heads, tokens, width) = plan.columns(q.device), q.shape
        grad, kv_width = grads[0].contiguous(), k.shape[1] * width
        delta, dq = torch.empty_like(norm), torch.empty_like(out)
        scales, steps, shape = (plan.scale / log(2), plan.scale), _strides(q, k, v), plan.shape(q, k)
        masks = plan.masks(q.dtype)
        valid, window = norm if plan.valid is None else plan.valid, plan.window or 0
        tile.launch(
            kernels.backward_queries, (triton.cdiv(tokens, shape["Q"]), heads, rows), q, k, v, out, grad, norm, delta,
            dq, valid, c["owner"], c["keys"], c["values"], c["size"], *scales, tokens, window, kv_width, *steps,
            **shape, **masks, **plan.prefix,
        )  # fmt: skip
        dk, dv = (torch.empty(rows, tokens, k.shape[1], width, dtype=t.dtype, device=t.device) for t in (k, v))
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            tile.launch(
                backward.backward_keys, (triton.cdiv(tokens, masks["K"]), k.shape[1], rows), q, k, v, grad, norm,
                delta, dk, dv, valid, *scales, tokens, window, *steps, **shape, **masks,
            )  # fmt: skip
        new = torch.empty if plan.lengths is None else torch.zeros  # rows of padding are zero
        flat = [new(plan.keys.total * kv_width, dtype=plan.keys.dtype, device=q.device) for _ in range(2)]
        prefix = plan.prefix
        tile.launch(
            backward.backward_prefix, (triton.cdiv(plan.keys.largest, prefix["P"]), k.shape[1], len(plan.keys.sizes)),
            q, grad, norm, delta, *flat, c["keys"], c["values"], c["size"], c["rows"], c["first"], c["count"],
            c["before"], *scales, tokens, kv_width, *steps[:3], **shape, **prefix,
        )  # fmt: skip
        own = [part for f, w in zip(flat, (plan.keys, plan.values), strict=True)
               for part in split(f, w, lambda size: (size, kv_width))]  # fmt: skip
        return (None, dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), *own)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(step for t in tensors for step in t.stride()[:3])
