"""SSF: learned scales and shifts of what linears and norms give (Lian et al. 2022, arXiv:2210.08823)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.methods.vectors import scaled

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class SSF(Method):
    """y * s + t, s and t in R^{d_out} after each adapted linear or norm; s = 1, t = 0 at the start.

    The authors' code draws both around these values; here the start is exact. Keys are left out: a softmax does not
    see a shift of all keys, and their scale is that of the queries.
    """

    name, category = "ssf", "additive"
    sites = frozenset({"q", "v", "o", "gate", "up", "down", "norm"})
    default_sites = ("q", "v", "o", "up", "down", "norm")
    merges = True

    def tensors(self, site: Site) -> Tensors:
        return {"scale": Tensor((site.d_out,), init="ones"), "shift": Tensor((site.d_out,))}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return scaled(y, p.scale, p.shift)

    def flops(self, site: Site, tokens: int) -> int:
        return 0  # element-wise, which is nothing beside products

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("y",)
