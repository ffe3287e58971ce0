"""Bottleneck adapters in Triton, every lane at its own size: sequential (x = y) and parallel.

    z[l] = x[l] D[l]^T + b[l]             x, y: L x N x d     D[l]: m[l] x d     b[l]: m[l]
    out[l] = y[l] + s[l] (sigma(z[l]) U[l]^T + c[l])          U[l]: d x m[l]     c[l]: d      s: L
and backward, for a gradient G of out, with z made again instead of kept:
    dz[l] = s[l] (G[l] U[l]) sigma'(z[l])     dx[l] = dz[l] D[l]  (+ G[l] where x = y)      dy = G
    dD[l] = dz[l]^T x[l]    db[l] = sum_n dz[l]    dU[l] = s[l] G[l]^T sigma(z[l])    dc[l] = s[l] sum_n G[l]

Source: Houlsby et al. 2019 (arXiv:1902.00751), He et al. 2021 (arXiv:2110.04366); keeping the narrow hidden state of a
block of tokens on the chip and making it again in the backward is FlashAttention's idea (Dao et al. 2022,
arXiv:2205.14135). Lanes run in classes of like size (16, 32, 64, 128, 256), so that a small one does not pay for a
large one's registers.

Bytes that must move, with b bytes a number of x, M = sum of m[l] (weights and their gradients in w bytes, usually 4):
    sequential    forward 2 b L N d + 2 w M d     backward 3 b L N d + 4 w M d
    parallel      forward 3 b L N d + 2 w M d     backward 3 b L N d + 4 w M d
As written here the backward reads x and G twice, once for dx and once for the weights, and passes sigma(z) and dz,
2 b N M, from one to the other; each block of tokens reads D and U again, from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftscape.spaces.ops import fused_bottleneck_kernels as kernels
from peftscape.spaces.ops import fused_tile as tile
from peftscape.spaces.ops.addresses import Own, Where, split, table, where

#: A block of tokens keeps its whole hidden state in registers.
LARGEST = 256


def bottleneck(x: Tensor | None, y: Tensor, down: Own, down_bias: Own, up: Own, up_bias: Own, activation: str,
               scale: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:  # fmt: skip
    """y + s (sigma(x D^T + b) U^T + c).

    Args:
        x: lanes x tokens x d, or None for y itself.
        down, down_bias, up, up_bias: a tensor of its own for each lane, or all stacked with zeros.
        activation: `relu`, `gelu`, `silu` or `tanh`.
        scale: lanes, takes no gradient; one where there is none.
        sizes: lanes, on the device, if tensors are stacked: what of them is not padding.
    """
    count = None if sizes is None else sizes.reshape(-1).to(torch.int64)
    parts = where(down, 0), where(down_bias, 0), where(up, 1), where(up_bias, 0)
    plan = _Plan(*parts, activation, count, x is None)
    if scale is None:
        scale = torch.ones((), device=y.device).expand(len(y))
    tensors = [t for one in parts for t in one.tensors]
    y = tile.plain(y)
    out: Tensor = _Bottleneck.apply(plan, y if x is None else tile.plain(x), y, scale, *tensors)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class _Plan:
    down: Where
    down_bias: Where
    up: Where
    up_bias: Where
    activation: str
    sizes: Tensor | None
    sequential: bool

    @property
    def classes(self) -> dict[int, list[int]]:
        """Lanes by the power of two that holds their bottleneck."""
        found: dict[int, list[int]] = {}
        for lane, size in enumerate(self.down.sizes):
            found.setdefault(tile.block(size, 16, LARGEST), []).append(lane)
        return dict(sorted(found.items()))

    @property
    def aligned(self) -> bool:
        """Whether all rows of `down` and starts of `up` lie at multiples of 16 bytes."""
        rows = self.up_bias.sizes[0] * self.down.tensors[0].element_size() % 16 == 0
        return rows and self.down.aligned and self.up.aligned

    def columns(self, device: torch.device) -> dict[str, Tensor]:
        parts = (self.down, self.down_bias, self.up, self.up_bias)
        key = ("bottleneck", *((f.addresses, f.sizes) for f in parts))
        found = table(key, device, self._columns)
        return found if self.sizes is None else found | {"size": self.sizes}

    def _columns(self) -> dict[str, Sequence[int]]:
        columns: dict[str, Sequence[int]] = {
            "down": self.down.addresses, "down_bias": self.down_bias.addresses, "up": self.up.addresses,
            "up_bias": self.up_bias.addresses, "size": self.down.sizes, "pitch": self.down.sizes,
            "before": self.down.starts,
        }  # fmt: skip
        return columns | {f"which{m}": lanes for m, lanes in self.classes.items()}

    def shape(self, m: int, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
        """Tokens and widths of a block: what its hidden state leaves room for."""
        half = dtype != torch.float32
        n = tile.block(tokens, 16, {16: 64, 32: 64, 64: 32, 128: 16, 256: 16}[m] if half else 16)
        k = {16: 64, 32: 64, 64: 64, 128: 32, 256: 32}[m] if half else 32
        return {
            "TYPE": tile.TYPES[self.down.dtype], "ALIGNED": self.aligned, "ACTIVATION": self.activation,
            "N": n, "M": m, "K": k, "num_warps": 8 if m >= 128 else 4, "num_stages": 2,
        }  # fmt: skip


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, y: Tensor, scale: Tensor, *weights: Tensor) -> Tensor:
        c, (_, tokens, width) = plan.columns(y.device), y.shape
        scale = scale.reshape(-1).float().contiguous()
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        for m, lanes in plan.classes.items():
            shape = plan.shape(m, y.dtype, tokens)
            tile.launch(
                kernels.forward, (-(-tokens // shape["N"]), len(lanes)), x, y, out, c[f"which{m}"], c["down"],
                c["down_bias"], c["up"], c["up_bias"], c["pitch"], c["size"], scale, tokens, width, x.stride(0),
                x.stride(1), y.stride(0), y.stride(1), **shape,
            )  # fmt: skip
        ctx.save_for_backward(x, scale, *weights)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x, scale, *_ = ctx.saved_tensors
        g = tile.plain(grads[0])
        c, (lanes, tokens, width) = plan.columns(g.device), g.shape
        dx = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        active, change = (torch.empty(plan.down.total * tokens, dtype=g.dtype, device=g.device) for _ in range(2))
        new = torch.empty if plan.sizes is None else torch.zeros  # rows of padding are zero
        sizes = (plan.down.total * width, plan.down.total, plan.up.total * width, lanes * width)
        flat = [new(size, dtype=plan.down.dtype, device=g.device) for size in sizes]
        strides = (x.stride(0), x.stride(1), g.stride(0), g.stride(1))
        for m, members in plan.classes.items():
            shape = plan.shape(m, g.dtype, tokens)
            tile.launch(
                kernels.backward_input, (-(-tokens // shape["N"]), len(members)), x, g, dx, active, change,
                c[f"which{m}"], c["down"], c["down_bias"], c["up"], c["pitch"], c["size"], c["before"], scale, tokens,
                width, *strides, SEQUENTIAL=plan.sequential, **shape,
            )  # fmt: skip
            n, block, d = tile.block(tokens, 16, 32), min(m, 32), 64
            tile.launch(
                kernels.backward_weights, (-(-width // d), m // block, len(members)), x, g, active, change, *flat,
                c[f"which{m}"], c["pitch"], c["size"], c["before"], scale, tokens, width, *strides,
                N=n, M=block, D=d, num_warps=4, num_stages=2,
            )  # fmt: skip
        d_down = split(flat[0], plan.down, lambda size: (size, width))
        d_down_bias = split(flat[1], plan.down_bias, lambda size: (size,))
        d_up = split(flat[2], plan.up, lambda size: (width, size))
        d_up_bias = split(flat[3], plan.up_bias, lambda size: (size,))
        # In a sequential adapter x is y: dx holds both.
        return (None, None if plan.sequential else dx, dx if plan.sequential else g, None,
                *d_down, *d_down_bias, *d_up, *d_up_bias)  # fmt: skip
