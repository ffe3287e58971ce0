"""The four kernels of attention with prefixes; `fused_attention.py` says what they compute.

Sequences lie as rows x heads x tokens x E by strides, what is written as rows x tokens x heads x E. Scores are in
units of log 2. A row's prefix is that of lane `owner[row]`, or none where that is -1.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from peftscape.spaces.ops.fused_tile import at, narrow, product

LOOSE = {
    "do_not_specialize": ["tokens", "window"],
    "do_not_specialize_on_alignment": ["valid", "owner", "keys", "values", "size", "rows", "first", "count", "before"],
}
#: Below every score, and finite, so that a difference of two is a number.
LOW = tl.constexpr(-1.0e30)


@triton.jit
def _allowed(q, k, valid, row, tokens, window, VALID: tl.constexpr, CAUSAL: tl.constexpr, LOCAL: tl.constexpr):
    """Which of the keys (columns) the queries (rows) may attend to."""
    allowed = (q < tokens)[:, None] & (k < tokens)[None, :]
    if VALID:
        allowed &= (tl.load(valid + row * tokens + k, mask=k < tokens, other=0) != 0)[None, :]
    if CAUSAL:
        allowed &= q[:, None] >= k[None, :]
    if LOCAL:
        allowed &= q[:, None] - k[None, :] < window
    return allowed


@triton.jit
def _prefix(base, lane, head, j, own, kv_width, WIDTH: tl.constexpr, E: tl.constexpr, TYPE: tl.constexpr,
            OUT: tl.constexpr):  # fmt: skip
    """Rows j of a head's part of a lane's prefix, j x E."""
    e = tl.arange(0, E)
    pointer = at(tl.load(base + lane), TYPE, False) + head * WIDTH
    mask = (j < own)[:, None] & (e < WIDTH)[None, :]
    return narrow(tl.load(pointer + j[:, None] * kv_width + e[None, :], mask=mask, other=0.0).to(tl.float32), OUT)


@triton.jit
def _sequence(base, row_step, token_step, row, head, head_step, t, tokens, WIDTH: tl.constexpr, E: tl.constexpr):
    """Tokens t of one head of one row, t x E."""
    e = tl.arange(0, E)
    place = base + row * row_step + head * head_step + t.to(tl.int64)[:, None] * token_step + e[None, :]
    return tl.load(place, mask=(t < tokens)[:, None] & (e < WIDTH)[None, :], other=0.0)


@triton.jit
def _attend(q, k, v, allowed, scale, most, share, total):
    """One more block of keys: the running maximum, the sum of weights and the weighted sum of values."""
    scores = tl.where(allowed, product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * scale, LOW)
    higher = tl.maximum(most, tl.max(scores, 1))
    weights = tl.where(allowed, tl.exp2(scores - higher[:, None]), 0.0)
    shrunk = tl.exp2(most - higher)
    share = share * shrunk + tl.sum(weights, 1)
    return higher, share, product(narrow(weights, v.dtype), v, total * shrunk[:, None])


@triton.jit
def _gradient(q, k, v, grad, allowed, scale, norm, delta):
    """A block's weights, and the gradient of its scores."""
    zeros = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    weights = tl.exp2(tl.where(allowed, product(q, tl.trans(k), zeros) * scale - norm[:, None], LOW))
    return weights, weights * (product(grad, tl.trans(v), zeros) - delta[:, None])


