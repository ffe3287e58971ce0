"""Gradients of keys and values, of the shared sequence and of the lanes' prefixes; see `fused_attention.py`."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from peftscape.spaces.ops.fused_attention_kernels import LOOSE, _allowed, _gradient, _prefix, _sequence
from peftscape.spaces.ops.fused_tile import narrow, product


@triton.jit
def _queries(q, grad, norm, delta, row, head, t, tokens, q_row, q_head, q_token,
             HEADS: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """What a block of queries brings to the backward: itself, its output's gradient, its norm and its mean."""
    place = (row * tokens + t) * HEADS + head
    query = _sequence(q, q_row, q_token, row, head, q_head, t, tokens, WIDTH, E)
    come = _sequence(grad, tokens * HEADS * WIDTH, HEADS * WIDTH, row, head, WIDTH, t, tokens, WIDTH, E)
    level = tl.load(norm + place, mask=t < tokens, other=0.0)
    return query, come, level, tl.load(delta + place, mask=t < tokens, other=0.0)


@triton.jit(**LOOSE)
def backward_keys(
    q, k, v, grad, norm, delta, dk, dv, valid, scale, natural, tokens, window,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr,
    VALID: tl.constexpr, CAUSAL: tl.constexpr, LOCAL: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dk and dv of K tokens, over all queries that see them and all heads that share them. Grid: tokens, kv, rows."""
    mine, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    s, e = tl.program_id(0) * K + tl.arange(0, K), tl.arange(0, E)
    key = _sequence(k, k_row, k_token, row, mine, k_head, s, tokens, WIDTH, E)
    value = _sequence(v, v_row, v_token, row, mine, v_head, s, tokens, WIDTH, E)
    keys, values = tl.zeros((K, E), tl.float32), tl.zeros((K, E), tl.float32)
    first, last = 0, tokens
    if CAUSAL:
        first = tl.program_id(0) * K // Q * Q
    if LOCAL:
        last = tl.minimum(tokens, (tl.program_id(0) + 1) * K + window - 1)
    for i in range(GROUP):
        head = mine * GROUP + i
        for t0 in range(first, last, Q):
            t = t0 + tl.arange(0, Q)
            query, come, level, mean = _queries(
                q, grad, norm, delta, row, head, t, tokens, q_row, q_head, q_token, HEADS, WIDTH, E
            )
            allowed = _allowed(t, s, valid, row, tokens, window, VALID, CAUSAL, LOCAL)
            weights, change = _gradient(query, key, value, come, allowed, scale, level, mean)
            values = product(tl.trans(narrow(weights, come.dtype)), come, values)
            keys = product(tl.trans(narrow(change, query.dtype)), query, keys)
    place = ((row * tokens + s) * (HEADS // GROUP) + mine)[:, None] * WIDTH + e[None, :]
    mask = (s < tokens)[:, None] & (e < WIDTH)[None, :]
    tl.store(dk + place, narrow(keys * natural, dk.dtype.element_ty), mask=mask)
    tl.store(dv + place, narrow(values, dv.dtype.element_ty), mask=mask)


@triton.jit(**LOOSE)
def backward_prefix(
    q, grad, norm, delta, dkeys, dvalues, keys, values, size, rows, first, count, before, scale, natural, tokens,
    kv_width, q_row, q_head, q_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, TYPE: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients of P of a lane's prefix, over all its rows and all heads that share them. Grid: prefix, kv, lanes."""
    mine, lane = tl.program_id(1), tl.program_id(2)
    own = tl.load(size + lane)
    j, e = tl.program_id(0) * P + tl.arange(0, P), tl.arange(0, E)
    if tl.program_id(0) * P < own:
        key = _prefix(keys, lane, mine, j, own, kv_width, WIDTH, E, TYPE, q.dtype.element_ty)
        value = _prefix(values, lane, mine, j, own, kv_width, WIDTH, E, TYPE, q.dtype.element_ty)
        key_sum, value_sum = tl.zeros((P, E), tl.float32), tl.zeros((P, E), tl.float32)
        start = tl.load(first + lane)
        for r in range(tl.load(count + lane)):
            row = tl.load(rows + start + r)
            for i in range(GROUP):
                head = mine * GROUP + i
                for t0 in range(0, tokens, Q):
                    t = t0 + tl.arange(0, Q)
                    query, come, level, mean = _queries(
                        q, grad, norm, delta, row, head, t, tokens, q_row, q_head, q_token, HEADS, WIDTH, E
                    )
                    allowed = (t < tokens)[:, None] & (j < own)[None, :]
                    weights, change = _gradient(query, key, value, come, allowed, scale, level, mean)
                    value_sum = product(tl.trans(narrow(weights, come.dtype)), come, value_sum)
                    key_sum = product(tl.trans(narrow(change, query.dtype)), query, key_sum)
        place = (tl.load(before + lane) + j)[:, None] * kv_width + mine * WIDTH + e[None, :]
        mask = (j < own)[:, None] & (e < WIDTH)[None, :]
        tl.store(dkeys + place, narrow(key_sum * natural, dkeys.dtype.element_ty), mask=mask)
        tl.store(dvalues + place, narrow(value_sum, dvalues.dtype.element_ty), mask=mask)
