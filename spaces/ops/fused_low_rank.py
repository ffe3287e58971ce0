"""Grouped low-rank product in Triton: y[l] += s[l] (x[l] A[l]^T) B[l]^T, every lane at its own rank.

    H[l] = x[l] A[l]^T                       x: L x N x d_in    A[l]: r[l] x d_in     H[l]: N x r[l]
    out[l] = y[l] + s[l] H[l] B[l]^T         y: L x N x d_out   B[l]: d_out x r[l]    s: L
and backward, for a gradient G of out:
    dH[l] = s[l] G[l] B[l]      dx[l] = dH[l] A[l]      dA[l] = dH[l]^T x[l]      dB[l] = s[l] G[l]^T H[l]      dy = G

Several linears that read one x (q, k, v) are one call: their A's are one longer A, so that x is read once forward and
once for all dA, and dx is written once instead of being added up.

Source: the split in a shrinking and an expanding product over lanes with weights of their own is Punica's (Chen et
al. 2023, arXiv:2310.18547) and S-LoRA's (Sheng et al. 2023, arXiv:2311.03285, unequal ranks without padding); the
backward and the rows by address are added here.

Bytes that must move, with b bytes a number of x and R = sum of r[l] (A and B are held in m bytes, usually 4):
    forward   b L N (d_in + 2 d_out) + m R (d_in + d_out)
    backward  b L N (2 d_in + d_out) + 2 m R (d_in + d_out)
As written here the backward reads G twice, for dH needs all of a row and dB all of a column of it; H and dH, 2 b N R,
come on top, as do re-reads of A and B for every block of tokens, which the L2 cache serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftscape.spaces.ops import fused_products as products
from peftscape.spaces.ops import fused_tile as tile
from peftscape.spaces.ops.addresses import Own, Where, split, table, where


def low_rank(x: Tensor, ys: Sequence[Tensor], a: Sequence[Own], b: Sequence[Own], scales: Tensor,
             ranks: Tensor | None = None, *, inplace: bool = False) -> tuple[Tensor, ...]:  # fmt: skip
    """Every y plus its low-rank map of x.

    Args:
        x: lanes x tokens x d_in.
        ys: of each linear, lanes x tokens x d_out; the linears' widths may differ.
        a, b: of each linear, the lanes' own A (r x d_in) and B (d_out x r), or both stacked with zeros.
        scales: linears x lanes, float32; takes no gradient.
        ranks: lanes, on the device, for one linear whose tensors are stacked: what of them is not padding.
        inplace: write over `ys`; they must not be views that torch forbids to write to.
    """
    # Rows of several A's are one table: each lane's must be a tensor of its own.
    own_a = [where(t.unbind() if isinstance(t, Tensor) and len(a) > 1 else t, 0) for t in a]
    own_b = [where(t, 1) for t in b]
    plan = _Plan(own_a, own_b, None if ranks is None else ranks.reshape(-1).to(torch.int64), inplace)
    tensors = [t for found in (*own_a, *own_b) for t in found.tensors]
    out = _LowRank.apply(plan, tile.plain(x), scales, *map(tile.plain, ys), *tensors)  # type: ignore[no-untyped-call]
    return tuple(out)


@dataclass(frozen=True)
class _Plan:
    """Where everything lies. `combined` columns are for all linears at once, the others for one."""

    a: Sequence[Where]
    b: Sequence[Where]
    ranks: Tensor | None
    inplace: bool

    @property
    def total(self) -> int:
        return sum(found.total for found in self.a)

    @property
    def largest(self) -> int:
        return max(map(sum, zip(*(found.sizes for found in self.a), strict=True)))

    def columns(self, device: torch.device, width: int) -> dict[str, Tensor]:
        key = ("low_rank", width, *((f.addresses, f.sizes) for f in (*self.a, *self.b)))
        found = table(key, device, lambda: self._columns(width))
        if self.ranks is None:
            return found
        return found | {"size": self.ranks, "size0": self.ranks}

    def _columns(self, width: int) -> dict[str, Sequence[int]]:
        lanes = range(len(self.a[0].sizes))
        step = width * self.a[0].tensors[0].element_size()
        rows = [f.addresses[i] + j * step for i in lanes for f in self.a for j in range(f.sizes[i])]
        together = [sum(f.sizes[i] for f in self.a) for i in lanes]
        columns: dict[str, Sequence[int]] = {
            "rows": rows, "first": [sum(together[:i]) for i in lanes], "ranks": together, "size": together,
            "zero": [0] * len(lanes),
        }  # fmt: skip
        for p, found in enumerate(self.b):
            columns[f"address{p}"], columns[f"size{p}"], columns[f"pitch{p}"] = (
                found.addresses,
                found.sizes,
                found.sizes,
            )
            columns[f"column{p}"] = [sum(f.sizes[i] for f in self.a[:p]) for i in lanes]
            columns[f"before{p}"] = found.starts
        return columns


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, scales: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, tokens, width = x.shape
        ys, weights = tensors[: len(plan.a)], tensors[len(plan.a) :]
        columns = plan.columns(x.device, width)
        scales = scales.float().contiguous()
        h = torch.empty(plan.total * tokens, dtype=x.dtype, device=x.device)
        _shrink_all(plan, columns, x, h)
        outs = []
        for p, y in enumerate(ys):
            out = y if plan.inplace else torch.empty(y.shape, dtype=y.dtype, device=y.device)
            _expand(plan, columns, h, out, y, p, scales)
            outs.append(out)
        if plan.inplace:
            ctx.mark_dirty(*ys)
        ctx.save_for_backward(x, h, scales, *weights)
        ctx.plan = plan
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x, h, scales, *_ = ctx.saved_tensors
        columns = plan.columns(x.device, x.shape[2])
        gs = [tile.plain(g) for g in grads]
        dh = torch.empty_like(h)
        # What is needed of each: [plan, x, scales, *ys, *a, *b].
        places = [len(f.tensors) for f in (*plan.a, *plan.b)]
        first = 3 + len(gs)
        needs_a = any(ctx.needs_input_grad[first : first + sum(places[: len(gs)])])
        da: list[Tensor | None] = [None] * sum(places[: len(gs)])
        db: list[Tensor | None] = [None] * sum(places[len(gs) :])
        if needs_a or ctx.needs_input_grad[1]:
            for p, g in enumerate(gs):
                _shrink_one(plan, columns, g, dh, p, scales)
        if needs_a:
            da = [*_outer_all(plan, columns, dh, x)]
        if any(ctx.needs_input_grad[first + len(da) :]):
            db = [part for p, g in enumerate(gs) for part in _outer_one(plan, columns, h, g, p, scales)]
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            _expand(plan, columns, dh, dx, None, 0, scales)
        return (None, dx, None, *gs, *da, *db)


def _shrink_all(plan: _Plan, c: dict[str, Tensor], x: Tensor, h: Tensor) -> None:
    """H of all linears: x is read once for every 64 of a lane's ranks together."""
    n, r = (tile.block(size, 16, tile.tall(x.dtype)) for size in (x.shape[1], plan.largest))
    grid = (-(-x.shape[1] // n), -(-plan.largest // r), len(x))
    aligned = all(f.aligned for f in plan.a) and x.shape[2] * plan.a[0].tensors[0].element_size() % 16 == 0
    tile.launch(
        products.shrink, grid, x, h, c["rows"], c["zero"], c["zero"], c["first"], c["ranks"], c["zero"], c["size"], h,
        x.shape[1], x.shape[2], x.stride(0), x.stride(1), TYPE=tile.TYPES[plan.a[0].dtype], ROWS=True, ALIGNED=aligned,
        SCALED=False, N=n, R=r, K=tile.tall(x.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip


def _shrink_one(plan: _Plan, c: dict[str, Tensor], g: Tensor, dh: Tensor, p: int, scales: Tensor) -> None:
    """One linear's part of dH."""
    found = plan.b[p]
    n, r = (tile.block(size, 16, tile.tall(g.dtype)) for size in (g.shape[1], found.largest))
    grid = (-(-g.shape[1] // n), -(-found.largest // r), len(g))
    tile.launch(
        products.shrink, grid, g, dh, c["zero"], c[f"address{p}"], c[f"pitch{p}"], c["first"], c["ranks"],
        c[f"column{p}"], c[f"size{p}"], scales[p], g.shape[1], g.shape[2], g.stride(0), g.stride(1),
        TYPE=tile.TYPES[found.dtype], ROWS=False, ALIGNED=found.aligned, SCALED=True, N=n, R=r, K=tile.tall(g.dtype),
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _expand(
    plan: _Plan, c: dict[str, Tensor], h: Tensor, out: Tensor, y: Tensor | None, p: int, scales: Tensor
) -> None:
    """y + s H B^T for one linear, or without y dH A for all."""
    rows = y is None
    found = plan.a[0] if rows else plan.b[p]
    largest = plan.largest if rows else found.largest
    n, r, d = tile.block(out.shape[1], 16, tile.tall(h.dtype)), tile.block(largest, 16, 32), 64
    grid = (-(-out.shape[1] // n), -(-out.shape[2] // d), len(out))
    aligned = found.aligned
    if rows:
        aligned = all(f.aligned for f in plan.a) and out.shape[2] * found.tensors[0].element_size() % 16 == 0
    base = out if y is None else y
    place = (c["zero"], c["zero"], c["first"], c["ranks"], c["zero"], c["size"])
    if not rows:
        place = (c[f"address{p}"], c[f"pitch{p}"], c["first"], c["ranks"], c[f"column{p}"], c[f"size{p}"])
    tile.launch(
        products.expand, grid, out, base, h, c["rows"], *place, scales[p], out.shape[1], out.shape[2],
        out.stride(0), out.stride(1), base.stride(0), base.stride(1), TYPE=tile.TYPES[found.dtype], ROWS=rows,
        ALIGNED=aligned, SCALED=not rows, BASE=not rows, N=n, R=r, D=d, num_warps=4, num_stages=2,
    )  # fmt: skip


def _outer_all(plan: _Plan, c: dict[str, Tensor], dh: Tensor, x: Tensor) -> list[Tensor]:
    """dA of all linears: a row for every rank of every lane, cut into the tensors that they belong to."""
    first, lanes, width = plan.a[0], len(x), x.shape[2]
    new = torch.empty if plan.ranks is None else torch.zeros  # rows of padding are zero
    flat = new(plan.total * width, dtype=first.dtype, device=x.device)
    n, r, d = tile.block(x.shape[1], 16, 32), tile.block(plan.largest, 16, tile.tall(x.dtype)), 64
    tile.launch(
        products.outer, (-(-width // d), -(-plan.largest // r), lanes), dh, x, flat, c["zero"], c["first"], c["ranks"],
        c["zero"], c["size"], c["first"], dh, x.shape[1], width, x.stride(0), x.stride(1), ROWS=True, SCALED=False,
        N=n, R=r, D=d, num_warps=4, num_stages=3,
    )  # fmt: skip
    if len(plan.a) == 1:
        return list(split(flat, first, lambda size: (size, width)))
    sizes = [found.sizes[i] for i in range(lanes) for found in plan.a]
    parts = torch.split(flat.view(-1, width), sizes)
    return [part for p in range(len(plan.a)) for part in parts[p :: len(plan.a)]]


def _outer_one(plan: _Plan, c: dict[str, Tensor], h: Tensor, g: Tensor, p: int, scales: Tensor) -> tuple[Tensor, ...]:
    """dB of one linear."""
    found, width = plan.b[p], g.shape[2]
    new = torch.empty if plan.ranks is None else torch.zeros
    flat = new(found.total * width, dtype=found.dtype, device=g.device)
    n, r, d = tile.block(g.shape[1], 16, 32), tile.block(found.largest, 16, tile.tall(g.dtype)), 64
    tile.launch(
        products.outer, (-(-width // d), -(-found.largest // r), len(g)), h, g, flat, c[f"pitch{p}"], c["first"],
        c["ranks"], c[f"column{p}"], c[f"size{p}"], c[f"before{p}"], scales[p], g.shape[1], width, g.stride(0),
        g.stride(1), ROWS=False, SCALED=True, N=n, R=r, D=d, num_warps=4, num_stages=3,
    )  # fmt: skip
    return split(flat, found, lambda size: (width, size))
