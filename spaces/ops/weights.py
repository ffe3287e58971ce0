"""Changes of whole weights: for methods whose lanes each have their own weights of the adapted linears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from peftscape.spaces.sites import Site


def dense(x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """y + x delta^T, with delta: L x d_out x d_in."""
    import torch

    return torch.baddbmm(y, x, delta.mT)


def total(sites: Sequence[Site]) -> int:
    """Weights of these linears together."""
    return sum(site.d_in * site.d_out for site in sites)


def split(flat: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """One vector over all sites, in their order, as a weight for each (d_out x d_in)."""
    import torch

    parts = torch.split(flat, [site.d_in * site.d_out for site in sites])
    return [part.view(site.d_out, site.d_in) for part, site in zip(parts, sites, strict=True)]


def scatter(values: Tensor, index: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """Weights that are zero but for `values` at the places `index` of all sites' weights end to end."""
    return split(values.new_zeros(total(sites)).index_copy(0, index, values), sites)


def largest(scores: Sequence[Tensor], count: int) -> Tensor:
    """The places of the `count` largest among all sites' scores end to end, ascending."""
    import torch

    flat = torch.cat([score.reshape(-1) for score in scores])
    return torch.topk(flat, count).indices.sort().values
