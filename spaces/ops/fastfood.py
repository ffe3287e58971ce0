"""Fastfood: a random projection of signs, a permutation and Hadamard matrices (Le et al. 2013, arXiv:1408.3060)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Up to here, four megabytes of random parts, drawing them anew each step would cost more than the projection.
KEPT = 2**18


def hadamard(x: Tensor) -> Tensor:
    """H x for the Hadamard matrix of 2^k rows, entries +-1, in k passes over the vector."""
    import torch

    size, h = x.numel(), 1
    while h < size:
        pairs = x.view(-1, 2, h)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1)
        h *= 2
    return x.view(size)


def fastfood(theta: Tensor, size: int, seed: int) -> Tensor:
    """`size` numbers M theta: M has entries of mean square 1 / `size`, so that lengths are kept on average.

    M = H G P H B, cut to `size` rows and as many columns as theta has, at most as many: B signs, P a permutation, G
    normal numbers, all drawn by `seed` alone (as the code of Aghajanyan et al., arXiv:2012.13255, uses it).
    """
    import torch

    signs, order, normal, scale = random_parts(size, seed)
    padded = torch.nn.functional.pad(theta, (0, len(signs) - len(theta)))
    mixed = hadamard(padded * signs.to(theta))[order.to(theta.device)] * normal.to(theta)
    return hadamard(mixed)[:size] * scale.to(theta)


def random_parts(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B, P and G for `size` rows, and the factor that makes M's entries small; those of small weights are kept."""
    return _kept(size, seed) if size <= KEPT else draw_parts(size, seed)


@lru_cache(maxsize=64)
def _kept(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return draw_parts(size, seed)


def draw_parts(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `random_parts` gives, drawn anew."""
    import torch

    length = 1 << max(0, size - 1).bit_length()
    source = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (length,), generator=source) - 1
    order = torch.randperm(length, generator=source)
    normal = torch.empty(length).normal_(generator=source)
    scale = (size * normal.square().sum()).rsqrt()
    return signs, order, normal, scale
