"""The operations of lanes in plain torch. L lanes, N tokens a lane; no lane's rows touch another's.

torch is imported by whoever calls: importing this module loads none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """y + scale * (x A^T) B^T, with A: L x r x d_in, B: L x d_out x r, scale: L x 1 x 1 (arXiv:2106.09685)."""
    import torch

    return torch.baddbmm(y, torch.bmm(x, a.mT) * scale, b.mT)


def bottleneck(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str) -> Tensor:
    """sigma(x D^T + b_D) U^T + b_U, with D: L x m x d, U: L x d x m (arXiv:1902.00751, eq. in sec. 2.1)."""
    import torch

    hidden = torch.baddbmm(down_bias.unsqueeze(1), x, down.mT)
    return torch.baddbmm(up_bias.unsqueeze(1), _activation(hidden, activation), up.mT)


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
