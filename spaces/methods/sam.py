"""SAM, the second-order approximation method (Fu et al. 2022, arXiv:2211.15583): not the optimiser of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.methods.fish_mask import FishMask
from peftscape.spaces.ops import weights

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Own, Probe
    from peftscape.spaces.sites import Site


class SAM(FishMask):
    """(W + D) x, D zero but for k values where the mean gradient's square (mean over N examples of g_i)^2 is largest.

    To second order and with a Hessian diagonal that is alike everywhere, training weight i alone lowers the loss by
    g_i^2 / (2 h): the best k are those of the largest g_i^2 (theorem 3). FISH Mask squares before it takes the mean.
    """

    name, category = "sam", "partial"

    def prepare(self, own: list[Own], sites: tuple[Site, ...], probe: Probe) -> None:
        index = own[0]["index"]
        squares = [g.square() for g in probe.gradients(self.examples)]
        index.copy_(weights.largest(squares, len(index)))
