"""S3Delta's gates: how probable each module is, so that their expected size is the budget (arXiv:2206.07382, sec. 3).

p_i = sigmoid(alpha_i - zeta), one shift zeta for all, of which sum_i n_i p_i = B. Raising one alpha lowers the p of all
others: the shift's own gradient is part of every p's.
"""

from __future__ import annotations

import torch
from scipy.optimize import brentq
from scipy.special import expit, logit
from torch import Tensor


def shift(alpha: Tensor, sizes: Tensor, budget: float) -> Tensor:
    """zeta with sum_i sizes_i sigmoid(alpha_i - zeta) = budget; differentiable in alpha.

    Found by Brent's method, with the gradient of the implicit function theorem:
    d zeta / d alpha_i = sizes_i p_i (1 - p_i) / sum_j sizes_j p_j (1 - p_j).

    Args:
        alpha: one a module, float64.
        sizes: parameters of each module, float64.
        budget: above 0 and below the sum of the sizes.
    """
    a, n = alpha.detach().cpu().numpy(), sizes.cpu().numpy()
    # All p are at least the share below the one end, and at most the share above the other.
    share = logit(budget / n.sum())
    ends = a.min() - share - 1, a.max() - share + 1
    found = brentq(lambda zeta: float(n @ expit(a - zeta)) - budget, *ends, xtol=1e-13)
    p = expit(a - found)
    slope = max(float(n @ (p * (1 - p))), torch.finfo(alpha.dtype).tiny)
    expected = (sizes * torch.sigmoid(alpha - found)).sum()
    zeta: Tensor = found + (expected - expected.detach()) / slope  # exactly found: the bracket is 0, with a gradient
    return zeta


def logits(alpha: Tensor, sizes: Tensor, budget: float) -> Tensor:
    """log p / (1 - p) of each module, which is alpha - zeta; float64."""
    wide = alpha.double()
    return wide - shift(wide, sizes, budget)


def sample(values: Tensor, temperature: float, source: torch.Generator) -> Tensor:
    """Binary-concrete gates: sigmoid((log u / (1 - u) + logit) / temperature), u uniform (arXiv:1611.00712)."""
    u = torch.rand(values.shape, generator=source, dtype=torch.float64).clamp(1e-9, 1 - 1e-9).to(values.device)
    return torch.sigmoid((torch.logit(u) + values) / temperature)
