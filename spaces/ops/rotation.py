"""Rotations of blocks of coordinates, and skew-symmetric matrices made into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Each block of b neighbours of x times its own matrix: x_k R_k for the k-th block.

    Args:
        x: lanes x tokens x d.
        rotation: lanes x d / b x b x b.
    """
    lanes, tokens, width = x.shape
    blocks, b = rotation.shape[1:3]
    by_block = x.view(lanes, tokens, blocks, b).transpose(1, 2)
    return (by_block @ rotation).transpose(1, 2).reshape(lanes, tokens, width)


def skew(upper: Tensor, size: int) -> Tensor:
    """... x b (b - 1) / 2 entries above the diagonal, row by row, to skew-symmetric ... x b x b."""
    import torch

    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    full = upper.new_zeros(*upper.shape[:-1], size, size)
    full[..., rows, columns] = upper
    return full - full.mT


def cayley(q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^{-1}, orthogonal for a skew-symmetric Q."""
    import torch

    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # Without checks: what is not finite stays in its lane, and nothing else is singular.
    solved: Tensor = torch.linalg.solve_ex(one + q, one - q, left=False).result
    return solved


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q^2 + ... + Q^{terms - 1}: nearly (I + Q)(I - Q)^{-1} where Q is small, without an inverse."""
    import torch

    total, power = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q), q
    for n in range(1, terms):
        total = total + (power if n == terms - 1 else 2 * power)
        power = power @ q
    return total
