"""What methods that give a lane weights of its own have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftscape.spaces.methods.base import Lanes, Method, Tensors
from peftscape.spaces.ops import weights
from peftscape.spaces.sites import LINEARS

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class WeightChange(Method):
    """(W + D) x, D in R^{d_out x d_in} made anew in each step by `expand`, under the name `delta`."""

    execution = "rewritten"
    sites = frozenset(LINEARS)
    default_sites: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "up", "down")
    merges = True

    def tensors(self, site: Site) -> Tensors:
        return {}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return weights.dense(x, y, p.delta)

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * site.d_in * site.d_out

    def first_flops(self, site: Site, tokens: int) -> int:
        return self.flops(site, tokens)  # one product

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)  # for the gradient of D
