"""One AdamW step over all lanes in Triton, each with its learning rate, decay, step count and clip norm.

For every number of lane l, with its gradient norm |g[l]| over all its tensors and t = steps[l] + 1:
    g <- g min(1, clip[l] / (|g[l]| + 1e-6))
    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2      p <- p (1 - lr[l] decay[l])
    p <- p - lr[l] / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
A lane whose norm, or whose loss where it is given, is not finite stays as it is, step count included.

Source: Loshchilov and Hutter 2017 (arXiv:1711.05101, alg. 2, as torch.optim.AdamW orders it); clipping is
torch.nn.utils.clip_grad_norm_; a table of blocks over many tensors is apex's multi_tensor_apply.

Bytes that must move, 4 a number: the gradient twice (its norm must be known before the first update), p, m and v read
and written: 32 a trained number (28 where the gradients of all lanes stay in the L2 cache), 4 more for a mask.

Three launches for all lanes: partial sums of squares, the lanes' factors, the update. The sums are taken in an order
that depends on a lane's own tensors alone.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftscape.spaces.ops import fused_tile as tile
from peftscape.spaces.ops.addresses import table
from peftscape.spaces.ops.fused_tile import at

BLOCK = 1024

Lanes = Sequence[Sequence[Tensor]]


def adamw(params: Lanes, grads: Lanes, first: Lanes, second: Lanes, steps: Tensor, lr: Tensor, decay: Tensor,
          clip: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
          masks: Sequence[Sequence[Tensor | None]] | None = None, rates: Tensor | None = None,
          losses: Tensor | None = None) -> Tensor:  # fmt: skip
    """Change parameters, moments and step counts in place; the norm of every lane's gradient before clipping.

    Args:
        params, grads, first, second: of each lane its tensors, contiguous float32, and what belongs to each.
        steps: lanes, float32: steps taken so far.
        lr, decay, clip: lanes, float32, on the device.
        masks: by tensor, zero where a gradient is dropped.
        rates: of every tensor, lane after lane, its learning rate over its lane's (LoRA+); float32, on the device.
        losses: lanes, float32; a lane whose loss is not finite stays as it is too.
    """
    every = [[t for lane in lanes for t in lane] for lanes in (params, grads, first, second)]
    drop = [None] * len(every[0]) if masks is None else [t for lane in masks for t in lane]
    for t in [t for tensors in (*every, drop) for t in tensors if t is not None]:
        if t.dtype != torch.float32 or not t.is_contiguous():
            raise TypeError(f"adamw takes contiguous float32 tensors, not {t.dtype} with strides {t.stride()}")
    counts, sizes = tuple(map(len, params)), tuple(t.numel() for t in every[0])
    device, lanes = steps.device, len(params)
    c = table(("adamw", counts, sizes), device, lambda: _blocks(counts, sizes))
    place = {name: _addresses(tensors, device) for name, tensors in zip(NAMES, (*every, drop), strict=True)}
    blocks = len(c["tensor"])
    partial = torch.empty(blocks, dtype=torch.float32, device=device)
    norms, factors = (torch.empty(n, lanes, dtype=torch.float32, device=device) for n in (1, 3))
    masked = any(t is not None for t in drop)
    tile.launch(_squares, (blocks,), partial, place["grad"], place["mask"], c["tensor"], c["start"], c["size"],
                MASKED=masked, BLOCK=BLOCK, num_warps=4)  # fmt: skip
    tile.launch(_factors, (lanes,), partial, norms, factors, steps, lr, clip, lr if losses is None else losses,
                c["from"], c["to"], *map(log, betas), JUDGED=losses is not None, BLOCK=1024, num_warps=4)  # fmt: skip
    rest = [1 - b for b in betas]
    tile.launch(
        _update, (blocks,), factors, *place.values(), c["tensor"], c["start"], c["size"], c["lane"], lr, decay,
        lr if rates is None else rates, *betas, *rest, eps, lanes, MASKED=masked, RATED=rates is not None,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return norms[0]


#: In the order in which `_update` takes their addresses.
NAMES = ("param", "grad", "first", "second", "mask")


def _addresses(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Where tensors lie, zero for none. Gradients may lie elsewhere in every step, the others seldom do."""
    places = tuple(0 if t is None else t.data_ptr() for t in tensors)
    return table(("addresses", array("q", places).tobytes()), device, lambda: {"at": places})["at"]


