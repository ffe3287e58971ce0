"""The three kernels of the bottleneck adapter; `fused_bottleneck.py` says what they compute and puts them together.

A lane is named by its place in a class of lanes of like bottleneck: `which` gives its number in the group. `M` holds
every bottleneck of the class, so that a block of tokens keeps its whole hidden state in registers.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from peftscape.spaces.ops.fused_tile import activate, at, narrow, product, slope

LOOSE = {
    "do_not_specialize": ["tokens"],
    "do_not_specialize_on_alignment": [
        "which", "down", "down_bias", "up", "up_bias", "pitch", "size", "before", "scale",
    ],
}  # fmt: skip


@triton.jit(**LOOSE)
def forward(
    x, y, out, which, down, down_bias, up, up_bias, pitch, size, scale, tokens, width, x_lane, x_token, y_lane, y_token,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, ACTIVATION: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """N tokens of a lane, whole: the bottleneck in registers, then the output block by block. Grid: tokens, lanes."""
    lane = tl.load(which + tl.program_id(1))
    own, step = tl.load(size + lane), tl.load(pitch + lane)
    m, n = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    real, mine = n < tokens, m < own
    narrowing, widening = at(tl.load(down + lane), TYPE, ALIGNED), at(tl.load(up + lane), TYPE, ALIGNED)
    read = x + lane * x_lane + n.to(tl.int64)[:, None] * x_token
    hidden = tl.zeros((N, M), tl.float32)
    for k0 in range(0, width, K):
        k = k0 + tl.arange(0, K)
        seen = tl.load(read + k[None, :], mask=real[:, None] & (k < width)[None, :], other=0.0)
        mask = mine[None, :] & (k < width)[:, None]
        weights = tl.load(narrowing + m.to(tl.int64)[None, :] * width + k[:, None], mask=mask, other=0.0)
        hidden = product(seen, narrow(weights.to(tl.float32), seen.dtype), hidden)
    bias = tl.load(at(tl.load(down_bias + lane), TYPE, False) + m, mask=mine, other=0.0)
    active = narrow(activate(hidden + bias.to(tl.float32)[None, :], ACTIVATION), x.dtype.element_ty)
    factor = tl.load(scale + lane)
    for k0 in range(0, width, K):
        k = k0 + tl.arange(0, K)
        inside = real[:, None] & (k < width)[None, :]
        mask = mine[:, None] & (k < width)[None, :]
        weights = tl.load(widening + k.to(tl.int64)[None, :] * step + m[:, None], mask=mask, other=0.0)
        total = product(active, narrow(weights.to(tl.float32), active.dtype), tl.zeros((N, K), tl.float32))
        shift = tl.load(at(tl.load(up_bias + lane), TYPE, False) + k, mask=k < width, other=0.0)
        place = n.to(tl.int64)[:, None] * y_token + k[None, :]
        kept = tl.load(y + lane * y_lane + place, mask=inside, other=0.0).to(tl.float32)
        total = kept + factor * (total + shift.to(tl.float32)[None, :])
        write = out + lane * tokens * width + n.to(tl.int64)[:, None] * width + k[None, :]
        tl.store(write, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit(**LOOSE)
def backward_input(
    x, g, dx, active, change, which, down, down_bias, up, pitch, size, before, scale, tokens, width,
    x_lane, x_token, g_lane, g_token,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, ACTIVATION: tl.constexpr, SEQUENTIAL: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dx of N tokens; and the bottleneck, made again, and its gradient for `backward_weights`. Grid: tokens, lanes."""
    lane = tl.load(which + tl.program_id(1))
    own, step = tl.load(size + lane), tl.load(pitch + lane)
    m, n = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    real, mine = n < tokens, m < own
    narrowing, widening = at(tl.load(down + lane), TYPE, ALIGNED), at(tl.load(up + lane), TYPE, ALIGNED)
    read = x + lane * x_lane + n.to(tl.int64)[:, None] * x_token
    come = g + lane * g_lane + n.to(tl.int64)[:, None] * g_token
    hidden, back = tl.zeros((N, M), tl.float32), tl.zeros((N, M), tl.float32)
    for k0 in range(0, width, K):
        k = k0 + tl.arange(0, K)
        inside = real[:, None] & (k < width)[None, :]
        seen = tl.load(read + k[None, :], mask=inside, other=0.0)
        grad = tl.load(come + k[None, :], mask=inside, other=0.0)
        mask = mine[None, :] & (k < width)[:, None]
        weights = tl.load(narrowing + m.to(tl.int64)[None, :] * width + k[:, None], mask=mask, other=0.0)
        hidden = product(seen, narrow(weights.to(tl.float32), seen.dtype), hidden)
        weights = tl.load(widening + k.to(tl.int64)[:, None] * step + m[None, :], mask=mask, other=0.0)
        back = product(grad, narrow(weights.to(tl.float32), grad.dtype), back)
    bias = tl.load(at(tl.load(down_bias + lane), TYPE, False) + m, mask=mine, other=0.0)
    hidden += bias.to(tl.float32)[None, :]
    place = tl.load(before + lane) * tokens + n.to(tl.int64)[:, None] * step + m[None, :]
    own_rows = real[:, None] & mine[None, :]
    tl.store(active + place, narrow(activate(hidden, ACTIVATION), active.dtype.element_ty), mask=own_rows)
    moved = narrow(tl.load(scale + lane) * back * slope(hidden, ACTIVATION), change.dtype.element_ty)
    tl.store(change + place, moved, mask=own_rows)
    for k0 in range(0, width, K):
        k = k0 + tl.arange(0, K)
        inside = real[:, None] & (k < width)[None, :]
        mask = mine[:, None] & (k < width)[None, :]
        weights = tl.load(narrowing + m.to(tl.int64)[:, None] * width + k[None, :], mask=mask, other=0.0)
        total = product(moved, narrow(weights.to(tl.float32), moved.dtype), tl.zeros((N, K), tl.float32))
        if SEQUENTIAL:
            total += tl.load(come + k[None, :], mask=inside, other=0.0).to(tl.float32)
        write = dx + lane * tokens * width + n.to(tl.int64)[:, None] * width + k[None, :]
        tl.store(write, narrow(total, dx.dtype.element_ty), mask=inside)


