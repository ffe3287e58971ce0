"""The three products of a grouped low-rank map, each lane at its own rank; `fused_low_rank.py` puts them together.

    shrink  H[n, r]  = s sum_k X[n, k] W[k, r]           X: x or dY     W: A^T or B     H: A x or dH
    expand  Y[n, d]  = Y'[n, d] + s sum_r H[n, r] W[r, d]               W: B^T or A
    outer   W'[r, d] = s sum_n H[n, r] X[n, d]                          W': dA or dB^T

W lies where each lane keeps it: as rows with an address each (ROWS: the A's of several linears that read one x are
then one longer A), or as a matrix with `size` columns at one address (B). H is one buffer without padding: lane l's
block starts at `first[l] * tokens`, its rows are `ranks[l]` long, and a linear's part starts at `column[l]`.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from peftscape.spaces.ops.fused_tile import at, narrow, product


@triton.jit
def _weights(rows, address, first, pitch, lane, r, own, TYPE: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to W[., r] of a lane, and how far the next element along the width is."""
    if ROWS:
        pointer = at(tl.load(rows + tl.load(first + lane) + r, mask=r < own, other=0), TYPE, ALIGNED)
        step = 1
    else:
        pointer = at(tl.load(address + lane), TYPE, ALIGNED) + r
        step = tl.load(pitch + lane)
    return pointer, step


#: Compiled once for every number of tokens and wherever the table's columns lie.
LOOSE = {
    "do_not_specialize": ["tokens"],
    "do_not_specialize_on_alignment": [
        "rows", "address", "pitch", "first", "ranks", "column", "size", "before", "scale",
    ],
}  # fmt: skip


@triton.jit(**LOOSE)
def shrink(
    x, h, rows, address, pitch, first, ranks, column, size, scale, tokens, width, x_lane, x_token,
    TYPE: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of H, over the whole width. Grid: tokens, ranks, lanes."""
    lane = tl.program_id(2)
    own = tl.load(size + lane)
    r = tl.program_id(1) * R + tl.arange(0, R)
    n = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(1) * R < own:
        weights, step = _weights(rows, address, first, pitch, lane, r, own, TYPE, ROWS, ALIGNED)
        read = x + lane.to(tl.int64) * x_lane + n.to(tl.int64)[:, None] * x_token
        total = tl.zeros((N, R), tl.float32)
        for k0 in range(0, width, K):
            k = k0 + tl.arange(0, K)
            mine = tl.load(read + k[None, :], mask=(n < tokens)[:, None] & (k < width)[None, :], other=0.0)
            mask = (k < width)[:, None] & (r < own)[None, :]
            theirs = tl.load(weights[None, :] + k[:, None] * step, mask=mask, other=0.0).to(tl.float32)
            total = product(mine, narrow(theirs, mine.dtype), total)
        if SCALED:
            total *= tl.load(scale + lane)
        write = h + tl.load(first + lane) * tokens + n.to(tl.int64)[:, None] * tl.load(ranks + lane)
        mask = (n < tokens)[:, None] & (r < own)[None, :]
        tl.store(write + tl.load(column + lane) + r[None, :], narrow(total, h.dtype.element_ty), mask=mask)


@triton.jit(**LOOSE)
def expand(
    y, base, h, rows, address, pitch, first, ranks, column, size, scale, tokens, width,
    y_lane, y_token, base_lane, base_token,
    TYPE: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile of Y, over the lane's own ranks alone; `base` is read and Y written once. Grid: tokens, width, lanes."""
    lane = tl.program_id(2)
    own = tl.load(size + lane)
    n = tl.program_id(0) * N + tl.arange(0, N)
    d = tl.program_id(1) * D + tl.arange(0, D)
    inside = (n < tokens)[:, None] & (d < width)[None, :]
    read = h + tl.load(first + lane) * tokens + n.to(tl.int64)[:, None] * tl.load(ranks + lane) + tl.load(column + lane)
    total = tl.zeros((N, D), tl.float32)
    for r0 in range(0, own, R):
        r = r0 + tl.arange(0, R)
        weights, step = _weights(rows, address, first, pitch, lane, r, own, TYPE, ROWS, ALIGNED)
        hidden = tl.load(read + r[None, :], mask=(n < tokens)[:, None] & (r < own)[None, :], other=0.0)
        mask = (r < own)[:, None] & (d < width)[None, :]
        theirs = tl.load(weights[:, None] + d[None, :] * step, mask=mask, other=0.0).to(tl.float32)
        total = product(hidden, narrow(theirs, hidden.dtype), total)
    if SCALED:
        total *= tl.load(scale + lane)
    if BASE:
        from_ = base + lane.to(tl.int64) * base_lane + n.to(tl.int64)[:, None] * base_token + d[None, :]
        total += tl.load(from_, mask=inside, other=0.0).to(tl.float32)
    to = y + lane.to(tl.int64) * y_lane + n.to(tl.int64)[:, None] * y_token + d[None, :]
    tl.store(to, narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit(**LOOSE)
def outer(
    h, x, w, pitch, first, ranks, column, size, before, scale, tokens, width, x_lane, x_token,
    ROWS: tl.constexpr, SCALED: tl.constexpr, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile of a lane's W', over all its tokens; as rows (dA) or as columns (dB). Grid: width, ranks, lanes."""
    lane = tl.program_id(2)
    own = tl.load(size + lane)
    r = tl.program_id(1) * R + tl.arange(0, R)
    d = tl.program_id(0) * D + tl.arange(0, D)
    if tl.program_id(1) * R < own:
        ld = tl.load(ranks + lane)
        read = h + tl.load(first + lane) * tokens + tl.load(column + lane) + r[:, None]
        total = tl.zeros((R, D), tl.float32)
        for n0 in range(0, tokens, N):
            n = (n0 + tl.arange(0, N)).to(tl.int64)
            mask = (r < own)[:, None] & (n < tokens)[None, :]
            hidden = tl.load(read + n[None, :] * ld, mask=mask, other=0.0)
            from_ = x + lane.to(tl.int64) * x_lane + n[:, None] * x_token + d[None, :]
            mine = tl.load(from_, mask=(n < tokens)[:, None] & (d < width)[None, :], other=0.0)
            total = product(hidden, mine, total)
        if SCALED:
            total *= tl.load(scale + lane)
        start = tl.load(before + lane) * width
        if ROWS:
            write = w + start + r.to(tl.int64)[:, None] * width + d[None, :]
        else:
            write = w + start + d.to(tl.int64)[None, :] * tl.load(pitch + lane) + r[:, None]
        tl.store(write, narrow(total, w.dtype.element_ty), mask=(r < own)[:, None] & (d < width)[None, :])