def _blocks(counts: Sequence[int], sizes: Sequence[int]) -> dict[str, Sequence[int]]:
    """Blocks of at most BLOCK numbers, lane after lane: which tensor and where in it; and each lane's blocks."""
    owner = [lane for lane, count in enumerate(counts) for _ in range(count)]
    blocks = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, BLOCK)]
    in_lane = [0] * len(counts)
    for lane, size in zip(owner, sizes, strict=True):
        in_lane[lane] += -(-size // BLOCK)
    ends = list(accumulate(in_lane))
    return {
        "size": sizes, "lane": owner, "tensor": [i for i, _ in blocks], "start": [start for _, start in blocks],
        "from": [0, *ends[:-1]], "to": ends,
    }  # fmt: skip


LOOSE = {
    "do_not_specialize": ["lanes"],
    "do_not_specialize_on_alignment": [
        "param", "grad", "first", "second", "mask", "tensor", "start", "size", "lane", "from_", "to", "lr", "decay",
        "rates", "clip", "losses", "steps", "norms", "factors",
    ],
}  # fmt: skip


@triton.jit
def _gradient(grad, mask, which, n, inside, MASKED: tl.constexpr):
    g = tl.load(at(tl.load(grad + which), tl.float32, False) + n, mask=inside, other=0.0)
    if MASKED:
        place = tl.load(mask + which)
        if place != 0:
            kept = tl.load(at(place, tl.float32, False) + n, mask=inside, other=0.0)
            g = tl.where(kept == 0, 0.0, g * kept)
    return g


@triton.jit(**LOOSE)
def _squares(partial, grad, mask, tensor, start, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of one block. Grid: blocks."""
    which = tl.load(tensor + tl.program_id(0))
    n = tl.load(start + tl.program_id(0)) + tl.arange(0, BLOCK)
    g = _gradient(grad, mask, which, n, n < tl.load(size + which), MASKED)
    tl.store(partial + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit(**LOOSE)
def _factors(partial, norms, factors, steps, lr, clip, losses, from_, to, log1, log2, JUDGED: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """What one lane's gradient is scaled by, its step size and its second moment's correction. Grid: lanes."""
    lane, lanes = tl.program_id(0), tl.num_programs(0)
    last = tl.load(to + lane)
    total = tl.zeros((BLOCK,), tl.float32)
    for i0 in range(tl.load(from_ + lane), last, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < last, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    finite = norm < float("inf")  # false for NaN too
    if JUDGED:
        finite = finite & (tl.abs(tl.load(losses + lane)) < float("inf"))
    taken = tl.load(steps + lane)
    t = taken + 1.0
    tl.store(norms + lane, norm)
    tl.store(steps + lane, tl.where(finite, t, taken))
    # 1 - b^t in float64: at the first step of b = 0.999 float32 keeps three digits less of it.
    kept1 = 1.0 - tl.exp(t.to(tl.float64) * log1)
    kept2 = 1.0 - tl.exp(t.to(tl.float64) * log2)
    scale = tl.minimum(1.0, tl.load(clip + lane) / (norm + 1e-6))
    tl.store(factors + lane, tl.where(finite, scale, 0.0))
    tl.store(factors + lanes + lane, tl.where(finite, tl.load(lr + lane) / kept1.to(tl.float32), 0.0))
    tl.store(factors + 2 * lanes + lane, tl.where(finite, tl.sqrt(kept2).to(tl.float32), 0.0))


@triton.jit(**LOOSE)
def _update(factors, param, grad, first, second, mask, tensor, start, size, lane, lr, decay, rates, b1, b2, rest1,
            rest2, eps, lanes, MASKED: tl.constexpr, RATED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One block of one tensor. Grid: blocks."""
    which = tl.load(tensor + tl.program_id(0))
    mine = tl.load(lane + which)
    scale, step = tl.load(factors + mine), tl.load(factors + lanes + mine)
    kept = tl.load(factors + 2 * lanes + mine)
    shrink = tl.load(lr + mine) * tl.load(decay + mine)
    if RATED:
        step, shrink = step * tl.load(rates + which), shrink * tl.load(rates + which)
    if kept > 0:  # the lane's gradient is finite
        n = tl.load(start + tl.program_id(0)) + tl.arange(0, BLOCK)
        inside = n < tl.load(size + which)
        g = _gradient(grad, mask, which, n, inside, MASKED) * scale
        p = at(tl.load(param + which), tl.float32, False) + n
        m = at(tl.load(first + which), tl.float32, False) + n
        v = at(tl.load(second + which), tl.float32, False) + n
        old = tl.load(m, mask=inside, other=0.0)
        mean = old * b1 + g * rest1
        square = tl.load(v, mask=inside, other=0.0) * b2 + g * g * rest2
        value = tl.load(p, mask=inside, other=0.0) * (1.0 - shrink)
        value -= step * mean / (tl.sqrt(square) / kept + eps)
        tl.store(m, mean, mask=inside)
        tl.store(v, square, mask=inside)
        tl.store(p, value, mask=inside)