@triton.jit(**LOOSE)
def backward_weights(
    x, g, active, change, d_down, d_down_bias, d_up, d_up_bias, which, pitch, size, before, scale, tokens, width,
    x_lane, x_token, g_lane, g_token, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A block of a lane's four gradients, over all its tokens. Grid: width, bottleneck, lanes."""
    lane = tl.load(which + tl.program_id(2))
    own, step, start = tl.load(size + lane), tl.load(pitch + lane), tl.load(before + lane)
    m, d = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(0) * D + tl.arange(0, D)
    if tl.program_id(1) * M < own:
        factor = tl.load(scale + lane)
        down, up = tl.zeros((M, D), tl.float32), tl.zeros((M, D), tl.float32)
        down_bias, up_bias = tl.zeros((M,), tl.float32), tl.zeros((D,), tl.float32)
        for n0 in range(0, tokens, N):
            n = (n0 + tl.arange(0, N)).to(tl.int64)
            mask = (m < own)[:, None] & (n < tokens)[None, :]
            place = start * tokens + n[None, :] * step + m[:, None]
            was = tl.load(active + place, mask=mask, other=0.0)
            moved = tl.load(change + place, mask=mask, other=0.0)
            mask = (n < tokens)[:, None] & (d < width)[None, :]
            seen = tl.load(x + lane * x_lane + n[:, None] * x_token + d[None, :], mask=mask, other=0.0)
            grad = tl.load(g + lane * g_lane + n[:, None] * g_token + d[None, :], mask=mask, other=0.0)
            down = product(moved, seen, down)
            up = product(was, grad, up)
            down_bias += tl.sum(moved.to(tl.float32), 1)
            up_bias += tl.sum(grad.to(tl.float32), 0)
        inside = (m < own)[:, None] & (d < width)[None, :]
        rows = (start + m.to(tl.int64))[:, None] * width + d[None, :]
        tl.store(d_down + rows, narrow(down, d_down.dtype.element_ty), mask=inside)
        columns = start * width + d.to(tl.int64)[None, :] * step + m[:, None]
        tl.store(d_up + columns, narrow(factor * up, d_up.dtype.element_ty), mask=inside)
        if tl.program_id(0) == 0:
            tl.store(d_down_bias + start + m, narrow(down_bias, d_down_bias.dtype.element_ty), mask=m < own)
        if tl.program_id(1) == 0:
            write = d_up_bias + lane * width + d
            tl.store(write, narrow(factor * up_bias, d_up_bias.dtype.element_ty), mask=d < width)
