"""One call of every operation at sizes that matter on a GPU; what they compute is not looked at.

`full` adds the other shapes that the operations compile for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WIDTH, TOKENS = 256, 64


def low_rank(dtype: torch.dtype, full: bool) -> None:
    """Three linears that read one x, one alone, three with larger ranks."""
    from peftscape.spaces.ops.fused_low_rank import low_rank

    for linears, ranks in ((3, (3, 5)), (1, (3, 16)), (3, (17, 64)))[: 1 + 2 * full]:
        x = torch.zeros(2, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
        ys = [torch.zeros(2, TOKENS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(linears)]
        a = [[torch.zeros(r, WIDTH, requires_grad=True) for r in ranks] for _ in ys]
        b = [[torch.zeros(WIDTH, r, requires_grad=True) for r in ranks] for _ in ys]
        _backward(low_rank(x, ys, a, b, torch.ones(linears, 2)))


def bottleneck(dtype: torch.dtype, full: bool) -> None:
    """Adapters of every class of sizes, parallel and sequential."""
    from peftscape.spaces.ops.fused_bottleneck import bottleneck

    for sizes, parallel, activation in (
        ((16,), True, "gelu"),
        ((64,), False, "tanh"),
        ((3, 17, 128, 256), True, "silu"),
    )[: 1 + 2 * full]:
        x, y = (torch.zeros(len(sizes), TOKENS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
        shapes = [[(m, WIDTH), (m,), (WIDTH, m), (WIDTH,)] for m in sizes]
        down, down_bias, up, up_bias = zip(
            *([torch.zeros(s, requires_grad=True) for s in own] for own in shapes), strict=True
        )
        _backward((bottleneck(x if parallel else None, y, down, down_bias, up, up_bias, activation),))


def prefix_attention(dtype: torch.dtype, full: bool) -> None:
    """Grouped queries with heads of 64, causal and padded; heads of 128, neither."""
    from peftscape.spaces.ops.fused_attention import prefix_attention

    for heads, kv_heads, width, masked in ((4, 2, 64, True), (2, 2, 128, False))[: 1 + full]:
        q, k, v = (
            torch.zeros(2, TOKENS, h, width, dtype=dtype, requires_grad=True).transpose(1, 2)
            for h in (heads, kv_heads, kv_heads)
        )
        keys, values = ([torch.zeros(n, kv_heads * width, requires_grad=True) for n in (3, 64)] for _ in range(2))
        valid = torch.ones(2, TOKENS, dtype=torch.bool) if masked else None
        _backward((prefix_attention(q, k, v, keys, values, [0, 1], valid=valid, causal=masked),))


def adamw(dtype: torch.dtype, full: bool) -> None:
    """Two lanes, one of them masked; float32 whatever the backbone's precision."""
    from peftscape.spaces.ops.fused_adamw import adamw

    lanes = [[torch.zeros(3000), torch.zeros(5)], [torch.zeros(7)]]
    numbers = [torch.ones(2) for _ in range(4)]
    adamw(lanes, lanes, lanes, lanes, *numbers, masks=[[None, torch.ones(5)], [None]], losses=torch.ones(2))


def _backward(outputs: tuple[Tensor, ...]) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])


CASES: dict[str, Callable[[torch.dtype, bool], None]] = {
    case.__name__: case for case in (low_rank, bottleneck, prefix_attention, adamw)
}
