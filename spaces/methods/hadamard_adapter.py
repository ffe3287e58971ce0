"""Hadamard adapter: an element-wise linear map of the attention's output (Chen et al. 2024, arXiv:2407.11033)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.methods.vectors import scaled

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class HadamardAdapter(Method):
    """w * y + b, w and b in R^d, on the output of each attention before the residual sum; w = 1, b = 0 at the start.

    The paper trains the LayerNorm after it too: a second placement, `ln_tuning` with `after = "attention"`.
    """

    name, category = "hadamard_adapter", "additive"
    sites = frozenset({"attention", "ffn"})
    default_sites = ("attention",)
    merges = True

    def tensors(self, site: Site) -> Tensors:
        return {"w": Tensor((site.d_out,), init="ones"), "b": Tensor((site.d_out,))}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return scaled(y, p.w, p.b)

    def flops(self, site: Site, tokens: int) -> int:
        return 0  # element-wise, which is nothing beside products

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("y",)
