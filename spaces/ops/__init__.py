"""What lanes compute: each operation in plain torch (`reference`) and, beside it, as a Triton kernel.

The functions here take the kernel where `choose.py` finds that it wins, and plain torch elsewhere. Lanes' tensors come
stacked, with zeros where one is smaller (lanes x ...), or as a list with a tensor of its own for each lane: kernels
read the list as it lies, without padding. Importing this loads neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftscape.spaces.ops import reference
from peftscape.spaces.ops.choose import Call, choice, possible

if TYPE_CHECKING:
    from torch import Tensor

    from peftscape.spaces.ops.addresses import Own

#: A bottleneck of more numbers does not fit in a block's registers.
LARGEST_BOTTLENECK = 256
#: Nor a head of more.
WIDEST_HEAD = 256


def low_rank(x: Tensor, y: Tensor, a: Own, b: Own, scale: Tensor, rank: Tensor | None = None) -> Tensor:
    """y + scale * (x A^T) B^T (arXiv:2106.09685).

    Args:
        x, y: lanes x tokens x d_in and d_out.
        a, b: A: r x d_in and B: d_out x r of each lane, stacked or each its own.
        scale: one number a lane, or one for all.
        rank: what of stacked tensors is not padding, one number a lane.
    """
    return low_rank_shared(x, [y], [a], [b], [scale], rank)[0]


def low_rank_shared(x: Tensor, ys: Sequence[Tensor], a: Sequence[Own], b: Sequence[Own], scales: Sequence[Tensor],
                    rank: Tensor | None = None) -> tuple[Tensor, ...]:  # fmt: skip
    """`low_rank` of several linears that read the same x (q, k, v): a kernel reads x once for all."""
    may = possible(x.device) and _may(x, [*ys, *a, *b], scales)
    if may and choice(_call("low_rank", x, a[0], 0, x.shape[1]), x.device).kernel:
        import torch

        from peftscape.spaces.ops.fused_low_rank import low_rank as fused

        scale = torch.stack([s.reshape(-1).float().expand(len(x)) for s in scales])
        return fused(x, ys, a, b, scale, _exact(a[0], rank))
    return tuple(
        reference.low_rank(x, y, reference.stacked(p, x.dtype), reference.stacked(q, x.dtype), _each(s, x))
        for y, p, q, s in zip(ys, a, b, scales, strict=True)
    )


def adapter(y: Tensor, down: Own, down_bias: Own, up: Own, up_bias: Own, activation: str, *, x: Tensor | None = None,
            scale: Tensor | None = None, size: Tensor | None = None) -> Tensor:  # fmt: skip
    """y + scale * (sigma(x D^T + b) U^T + c), with x = y where none is given (arXiv:1902.00751, arXiv:2110.04366).

    Args:
        x, y: lanes x tokens x d.
        down, down_bias, up, up_bias: D: m x d, b: m, U: d x m, c: d of each lane, stacked or each its own.
        scale: one number a lane, or one for all.
        size: what of stacked tensors is not padding, one number a lane.
    """
    own = (down, down_bias, up, up_bias)
    fits = max(t.shape[0] for t in _list(down)) <= LARGEST_BOTTLENECK and (x is None or x.shape == y.shape)
    may = fits and possible(y.device)
    may = may and _may(y, [*own, *([] if x is None else [x])], [] if scale is None else [scale])
    if may and choice(_call("bottleneck", y, down, 0, y.shape[1]), y.device).kernel:
        from peftscape.spaces.ops.fused_bottleneck import bottleneck as fused

        factor = None if scale is None else scale.reshape(-1).expand(len(y))
        return fused(x, y, *own, activation, factor, _exact(down, size))
    weights = reference.stacked(down, y.dtype), reference.stacked(down_bias, y.dtype)
    back = reference.stacked(up, y.dtype), reference.stacked(up_bias, y.dtype)
    change = reference.bottleneck(y if x is None else x, *weights, *back, activation)
    return y + (change if scale is None else _each(scale, y) * change)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, keys: Own, values: Own, owner: Sequence[int], *,
                     valid: Tensor | None = None, causal: bool = False, window: int | None = None,
                     scale: float | None = None, softcap: float | None = None,
                     lengths: Tensor | None = None) -> Tensor:  # fmt: skip
    """softmax(s Q [P_k; K]^T + mask) [P_v; V], every row with its lane's prefix (arXiv:2101.00190).

    Args: as `fused_attention.prefix_attention`; softcap: scores become tanh(scores / softcap) softcap, in torch only.
    """
    if softcap is None and attends_fused(q, keys, values):
        from peftscape.spaces.ops.fused_attention import prefix_attention as fused

        how: dict[str, Any] = {"valid": valid, "causal": causal, "window": window, "scale": scale, "lengths": lengths}
        return fused(q, k, v, keys, values, owner, **how)
    if lengths is None and not hasattr(keys, "shape"):
        import torch

        lengths = torch.tensor([len(t) for t in keys], device=q.device)
    before = reference.stacked(keys, q.dtype), reference.stacked(values, q.dtype)
    return reference.prefix_attention(
        q, k, v, *before, owner, valid=valid, causal=causal, window=window, scale=scale, softcap=softcap,
        lengths=lengths,
    )  # fmt: skip


def attends_fused(q: Tensor, keys: Own, values: Own) -> bool:
    """Whether `prefix_attention` of queries like these would run as a kernel."""
    may = q.shape[-1] <= WIDEST_HEAD and possible(q.device) and _may(q, [keys, values], [])
    return may and choice(_call("prefix_attention", q, keys, 0, q.shape[2]), q.device).kernel


def adamw(params: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]], first: Sequence[Sequence[Tensor]],
          second: Sequence[Sequence[Tensor]], steps: Tensor, lr: Tensor, decay: Tensor, clip: Tensor,
          **how: Any) -> Tensor:  # fmt: skip
    """One AdamW step of every lane, in place; the norms of their gradients (arXiv:1711.05101). A lane whose norm is
    not finite stays as it is. Args: as `fused_adamw.adamw`."""
    if updates_fused(params):
        from peftscape.spaces.ops.fused_adamw import adamw as fused

        return fused(params, grads, first, second, steps, lr, decay, clip, **how)
    return reference.adamw(params, grads, first, second, steps, lr, decay, clip, **how)


def updates_fused(params: Sequence[Sequence[Tensor]]) -> bool:
    """Whether `adamw` of parameters like these would run as a kernel. Where not, torch's own optimiser beats the
    reference."""
    every = [t for lane in params for t in lane]
    if not every or not possible(every[0].device):
        return False
    if any(str(t.dtype) != "torch.float32" or not t.is_contiguous() for t in every):
        return False
    numbers = sum(t.numel() for t in every) // len(params)
    return choice(Call("adamw", "float32", len(params), numbers, len(every), 1), every[0].device).kernel


def _may(x: Tensor, tensors: Sequence[Own], scales: Sequence[Tensor]) -> bool:
    """Whether a kernel knows these precisions; none gives a gradient to a scale."""
    known = ("torch.float32", "torch.bfloat16", "torch.float16")
    every = {x.dtype, *(t.dtype for own in tensors for t in _list(own))}
    return all(str(dtype) in known for dtype in every) and not any(s.requires_grad for s in scales)


def _list(own: Own) -> Sequence[Tensor]:
    """The lanes' tensors; a view of one stands for all that are stacked."""
    return [own[0]] if hasattr(own, "shape") else own


def _call(op: str, x: Tensor, own: Own, dim: int, tokens: int) -> Call:
    lanes = len(own)
    sizes = [t.shape[dim] for t in _list(own)]
    return Call(op, str(x.dtype).removeprefix("torch."), lanes, -(-sum(sizes) // len(sizes)), tokens, x.shape[-1])


def _exact(own: Own, size: Tensor | None) -> Tensor | None:
    """Sizes of stacked tensors, unless their precision cannot count so far: padding is slow, a lost row is wrong."""
    if size is None or not hasattr(own, "shape"):
        return None
    import torch

    count = {torch.bfloat16: 256, torch.float16: 2048}.get(size.dtype)
    return None if count is not None and own.shape[1] > count else size


def _each(scale: Tensor, x: Tensor) -> Tensor:
    return scale.to(x.dtype).view(-1, 1, 1)
