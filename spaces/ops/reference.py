"""The operations of lanes in plain torch. L lanes, N tokens a lane; no lane's rows touch another's.

torch is imported by whoever calls: importing this module loads none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from peftscape.spaces.ops.addresses import Own


def low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """y + scale * (x A^T) B^T, with A: L x r x d_in, B: L x d_out x r, scale: L x 1 x 1 (arXiv:2106.09685)."""
    import torch

    return torch.baddbmm(y, torch.bmm(x, a.mT) * scale, b.mT)


def bottleneck(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str) -> Tensor:
    """sigma(x D^T + b_D) U^T + b_U, with D: L x m x d, U: L x d x m (arXiv:1902.00751, eq. in sec. 2.1)."""
    import torch

    hidden = torch.baddbmm(down_bias.unsqueeze(1), x, down.mT)
    return torch.baddbmm(up_bias.unsqueeze(1), _activation(hidden, activation), up.mT)


def stacked(own: Own, dtype: torch.dtype) -> Tensor:
    """The lanes' tensors under one leading dimension, zeros where one is smaller."""
    import torch

    from peftscape.spaces.ops.stack import stack

    return own.to(dtype) if isinstance(own, torch.Tensor) else stack(own, dtype)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, owner: Sequence[int], *,
                     valid: Tensor | None = None, causal: bool = False, window: int | None = None,
                     scale: float | None = None, softcap: float | None = None,
                     lengths: Tensor | None = None) -> Tensor:  # fmt: skip
    """softmax(s Q [P_k; K]^T + mask) [P_v; V] with every row's prefix put before its sequence (arXiv:2101.00190).

    Args: as `peftscape.spaces.ops.prefix_attention`, prefixes stacked. Returns rows x tokens x heads x head_dim.
    """
    import torch

    rows, heads, tokens, width = q.shape
    which = torch.tensor(owner, device=q.device)
    own = torch.full((len(keys),), keys.shape[1], device=q.device) if lengths is None else lengths
    seen = torch.arange(keys.shape[1], device=q.device) < own[which][:, None]
    seen &= (which >= 0)[:, None]
    place = torch.arange(tokens, device=q.device)
    near = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
    if causal:
        near &= place[:, None] >= place
    if window is not None:
        near &= place[:, None] - place < window
    text = near.expand(rows, -1, -1) if valid is None else near & valid[:, None, :]
    allowed = torch.cat([seen[:, None, :].expand(-1, tokens, -1), text], dim=-1)[:, None]
    before = [t.view(len(t), t.shape[1], -1, width)[which].transpose(1, 2) for t in (keys, values)]
    group = heads // k.shape[1]
    k, v = (torch.cat([p, t], dim=2).repeat_interleave(group, dim=1) for p, t in zip(before, (k, v), strict=True))
    scores = torch.matmul(q * (width**-0.5 if scale is None else scale), k.mT)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), dim=-1)
    # Where nothing may be seen the softmax is even; a kernel gives zero.
    return torch.matmul(weights * allowed.any(-1, keepdim=True), v).transpose(1, 2)


def adamw(params: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]], first: Sequence[Sequence[Tensor]],
          second: Sequence[Sequence[Tensor]], steps: Tensor, lr: Tensor, decay: Tensor, clip: Tensor, *,
          betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
          masks: Sequence[Sequence[Tensor | None]] | None = None, rates: Tensor | None = None,
          losses: Tensor | None = None) -> Tensor:  # fmt: skip
    """One AdamW step of every lane, clipped by its own norm, in place; the norms (arXiv:1711.05101, alg. 2)."""
    import torch

    norms, number = [], 0
    with torch.no_grad():
        for lane, (ps, gs, ms, vs) in enumerate(zip(params, grads, first, second, strict=True)):
            drop = [None] * len(ps) if masks is None else masks[lane]
            gs = [g if m is None else torch.where(m == 0, 0, g * m) for g, m in zip(gs, drop, strict=True)]
            norm = torch.stack([g.square().sum() for g in gs]).sum().sqrt()
            norms.append(norm)
            rate = [1.0] * len(ps) if rates is None else rates[number : number + len(ps)].tolist()
            number += len(ps)
            if not bool(torch.isfinite(norm)) or (losses is not None and not bool(torch.isfinite(losses[lane]))):
                continue
            steps[lane] += 1
            scale, t = torch.clamp(clip[lane] / (norm + 1e-6), max=1.0), float(steps[lane])
            for p, g, m, v, r in zip(ps, gs, ms, vs, rate, strict=True):
                g = g * scale
                m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
                v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
                step = lr[lane] * r
                p.mul_(1 - step * decay[lane])
                p.sub_(step / (1 - betas[0] ** t) * m / (v.sqrt() / (1 - betas[1] ** t) ** 0.5 + eps))
        return torch.stack(norms)


def _activation(x: Tensor, name: str) -> Tensor:
    import torch

    # All of them map zero to zero, so that a bottleneck padded with zero rows stays as it was.
    functions = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }
    return functions[name](x)
