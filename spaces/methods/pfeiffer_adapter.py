"""Pfeiffer's sequential adapter, once a layer at its last sum (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces import ops
from peftscape.spaces.methods.base import Lanes
from peftscape.spaces.methods.bottleneck import Bottleneck

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site, SiteMap


class PfeifferAdapter(Bottleneck):
    """LN(s + W_up sigma(W_down LN(s) + b_down) + b_up), s the layer's last residual sum, LN frozen; W_up = 0.

    It reads what the frozen LayerNorm gives and adds to the sum before it: once a layer, L(2dm + m + d) parameters.
    Where layers norm first, s is what the layer gives, and s + W_up sigma(W_down s + b_down) + b_up goes on (as in
    the `adapters` library). A layer takes the one or the other, so a placement names both kinds of sites.
    """

    name, category = "pfeiffer_adapter", "additive"
    sites = frozenset({"norm", "block"})
    default_sites = ("norm", "block")
    needs_weight = True

    def takes(self, site: Site, sites: SiteMap) -> bool:
        if sites.norm_place == "pre" or site.kind == "block":
            return sites.norm_place == "pre" and site.kind == "block"
        norms = [s for s in sites.sites if s.kind == "norm" and s.layer == site.layer]
        return site.layer >= 0 and site == norms[-1]

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        if hasattr(p, "norm"):
            return p.norm(ops.adapter(x, *self.weights(p), self.activation, x=y))
        return ops.adapter(y, *self.weights(p), self.activation)

    def saved_floats(self, site: Site, tokens: int) -> int:
        again = site.d_out + 2 if site.kind == "norm" else 0  # the second LayerNorm: its input, mean and deviation
        return tokens * again + super().saved_floats(site, tokens)