@triton.jit(**LOOSE)
def forward(
    q, k, v, out, norm, valid, owner, keys, values, size, scale, tokens, window, kv_width,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, TYPE: tl.constexpr,
    VALID: tl.constexpr, CAUSAL: tl.constexpr, LOCAL: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Q queries of one head: the prefix first, then the sequence. Grid: tokens, heads, rows."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.load(owner + row)
    own = tl.load(size + lane, mask=lane >= 0, other=0)
    t, e = tl.program_id(0) * Q + tl.arange(0, Q), tl.arange(0, E)
    query = _sequence(q, q_row, q_token, row, head, q_head, t, tokens, WIDTH, E)
    most, share = tl.full((Q,), LOW, tl.float32), tl.zeros((Q,), tl.float32)
    total = tl.zeros((Q, E), tl.float32)
    for j0 in range(0, own, P):
        j = j0 + tl.arange(0, P)
        key = _prefix(keys, lane, head // GROUP, j, own, kv_width, WIDTH, E, TYPE, query.dtype)
        value = _prefix(values, lane, head // GROUP, j, own, kv_width, WIDTH, E, TYPE, query.dtype)
        allowed = (t < tokens)[:, None] & (j < own)[None, :]
        most, share, total = _attend(query, key, value, allowed, scale, most, share, total)
    first, last = 0, tokens
    if CAUSAL:
        last = tl.minimum(tokens, (tl.program_id(0) + 1) * Q)
    if LOCAL:
        first = tl.maximum(0, (tl.program_id(0) * Q - window + 1) // K * K)
    for s0 in range(first, last, K):
        s = s0 + tl.arange(0, K)
        key = _sequence(k, k_row, k_token, row, head // GROUP, k_head, s, tokens, WIDTH, E)
        value = _sequence(v, v_row, v_token, row, head // GROUP, v_head, s, tokens, WIDTH, E)
        allowed = _allowed(t, s, valid, row, tokens, window, VALID, CAUSAL, LOCAL)
        most, share, total = _attend(query, key, value, allowed, scale, most, share, total)
    some = tl.where(share > 0, share, 1.0)
    place = (row * tokens + t) * HEADS + head
    tl.store(norm + place, most + tl.log2(some), mask=t < tokens)
    mask = (t < tokens)[:, None] & (e < WIDTH)[None, :]
    tl.store(out + place[:, None] * WIDTH + e[None, :], narrow(total / some[:, None], out.dtype.element_ty), mask=mask)


@triton.jit(**LOOSE)
def backward_queries(
    q, k, v, out, grad, norm, delta, dq, valid, owner, keys, values, size, scale, natural, tokens, window, kv_width,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, TYPE: tl.constexpr,
    VALID: tl.constexpr, CAUSAL: tl.constexpr, LOCAL: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dq of Q queries of one head, and sum(grad * out) for the other two kernels. Grid: tokens, heads, rows."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.load(owner + row)
    own = tl.load(size + lane, mask=lane >= 0, other=0)
    t, e = tl.program_id(0) * Q + tl.arange(0, Q), tl.arange(0, E)
    place = (row * tokens + t) * HEADS + head
    mask = (t < tokens)[:, None] & (e < WIDTH)[None, :]
    query = _sequence(q, q_row, q_token, row, head, q_head, t, tokens, WIDTH, E)
    come = tl.load(grad + place[:, None] * WIDTH + e[None, :], mask=mask, other=0.0)
    gave = tl.load(out + place[:, None] * WIDTH + e[None, :], mask=mask, other=0.0)
    level = tl.load(norm + place, mask=t < tokens, other=0.0)
    mean = tl.sum(come.to(tl.float32) * gave.to(tl.float32), 1)
    tl.store(delta + place, mean, mask=t < tokens)
    total = tl.zeros((Q, E), tl.float32)
    for j0 in range(0, own, P):
        j = j0 + tl.arange(0, P)
        key = _prefix(keys, lane, head // GROUP, j, own, kv_width, WIDTH, E, TYPE, query.dtype)
        value = _prefix(values, lane, head // GROUP, j, own, kv_width, WIDTH, E, TYPE, query.dtype)
        allowed = (t < tokens)[:, None] & (j < own)[None, :]
        _, change = _gradient(query, key, value, come, allowed, scale, level, mean)
        total = product(narrow(change, key.dtype), key, total)
    first, last = 0, tokens
    if CAUSAL:
        last = tl.minimum(tokens, (tl.program_id(0) + 1) * Q)
    if LOCAL:
        first = tl.maximum(0, (tl.program_id(0) * Q - window + 1) // K * K)
    for s0 in range(first, last, K):
        s = s0 + tl.arange(0, K)
        key = _sequence(k, k_row, k_token, row, head // GROUP, k_head, s, tokens, WIDTH, E)
        value = _sequence(v, v_row, v_token, row, head // GROUP, v_head, s, tokens, WIDTH, E)
        allowed = _allowed(t, s, valid, row, tokens, window, VALID, CAUSAL, LOCAL)
        _, change = _gradient(query, key, value, come, allowed, scale, level, mean)
        total = product(narrow(change, key.dtype), key, total)
    write = dq + place[:, None] * WIDTH + e[None, :]
    tl.store(write, narrow(total * natural, dq.dtype.element_ty), mask=mask)
