"""The upper reference point: every weight of the backbone trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.methods.base import Method, Tensor, Tensors

if TYPE_CHECKING:
    from peftscape.spaces.sites import Site, SiteMap


class FullFinetuning(Method):
    """W + delta for all weights, delta one flat vector in the order of the model's parameters; delta = 0.

    The flat vector makes it a method like any other: counted, saved and trained by the same code.
    """

    name, category, execution = "full_finetuning", "reference", "solo"
    sites = frozenset({"model"})
    default_sites = ("model",)
    merges = True
    alone = True

    def takes(self, site: Site, sites: SiteMap) -> bool:
        return not sites.quantised  # 4-bit weights do not train

    def tensors(self, site: Site) -> Tensors:
        return {"delta": Tensor((site.d_out,))}

    def flops(self, site: Site, tokens: int) -> int:
        return 0  # the weights are the backbone's own
